"""Random numbers of a job that leave those of its caller alone."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR
from keras.src.utils.rng_utils import GLOBAL_RANDOM_SEED
from tensorflow.python.eager import context

# What TensorFlow's seed of eager operations consists of.
EAGER = "_seed", "_rng"


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Afterwards Python, NumPy, Keras and TensorFlow sample as if nothing had happened.

    Within, a job may call `keras.utils.set_random_seed`, so that everything it samples
    follows from its seed. As a decorator it serves a whole function.

    One thing cannot be restored: TensorFlow operations with a seed of their own, such
    as tf.random.normal([2], seed=1), start from their first numbers again.
    """
    python, numpy = random.getstate(), np.random.get_state()
    names = GLOBAL_RANDOM_SEED, GLOBAL_SEED_GENERATOR
    of_keras = {name: global_state.get_global_attribute(name) for name in names}
    eager = context.context()
    of_eager = {name: getattr(eager, name) for name in EAGER if hasattr(eager, name)}
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for name, value in of_keras.items():
            global_state.set_global_attribute(name, value)
        vars(eager).update(of_eager)
