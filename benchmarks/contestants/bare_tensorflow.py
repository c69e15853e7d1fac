"""The same mathematics by hand: nested tapes, loops and arrays in a `tf.function`.

Variants: plain, xla.
"""

import argparse

import numpy as np
import protocol
import tensorflow as tf
from tensorflow_losses import (
    cross_entropy,
    lower_loss,
    upper_loss,
    use_threads,
    wait,
)


class Bare:
    def __init__(self, arguments: argparse.Namespace, instance: protocol.Instance):
        use_threads(arguments.threads)
        self.train = (
            tf.constant(instance.train),
            tf.constant(instance.train_labels),
        )
        self.validation = (
            tf.constant(instance.validation),
            tf.constant(instance.validation_labels),
        )
        self.inner_steps = instance.inner_steps
        x = tf.constant(instance.upper)
        y = [tf.constant(leaf) for leaf in instance.lower]
        z = [tf.constant(leaf) for leaf in instance.auxiliary]
        step, self.start = {
            "v-pbgd": (self.value_gap, (x, y, z)),
            "g-pbgd": (self.gradient_norm, (x, y)),
            "rhg": (self.unroll, (x, y)),
        }[arguments.method]
        self.weight = tf.constant(protocol.WEIGHT.get(arguments.method, 0.0))
        self.now = self.start
        self.step = tf.function(
            step, autograph=False, jit_compile=arguments.variant == "xla"
        )

    def hypergradient(self) -> np.ndarray:
        gradient, _ = self.step(self.weight, *self.start)
        return gradient.numpy()

    def run(self, steps: int, clock: protocol.Clock) -> int:
        del clock
        for _ in range(steps):
            _, self.now = self.step(self.weight, *self.now)
        wait(self.now)
        return steps

    def value_gap(self, weight: tf.Tensor, x: tf.Tensor, y: list, z: list) -> tuple:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(z)
            loss = lower_loss(x, z, self.train)
        z = _descend(z, protocol.INNER_RATE, tape.gradient(loss, z))
        constant = cross_entropy(z, *self.train)
        scale = tf.minimum(1.0 / (weight + 1e-8), 1.0)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([x, y])
            gap = cross_entropy(y, *self.train) - tf.stop_gradient(constant)
            penalty = tf.reduce_mean(tf.sigmoid(x) * gap)
            loss = scale * (upper_loss(x, y, self.validation) + weight * penalty)
        to_x, to_y = tape.gradient(loss, (x, y))
        x = x - protocol.UPPER_RATE * to_x
        return to_x, (x, _descend(y, protocol.LOWER_RATE, to_y), z)

    def gradient_norm(self, weight: tf.Tensor, x: tf.Tensor, y: list) -> tuple:
        scale = tf.minimum(1.0 / (weight + 1e-8), 1.0)
        with tf.GradientTape(watch_accessed_variables=False) as outer:
            outer.watch([x, y])
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(y)
                loss = lower_loss(x, y, self.train)
            gradient = inner.gradient(loss, y)
            norm = tf.add_n([tf.reduce_sum(leaf * leaf) for leaf in gradient])
            upper = upper_loss(x, y, self.validation)
            loss = scale * (upper + 0.5 * weight * norm)
        to_x, to_y = outer.gradient(loss, (x, y))
        x = x - protocol.UPPER_RATE * to_x
        return to_x, (x, _descend(y, protocol.LOWER_RATE, to_y))

    def unroll(self, weight: tf.Tensor, x: tf.Tensor, start: list) -> tuple:
        """Reverse mode that stores the iterates and derives each step anew."""
        del weight
        last = self.inner_steps
        arrays = [
            tf.TensorArray(
                leaf.dtype, last, element_shape=leaf.shape, clear_after_read=False
            )
            for leaf in start
        ]

        def forward(t: tf.Tensor, y: list, kept: list) -> tuple:
            kept = [array.write(t, leaf) for array, leaf in zip(kept, y, strict=True)]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(y)
                loss = lower_loss(x, y, self.train)
            y = _descend(y, protocol.UNROLL_RATE, tape.gradient(loss, y))
            return t + 1, y, kept

        _, end, kept = tf.while_loop(
            lambda t, *_: t < last,
            forward,
            (tf.constant(0), start, arrays),
            maximum_iterations=last,
        )
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(end)
            loss = upper_loss(x, end, self.validation)
        adjoint = tape.gradient(loss, end)

        def backward(t: tf.Tensor, adjoint: list, total: tf.Tensor) -> tuple:
            y = [array.read(t) for array in kept]
            with tf.GradientTape(watch_accessed_variables=False) as outer:
                outer.watch([x, y])
                with tf.GradientTape(watch_accessed_variables=False) as inner:
                    inner.watch(y)
                    loss = lower_loss(x, y, self.train)
                gradient = inner.gradient(loss, y)
            to_x, to_y = outer.gradient(gradient, (x, y), output_gradients=adjoint)
            total = total - protocol.UNROLL_RATE * to_x
            return t - 1, _descend(adjoint, protocol.UNROLL_RATE, to_y), total

        _, _, to_x = tf.while_loop(
            lambda t, *_: t >= 0,
            backward,
            (tf.constant(last - 1), adjoint, tf.zeros_like(x)),
            maximum_iterations=last,
        )
        return to_x, (x - protocol.UPPER_RATE * to_x, start)


def _descend(variables: list, rate: float, gradient: list) -> list:
    return [v - rate * g for v, g in zip(variables, gradient, strict=True)]


if __name__ == "__main__":
    protocol.serve(Bare)
