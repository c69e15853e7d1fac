"""Reverse-mode differentiation through the inner loop."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._calculus.loops import serial_loop
from tfbilevel._core.aggregation import Aggregation, aggregated, require_aggregation
from tfbilevel._core.arguments import require_choice, require_count
from tfbilevel._core.batches import Batches
from tfbilevel._core.inner_solver import (
    InnerSolver,
    Iterate,
    require_fixed_length,
    require_inner,
)
from tfbilevel._core.method import Method, Step
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._methods.hypergradient.trajectory import (
    ENDS,
    Span,
    checkpoint,
    replay,
    search,
    tape,
)

LOOPS = {"replay": replay, "checkpoint": checkpoint, "tape": tape, "host": replay}
MEMORIES = tuple(LOOPS)


@dataclasses.dataclass(frozen=True, eq=False)
class Unroll(Method):
    r"""Hypergradient by reverse mode through the inner steps (RHG, T-RHG, PTT, BDA).

        y_{t+1} = Phi(x, y_t),  t < T;        dF/dx = d/dx f(x, y_T(x))

    computed by the adjoint recursion a_T = f_y, a_t = Phi_y' a_{t+1}, which adds
    Phi_x' a_{t+1} to f_x at each of the last `last` steps. It is the exact gradient
    of f(x, y_T(x)) for every T. With `last = K`, y_{T-K} is treated as constant, which
    causes an error that decays like (1 - rate * curvature)^K.

    If the lower problem has many solutions, or is not convex, the end point matters.
    `end="pessimistic"` (PTT) evaluates f after every step and differentiates only
    through the first k*,

        k* = argmax_{1 <= k <= T} f(x, y_k),      dF/dx = d/dx f(x, y_{k*}(x))

    the first one on ties; the lower variables after the step are still y_T. With
    `problem.lower_start` reading the start from the upper variables this is IAPTT-GM
    (IA-GM with `end="final"`), and over tasks MAML and ANIL. `aggregate` (BDA) mixes f
    into the direction of the inner steps, see `tb.Aggregation`; the metric `lower_loss`
    is then that of the mixture.

    `first_order` (FOMAML, FO-ITD-BiO) treats the inner gradients as constants: only
    f_x and the parts through the start and the learning rate remain. It needs no second
    derivatives, but the result is not the gradient of any function.

    Cost: T inner steps and, for each differentiated one, a vector-Jacobian product
    of about two more gradients. Memory besides that of one step: "replay" K iterates,
    "checkpoint" 2 sqrt(K) iterates at the cost of one more inner step per step, "tape"
    everything that every step computed. "host" is "replay" with the K iterates in the
    host's memory: a GPU keeps none of them, and sends each one there and back. On a CPU
    it is "replay". XLA cannot compile it. The lower loss only needs to be twice
    differentiable. Prefer `Implicit` if the inner solve is long and converges.

    Args:
        inner: the inner solver whose steps are differentiated.
        last: K, number of last steps to differentiate; `None`: all.
        end: "final": f at y_T. "pessimistic": f at the iterate with the largest f;
            costs one evaluation of f per step, and the reverse sweep has k* steps.
        aggregate: a `tb.Aggregation`, or `None`.
        memory: "replay", "checkpoint", "tape" or "host". All give the same gradient.
        first_order: treat the inner gradients as constants.
        skipped: what the steps before the last K pass on to a learned start: "stop":
            nothing. "identity": the adjoint at y_{T-K} unchanged, as in the published
            T-RHG with a learned start.

    Raises:
        ValueError: if `last` is not between 1 and `inner.steps`, for an unknown
            choice, for `end="pessimistic"` with `last`, for an inner solver with a
            tolerance, or, in a step with `memory="host"`, if XLA is to compile it.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.5), steps=1))
        >>> x, y = tf.constant(2.0), tf.constant(0.0)
        >>> step = method.step(problem, x, y, tb.Batches(None, None), method.init(
        ...     problem, x, y))
        >>> float(step.lower), float(step.upper_gradient)
        (1.0, 0.0)

    References:
        Franceschi, Donini, Frasconi, Pontil (2017), Forward and reverse
        gradient-based hyperparameter optimization. arXiv:1703.01785.
        Shaban, Cheng, Hatch, Boots (2019), Truncated back-propagation for bilevel
        optimization. arXiv:1810.10667.
        Liu, Mu, Yuan, Zeng, Zhang (2020), A generic first-order algorithmic
        framework for bi-level programming beyond lower-level singleton.
        arXiv:2006.04045.
        Liu, Liu, Zeng, Zhang (2021), Towards gradient-based bilevel optimization
        with non-convex followers and beyond. arXiv:2110.00455.
    """

    inner: InnerSolver
    last: int | None = None
    end: str = "final"
    aggregate: Aggregation | None = None
    memory: str = "replay"
    first_order: bool = False
    skipped: str = "stop"

    def __post_init__(self) -> None:
        require_inner(self.inner)
        require_fixed_length(self.inner, "Unroll")
        require_choice(self.end, "end", ENDS)
        require_choice(self.memory, "memory", MEMORIES)
        require_choice(self.skipped, "skipped", ("stop", "identity"))
        require_aggregation(self.aggregate)
        if self.last is not None:
            require_count(self.last, "last")
            if self.last > self.inner.steps:
                raise ValueError(
                    "`last` must not exceed the inner solver's steps: only steps that "
                    "are made can be differentiated. Lower `last` or raise `steps`. "
                    f"Received: last={self.last}, steps={self.inner.steps}"
                )
            if self.end == "pessimistic":
                raise ValueError(
                    "`last` and end='pessimistic' exclude each other: one drops the "
                    "first steps, the other those after the worst iterate. Leave one "
                    f"out. Received: last={self.last}, end='pessimistic'"
                )

    @property
    def differentiated(self) -> int:
        """K, the largest number of inner steps that are differentiated."""
        return self.inner.steps if self.last is None else self.last

    @property
    def _first(self) -> int:
        """T - K, the first inner step that is differentiated."""
        return self.inner.steps - self.differentiated

    @property
    def _span(self) -> Span:
        pessimistic = self.end == "pessimistic"
        return Span(
            self.inner, self._first, self.first_order, pessimistic, self.keeps_on_host
        )

    @property
    def takes_second_derivatives(self) -> bool:
        return not self.first_order

    @property
    def keeps_on_host(self) -> bool:
        return self.memory == "host"

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        return self.inner.init(problem, upper, lower)

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = self._prepared(problem, upper, batches)
        loop = LOOPS[self.memory]
        iterate, pull_start = self.inner.begin_pullback(here, lower, state)
        iterate = self._skip(here, iterate)
        run = loop(self._span, here, iterate)
        metrics = {}
        end = run.made.end
        point = end.lower
        if self.end == "pessimistic":
            point = run.made.worst.lower
            metrics["truncation"] = run.made.worst.steps
        upper_loss, partial, adjoint = here.upper_partials(point)
        response, adjoint = run.pullback(adjoint)
        if pull_start is not None and (self._first == 0 or self.skipped == "identity"):
            response = derivatives.add_partials(response, pull_start(adjoint)[0])
        return Step(
            upper_gradient=self._total(here, partial, response),
            lower=end.lower,
            state=self.inner.carried(end, state),
            metrics={
                "upper_loss": upper_loss,
                "lower_loss": run.made.lower_loss,
                **metrics,
            },
        )

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        at = self._prepared(problem, upper, batches)
        begun = self.inner.begin(at, lower, state)
        fixed = self._skip(at, begun)
        stop = self._span.stop(search(self._span, at, fixed))

        def value(x: Nest) -> tf.Tensor:
            here = self._prepared(problem, x, batches)
            iterate = self.inner.begin(here, lower, state)
            if self._first > 0:
                moved = structure.zeros_like(fixed.lower)
                if self.skipped == "identity":
                    moved = structure.subtract(iterate.lower, begun.lower)
                start = structure.add(fixed.lower, moved)
                iterate = fixed._replace(lower=start)
            if self.first_order:
                end = self._with_constant_gradients(at, fixed, here, iterate, stop)
            else:
                end, _ = self._span.run(here, iterate, stop)
            return here.upper_loss(end.lower)

        return value

    def _prepared(self, problem: Problem, upper: Nest, batches: Batches) -> Prepared:
        return aggregated(self.aggregate, problem.prepared(upper, batches))

    def _skip(self, here: Prepared, iterate: Iterate) -> Iterate:
        """Make the steps that are not differentiated."""
        return self.inner.run(here, iterate, 0, self._first, self._first)[0]

    def _total(self, here: Prepared, partial: Nest, response: Nest) -> Any:
        if self.first_order:
            # Where f depends on x itself, a gradient through y of zero is intended.
            nothing = derivatives.scale_partial(0.0, partial)
            response = derivatives.add_partials(response, nothing)
            differentiated = "A first-order unroll (upper loss, start and rate)"
        elif self.last is not None:
            steps = f"{self.last} step" + "s" * (self.last > 1)
            differentiated = f"A truncated unroll (upper loss and the last {steps})"
        else:
            return here.gradient(partial, response)
        try:
            return here.gradient(partial, response)
        except derivatives.UnconnectedGradientError as error:
            raise derivatives.UnconnectedGradientError(
                error.level, error.index, error.name, differentiated
            ) from None

    def _with_constant_gradients(
        self, at: Prepared, fixed: Iterate, here: Prepared, start: Iterate, stop: Any
    ) -> Iterate:
        """The differentiated steps, with the gradients evaluated at another x."""

        def body(t: tf.Tensor, other: Iterate, now: Iterate) -> tuple:
            _, gradient = self.inner.gradient(at, other, t)
            other = self.inner.move(at, other, gradient)
            after = self.inner.move(here, now, gradient)
            return t + 1, other, structure.stepped(t < stop, now, after)

        _, _, end = serial_loop(
            lambda t, *_: tf.reduce_any(t < stop),
            body,
            (tf.constant(self._first), fixed, start),
            self.differentiated,
        )
        return end
