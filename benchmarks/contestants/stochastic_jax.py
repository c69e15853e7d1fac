"""SOBA, StocBiO and F2SA in JAX, as the papers have them, for part (a) of
`stochastic.py`.

Loops over all outer steps of a call by `lax.scan`, inner loops too; one `jit` for each
setting. Products with second derivatives are forward-over-reverse (`jax.jvp` of
`jax.grad`) for g_yy and reverse-over-reverse for g_xy. The batches have the numbers
that tfbilevel's have, so both make the same steps up to rounding, and count the same
oracle calls.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import stochastic_protocol as protocol
from stochastic_protocol import RAMP, TERMS, Setting


def upper_loss(x: jax.Array, y: jax.Array, batch: tuple) -> jax.Array:
    d, e = batch
    return 0.5 * jnp.mean((d @ y - e) ** 2) + 0.05 * jnp.sum(x**2)


def lower_loss(x: jax.Array, y: jax.Array, batch: tuple) -> jax.Array:
    a, b = batch
    return 0.5 * jnp.mean((a @ y - b @ x) ** 2)


lower_gradient = jax.grad(lower_loss, argnums=1)


def curvature(x: jax.Array, y: jax.Array, batch: tuple, v: jax.Array) -> jax.Array:
    """g_yy v."""
    return jax.jvp(lambda y: lower_gradient(x, y, batch), (y,), (v,))[1]


def mixed(x: jax.Array, y: jax.Array, batch: tuple, v: jax.Array) -> jax.Array:
    """g_xy v."""
    return jax.vjp(lambda x: lower_gradient(x, y, batch), x)[1](v)[0]


class Rates(NamedTuple):
    """Those of one outer step."""

    lower: jax.Array
    upper: jax.Array
    series: float  # of the setting, which does not decay
    step: jax.Array


class SOBA:
    """Dagreou, Ablin, Vaiter, Moreau (2022), SOBA with SGD directions:

    y <- y - rho g_y,    v <- v - rho (g_yy v - f_y),    x <- x - gamma (f_x - g_xy v)

    (the paper's v is minus this one).
    """

    draws, order = 1, 2

    @staticmethod
    def begin(x: jax.Array, y: jax.Array) -> tuple:
        return x, y, jnp.zeros_like(y)

    @staticmethod
    def step(now: tuple, upper: tuple, lower: tuple, rates: Rates) -> tuple:
        x, y, v = now
        batch = jax.tree.map(lambda leaf: leaf[0], lower)
        of_x, of_y = jax.grad(upper_loss, argnums=(0, 1))(x, y, upper)
        # One linearisation serves g_y and both products.
        gradient, pullback = jax.vjp(lambda x, y: lower_gradient(x, y, batch), x, y)
        mixed_v, curved_v = pullback(v)
        return (
            x - rates.upper * (of_x - mixed_v),
            y - rates.lower * gradient,
            v - rates.lower * (curved_v - of_y),
        )


class StocBiO:
    """Ji, Yang, Liang (2021), algorithm 2 with the series of its equation (4):

    D steps of y;  r_0 = f_y,  r_{j+1} = (I - eta g_yy(B_j)) r_j;
    x <- x - beta (f_x - g_xy eta sum_j r_j)
    """

    draws, order = 2 * TERMS + 1, 2

    @staticmethod
    def begin(x: jax.Array, y: jax.Array) -> tuple:
        return x, y

    @staticmethod
    def step(now: tuple, upper: tuple, lower: tuple, rates: Rates) -> tuple:
        x, y = now
        first, then, last = _parts(lower, TERMS, 2 * TERMS)

        def descend(y: jax.Array, batch: tuple) -> tuple:
            return y - rates.lower * lower_gradient(x, y, batch), None

        y, _ = jax.lax.scan(descend, y, first)
        of_x, of_y = jax.grad(upper_loss, argnums=(0, 1))(x, y, upper)

        def factor(carried: tuple, batch: tuple) -> tuple:
            term, total = carried
            term = term - rates.series * curvature(x, y, batch, term)
            return (term, total + term), None

        (_, total), _ = jax.lax.scan(factor, (of_y, of_y), then)
        response = mixed(x, y, last, rates.series * total)
        return x - rates.upper * (of_x - response), y


class F2SA:
    """Kwon, Kwon, Wright, Nowak (2023), algorithm 1, with min(1 / lambda, 1) in the
    rates alpha_k of y and xi alpha_k of x:

    T steps of z along g_y(x, z) and of y along f_y + lambda g_y(x, y);
    x <- x - xi alpha_k (f_x + lambda (g_x(x, y) - g_x(x, z)))
    """

    draws, order = 2 * TERMS + 1, 1

    @staticmethod
    def begin(x: jax.Array, y: jax.Array) -> tuple:
        return x, y, y

    @staticmethod
    def step(now: tuple, upper: tuple, lower: tuple, rates: Rates) -> tuple:
        x, y, z = now
        of_z, of_y, last = _parts(lower, TERMS, 2 * TERMS)
        begin, end, steps = RAMP
        weight = begin + (end - begin) * jnp.minimum(rates.step / steps, 1.0)
        scale = 1 / jnp.maximum(weight, 1.0)

        def follow(z: jax.Array, batch: tuple) -> tuple:
            return z - rates.lower * lower_gradient(x, z, batch), None

        def penalised(y: jax.Array, batch: tuple) -> jax.Array:
            return upper_loss(x, y, upper) + weight * lower_loss(x, y, batch)

        def descend(y: jax.Array, batch: tuple) -> tuple:
            return y - scale * rates.lower * jax.grad(penalised)(y, batch), None

        z, _ = jax.lax.scan(follow, z, of_z)
        y, _ = jax.lax.scan(descend, y, of_y)

        def outer(x: jax.Array) -> jax.Array:
            gap = lower_loss(x, y, last) - lower_loss(x, z, last)
            return upper_loss(x, y, upper) + weight * gap

        return x - scale * rates.upper * jax.grad(outer)(x), y, z


METHODS = {"SOBA": SOBA, "StocBiO": StocBiO, "F2SA": F2SA}


def _parts(lower: tuple, first: int, second: int) -> tuple[Any, Any, Any]:
    """The lower batches before the first and the second number, and the one there."""
    return tuple(
        jax.tree.map(lambda leaf, part=part: leaf[part], lower)
        for part in (slice(first), slice(first, second), second)
    )


class Compiled:
    """A method on part (a), compiled for one setting."""

    kind = "random"

    def __init__(self, problem: Any, method: Any, setting: Setting):
        self.problem, self.of = problem, method
        self.draws, self.order = method.draws, method.order
        self.together = problem.together
        self.rate = setting.rate / problem.largest
        self.ratio, self.power = setting.ratio, setting.power
        to_device = lambda leaf: jnp.asarray(leaf, jnp.float32)  # noqa: E731
        self.examples = jax.tree.map(to_device, problem.examples(""))
        carried = self.begin("")
        sizes = tuple(len(arrays[0]) for arrays in problem.examples(""))
        numbers = protocol.batches(self.kind, self.draws, self.together, sizes, 0)
        given = self.ready(next(numbers))
        traced = jax.jit(self._several).lower(self.examples, given, *carried)
        self.compiled = traced.compile()
        jax.block_until_ready(self.several(carried, given))

    def begin(self, case: str, seed: int = 0) -> Any:
        x, y = map(jnp.asarray, self.problem.start())
        return jnp.asarray(0, jnp.int32), self.of.begin(x, y)

    def ready(self, batches: tuple[np.ndarray, ...]) -> Any:
        return jax.block_until_ready(tuple(map(jnp.asarray, batches)))

    def several(self, carried: Any, batches: Any) -> Any:
        return self.compiled(self.examples, batches, *carried)

    def x(self, carried: Any) -> np.ndarray:
        return np.asarray(carried[1][0])

    def y(self, carried: Any) -> np.ndarray:
        return np.asarray(carried[1][1])

    def step_bytes(self) -> int | None:
        """XLA's count of its temporary buffers and results, and the variables."""
        count = self.compiled.memory_analysis()
        if count is None:
            return None
        given = jax.tree.leaves(self.begin(""))
        made = count.temp_size_in_bytes + count.output_size_in_bytes
        return made + sum(leaf.nbytes for leaf in given)

    def _several(self, examples: tuple, batches: tuple, k: jax.Array, now: Any):
        def body(carried: tuple, numbers: tuple) -> tuple:
            k, now = carried
            chosen = [
                tuple(leaf[rows] for leaf in level)
                for level, rows in zip(examples, numbers, strict=True)
            ]
            decay = (k + 1.0) ** -self.power if self.power else 1.0
            rate = self.rate * decay
            rates = Rates(rate, rate * self.ratio, self.rate, k)
            return (k + 1, self.of.step(now, *chosen, rates)), None

        carried, _ = jax.lax.scan(body, (k, now), batches)
        return carried


def build(arguments: argparse.Namespace, problem: Any) -> Callable[[Setting], Compiled]:
    method = METHODS[arguments.method]
    return lambda setting: Compiled(problem, method, setting)


if __name__ == "__main__":
    protocol.serve(build)
