"""What the installed package must do in an empty environment, off the checkout."""

import pathlib

import keras
import numpy as np
import tensorflow as tf

import tfbilevel as tb

here = pathlib.Path.cwd()
assert here not in pathlib.Path(tb.__file__).parents, "run me outside of the checkout"

# min_x (y*(x) - 3)^2 with y*(x) = argmin_y (y - x)^2 = x.
problem = tb.Problem(
    upper_loss=lambda x, y, batch: (y - 3.0) ** 2,
    lower_loss=lambda x, y, batch: (y - x) ** 2,
)
inner = tb.InnerSolver(keras.optimizers.SGD(0.25), steps=10)
result = tb.minimize(
    problem,
    tb.Unroll(inner),
    upper=0.0,
    lower=0.0,
    upper_optimizer=keras.optimizers.SGD(0.1),
    batches=tb.Batches(None, None),
    steps=60,
)
np.testing.assert_allclose(result.upper, 3.0, atol=1e-3)

x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
y = (x[:, 0] > 0).astype("int64")


def losses(net, batch):
    return keras.losses.sparse_categorical_crossentropy(batch[1], net(batch[0]), True)


model = tb.BilevelModel(
    upper=tb.ExampleWeights(32),
    lower=keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]),
    upper_loss=lambda weights, net, batch: tf.reduce_mean(losses(net, batch)),
    lower_loss=lambda weights, net, batch: weights.mean(losses(net, batch)),
)
model.compile(tb.Implicit(inner, tb.ConjugateGradient(5)), keras.optimizers.Adam(0.1))
validation, training = (
    tf.data.Dataset.from_tensors((x[half], y[half]))
    for half in (slice(32), slice(32, 64))
)
history = model.fit(tb.pair(validation, training).repeat(5), epochs=2, verbose=0)
upper_loss = history.history["upper_loss"]
assert upper_loss[-1] < upper_loss[0], upper_loss
print("tfbilevel", tb.__version__, "works with TensorFlow", tf.__version__, end=" ")
print("and Keras", keras.__version__)
