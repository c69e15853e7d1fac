"""What every test needs before TensorFlow is imported."""

import gc
import os
import random
import unittest.mock

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

    if _tensorflow_has_drawn():
        keras.utils.set_random_seed(0)
    else:
        with unittest.mock.patch("tensorflow.random.set_seed"):
            keras.utils.set_random_seed(0)


def _tensorflow_has_drawn() -> bool:
    """Whether an operation has taken a seed since TensorFlow's was last set to 0.

    Setting it makes TensorFlow forget all its kernels, a sixth of the time of eager
    tests, and changes nothing where none has.
    """
    from tensorflow.python.eager import context

    eager = context.context()
    if getattr(eager, "_seed", None) != 0 or not hasattr(eager, "_rng"):
        return True
    return eager._rng.getstate() != random.Random(0).getstate()


@pytest.fixture
def no_dense_gradient(monkeypatch: pytest.MonkeyPatch):
    """`check_hypergradient` without its dense implicit gradient, which takes most of
    the time where there are many lower variables: one product for each."""
    monkeypatch.setattr("tfbilevel._check.hypergradient.DENSE_LIMIT", 0)
