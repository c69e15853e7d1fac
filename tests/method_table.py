"""Every method on the oracle problems: how it is built, and what it must give.

A new method is one line in METHODS: how to build it for an oracle, and the NumPy
number that its first upper gradient must equal.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import references
import tensorflow as tf
from problems import ORACLES, Oracle, Vector, cast, flat, unflat

import tfbilevel as tb

SGD = keras.optimizers.SGD

STEPS = 28  # "converged": 0.45^28 = 2e-10
FEW = 5
WEIGHT = 1.7
LOWER_RATE = 0.01


def inner(oracle: Oracle, steps: int = STEPS) -> tb.InnerSolver:
    return tb.InnerSolver(keras.optimizers.SGD(oracle.rate), steps)


def rate() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(LOWER_RATE)


def unroll(steps: int = FEW, **options: Any) -> Callable[[Oracle], tb.Method]:
    return lambda oracle: tb.Unroll(inner(oracle, steps), **options)


def implicit(solver: tb.LinearSolver) -> Callable[[Oracle], tb.Method]:
    return lambda oracle: tb.Implicit(inner(oracle), solver)


def exact(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """The true hypergradient and the true solution."""
    del y
    return oracle.hypergradient(x), oracle.solution(x)


def damped(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """The true solution, and the hypergradient with 0.3 on the Hessian's diagonal."""
    del y
    end = oracle.solution(x)
    v = np.linalg.solve(oracle.hessian(x) + 0.3 * np.eye(len(end)), oracle.f_y(x, end))
    return oracle.f_x(x, end) - oracle.g_xy(x, end, v), end


def finite(last: int | None = None) -> Callable:
    """The reverse recursion over a few steps, far from solved."""

    def expected(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
        iterates = references.descend(oracle, x, y, oracle.rate, FEW)
        gradient = references.unroll(oracle, x, iterates, oracle.rate, last)
        return gradient, iterates[-1]

    return expected


def value_gap(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """Three inner steps: z is far from solved, so its own value counts."""
    z = references.descend(oracle, x, y, oracle.rate, 3)[-1]
    d_x, d_y = references.value_gap(oracle, x, y, z, WEIGHT)
    return d_x, y - LOWER_RATE * d_y


def constant_value(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    d_x, d_y = references.value_gap(oracle, x, y, None, WEIGHT)
    return d_x, y - LOWER_RATE * d_y


def gradient_norm(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    d_x, d_y = references.gradient_norm(oracle, x, y, WEIGHT)
    return d_x, y - LOWER_RATE * d_y


def multipliers(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    return references.augmented_lagrangian(
        oracle, x, y, rate=LOWER_RATE, steps=FEW, rho=1.7, lam=0.6, nu=0.3
    )


def first_order(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """Only f_x at the last iterate: nothing passes through the steps."""
    end = references.descend(oracle, x, y, oracle.rate, FEW)[-1]
    return oracle.f_x(x, end), end


def up_to_worst(oracle: Oracle, x: Vector, iterates: list) -> list:
    """The iterates up to that of largest upper loss."""
    upper, lower, batches = oracle.at("float64")

    def f(x: Vector, y: Vector) -> float:
        at = unflat(y, oracle.y)
        return float(oracle.problem.upper_loss(upper, cast(at, "float64"), batches[0]))

    return iterates[: references.pessimistic(oracle, x, iterates, f) + 1]


def worst(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    iterates = references.descend(oracle, x, y, oracle.rate, FEW)
    kept = up_to_worst(oracle, x, iterates)
    return references.unroll(oracle, x, kept, oracle.rate), iterates[-1]


WEIGHTS = [0.4 * 0.5**t for t in range(FEW + 1)]


def mixture(last: int | None = None) -> Callable:
    def expected(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
        return references.mixture(oracle, x, y, oracle.rate, WEIGHTS[:FEW], last)

    return expected


def at_worst(of: Callable) -> Callable:
    """Something of the iterate of largest upper loss."""

    def expected(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
        iterates = references.descend(oracle, x, y, oracle.rate, FEW)
        return of(oracle, x, up_to_worst(oracle, x, iterates)[-1]), iterates[-1]

    return expected


def implicit_mixture(pessimistic: bool) -> Callable:
    """The system of the mixture at its end, with the weight of the step from there."""

    def expected(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
        iterates = references.mixture_path(oracle, x, y, oracle.rate, WEIGHTS[:FEW])
        kept = up_to_worst(oracle, x, iterates) if pessimistic else iterates
        weight = WEIGHTS[len(kept) - 1]
        gradient = references.implicit_mixture(oracle, x, kept[-1], weight)
        return gradient, iterates[-1]

    return expected


def bamm(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """v = 0 still: x moves along f_x (test_bamm.py goes on from there)."""
    return oracle.f_x(x, y), references.descend(oracle, x, y, LOWER_RATE, 1)[-1]


def series(terms: int) -> Callable:
    def expected(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
        end = references.descend(oracle, x, y, oracle.rate, FEW)[-1]
        return references.series(oracle, x, end, 0.2, terms), end

    return expected


def ttsa(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """At k = 0 both scales are 1; Q = 1 leaves no choice of the random length."""
    end = references.descend(oracle, x, y, LOWER_RATE, 1)[-1]
    return references.series(oracle, x, end, 0.2, 1), end


def fsla(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """v makes its first step from 0."""
    end = references.descend(oracle, x, y, LOWER_RATE, 1)[-1]
    v = 0.2 * oracle.f_y(x, end)
    return oracle.f_x(x, end) - oracle.g_xy(x, end, v), end


def double_momentum(terms: int) -> Callable:
    """Without a step before there is no momentum; x is at the y before its step."""

    def expected(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
        end = references.descend(oracle, x, y, LOWER_RATE, 1)[-1]
        return references.series(oracle, x, y, 0.2, terms), end

    return expected


def vrbo(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """The first step only estimates."""
    return references.series(oracle, x, y, 0.2, 4), y


def f2sa(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    z = references.descend(oracle, x, y, oracle.rate, 3)[-1]
    for _ in range(3):
        d_y = oracle.f_y(x, y) + WEIGHT * oracle.g_y(x, y)
        y = y - LOWER_RATE / WEIGHT * d_y
    return references.value_gap(oracle, x, y, z, WEIGHT)[0], y


def bome(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    z = references.descend(oracle, x, y, oracle.rate, 3)[-1]
    q_x, q_y = oracle.g_x(x, y) - oracle.g_x(x, z), oracle.g_y(x, y)
    f_x, f_y = oracle.f_x(x, y), oracle.f_y(x, y)
    square = q_x @ q_x + q_y @ q_y
    weight = max(2.5 * square - f_x @ q_x - f_y @ q_y, 0) / square
    return f_x + weight * q_x, y - LOWER_RATE * (f_y + weight * q_y)


def meha(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """z starts at y, so the envelope does not pull in the first step."""
    z = y - LOWER_RATE * oracle.g_y(x, y)
    along = oracle.f_y(x, y) / WEIGHT + oracle.g_y(x, y) - (y - z) / 0.6
    end = y - LOWER_RATE * along
    gap = oracle.g_x(x, end) - oracle.g_x(x, z)
    return oracle.f_x(x, end) / WEIGHT + gap, end


def f3sa(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """Without a step before there is no momentum."""
    z = references.descend(oracle, x, y, oracle.rate, 1)[-1]
    end = y - LOWER_RATE / WEIGHT * (oracle.f_y(x, y) + WEIGHT * oracle.g_y(x, y))
    return references.value_gap(oracle, x, end, z, WEIGHT)[0], end


SLACK = 30.0  # no y is outside


def bvfsm(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """z makes 3 steps and y 2. r cancels in the difference of g."""
    h, linear = oracle.hessian(x), oracle.linear(x)
    z = y
    for _ in range(3):
        z = z - oracle.rate * (oracle.g_y(x, z) + 0.1 * z)

    def weight(y: Vector) -> Any:
        gap = 0.5 * (y @ h @ y - z @ h @ z) - linear @ (y - z)
        return WEIGHT / (SLACK + 0.05 * z @ z - gap)

    for _ in range(2):
        along = oracle.f_y(x, y) + weight(y) * oracle.g_y(x, y) + 0.2 * y
        y = y - LOWER_RATE * along
    gap = oracle.g_x(x, y) - oracle.g_x(x, z)
    return oracle.f_x(x, y) + weight(y) * gap, y


def of_bvfsm(oracle: Oracle) -> tb.Method:
    return tb.BVFSM(
        inner(oracle, 3),
        rate(),
        2,
        relaxation=WEIGHT,
        slack=SLACK,
        auxiliary_ridge=0.1,
        lower_ridge=0.2,
    )


def constraints(x: Any, y: Any) -> Any:
    """Of every entry of y, and of both levels together."""
    sums = [tf.add_n([tf.reduce_sum(v) for v in tf.nest.flatten(n)]) for n in (x, y)]
    return {"both": sums[0] * sums[1], "own": tf.nest.map_structure(add_tenth, y)}


def add_tenth(y: Any) -> Any:
    return y + 0.1


def gaffa(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """z = 0.3 and theta = y at first; derivatives of <m, h> by hand."""

    def h_y(m: Vector) -> Vector:
        return m[0] * x.sum() + m[1:]

    z = np.full(1 + len(y), 0.3)
    theta = y - LOWER_RATE * (oracle.g_y(x, y) + h_y(z))
    values = np.concatenate([[x.sum() * y.sum()], y + 0.1])
    raised = np.maximum(z + 0.7 * values, 0)
    along = oracle.f_y(x, y) / WEIGHT + oracle.g_y(x, y) + h_y(raised)
    d_x = oracle.f_x(x, y) / WEIGHT + oracle.g_x(x, y) - oracle.g_x(x, theta)
    d_x = d_x + raised[0] * y.sum() - z[0] * theta.sum()
    return d_x, y - LOWER_RATE * (along - (y - theta) / 0.6)


def identity(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """v = rate f_y at the solution."""
    del y
    end = oracle.solution(x)
    v = oracle.rate * oracle.f_y(x, end)
    return oracle.f_x(x, end) - oracle.g_xy(x, end, v), end


def known_noise(size: int) -> np.ndarray:
    return 0.2 * np.random.default_rng(3).normal(size=(2, size))


class WithKnownNoise(tb.PersistentES):
    """XLA samples others than TensorFlow's own operations."""

    def _noise(self, upper: Any, step: Any) -> Any:
        del step
        like = tf.nest.map_structure(lambda leaf: np.zeros(leaf.shape), upper)
        rows = [unflat(row, like) for row in known_noise(len(flat(like)))]
        return tf.nest.map_structure(
            lambda leaf, *leaves: tf.constant(np.stack(leaves), leaf.dtype),
            upper,
            *rows,
        )


def persistent(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """Four particles; before the first window there is no noise to add up."""
    upper, _, batches = oracle.at("float64")
    total = np.zeros_like(x)
    for e in known_noise(len(x)):
        f = []
        for at in (x + e, x - e):
            end = references.descend(oracle, at, y, oracle.rate, FEW)[-1]
            x_y = (unflat(at, upper), unflat(end, oracle.y))
            nests = [cast(nest, "float64") for nest in x_y]
            f.append(float(oracle.problem.upper_loss(*nests, batches[0])))
        total += e * (f[0] - f[1]) / 2 / 0.2**2
    # Of two windows, the mean over them is the gradient of f at the end.
    return 2 * total / 2, references.descend(oracle, x, y, oracle.rate, FEW)[-1]


def rank_one(oracle: Oracle, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    end = references.descend(oracle, x, y, oracle.rate, 1)[-1]
    return references.rank_one(oracle, x, end), end


class Row(NamedTuple):
    """One method of the table: what it is, and (upper gradient, lower) expected."""

    name: str
    build: Callable[[Oracle], tb.Method]
    expected: Callable[[Oracle, Vector, Vector], tuple[Vector, Vector]]
    tolerance: dict[str, float] | None = None  # of an approximate gradient
    # Not the derivative of any finite computation: the check must say so.
    heuristic: bool = False
    oracles: tuple[str, ...] = tuple(oracle.name for oracle in ORACLES)


METHODS = [
    Row("unroll-replay", unroll(), finite()),
    Row("unroll-checkpoint", unroll(memory="checkpoint"), finite()),
    Row("unroll-tape", unroll(memory="tape"), finite()),
    Row("unroll-host", unroll(memory="host"), finite()),
    Row("unroll-replay-last", unroll(last=3), finite(3)),
    Row("unroll-checkpoint-last", unroll(last=3, memory="checkpoint"), finite(3)),
    Row("unroll-tape-last", unroll(last=3, memory="tape"), finite(3)),
    Row("unroll-converged", unroll(STEPS), exact),
    Row("implicit-cg", implicit(tb.ConjugateGradient(13, rtol=1e-10)), exact),
    Row("implicit-neumann", implicit(tb.Neumann(30, rtol=0.0)), exact),
    Row("implicit-fixed-point", implicit(tb.FixedPoint(30, rtol=0.0)), exact),
    Row(
        "unroll-first-order",
        unroll(first_order=True),
        first_order,
        # In the others some upper variable reaches f through y only.
        oracles=("quadratic", "scalar"),
    ),
    Row("unroll-pessimistic", unroll(end="pessimistic"), worst),
    Row(
        "unroll-pessimistic-checkpoint",
        unroll(end="pessimistic", memory="checkpoint"),
        worst,
    ),
    Row("unroll-pessimistic-tape", unroll(end="pessimistic", memory="tape"), worst),
    Row("unroll-bda", unroll(aggregate=tb.Aggregation(0.4, 0.5)), mixture()),
    Row(
        "forward-unroll", lambda oracle: tb.ForwardUnroll(inner(oracle, FEW)), finite()
    ),
    Row(
        "finite-difference",
        lambda oracle: tb.FiniteDifference(inner(oracle, FEW)),
        finite(1),
        {"float64": 2e-5, "float32": 2e-3},
    ),
    Row(
        "finite-difference-bda",
        lambda oracle: tb.FiniteDifference(
            inner(oracle, FEW), aggregate=tb.Aggregation(0.4, 0.5)
        ),
        mixture(1),
        {"float64": 2e-5, "float32": 2e-3},
        oracles=("nested",),
    ),
    Row(
        "implicit-pessimistic",
        lambda oracle: tb.Implicit(inner(oracle, FEW), tb.Direct(), end="pessimistic"),
        at_worst(references.implicit),
        None,
        True,
        oracles=("nested",),
    ),
    Row(
        "implicit-bda",
        lambda oracle: tb.Implicit(
            inner(oracle, FEW), tb.Direct(), aggregate=tb.Aggregation(0.4, 0.5)
        ),
        implicit_mixture(pessimistic=False),
        None,
        True,
        oracles=("nested",),
    ),
    Row(
        "implicit-bda-pessimistic",
        lambda oracle: tb.Implicit(
            inner(oracle, FEW),
            tb.Direct(),
            end="pessimistic",
            aggregate=tb.Aggregation(0.4, 0.5),
        ),
        implicit_mixture(pessimistic=True),
        None,
        True,
        oracles=("scalar", "nested"),
    ),
    Row(
        "rank-one-pessimistic",
        lambda oracle: tb.RankOne(inner(oracle, FEW), end="pessimistic"),
        at_worst(references.rank_one),
        None,
        True,
        oracles=("nested",),
    ),
    Row("rank-one", lambda oracle: tb.RankOne(inner(oracle, 1)), rank_one, None, True),
    Row("implicit-normal-cg", implicit(tb.NormalConjugateGradient(13)), exact),
    Row("implicit-minres", implicit(tb.MINRES(14, rtol=1e-10)), exact),
    Row("implicit-nystrom", implicit(tb.Nystrom(13, damping=0.3)), damped, None, True),
    Row("implicit-identity", implicit(tb.Identity()), identity, None, True),
    Row("implicit-direct", implicit(tb.Direct()), exact),
    Row(
        "implicit-gradient-solver",
        implicit(tb.GradientSolver(SGD(0.3), 80, warm_start=False, rtol=1e-11)),
        exact,
    ),
    Row(
        "implicit-optimizer-map",
        lambda oracle: tb.Implicit(
            tb.InnerSolver(keras.optimizers.SGD(oracle.rate / 2, momentum=0.2), 80),
            tb.NormalConjugateGradient(30, rtol=1e-10),
            through="optimizer",
        ),
        exact,
    ),
    Row(
        "stocbio",
        lambda oracle: tb.StocBiO(inner(oracle, FEW), 3, 0.2),
        series(4),
        None,
        True,
    ),
    Row(
        "bsa", lambda oracle: tb.BSA(inner(oracle, FEW), 1, 0.2), series(1), None, True
    ),
    Row("ttsa", lambda oracle: tb.TTSA(rate(), 1, 0.2), ttsa, None, True),
    Row(
        "bamm",
        lambda oracle: tb.BAMM(rate()),
        bamm,
        oracles=("quadratic", "scalar"),  # f_x is connected in these
    ),
    Row(
        "soba",
        lambda oracle: tb.SOBA(rate(), 0.2),
        bamm,  # v = 0 still here too
        oracles=("quadratic", "scalar"),
    ),
    Row(
        "srba",
        lambda oracle: tb.SRBA(rate(), 0.2),
        bamm,  # and here
        oracles=("quadratic", "scalar"),
    ),
    Row("fsla", lambda oracle: tb.FSLA(rate(), 0.2), fsla, None, True),
    Row(
        "amigo",
        lambda oracle: tb.AmIGO(inner(oracle, FEW), 4, 0.2),
        series(4),
        None,
        True,
    ),
    Row("mrbo", lambda oracle: tb.MRBO(rate(), 3, 0.2), double_momentum(4), None, True),
    Row(
        "sustain",
        lambda oracle: tb.SUSTAIN(rate(), 1, 0.2),
        double_momentum(1),
        None,
        True,
    ),
    Row("vrbo", lambda oracle: tb.VRBO(rate(), 3, 0.2), vrbo, None, True),
    Row("f2sa", lambda oracle: tb.F2SA(inner(oracle, 3), rate(), WEIGHT), f2sa),
    Row("bome", lambda oracle: tb.BOME(inner(oracle, 3), rate(), 2.5), bome),
    Row(
        "meha",
        lambda oracle: tb.MEHA(rate(), smoothing=0.6, upper_weight=1 / WEIGHT),
        meha,
    ),
    Row(
        "f3sa",
        lambda oracle: tb.F3SA(
            rate(), WEIGHT, auxiliary_optimizer=keras.optimizers.SGD(oracle.rate)
        ),
        f3sa,
        None,
        True,
    ),
    Row("bvfsm", of_bvfsm, bvfsm),
    Row(
        "gaffa",
        lambda oracle: tb.GAFFA(
            rate(),
            constraints,
            smoothing=0.6,
            multiplier_smoothing=0.7,
            upper_weight=1 / WEIGHT,
            initial_multiplier=0.3,
        ),
        gaffa,
    ),
    Row(
        "persistent-es",
        lambda oracle: WithKnownNoise(
            tb.InnerSolver(SGD(oracle.rate), FEW, start="cold"), 2 * FEW, 2, 0.2
        ),
        persistent,
        None,
        True,
    ),
    Row(
        "value-gap",
        lambda oracle: tb.ValueGap(inner(oracle, 3), rate(), WEIGHT),
        value_gap,
    ),
    Row(
        "value-gap-constant",
        lambda oracle: tb.ValueGap(None, rate(), WEIGHT),
        constant_value,
    ),
    Row(
        "gradient-norm",
        lambda oracle: tb.GradientNorm(rate(), WEIGHT),
        gradient_norm,
    ),
    Row(
        "augmented-lagrangian",
        lambda oracle: tb.AugmentedLagrangian(
            rate(), FEW, weight=1.7, lower_weight=0.6, initial_multiplier=0.3
        ),
        multipliers,
    ),
]
