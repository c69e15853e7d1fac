"""The same mathematics in JAX, each outer step one `jit`.

Variants: jit; for the unroll also remat (each inner step derived anew).
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import protocol


class JittedJax:
    def __init__(self, arguments: argparse.Namespace, instance: protocol.Instance):
        self.data = (
            jnp.asarray(instance.train),
            jax.nn.one_hot(instance.train_labels, 10),
            jnp.asarray(instance.validation),
            jax.nn.one_hot(instance.validation_labels, 10),
        )
        self.inner_steps = instance.inner_steps
        self.remat = arguments.variant == "remat"
        x = jnp.asarray(instance.upper)
        y = [jnp.asarray(leaf) for leaf in instance.lower]
        z = [jnp.asarray(leaf) for leaf in instance.auxiliary]
        step, self.start = {
            "v-pbgd": (_value_gap, (x, y, z)),
            "g-pbgd": (_gradient_norm, (x, y)),
            "rhg": (self.unroll, (x, y)),
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
                return _descend(y, protocol.UNROLL_RATE, gradient), None

            if self.remat:
                inner_step = jax.checkpoint(inner_step)
            end, _ = jax.lax.scan(inner_step, start, length=self.inner_steps)
            return _upper_loss(end, validation, validation_labels)

        to_x = jax.grad(end_loss)(x)
        return to_x, (x - protocol.UPPER_RATE * to_x, start)


def _value_gap(data: tuple, weight: jax.Array, x: jax.Array, y: list, z: list):
    train, train_labels, validation, validation_labels = data
    gradient = jax.grad(_lower_loss, argnums=1)(x, z, train, train_labels)
    z = _descend(z, protocol.INNER_RATE, gradient)
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


if __name__ == "__main__":
    protocol.serve(JittedJax)
