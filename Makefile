# Needs Python 3.11 and the package index; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo experiments test test-slow lint docs bench bench-env clean

demo: .venv/experiments
	rm -rf runs/demo
	$(BIN)/python experiments/label_cleaning.py --out runs/demo

# Goes on where it was ended; `rm -rf runs/gallery` begins again.
experiments: .venv/experiments
	$(BIN)/python experiments/gallery.py

# One process for each of two cores: more only import TensorFlow once more.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadgroup --max-worker-restart=0

test: .venv/test
	$(PYTEST)

# The report is looked at in a browser, where there is one or Debian can install it.
test-slow: .venv/test
	command -v chromium >/dev/null || (apt-get update && apt-get install -y \
		--no-install-recommends chromium) >/dev/null 2>&1 || true
	$(PYTEST) -m slow

lint: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: .venv/docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

bench: .venv/bench
	$(BIN)/python benchmarks/hyper_cleaning.py --out runs/bench
	$(BIN)/python benchmarks/memory.py --out runs/bench

bench-env:
	$(PYTHON) benchmarks/environment.py

.venv/%: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
