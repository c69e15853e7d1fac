"""The same computation written by hand: nested tapes and loops in a `tf.function`.

Inner steps are a `tf.while_loop`. The few products of a linear solve are unrolled in
the graph, where TensorFlow finds common subexpressions.

Variants: plain, xla.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import protocol
import tensorflow as tf
from tensorflow_losses import (
    compiled_ahead,
    cross_entropy,
    device_peak,
    lower_loss,
    minibatch_loss,
    upper_loss,
    use_threads,
    wait,
)


class Bare:
    def __init__(self, arguments: argparse.Namespace, instance: protocol.Instance):
        use_threads(arguments.threads)
        self.validation, self.train = tf.nest.map_structure(
            tf.constant, protocol.make_batches(arguments.method, instance)
        )
        self.inner_steps = instance.inner_steps
        x = tf.constant(instance.upper)
        y = [tf.constant(leaf) for leaf in instance.lower]
        z = [tf.constant(leaf) for leaf in instance.auxiliary]
        step, self.start = {
            "v-pbgd": (self.value_gap, (x, y, z)),
            "g-pbgd": (self.gradient_norm, (x, y)),
            "rhg": (self.unroll, (x, y)),
            "aid-cg": (self.conjugate_gradient, (x, y)),
            "aid-fp": (self.fixed_point, (x, y)),
            "stocbio": (self.stochastic, (x, y)),
        }[arguments.method]
        self.weight = tf.constant(protocol.WEIGHT.get(arguments.method, 0.0))
        self.now = self.start
        self.step = compiled_ahead(step, arguments.variant, self.weight, *self.start)

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
        gradient = _gradient(lower_loss, x, z, self.train)
        z = _descend(z, protocol.AUXILIARY_RATE, gradient)
        constant = cross_entropy(z, *self.train)
        scale = tf.minimum(1.0 / (weight + 1e-8), 1.0)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([x, y])
            gap = cross_entropy(y, *self.train) - tf.stop_gradient(constant)
            penalty = tf.reduce_mean(tf.sigmoid(x) * gap)
            loss = scale * (upper_loss(x, y, self.validation) + weight * penalty)
        to_x, to_y = _partials(tape, loss, (x, y))
        x = x - protocol.UPPER_RATE * to_x
        return to_x, (x, _descend(y, protocol.LOWER_RATE, to_y), z)

    def gradient_norm(self, weight: tf.Tensor, x: tf.Tensor, y: list) -> tuple:
        scale = tf.minimum(1.0 / (weight + 1e-8), 1.0)
        with tf.GradientTape(watch_accessed_variables=False) as outer:
            outer.watch([x, y])
            gradient = _gradient(lower_loss, x, y, self.train)
            norm = _dot(gradient, gradient)
            upper = upper_loss(x, y, self.validation)
            loss = scale * (upper + 0.5 * weight * norm)
        to_x, to_y = _partials(outer, loss, (x, y))
        x = x - protocol.UPPER_RATE * to_x
        return to_x, (x, _descend(y, protocol.LOWER_RATE, to_y))

    def unroll(self, weight: tf.Tensor, x: tf.Tensor, start: list) -> tuple:
        """Reverse mode that stores the iterates and linearises each step again."""
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
            gradient = _gradient(lower_loss, x, y, self.train)
            return t + 1, _descend(y, protocol.INNER_RATE, gradient), kept

        end, kept = _repeat(forward, last, start, arrays)
        adjoint = _gradient(upper_loss, x, end, self.validation)

        def backward(t: tf.Tensor, adjoint: list, total: tf.Tensor) -> tuple:
            y = [array.read(t) for array in kept]
            pullback = _pullback(lower_loss, x, y, self.train)
            to_x, to_y = pullback((x, y), adjoint)
            total = total - protocol.INNER_RATE * to_x
            return t - 1, _descend(adjoint, protocol.INNER_RATE, to_y), total

        _, _, to_x = tf.while_loop(
            lambda t, *_: t >= 0,
            backward,
            (tf.constant(last - 1), adjoint, tf.zeros_like(x)),
            maximum_iterations=last,
        )
        return to_x, (x - protocol.UPPER_RATE * to_x, start)

    def conjugate_gradient(self, weight: tf.Tensor, x: tf.Tensor, y: list) -> tuple:
        """Solves g_yy v = f_y after one inner step, starting at v = 0."""
        del weight
        y, adjoint, pullback = self._after_inner_step(x, y)
        v = [tf.zeros_like(leaf) for leaf in y]
        r = p = adjoint
        square = _dot(r, r)
        for _ in range(protocol.SOLVER_STEPS):
            curved = pullback(y, p)
            length = square / _dot(p, curved)
            v = _descend(v, -length, p)
            r = _descend(r, length, curved)
            before, square = square, _dot(r, r)
            p = _descend(r, -square / before, p)
        to_x = -pullback(x, v)
        return to_x, (x - protocol.UPPER_RATE * to_x, y)

    def fixed_point(self, weight: tf.Tensor, x: tf.Tensor, y: list) -> tuple:
        """v <- J'v + f_y with the inner step's Jacobian, after one such step."""
        del weight
        y, adjoint, pullback = self._after_inner_step(x, y)
        v = [tf.zeros_like(leaf) for leaf in y]
        for _ in range(protocol.SOLVER_STEPS):
            v = _descend(v, protocol.INNER_RATE, pullback(y, v))
            v = _sum(v, adjoint)
        to_x = -protocol.INNER_RATE * pullback(x, v)
        return to_x, (x - protocol.UPPER_RATE * to_x, y)

    def _after_inner_step(self, x: tf.Tensor, y: list) -> tuple[list, list, Callable]:
        gradient = _gradient(lower_loss, x, y, self.train)
        y = _descend(y, protocol.INNER_RATE, gradient)
        adjoint = _gradient(upper_loss, x, y, self.validation)
        return y, adjoint, _pullback(lower_loss, x, y, self.train)

    def stochastic(self, weight: tf.Tensor, x: tf.Tensor, y: list) -> tuple:
        """stocBiO: every inner step, factor and product on the next minibatch."""
        del weight
        steps, factors = protocol.STOCHASTIC_STEPS, protocol.FACTORS

        def minibatch(t: Any) -> tuple:
            return tuple(tf.gather(leaf, t) for leaf in self.train)

        def inner_step(t: tf.Tensor, y: list) -> tuple:
            gradient = _gradient(minibatch_loss, x, y, minibatch(t))
            return t + 1, _descend(y, protocol.INNER_RATE, gradient)

        (y,) = _repeat(inner_step, steps, y)
        term = total = _gradient(upper_loss, x, y, self.validation)
        for j in range(factors):
            pullback = _pullback(minibatch_loss, x, y, minibatch(steps + j))
            term = _descend(term, protocol.SERIES_RATE, pullback(y, term))
            total = _sum(total, term)
        pullback = _pullback(minibatch_loss, x, y, minibatch(steps + factors))
        # The derivative in the gathered weights is IndexedSlices.
        to_x = -protocol.SERIES_RATE * tf.convert_to_tensor(pullback(x, total))
        return to_x, (x - protocol.UPPER_RATE * to_x, y)


def _gradient(loss: Callable, x: tf.Tensor, y: list, batch: Any) -> list:
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(y)
        value = loss(x, y, batch)
    return _partials(tape, value, y)


def _pullback(loss: Callable, x: tf.Tensor, y: list, batch: Any) -> Callable:
    """(sources, v) -> products of v and the derivatives of loss_y in the sources."""
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as outer:
        outer.watch([x, y])
        gradient = _gradient(loss, x, y, batch)
    return lambda sources, v: _partials(outer, gradient, sources, v)


def _partials(
    tape: tf.GradientTape, targets: Any, sources: Any, v: list | None = None
) -> Any:
    """`tape.gradient`, whose type annotations cover single tensors only."""
    return tape.gradient(targets, sources, output_gradients=v)


def _repeat(body: Callable, times: int, *start: Any) -> tuple:
    """Repeats body(t, *state) -> (t + 1, *state) for t < times; the last state."""
    _, *end = tf.while_loop(
        lambda t, *_: t < times,
        body,
        (tf.constant(0), *start),
        maximum_iterations=times,
    )
    return tuple(end)


def _sum(a: list, b: list) -> list:
    return [u + v for u, v in zip(a, b, strict=True)]


def _dot(a: list, b: list) -> tf.Tensor:
    return tf.add_n([tf.reduce_sum(u * v) for u, v in zip(a, b, strict=True)])


def _descend(variables: list, rate: Any, gradient: list) -> list:
    return [v - rate * g for v, g in zip(variables, gradient, strict=True)]


if __name__ == "__main__":
    protocol.serve(Bare, device_peak=device_peak)
