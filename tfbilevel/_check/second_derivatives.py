"""Checking the second derivatives of a lower loss."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Nest
from tfbilevel._calculus.lost_derivatives import MissingSecondDerivativeError, Operation
from tfbilevel._check.float64 import in_float64, leaves_float64, to_float64
from tfbilevel._check.look import one_task, operations
from tfbilevel._core.arguments import require_count
from tfbilevel._core.batches import Batches, require_batches
from tfbilevel._core.problem import Problem, require_problem

# Widths of the central differences, relative to the size of what is moved. The result
# closest to that of the width before is used: rounding spoils small widths, kinks large
# ones.
WIDTHS = tuple(10 ** (-k / 2) for k in range(2, 13))
# An error above NOISY times the noise is an error. Below SMALL it never is, above LARGE
# it always is.
NOISY, SMALL, LARGE = 10.0, 1e-6, 0.1


class Probe(NamedTuple):
    """One product with a random vector v, along one random direction.

    Attributes:
        product: "g_yy v" or "g_xy v".
        claimed: the product along the direction, from TensorFlow's derivatives.
        difference: the central difference of <g_y, v> along that direction.
        noise: the disagreement of two differences.
    """

    product: str
    claimed: float
    difference: float
    noise: float


@dataclasses.dataclass(frozen=True)
class SecondDerivativesReport:
    """The result of `tb.check_second_derivatives`; printed, it is two tables.

    Attributes:
        operations: the operations to report between a variable and the gradient of the
            lower loss, each with `name`, `layer`, `verdict` ("missing", "wrong",
            "right" or "own": a custom gradient), `reason` and `instead`.
        probes: for each product, as many as were asked for; none if an operation is
            missing.
        precision: the precision of the computation: "float64", "float32", or "float64,
            in part float32".
            float32".
    """

    operations: tuple[Operation, ...]
    probes: tuple[Probe, ...]
    precision: str

    @property
    def error(self) -> float:
        """The largest |claimed - difference|, relative to the largest value of the
        same product; NaN without probes."""
        return self._largest(lambda one: abs(one.claimed - one.difference))

    @property
    def noise(self) -> float:
        """The largest noise, relative likewise; an error below it proves nothing."""
        return self._largest(lambda one: one.noise)

    @property
    def right(self) -> bool:
        """Whether no operation is missing or known to be wrong and all probes agree."""
        if any(one.verdict in ("missing", "wrong") for one in self.operations):
            return False
        return self.error <= self._tolerance

    @property
    def _tolerance(self) -> float:
        return min(LARGE, max(SMALL, NOISY * self.noise))

    def _largest(self, of: Callable[[Probe], float]) -> float:
        relative = []
        for product in {one.product for one in self.probes}:
            some = [one for one in self.probes if one.product == product]
            size = max(max(abs(p.claimed), abs(p.difference)) for p in some)
            largest = max(map(of, some))
            relative.append(largest / size if size else 0.0)
        return max(relative, default=np.nan)

    def __str__(self) -> str:
        lines = []
        if self.operations:
            rows = [("operation", "layer", "verdict", "why, and what to use instead")]
            for one in self.operations:
                instead = f"; use {one.instead}" if one.instead else ""
                rows.append((one.name, one.layer, one.verdict, one.reason + instead))
            widths = [max(len(row[k]) for row in rows) for k in range(3)]
            for row in rows:
                cells = (cell.ljust(w) for cell, w in zip(row, widths, strict=False))
                lines.append("  ".join((*cells, row[3])))
        else:
            lines.append("no operation without a second derivative")
        if not self.probes:
            return "\n".join([*lines, "no product could be computed"])
        lines.append("product   value                central difference   noise")
        for probe in self.probes:
            lines.append(
                f"{probe.product:9s} {probe.claimed: .12e}  {probe.difference: .12e}  "
                f"{probe.noise:.1e}"
            )
        said = "right" if self.error <= self._tolerance else "WRONG"
        lines.append(
            f"relative error {self.error:.2e} (noise {self.noise:.2e}) in "
            f"{self.precision}: {said}"
        )
        return "\n".join(lines)


def check_second_derivatives(
    problem: Any,
    batches: Batches,
    upper: Nest = None,
    lower: Nest = None,
    probes: int = 3,
    *,
    seed: int = 0,
) -> SecondDerivativesReport:
    r"""Check TensorFlow's second derivatives of a lower loss.

        <g_yy v, u>    against    ( <g_y(y + h u), v> - <g_y(y - h u), v> ) / 2h

    and g_xy v likewise along directions of x; u and v are random. All operations whose
    derivative TensorFlow lacks or has wrong are listed first. `BilevelModel.fit`,
    `tb.minimize` and `tb.check_hypergradient` reject those too; only the differences
    find a wrong handwritten gradient (tf.custom_gradient).

    The products are computed in float64 for variables of any dtype (Keras models are
    switched temporarily, and nothing is assigned). A part that works only in float32
    is computed in float32, and the noise shows how much the result then proves.

    Cost: two gradients of g per probe, product and width, with eleven widths; three
    traces. Over tasks, the first task is checked. Prefer `check_hypergradient` to check
    a method as a whole.

    Args:
        problem: a `tb.Problem`, or a `tb.BilevelModel` at its variables.
        batches: the data of one outer step; the lower part is used.
        upper: x of a `tb.Problem`, a nest of floating-point tensors.
        lower: y, likewise.
        probes: number of pairs u, v for each product, at least 1.
        seed: the seed of u and v.

    Returns:
        A report; print it, or read its `right`.

    Raises:
        ValueError: for arguments of the wrong kind.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: tf.reduce_sum(y**2),
        ...     lower_loss=lambda x, y, batch: tf.reduce_sum(x * tf.sin(y) + y**4),
        ... )
        >>> report = tb.check_second_derivatives(
        ...     problem, tb.Batches(None, None), tf.ones([3]), tf.ones([3]))
        >>> report.right, report.precision, report.error < 1e-8
        (True, 'float64', True)
    """
    require_count(probes, "probes")
    require_batches(batches)
    models = ()
    given = upper is not None, lower is not None
    if isinstance(problem, keras.Model):
        _require_bilevel(problem)
        if any(given):
            raise ValueError(
                "`upper` and `lower` must be left out with a tb.BilevelModel: they are "
                f"its variables. Received: upper={upper!r}, lower={lower!r}"
            )
        models = (problem.upper, problem.lower)
        upper, lower = problem._levels.read()
        problem = problem.problem
    elif not all(given):
        require_problem(problem)
        raise ValueError(
            "`upper` and `lower` must be given with a tb.Problem: the values where it "
            f"is checked. Received: upper={upper!r}, lower={lower!r}"
        )
    require_problem(problem)
    upper, lower = structure.to_tensors(upper), structure.to_tensors(lower)
    structure.require_floating(upper, "upper")
    structure.require_floating(lower, "lower")
    found = operations(problem, upper, lower, batches, models=models, corrected=True)
    if not any(one.verdict == "missing" for one in found):
        try:
            made, precision = _probed(
                models, problem, (upper, lower, batches), probes, seed
            )
            return SecondDerivativesReport(tuple(found), made, precision)
        except MissingSecondDerivativeError as error:
            found = [*found, *error.operations]
    return SecondDerivativesReport(tuple(found), (), "float64")


def _require_bilevel(model: keras.Model) -> None:
    """Raise unless the model holds a problem, as a `tb.BilevelModel` does."""
    if not isinstance(getattr(model, "problem", None), Problem):
        raise ValueError(
            "`problem` must be a tb.Problem or a tb.BilevelModel. Make one of the "
            f"network and its two losses. Received: {type(model)}"
        )


def _probed(
    models: Sequence, problem: Problem, point: Any, probes: int, seed: int
) -> tuple[tuple[Probe, ...], str]:
    """The probes, and the precision they were computed in."""
    try:
        with in_float64(models):
            upper, lower, batches = to_float64(point)
            made, whole = _differenced(problem, upper, lower, batches, probes, seed)
        return made, "float64" if whole else "float64, in part float32"
    except MissingSecondDerivativeError:
        raise
    except (TypeError, ValueError, tf.errors.OpError):
        # Float32 tensors in the loss cannot be combined with float64 variables.
        upper, lower, batches = point
        made, _ = _differenced(problem, upper, lower, batches, probes, seed)
        return made, tf.nest.flatten(lower)[0].dtype.name


def _differenced(
    problem: Problem, upper: Nest, lower: Nest, batches: Batches, probes: int, seed: int
) -> tuple[tuple[Probe, ...], bool]:
    """The probes, and whether everything had at least the variables' precision."""
    one, y, batches = one_task(problem, lower, batches)
    here = one.prepared(upper, batches)
    c, y = structure.to_tensors((here.upper, y))
    loss, batch = here.problem.lower_loss, here.batches.lower_at(0)

    def along(c: Nest, y: Nest, v: Any) -> tf.Tensor:
        return structure.dot(derivatives.lower_gradient(loss, c, y, batch)[1], v)

    def products(v: Any, u: Any, w: Any) -> tuple:
        _, gradient, pullback = derivatives.lower_gradient_pullback(loss, c, y, batch)
        mixed, curved = pullback(v)
        mixed = derivatives.fill_zeros(mixed, c)
        sizes = structure.norm(gradient), structure.norm(c), structure.norm(y)
        return structure.dot(curved, u), structure.dot(mixed, w), *sizes

    value = tf.function(along, autograph=False).get_concrete_function(c, y, y)
    both = tf.function(products, autograph=False).get_concrete_function(y, y, c)
    whole = not leaves_float64(value.graph)
    dtype = tf.nest.flatten(y)[0].dtype if whole else tf.float32
    epsilon = float(np.finfo(dtype.name).eps)

    def probe(name: str, claimed: Any, slope: Any, size: float, moved: Nest) -> Probe:
        best, before = (np.inf, 0.0), np.inf
        for width in WIDTHS:
            h = width * (size or 1.0)
            now = float(moved(h) - moved(-h)) / (2 * h)
            best = min(best, (abs(now - before) + epsilon * float(slope) / h, now))
            before = now
        return Probe(name, float(claimed), best[1], best[0])

    made = []
    for index in range(probes):
        v, u = (structure.direction(y, seed + 3 * index + k) for k in (0, 1))
        w = structure.direction(c, seed + 3 * index + 2)
        curved, mixed, slope, *sizes = both(v, u, w)

        def in_y(h: float, u: Any = u, v: Any = v) -> tf.Tensor:
            return value(c, structure.add_scaled(y, h, u), v)

        def in_c(h: float, w: Any = w, v: Any = v) -> tf.Tensor:
            return value(structure.add_scaled(c, h, w), y, v)

        made.append(probe("g_yy v", curved, slope, float(sizes[1]), in_y))
        made.append(probe("g_xy v", mixed, slope, float(sizes[0]), in_c))
    return tuple(made), whole
