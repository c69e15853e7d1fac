"""What every test needs before TensorFlow is imported."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Most programs run a few times on a few numbers: optimising them takes longer.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# More test processes than cores already.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

import pytest  # noqa: E402

# Tracing makes millions of objects that live as long as their graph: looking through
# them again and again takes a fifth of the time.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def seed():
    import keras  # the process that hands tests to others needs no TensorFlow

    keras.utils.set_random_seed(0)


@pytest.fixture
def no_dense_gradient(monkeypatch: pytest.MonkeyPatch):
    """`check_hypergradient` without its dense implicit gradient, which takes most of
    the time where there are many lower variables: one product for each."""
    monkeypatch.setattr("tfbilevel._check.hypergradient.DENSE_LIMIT", 0)
