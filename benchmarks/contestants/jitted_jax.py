"""The same computation in JAX, with one `jit` per outer step.

Variants: jit; for the unroll also remat (each inner step is recomputed).
"""

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import protocol


class JittedJax:
    def __init__(self, arguments: argparse.Namespace, instance: protocol.Instance):
        if arguments.device == "gpu":
            jax.devices("gpu")  # raises without one, instead of computing on the host
        upper, lower = protocol.make_batches(arguments.method, instance)
        self.data = (*_arrays(*lower), *_arrays(*upper))
        self.inner_steps = instance.inner_steps
        self.remat = arguments.variant == "remat"
        x = jnp.asarray(instance.upper)
        y = [jnp.asarray(leaf) for leaf in instance.lower]
        z = [jnp.asarray(leaf) for leaf in instance.auxiliary]
        step, self.start = {
            "v-pbgd": (_value_gap, (x, y, z)),
            "g-pbgd": (_gradient_norm, (x, y)),
            "rhg": (self.unroll, (x, y)),
            "aid-cg": (functools.partial(_implicit, _conjugate_gradient), (x, y)),
            "aid-fp": (functools.partial(_implicit, _fixed_point), (x, y)),
            "stocbio": (_stochastic, (x, y)),
        }[arguments.method]
        self.weight = jnp.float32(protocol.WEIGHT.get(arguments.method, 0.0))
        self.now = self.start
        self.step = jax.jit(step)

    def hypergradient(self) -> np.ndarray:
        return np.asarray(self.step(self.data, self.weight, *self.start)[0])

    def run(self, steps: int, clock: protocol.Clock) -> int:
        del clock
        for _ in range(steps):
            _, self.now = self.step(self.data, self.weight, *self.now)
        jax.block_until_ready(self.now)
        return steps

    def unroll(self, data: tuple, weight: jax.Array, x: jax.Array, start: list):
        del weight
        train, train_labels, validation, validation_labels = data

        def end_loss(x: jax.Array) -> jax.Array:
            def inner_step(y: list, _: None) -> tuple:
                gradient = jax.grad(_lower_loss, argnums=1)(x, y, train, train_labels)
                return _descend(y, protocol.INNER_RATE, gradient), None

            if self.remat:
                inner_step = jax.checkpoint(inner_step)
            end, _ = jax.lax.scan(inner_step, start, length=self.inner_steps)
            return _upper_loss(end, validation, validation_labels)

        to_x = jax.grad(end_loss)(x)
        return to_x, (x - protocol.UPPER_RATE * to_x, start)


def _value_gap(data: tuple, weight: jax.Array, x: jax.Array, y: list, z: list):
    train, train_labels, validation, validation_labels = data
    gradient = jax.grad(_lower_loss, argnums=1)(x, z, train, train_labels)
    z = _descend(z, protocol.AUXILIARY_RATE, gradient)
    constant = _cross_entropy(z, train, train_labels)
    scale = jnp.minimum(1.0 / (weight + 1e-8), 1.0)

    def penalised(x: jax.Array, y: list) -> jax.Array:
        gap = _cross_entropy(y, train, train_labels) - constant
        penalty = jnp.mean(jax.nn.sigmoid(x) * gap)
        upper = _upper_loss(y, validation, validation_labels)
        return scale * (upper + weight * penalty)

    to_x, to_y = jax.grad(penalised, argnums=(0, 1))(x, y)
    after = (x - protocol.UPPER_RATE * to_x, _descend(y, protocol.LOWER_RATE, to_y), z)
    return to_x, after


def _gradient_norm(data: tuple, weight: jax.Array, x: jax.Array, y: list):
    train, train_labels, validation, validation_labels = data
    scale = jnp.minimum(1.0 / (weight + 1e-8), 1.0)

    def penalised(x: jax.Array, y: list) -> jax.Array:
        gradient = jax.grad(_lower_loss, argnums=1)(x, y, train, train_labels)
        norm = sum(jnp.sum(leaf * leaf) for leaf in gradient)
        upper = _upper_loss(y, validation, validation_labels)
        return scale * (upper + 0.5 * weight * norm)

    to_x, to_y = jax.grad(penalised, argnums=(0, 1))(x, y)
    after = (x - protocol.UPPER_RATE * to_x, _descend(y, protocol.LOWER_RATE, to_y))
    return to_x, after


def _implicit(solve: Callable, data: tuple, weight: jax.Array, x: jax.Array, y: list):
    del weight
    train, train_labels, validation, validation_labels = data

    def gradient(x: jax.Array, y: list) -> list:
        return jax.grad(_lower_loss, argnums=1)(x, y, train, train_labels)

    y = _descend(y, protocol.INNER_RATE, gradient(x, y))
    adjoint = jax.grad(_upper_loss)(y, validation, validation_labels)
    _, product = jax.linearize(lambda y: gradient(x, y), y)
    to_x = -_mixed(gradient, x, y, solve(product, adjoint))
    return to_x, (x - protocol.UPPER_RATE * to_x, y)


def _conjugate_gradient(product: Callable, rhs: list) -> list:
    v, _ = jax.scipy.sparse.linalg.cg(
        product, rhs, tol=0.0, maxiter=protocol.SOLVER_STEPS
    )
    return v


def _fixed_point(product: Callable, rhs: list) -> list:
    """v <- (I - rate g_yy) v + f_y from zero; rate * v converges to the solution."""

    def step(v: list, _: None) -> tuple:
        v = _descend(v, protocol.INNER_RATE, product(v))
        return _descend(v, -1.0, rhs), None

    zeros = [jnp.zeros_like(leaf) for leaf in rhs]
    v, _ = jax.lax.scan(step, zeros, length=protocol.SOLVER_STEPS)
    return [protocol.INNER_RATE * leaf for leaf in v]


def _stochastic(data: tuple, weight: jax.Array, x: jax.Array, y: list):
    del weight
    *stacked, validation, validation_labels = data
    steps = protocol.STOCHASTIC_STEPS
    first, then, last = (
        [leaf[chosen] for leaf in stacked]
        for chosen in (slice(steps), slice(steps, -1), -1)
    )

    def gradient(x: jax.Array, y: list, batch: list) -> list:
        images, labels, indices = batch
        return jax.grad(_lower_loss, argnums=1)(x[indices], y, images, labels)

    def inner_step(y: list, batch: list) -> tuple:
        return _descend(y, protocol.INNER_RATE, gradient(x, y, batch)), None

    y, _ = jax.lax.scan(inner_step, y, first)
    adjoint = jax.grad(_upper_loss)(y, validation, validation_labels)

    def factor(carried: tuple, batch: list) -> tuple:
        term, total = carried
        _, product = jax.jvp(lambda y: gradient(x, y, batch), (y,), (term,))
        term = _descend(term, protocol.SERIES_RATE, product)
        return (term, _descend(total, -1.0, term)), None

    (_, total), _ = jax.lax.scan(factor, (adjoint, adjoint), then)
    mixed = _mixed(lambda x, y: gradient(x, y, last), x, y, total)
    to_x = -protocol.SERIES_RATE * mixed
    return to_x, (x - protocol.UPPER_RATE * to_x, y)


def _mixed(gradient: Callable, x: jax.Array, y: list, v: list) -> jax.Array:
    """g_xy v."""
    _, pullback = jax.vjp(lambda x: gradient(x, y), x)
    return pullback(v)[0]


def _arrays(images: np.ndarray, labels: np.ndarray, *indices: np.ndarray) -> tuple:
    return (
        jnp.asarray(images),
        jax.nn.one_hot(labels, 10),
        *map(jnp.asarray, indices),
    )


def _cross_entropy(variables: list, images: jax.Array, one_hot: jax.Array) -> jax.Array:
    hidden = images
    for kernel, bias in zip(variables[:-2:2], variables[1:-2:2], strict=True):
        hidden = jax.nn.sigmoid(hidden @ kernel + bias)
    logits = hidden @ variables[-2] + variables[-1]
    return -jnp.sum(one_hot * jax.nn.log_softmax(logits), axis=1)


def _upper_loss(y: list, images: jax.Array, one_hot: jax.Array) -> jax.Array:
    return jnp.mean(_cross_entropy(y, images, one_hot))


def _lower_loss(x: jax.Array, y: list, images: jax.Array, one_hot: jax.Array):
    return jnp.mean(jax.nn.sigmoid(x) * _cross_entropy(y, images, one_hot))


def _descend(variables: list, rate: float, gradient: list) -> list:
    return [v - rate * g for v, g in zip(variables, gradient, strict=True)]


def device_peak() -> int:
    return jax.devices("gpu")[0].memory_stats()["peak_bytes_in_use"]


if __name__ == "__main__":
    protocol.serve(JittedJax, device_peak=device_peak)
