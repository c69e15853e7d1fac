"""The documentation: its code runs, and it names everything that is public."""

import os
import pathlib
import re
import subprocess
import sys
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
from suites import fast_where

import tfbilevel as tb

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
FENCED = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def public_names(module: types.ModuleType) -> list[str]:
    return sorted(
        name
        for name, value in vars(module).items()
        if not isinstance(value, types.ModuleType)
        and (not name.startswith("_") or name == "__version__")
    )


PUBLIC = public_names(tb)


# Trainings that the tests make shorter: what stands on the page, once, and what runs.
# WHOLE_PAGES=1 leaves them as they are.
SHORTER = {
    "README.md": {"epochs=10": "epochs=4"},
    # The control makes the same trainings as the cleaner, but for the last: it takes
    # them from a folder.
    "label_cleaner.md": {
        "augmentation=shifts)\ncleaner": 'augmentation=shifts, backup="b")\ncleaner',
        "learn=False)": 'learn=False, backup="b")',
        "cleaner.fit(x, given, trusted=trusted, epochs=16": (
            "cleaner.fit(x, given, trusted=trusted, epochs=12"
        ),
        "control.fit(x, given, trusted=trusted, epochs=16": (
            "control.fit(x, given, trusted=trusted, epochs=12"
        ),
    },
}
WHOLE = "WHOLE_PAGES" in os.environ


def shorter(page: pathlib.Path, texts: list[str]) -> list[str]:
    """The texts of one page with the changes of `SHORTER`."""
    changes = {} if WHOLE else SHORTER.get(page.name, {})
    for old, new in changes.items():
        assert sum(text.count(old) for text in texts) == 1, old
        texts = [text.replace(old, new) for text in texts]
    return texts


class Block(NamedTuple):
    """A block of code: its text and how many lines of the page come before it."""

    code: str
    before: int


def blocks(page: pathlib.Path) -> list[Block]:
    text = page.read_text()
    found = [*FENCED.finditer(text)]
    return [
        Block(code, text.count("\n", 0, match.start(1)))
        for code, match in zip(
            shorter(page, [match[1] for match in found]), found, strict=True
        )
    ]


# The tutorials have tests of their own, `test_tutorials.py`.
OTHERS = [page for page in PAGES if page.parent.name != "tutorials"]
WITH_CODE = [page for page in OTHERS if blocks(page)]


def run(page: pathlib.Path) -> dict[str, Any]:
    """What the blocks of one page define, run in order in one namespace."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        # Blank lines make a traceback show the page's own line numbers.
        source = "\n" * block.before + block.code
        exec(compile(source, str(page), "exec"), namespace)
    return namespace


def test_enough_pages_have_code() -> None:
    assert len(WITH_CODE) >= 6


# Short ones; the others take a minute together.
FIRST = {"implicit.md", "second_derivatives.md"}


@pytest.mark.parametrize(
    "page",
    fast_where(lambda page: page.name in FIRST, WITH_CODE),
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_code_runs(
    page: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The blocks of one page, in order, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace = run(page)
    if page.name == "README.md":
        require_trained(namespace)
        require_cleaned(namespace, capsys.readouterr().out)
        assert (tmp_path / "report.html").exists()
    else:  # the code looks at its own results
        assert any("assert" in block.code for block in blocks(page))


def require_trained(namespace: dict[str, Any]) -> None:
    """README's network reads digits better than one of the trusted images alone does,
    and its suspects are wrong labels."""
    from sklearn.linear_model import LogisticRegression

    trusted, noisy, test = (namespace[name] for name in ("trusted", "noisy", "test"))
    images, labels = namespace["images"] / 255, namespace["labels"]
    alone = LogisticRegression(max_iter=500).fit(images[trusted], labels[trusted])
    assert namespace["accuracy"] > alone.score(images[test], labels[test]) + 0.02
    suspects = namespace["suspects"]
    assert np.mean(namespace["given"][suspects] != labels[suspects]) > 0.8
    assert len(suspects) == len(noisy) // 2


def require_cleaned(namespace: dict[str, Any], printed: str) -> None:
    """README's first example prints what README says, which is what it made."""
    lines = r"right: ([\d.]+)% before, ([\d.]+)% now\s+test accuracy ([\d.]+)%"
    (found,) = re.findall(lines, printed)
    before, now, accuracy = map(float, found)
    right = np.mean(namespace["cleaned"] == namespace["right"])
    assert now == pytest.approx(100 * right, abs=0.06) and now > before + 30
    (stated,) = re.findall(lines, (ROOT / "README.md").read_text())
    tolerance = 1.5 if WHOLE else 2.5
    for found, value in zip((before, now, accuracy), map(float, stated), strict=True):
        assert found == pytest.approx(value, abs=tolerance)


@pytest.mark.slow
def test_builds_without_a_warning_and_lists_every_public_name(
    tmp_path: pathlib.Path,
) -> None:
    options = ["-q", "-W", "--keep-going", "-b", "html", "-d", tmp_path / "cache"]
    built = tmp_path / "html"
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, ROOT / "docs", built],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").rglob("*.md"):
        made = built / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert made.exists(), made
    reference = (built / "reference.html").read_text()
    for name in PUBLIC:
        assert name == "__version__" or f'id="tfbilevel.{name}"' in reference, name


def test_public_names_are_documented() -> None:
    """Outside the reference, which has every name."""
    pages = [page for page in (ROOT / "docs").rglob("*.md") if page.stem != "reference"]
    words = {*re.findall(r"\w+", "".join(page.read_text() for page in pages))}
    assert not {*PUBLIC} - words
