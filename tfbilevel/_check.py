"""Checking a hypergradient against finite differences and dense algebra."""

import dataclasses
from typing import Any

import tensorflow as tf

from tfbilevel import _derivatives as derivatives
from tfbilevel import _structure as structure
from tfbilevel._arguments import require_count
from tfbilevel._look import require_second_derivatives
from tfbilevel._method import Method, require_method
from tfbilevel._problem import Batches, Problem, require_problem

DENSE_LIMIT = 2000


@dataclasses.dataclass(frozen=True)
class HypergradientReport:
    """What `tb.check_hypergradient` found.

    Attributes:
        claimed: the method's derivative along each probe.
        differences: the central difference along each probe.
        error: largest |claimed - difference| relative to the larger of the two
            norms over all probes.
        noise: how far central differences of two step sizes disagree, relative
            likewise; an error below it proves nothing.
        implicit_error: relative distance of the whole gradient from the dense
            implicit gradient at the method's lower variables; `None` for problems
            with more than 2,000 lower variables or a singular lower Hessian.
        stationarity: norm of the lower gradient there.
    """

    claimed: list[float]
    differences: list[float]
    error: float
    noise: float
    implicit_error: float | None
    stationarity: float

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
        return "\n".join(lines)


def check_hypergradient(
    problem: Problem,
    method: Method,
    upper: Any,
    lower: Any,
    batches: Batches,
    probes: int = 5,
    *,
    state: Any = None,
    seed: int = 0,
) -> HypergradientReport:
    r"""Compare a method's upper gradient with independent values.

        <step.upper_gradient, p>    against    ( F(x + h p) - F(x - h p) ) / 2h

    along random unit directions p, where F is the method's own finite computation
    (`method.objective`): f after all inner steps, the truncated loop with its start
    held constant, the penalised loss. For small problems also against the dense
    implicit gradient f_x - g_xy g_yy^{-1} f_y at the lower variables that the method
    reached, which unrolled and implicit methods approach as the inner solve
    converges. (Always of g alone and after the step: with a pessimistic end, an
    aggregation or `tb.BAMM` the method's own gradient is of another point or loss, and
    the distance says how far that is, not that it is wrong.) Use float64 variables for
    errors below 1e-4.

    Args:
        problem: the problem.
        method: the method to check.
        upper: x, a nest of floating-point tensors.
        lower: y, likewise.
        batches: the data of one outer step.
        probes: how many directions, at least 1.
        state: the method's state; `None`: `method.init`.
        seed: of the directions.

    Returns:
        A report; print it, or compare `error` with a tolerance.

    Raises:
        ValueError: for arguments of the wrong kind or variables that are not
            floating-point.
        tb.MissingSecondDerivativeError: if the method takes second derivatives that
            TensorFlow has wrong or not at all.

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
    # A graph: eagerly, steps that take tasks in turn would be traced at every call.
    one_step = tf.function(
        lambda: method.step(problem, upper, lower, batches, state), autograph=False
    )
    step = one_step()
    objective = tf.function(
        method.objective(problem, upper, lower, batches, state), autograph=False
    )
    precision = min(
        leaf.dtype.as_numpy_dtype(0).itemsize for leaf in tf.nest.flatten(upper)
    )
    width = 1e-5 if precision >= 8 else 5e-3
    size = max(1.0, float(structure.norm(upper)))
    claimed, differences, halves = [], [], []
    for index in range(probes):
        probe = direction(upper, seed + index)
        claimed.append(float(structure.dot(step.upper_gradient, probe)))
        for values, h in ((differences, width * size), (halves, width * size / 2)):
            ahead = objective(structure.add_scaled(upper, h, probe))
            behind = objective(structure.add_scaled(upper, -h, probe))
            values.append(float(ahead - behind) / (2 * h))
    # The lower batch that an implicit method's system is made of.
    draw = getattr(getattr(method, "inner", None), "steps", 0)
    dense, stationarity = _dense_implicit(problem, upper, step.lower, batches, draw)
    return HypergradientReport(
        claimed=claimed,
        differences=differences,
        error=_relative(claimed, differences),
        noise=_relative(differences, halves),
        implicit_error=None if dense is None else _distance(step.upper_gradient, dense),
        stationarity=stationarity,
    )


def direction(like: Any, seed: int) -> Any:
    """A random one, of length 1."""
    probe = tf.nest.pack_sequence_as(
        like,
        [
            tf.random.stateless_normal(tf.shape(leaf), (seed, index), dtype=leaf.dtype)
            for index, leaf in enumerate(tf.nest.flatten(like))
        ],
    )
    return structure.scale(1.0 / structure.norm(probe), probe)


def _relative(a: list[float], b: list[float]) -> float:
    largest = max(map(abs, [*a, *b]))
    return (
        max(abs(u - v) for u, v in zip(a, b, strict=True)) / largest if largest else 0.0
    )


def _distance(a: Any, b: Any) -> float:
    larger = max(float(structure.norm(a)), float(structure.norm(b)))
    return float(structure.norm(structure.subtract(a, b))) / larger if larger else 0.0


def _dense_implicit(
    problem: Problem, upper: Any, lower: Any, batches: Batches, draw: int
) -> tuple[Any, float]:
    here = problem.prepared(upper, batches)
    _, (partial, rhs) = derivatives.value_and_partials(
        lambda c, y: here.problem.upper_loss(c, y, here.batches.upper),
        here.upper,
        lower,
    )
    _, gradient, pullback = derivatives.lower_gradient_pullback(
        here.problem.lower_loss, here.upper, lower, here.batches.lower_at(draw)
    )
    stationarity = float(structure.norm(gradient))
    count = structure.size(lower)
    if count > DENSE_LIMIT:
        return None, stationarity

    def wide(tree: Any) -> tf.Tensor:
        return tf.cast(structure.to_vector(tree), tf.float64)

    def like_lower(vector: tf.Tensor) -> Any:
        dtype = tf.nest.flatten(lower)[0].dtype
        return structure.from_vector(tf.cast(vector, dtype), lower)

    basis = tf.eye(count, dtype=tf.float64)
    hessian = tf.stack([wide(pullback(like_lower(row))[1]) for row in basis])
    condition = tf.linalg.svd(hessian, compute_uv=False)
    if float(condition[-1]) <= 1e-10 * float(condition[0]):
        return None, stationarity
    rhs = wide(derivatives.fill_zeros(rhs, lower))
    solution = tf.linalg.solve(hessian, rhs[:, None])[:, 0]
    mixed, _ = pullback(like_lower(-solution))
    filled = derivatives.fill_zeros(mixed, here.upper)
    return here.gradient(partial, filled), stationarity
