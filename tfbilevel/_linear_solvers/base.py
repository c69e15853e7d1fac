"""The interface of the linear solvers."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._calculus.loops import serial_loop
from tfbilevel._core.arguments import (
    not_negative,
    positive,
    require_count,
    require_number,
)
from tfbilevel._core.former_arguments import renamed
from tfbilevel._core.schedules import (
    Schedule,
    as_schedule,
    is_schedule,
    require_tolerance,
)

UNROLLED = 10  # steps of a solver without a tolerance
TOLERANCE = {"tolerance": "rtol"}  # its name in the previous release

Product = Callable[[Nest], Nest]


class LinearSystem(NamedTuple):
    """The matrix A, represented by its products.

    `tb.Implicit` makes it for its solver; make one yourself only to test a solver.

    Attributes:
        product: v -> A v.
        transposed: v -> A'v; `None`: A is symmetric.
        rate: the inner solver's learning rate, for solvers that step with it.
        point: (upper, lower) variables at which A is evaluated, for preconditioners.
        outer_step: number of the outer step, for tolerances that follow a schedule.
        leading: 1 if A is block-diagonal, with one block for each entry of the leading
            axis of all leaves (tasks): every block is solved separately.

    Example:
        >>> twice = tb.LinearSystem(product=lambda v: 2.0 * v)
        >>> solution = tb.ConjugateGradient(5).solve(twice, tf.constant([4.0]))
        >>> solution.value.numpy().tolist()
        [2.0]
    """

    product: Product
    transposed: Product | None = None
    rate: Any = None
    point: tuple[Any, Any] = (None, None)
    outer_step: Any = 0
    leading: int = 0

    @property
    def inner_product(self) -> structure.InnerProduct:
        """Its `dot` and `norm`, `to_vector` and `from_vector`, and `each` (block)."""
        return structure.InnerProduct(self.leading)

    def with_inner_product(self, product: structure.InnerProduct) -> "LinearSystem":
        """The same system over vectors of this inner product."""
        return self._replace(leading=product.leading)

    def dot(self, a: Nest, b: Nest) -> tf.Tensor:
        """The inner product, one value per block."""
        return self.inner_product.dot(a, b)

    def norm(self, a: Nest) -> tf.Tensor:
        """The Euclidean norm, one value per block."""
        return self.inner_product.norm(a)

    def stepped(self, going: tf.Tensor, before: Nest, after: Nest) -> Nest:
        """`after`, except for blocks that have finished, which keep `before`."""
        return structure.stepped(going, before, after)


class LinearSolution(NamedTuple):
    """The result of a linear solver.

    Attributes:
        value: v, like the right-hand side.
        residual: relative residual ||b - A v|| / ||b||, scalar; 0 for b = 0. Methods
            whose last operation updates v report the residual before that update.
        iterations: number of steps that the loop made, int32 scalar.
        state: the solver's state for the next outer step.
        diverged: whether the steps led away from the solution, bool scalar.

    For a block-diagonal system `residual` and `diverged` have one entry per block.
    """

    value: Any
    residual: tf.Tensor
    iterations: tf.Tensor
    state: State = ()
    diverged: Any = False


@dataclasses.dataclass(frozen=True, eq=False)
class LinearSolver(abc.ABC):
    """Solves A v = b, given products with A.

    Args:
        damping: solve (A + damping I) v = b instead; not negative.

    Raises:
        ValueError: if an argument is out of its range.
    """

    damping: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        require_number(self.damping, "damping", not_negative, "not negative")

    # Traits that `tb.Implicit` reads before it passes a system to the solver.

    @property
    def transposes(self) -> bool:
        """Whether it uses products with the transpose of A."""
        return False

    @property
    def needs_symmetric(self) -> bool:
        """Whether A must be symmetric."""
        return False

    @property
    def needs_rate(self) -> bool:
        """Whether it uses `system.rate`, the inner learning rate, which must then be
        constant."""
        return False

    @property
    def needs_point(self) -> bool:
        """Whether it uses lower variables as vectors of A, at `system.point`."""
        return False

    @property
    def scheduled(self) -> bool:
        """Whether it depends on `system.outer_step`."""
        return False

    def init(self, like: Nest) -> State:
        """The state before the first outer step, for right-hand sides like `like`."""
        del like
        return ()

    def init_blocks(self, like: Nest) -> State:
        """`init` for a block-diagonal system with its blocks along the leading axis."""
        return self.init(like)

    @abc.abstractmethod
    def solve(
        self, system: LinearSystem, rhs: Nest, state: State = ()
    ) -> LinearSolution:
        """Solve A v = rhs.

        Args:
            system: A.
            rhs: b, any nest of tensors.
            state: the solver's state; `()`: none, start at zero.
        """

    def damped(self, system: LinearSystem) -> tuple[Product, Product]:
        """v -> (A + damping I) v and its transpose."""

        def with_damping(product: Product) -> Product:
            if self.damping == 0:
                return product
            return lambda vector: structure.add_scaled(
                product(vector), self.damping, vector
            )

        product = with_damping(system.product)
        if system.transposed is None:
            return product, product
        return product, with_damping(system.transposed)


@renamed(TOLERANCE)
@dataclasses.dataclass(frozen=True, eq=False)
class IterativeSolver(LinearSolver):
    """A linear solver that makes steps until the residual is small.

    Subclasses have a field `max_steps`. One with a true field `warm_start` carries the
    solution from one outer step to the next.

    Args:
        rtol: stop when ||b - A v|| <= rtol * ||b||; not negative. A schedule of the
            outer step can lower it as the outer loop converges.
        damping: solve (A + damping I) v = b instead; not negative.

    Example:
        >>> schedule = tb.Geometric(0.1, 0.5)
        >>> solver = tb.FixedPoint(50, rate=0.25, rtol=schedule)
        >>> b, outer_step = tf.constant([4.0]), tf.constant(2)
        >>> system = tb.LinearSystem(lambda v: 2.0 * v, outer_step=outer_step)
        >>> bool(solver.solve(system, b).residual <= 0.1 * 0.5**2)
        True
    """

    rtol: float | Schedule | LearningRateSchedule = dataclasses.field(
        default=1e-6, kw_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self.max_steps, "max_steps")
        require_tolerance(self.rtol, "rtol")

    def init(self, like: Nest) -> State:
        return structure.zeros_like(like) if self._warm else ()

    @property
    def _warm(self) -> bool:
        return getattr(self, "warm_start", False)

    @property
    def scheduled(self) -> bool:
        return is_schedule(self.rtol)

    @property
    def ends_early(self) -> bool:
        """Whether it may stop before `max_steps`."""
        rtol: Any = self.rtol
        return self.scheduled or rtol > 0

    def goal(self, system: LinearSystem, dtype: tf.DType) -> tf.Tensor:
        """The relative tolerance at this outer step."""
        if is_schedule(self.rtol):
            rtol = as_schedule(self.rtol, "rtol")
            return tf.cast(rtol(tf.convert_to_tensor(system.outer_step)), dtype)
        return structure.scalar(self.rtol, dtype)

    def repeated(
        self, unfinished: Callable, body: Callable, begin: tuple, most: int
    ) -> tuple:
        """Repeat steps from `begin` while `unfinished`, at most `most` times.

        Without a tolerance nearly always all steps are made. A few steps are unrolled
        then, because in a loop TensorFlow recomputes for every product what they share.
        """
        if self.ends_early or most > UNROLLED:
            return serial_loop(unfinished, body, begin, most)
        now = begin
        for _ in range(most):
            going = unfinished(*now)
            now = structure.where(going, body(*now), now)
        return now

    def start(self, system: LinearSystem, rhs: Nest, state: State) -> Nest:
        """The start of the steps: zero for b = 0, whose solution is zero."""
        zeros = structure.zeros_like(rhs)
        if is_cold(state):
            return zeros
        return structure.where(system.norm(rhs) > 0, state, zeros)

    def start_and_residual(
        self, system: LinearSystem, product: Product, rhs: Nest, state: State
    ) -> tuple[Any, Any]:
        """The start of the steps, and b - A v there; zero costs no product."""
        start = self.start(system, rhs, state)
        if is_cold(state):
            return start, rhs
        return start, structure.subtract(rhs, product(start))

    def solution(
        self,
        system: LinearSystem,
        value: Any,
        residual_norm: tf.Tensor,
        rhs: Nest,
        steps: tf.Tensor,
        diverged: tf.Tensor | None = None,
        first_norm: tf.Tensor | None = None,
    ) -> LinearSolution:
        """The solution, with the state of a solver that carries v or nothing.

        By default it counts as diverged if v = 0 has a smaller residual and, if
        `first_norm` is given, the start had one too (a warm start may be far off).
        """
        rhs_norm = system.norm(rhs)
        residual = structure.ratio(residual_norm, rhs_norm)
        if diverged is None:
            diverged = residual > 1
            if first_norm is not None:
                diverged &= residual_norm > first_norm
        return LinearSolution(
            value,
            residual,
            steps,
            value if self._warm else (),
            diverged,
        )


class WithRate:
    """A linear solver with a step size; `None`: the inner solver's learning rate."""

    rate: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate is not None:
            remedy = "Stay below 2 / (largest eigenvalue of the lower Hessian)."
            require_number(self.rate, "rate", positive, "above 0", remedy)

    @property
    def needs_rate(self) -> bool:
        return self.rate is None

    def rate_of(self, system: LinearSystem) -> Any:
        """The step size for this system."""
        return system.rate if self.rate is None else self.rate


def is_cold(state: State) -> bool:
    """Whether a solver has no state from before, and starts at zero."""
    return isinstance(state, tuple) and not state
