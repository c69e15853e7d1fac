"""What training leaves behind when it does not end as planned."""

import itertools

import keras
import pytest
import tensorflow as tf

import tfbilevel as tb


def regression() -> tb.BilevelModel:
    """One number, one weight."""
    weight, network = tb.ExampleWeights(1), keras.layers.Dense(1)
    network.build((1, 1))

    def upper_loss(weight, network, number):
        return tf.reduce_sum(network(number) ** 2)

    def lower_loss(weight, network, number):
        return tf.reduce_sum(weight(None) * network(number) ** 2)

    model = tb.BilevelModel(weight, network, upper_loss, lower_loss)
    inner = tb.InnerSolver(keras.optimizers.SGD(0.1), steps=1)
    model.compile(tb.Unroll(inner), keras.optimizers.SGD(0.1), jit_compile=False)
    return model


class Interrupt(keras.callbacks.Callback):
    """Control-C in the fourth outer step."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("fourth", "callbacks", "ends"),
    [
        pytest.param(float("nan"), [], tb.NonFiniteError, id="nan"),
        pytest.param(
            1.0,
            [Interrupt()],
            KeyboardInterrupt,
            id="interrupt",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_generator_behind_the_batches_is_closed(fourth, callbacks, ends):
    # No thread can enter Python any more once it shuts down. An iterator that is
    # deleted then, and has asked the generator for more, waits for ever.
    closed = []

    def draw():
        try:
            for step in itertools.count():
                yield [[fourth if step == 3 else 1.0]]
        finally:
            closed.append(True)

    signature = tf.TensorSpec([1, 1], tf.float32)
    numbers = tf.data.Dataset.from_generator(draw, output_signature=signature)
    batches = numbers.map(lambda number: tb.Batches(number, number)).prefetch(2)
    # What is caught holds the frames it came through, as Python does with a script's
    # last error.
    with pytest.raises(ends) as caught:
        regression().fit(batches, steps_per_epoch=9, callbacks=callbacks, verbose=0)
    assert caught.tb is not None
    assert closed
