"""Checking a hypergradient against finite differences and dense algebra."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._check.example_indices import explain
from tfbilevel._check.look import require_second_derivatives
from tfbilevel._core.arguments import require_count
from tfbilevel._core.batches import Batches
from tfbilevel._core.method import Method, require_method
from tfbilevel._core.problem import Problem, require_problem

DENSE_LIMIT = 2000
# A trace takes as long as some twenty eager products of a small network.
TRACED_FROM = 50

# Step sizes, relative to the size of the upper variables. The first whose noise is
# small enough is used, otherwise the one with the least noise.
STEPS = {8: (1e-5, 1e-4, 1e-3, 1e-2, 1e-6, 1e-1), 4: (5e-3, 2e-2, 1e-1, 1e-3, 1e-4)}
QUIET = {8: 1e-8, 4: 1e-3}


@dataclasses.dataclass(frozen=True)
class HypergradientReport:
    """The result of `tb.check_hypergradient`.

    Attributes:
        claimed: the method's derivative along each probe.
        differences: the central difference along each probe.
        error: largest |claimed - difference| relative to the larger of the two
            norms over all probes.
        noise: the disagreement of central differences at two step sizes, plus the
            effect of rounding in the losses, relative likewise; an error below it
            proves nothing. Infinite if every difference is exactly zero but the
            method's derivative is not.
        implicit_error: relative distance of the whole gradient from the dense
            implicit gradient at the method's lower variables; `None` for problems
            with more than 2,000 lower variables or a singular lower Hessian.
        stationarity: norm of the lower gradient there.
        notes: limits of this check, one sentence each.
    """

    claimed: list[float]
    differences: list[float]
    error: float
    noise: float
    implicit_error: float | None
    stationarity: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = ["probe      method            central difference"]
        for index, (a, b) in enumerate(
            zip(self.claimed, self.differences, strict=True)
        ):
            lines.append(f"{index:5d}   {a: .10e}   {b: .10e}")
        lines.append(f"relative error {self.error:.2e} (noise {self.noise:.2e})")
        if self.implicit_error is not None:
            lines.append(
                f"relative distance from the dense implicit gradient "
                f"{self.implicit_error:.2e} (lower gradient {self.stationarity:.2e})"
            )
        lines += self.notes
        return "\n".join(lines)


def check_hypergradient(
    problem: Problem,
    method: Method,
    upper: Nest,
    lower: Nest,
    batches: Batches,
    probes: int = 5,
    *,
    state: State = None,
    seed: int = 0,
) -> HypergradientReport:
    r"""Compare a method's upper gradient with independent values.

        <step.upper_gradient, p>    against    ( F(x + h p) - F(x - h p) ) / 2h
        <step.upper_gradient, p>    against    ( F(x + h p) - F(x - h p) ) / 2h

    along random unit directions p, in which every tensor of x moves in proportion to
    its size (root mean square; 1 for zeros). F is the function that the method
    computes exactly (`method.objective`): f after all inner steps, the truncated loop
    with its start held constant, the penalised loss.

    For small problems the gradient is also compared with the dense implicit gradient
    f_x - g_xy g_yy^{-1} f_y at the lower variables that the method reached. Unrolled
    and implicit methods approach it as the inner solve converges. It is always that of
    g alone and after the step: with a pessimistic end, an aggregation or `tb.BAMM` the
    method's own gradient belongs to another point or loss, and the distance does not
    mean that it is wrong.

    h follows the size of x. Where noise hides the differences (a large constant in f,
    a loss in float32), larger and smaller steps are tried. Use float64 variables and
    losses for errors below 1e-4.

    Only x is moved. Everything else that the problem's functions read is constant for
    both sides: the report's `notes` name the trainable variables among it, but tensors
    and arrays that a function closes over cannot be detected.

    Args:
        problem: the problem.
        method: the method to check.
        upper: x, a nest of floating-point tensors.
        lower: y, likewise.
        batches: the data of one outer step.
        probes: how many directions, at least 1.
        state: the method's state; `None`: `method.init`.
        seed: the seed of the directions.

    Returns:
        A report; print it, or compare `error` with a tolerance.

    Raises:
        ValueError: for arguments of the wrong kind or variables that are not
            floating-point.
        tb.MissingSecondDerivativeError: if the method takes second derivatives that
            are missing or wrong in TensorFlow.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: tf.reduce_sum((y - 1.0) ** 2),
        ...     lower_loss=lambda x, y, batch: tf.reduce_sum((y - x) ** 2),
        ... )
        >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.1), steps=3)
        >>> x = y = tf.zeros([4], tf.float64)
        >>> report = tb.check_hypergradient(
        ...     problem, tb.Unroll(inner), x, y, tb.Batches(None, None))
        >>> report.error < 1e-8
        True
    """
    require_count(probes, "probes")
    require_problem(problem)
    require_method(method)
    upper, lower = structure.to_tensors(upper), structure.to_tensors(lower)
    structure.require_floating(upper, "upper")
    structure.require_floating(lower, "lower")
    require_second_derivatives(problem, method, upper, lower, batches)
    if state is None:
        state = method.init(problem, upper, lower)
    # In a graph: eagerly, sequential tasks would be traced at every call.
    one_step = tf.function(
        lambda: problem.step(method, upper, lower, batches, state), autograph=False
    )
    step = one_step()
    objective = tf.function(
        method.objective(problem, upper, lower, batches, state), autograph=False
    )
    probe_list = [_direction(upper, seed + index) for index in range(probes)]
    claimed = [float(structure.dot(step.upper_gradient, p)) for p, _ in probe_list]
    found = _differences(objective, upper, probe_list, claimed)
    if not np.isfinite([*claimed, *found.values]).all():
        explain(problem, upper, problem._one_lower(lower), batches)
    rounded = not any(found.values) and any(claimed)
    # The lower batch that an implicit method uses for its linear system.
    draw = getattr(getattr(method, "inner", None), "steps", 0)
    dense, stationarity = _dense_implicit(problem, upper, step.lower, batches, draw)
    return HypergradientReport(
        claimed=claimed,
        differences=found.values,
        error=_relative(claimed, found.values),
        noise=found.noise,
        implicit_error=None if dense is None else _distance(step.upper_gradient, dense),
        stationarity=stationarity,
        notes=_notes(objective.get_concrete_function(upper), rounded),
    )


def _notes(objective: Any, rounded: bool) -> tuple[str, ...]:
    """The report's notes on a traced objective."""
    notes = []
    read = sorted({v.name for v in objective.graph.variables if v.trainable})
    if read:
        notes.append(
            "constants to both sides, as they are not handed over with x or y: the "
            f"stored variables {', '.join(read)}"
        )
    if rounded:
        dtype = objective.output_dtypes.name
        notes.append(
            "every difference is exactly zero: either the objective does not depend on "
            f"the upper variables, or its changes are lost to rounding (its {dtype}, a "
            "part in float32, a large constant). Compute the losses in float64, "
            "without the constant"
        )
    return tuple(notes)


def _direction(like: Nest, seed: int) -> tuple[Any, float]:
    """A unit vector, and its length when every entry of x moves by the leaf's size."""
    scaled = tf.nest.pack_sequence_as(
        like,
        [
            _size(leaf)
            * tf.random.stateless_normal(
                tf.shape(leaf), (seed, index), dtype=leaf.dtype
            )
            for index, leaf in enumerate(tf.nest.flatten(like))
        ],
    )
    length = structure.norm(scaled)
    return structure.scale(1.0 / length, scaled), float(length)


def _size(leaf: tf.Tensor) -> tf.Tensor:
    """The root mean square of the entries, 1 if they are zero."""
    largest = tf.reduce_max(tf.abs(leaf))  # squares of small numbers would be zero
    if largest == 0:
        return tf.ones([], leaf.dtype)
    return largest * tf.sqrt(tf.reduce_mean(tf.square(leaf / largest)))


@dataclasses.dataclass(frozen=True)
class _Differences:
    """Central differences along every probe, and their relative noise."""

    values: list[float]
    noise: float


def _differences(
    objective: Callable, upper: Nest, probes: list, claimed: list[float]
) -> _Differences:
    """The differences at the first step size that is quiet enough along the first
    probe, otherwise at the least noisy one."""
    precision = min(
        leaf.dtype.as_numpy_dtype(0).itemsize for leaf in tf.nest.flatten(upper)
    )
    precision = 8 if precision >= 8 else 4
    _, length = probes[0]
    absolute = STEPS[precision][0] * max(1.0, float(structure.norm(upper))) / length
    best, least = STEPS[precision][0], math.inf
    for step in (*STEPS[precision], absolute):
        noise = _at_step(objective, upper, probes[:1], claimed[:1], step).noise
        if noise < least:
            best, least = step, noise
        if noise <= QUIET[precision]:
            break
    return _at_step(objective, upper, probes, claimed, best)


def _at_step(
    objective: Callable, upper: Nest, probes: list, claimed: list[float], step: float
) -> _Differences:
    differences, halves, rounding = [], [], 0.0
    for probe, length in probes:
        for values, h in ((differences, step * length), (halves, step * length / 2)):
            ahead = objective(structure.add_scaled(upper, h, probe))
            behind = objective(structure.add_scaled(upper, -h, probe))
            values.append((float(ahead) - float(behind)) / (2 * h))
            precise = np.finfo(ahead.dtype.as_numpy_dtype).eps
            rounding = max(rounding, float(precise) * abs(float(ahead)) / h)
    largest = max(map(abs, [*claimed, *differences, *halves]))
    if not any(differences) and any(claimed):
        return _Differences(differences, math.inf)
    noise = _relative(differences, halves)
    if largest:
        noise = max(noise, rounding / largest)
    # Those of the smaller step size: the noise is then three times their error.
    return _Differences(halves, noise if math.isfinite(noise) else math.inf)


def _relative(a: list[float], b: list[float]) -> float:
    largest = max(map(abs, [*a, *b]))
    return (
        max(abs(u - v) for u, v in zip(a, b, strict=True)) / largest if largest else 0.0
    )


def _distance(a: Nest, b: Nest) -> float:
    larger = max(float(structure.norm(a)), float(structure.norm(b)))
    return float(structure.norm(structure.subtract(a, b))) / larger if larger else 0.0


def _dense_implicit(
    problem: Problem, upper: Nest, lower: Nest, batches: Batches, draw: int
) -> tuple[Any, float]:
    here = problem.prepared(upper, batches)
    _, (partial, rhs) = derivatives.value_and_partials(
        lambda c, y: here.problem.upper_loss(c, y, here.batches.upper),
        here.upper,
        lower,
    )
    _, gradient, pullback = here.lower_gradient_pullback(lower, draw)
    stationarity = float(structure.norm(gradient))
    count = structure.size(lower)
    if count > DENSE_LIMIT:
        return None, stationarity

    def wide(tree: Any) -> tf.Tensor:
        return tf.cast(structure.to_vector(tree), tf.float64)

    def like_lower(vector: tf.Tensor) -> Any:
        dtype = tf.nest.flatten(lower)[0].dtype
        return structure.from_vector(tf.cast(vector, dtype), lower)

    def product(row: tf.Tensor) -> tf.Tensor:
        return wide(pullback(like_lower(row))[1])

    basis = tf.eye(count, dtype=tf.float64)
    if count > TRACED_FROM:
        traced = tf.function(lambda: tf.map_fn(product, basis), autograph=False)
        hessian = traced()
    else:
        hessian = tf.stack([product(row) for row in basis])
    condition = tf.linalg.svd(hessian, compute_uv=False)
    if not float(condition[-1]) > 1e-10 * float(condition[0]):  # NaN, too
        return None, stationarity
    rhs = wide(derivatives.fill_zeros(rhs, lower))
    solution = tf.linalg.solve(hessian, rhs[:, None])[:, 0]
    mixed, _ = pullback(like_lower(-solution))
    filled = derivatives.fill_zeros(mixed, here.upper)
    return here.gradient(partial, filled), stationarity
