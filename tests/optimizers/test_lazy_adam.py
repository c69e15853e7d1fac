"""Adam per entry: that of NumPy on the entries' own gradients, and of nothing else."""

import keras
import numpy as np
import pytest
import references
import tensorflow as tf

import tfbilevel as tb


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_entry_has_an_adam_of_its_own(dtype, jit):
    generator = np.random.default_rng(0)
    gradients = generator.normal(size=(40, 3, 5)) * (generator.random((40, 3, 5)) < 0.4)
    start = generator.normal(size=(3, 5))
    x = keras.Variable(start, dtype=dtype)
    optimizer = tb.LazyAdam(0.03, beta_1=0.8, beta_2=0.95, epsilon=1e-6)
    optimizer.build([x])

    @tf.function(jit_compile=jit)
    def apply(gradient):
        optimizer.apply([gradient], [x])

    for gradient in gradients:
        apply(tf.constant(gradient, dtype))
    tolerance = {"float32": 1e-5, "float64": 1e-8}[dtype]
    for place in np.ndindex(3, 5):
        own = [g for g in gradients[(slice(None), *place)] if g != 0]
        seen = iter(own)
        # Keras rounds its rate to float32 on the way to float64 variables.
        want = references.adam(
            lambda y, seen=seen: np.array([next(seen)]),
            np.array([start[place]]),
            float(np.float32(0.03)),
            len(own),
            0.8,
            0.95,
            1e-6,
        )
        assert x.numpy()[place] == pytest.approx(want[0], rel=tolerance, abs=tolerance)


def test_it_is_adam_where_every_gradient_is_there():
    generator = np.random.default_rng(1)
    variables = [keras.Variable(np.ones(4)) for _ in range(2)]
    optimizers = tb.LazyAdam(0.1), keras.optimizers.Adam(0.1)
    for gradient in generator.normal(size=(20, 4)):
        for optimizer, x in zip(optimizers, variables, strict=True):
            optimizer.apply([tf.constant(gradient, tf.float32)], [x])
    np.testing.assert_allclose(*(x.numpy() for x in variables), rtol=1e-5)


def test_adam_itself_moves_what_has_no_gradient():
    """The reason for this class: the published script's moments leaked likewise."""
    moved = {}
    for optimizer in (tb.LazyAdam(0.1), keras.optimizers.Adam(0.1)):
        x = keras.Variable([0.0, 0.0])
        optimizer.apply([tf.constant([1.0, 1.0])], [x])
        before = x.numpy()
        optimizer.apply([tf.constant([0.0, 1.0])], [x])
        moved[type(optimizer)] = (x.numpy() - before)[0]
    assert moved[tb.LazyAdam] == 0
    assert moved[keras.optimizers.Adam] < -0.01


def test_it_is_saved_and_loaded():
    optimizer = tb.LazyAdam(0.2, 0.7, 0.9, 1e-5)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert isinstance(again, tb.LazyAdam)
    assert (again.beta_1, again.beta_2, again.epsilon) == (0.7, 0.9, 1e-5)
    assert float(again.learning_rate) == pytest.approx(0.2)


def test_two_variables_and_weight_decay():
    """Slots belong to their variable; Keras's own decay goes on as always."""
    x, y = keras.Variable([1.0, 1.0]), keras.Variable([[2.0]])
    optimizer = tb.LazyAdam(0.1, weight_decay=0.5)
    optimizer.apply([tf.constant([1.0, 0.0]), tf.constant([[-4.0]])], [x, y])
    np.testing.assert_allclose(x.numpy(), [0.95 - 0.1, 0.95], rtol=1e-5)
    np.testing.assert_allclose(y.numpy(), [[1.9 + 0.1]], rtol=1e-5)
