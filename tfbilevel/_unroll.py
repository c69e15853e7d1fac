"""Reverse-mode differentiation through the inner loop."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tfbilevel import _derivatives as derivatives
from tfbilevel import _structure as structure
from tfbilevel._aggregation import Aggregation
from tfbilevel._arguments import require_choice, require_count
from tfbilevel._inner import (
    SERIAL,
    InnerSolver,
    Iterate,
    require_fixed_length,
    require_inner,
)
from tfbilevel._method import Method, Step
from tfbilevel._problem import Batches, Prepared, Problem

# In the reverse sweep each step's map is derived anew from a stored iterate, which
# the next step's can begin before this one's adjoint is there.
OVERLAPPED = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Unroll(Method):
    r"""Hypergradient by reverse mode through the inner steps (RHG, T-RHG, PTT, BDA).

        y_{t+1} = Phi(x, y_t),  t < T;        dF/dx = d/dx f(x, y_T(x))

    computed by the adjoint recursion a_T = f_y, a_t = Phi_y' a_{t+1}, adding
    Phi_x' a_{t+1} to f_x at each of the last `last` steps. It is the exact gradient
    of f(x, y_T(x)) for every T; with `last = K` it takes y_{T-K} for constant, an
    error that decays like (1 - rate * curvature)^K.

    Where the lower problem has many solutions, or is not convex, the end point
    matters. `end="pessimistic"` (PTT) evaluates f after every step and differentiates
    through the first k* only,

        k* = argmax_{1 <= k <= T} f(x, y_k),      dF/dx = d/dx f(x, y_{k*}(x))

    the first one on ties; the lower variables after the step are still y_T. With
    `problem.lower_start` reading the start from the upper variables this is IAPTT-GM
    (IA-GM with `end="final"`), MAML, ANIL and ITD-BiO. `aggregate` (BDA) mixes f into
    the direction of the inner steps, see `tb.Aggregation`; the metric `lower_loss` is
    then the mixture's.

    `first_order` (FOMAML, FO-ITD-BiO) takes the inner gradients for constants: only
    f_x and what passes through the start and the learning rate remain. No second
    derivatives, and no adjoint of x through the steps: not the gradient of anything.

    Cost: T inner steps and, for each differentiated one, a vector-Jacobian product
    of about two more gradients. Memory besides one step's: "replay" the K iterates,
    "checkpoint" 2 sqrt(K) iterates for one more inner step per step, "tape"
    everything that every step computed. No assumption on the lower loss but that it
    is twice differentiable. Prefer `Implicit` when the inner solve is long and
    converges.

    Args:
        inner: the inner solver whose steps are differentiated.
        last: K, how many last steps to differentiate; `None`: all.
        end: "final": f at y_T. "pessimistic": f at the iterate of largest f; costs
            one evaluation of f a step, and the reverse sweep has k* steps.
        aggregate: a `tb.Aggregation`, or `None`.
        memory: "replay", "checkpoint" or "tape". All give the same gradient.
        first_order: take the inner gradients for constants.
        skipped: what the steps before the last K pass on to a learned start: "stop":
            nothing. "identity": the adjoint at y_{T-K} as it is, as the published
            T-RHG with a learned start does.

    Raises:
        ValueError: if `last` is not between 1 and `inner.steps`, for an unknown
            choice, for `end="pessimistic"` with `last`, or for an inner solver with a
            tolerance.

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
        require_choice(self.end, "end", ("final", "pessimistic"))
        require_choice(self.memory, "memory", ("replay", "checkpoint", "tape"))
        require_choice(self.skipped, "skipped", ("stop", "identity"))
        if self.aggregate is not None and not isinstance(self.aggregate, Aggregation):
            raise ValueError(
                "`aggregate` must be a tb.Aggregation, such as tb.Aggregation(0.5, "
                f"decay=0.9). Received: aggregate={self.aggregate!r}"
            )
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
        """K, how many inner steps are differentiated at most."""
        return self.inner.steps if self.last is None else self.last

    @property
    def first(self) -> int:
        """T - K, the first inner step that is differentiated."""
        return self.inner.steps - self.differentiated

    def init(self, problem: Problem, upper: Any, lower: Any) -> Any:
        return self.inner.init(problem, upper, lower)

    def step(
        self, problem: Problem, upper: Any, lower: Any, batches: Batches, state: Any
    ) -> Step:
        here = self._prepared(problem, upper, batches)
        loop = {"replay": _replay, "checkpoint": _checkpoint, "tape": _tape}[
            self.memory
        ]
        iterate, pull_start = self.inner.begin_pullback(here, lower, state)
        iterate = self._skip(here, iterate)
        run = loop(self, here, iterate)
        metrics = {}
        end = run.made.end
        point = end.lower
        if self.end == "pessimistic":
            point = run.made.worst.lower
            metrics["truncation"] = run.made.worst.steps
        upper_loss, partial, adjoint = here.upper_partials(point)
        response, adjoint = run.pullback(adjoint)
        if pull_start is not None and (self.first == 0 or self.skipped == "identity"):
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
        self, problem: Problem, upper: Any, lower: Any, batches: Batches, state: Any
    ) -> Callable[[Any], tf.Tensor]:
        at = self._prepared(problem, upper, batches)
        begun = self.inner.begin(at.problem, at.upper, lower, state)
        fixed = self._skip(at, begun)
        stop = self._stop(_search(self, at, fixed))

        def value(x: Any) -> tf.Tensor:
            here = self._prepared(problem, x, batches)
            iterate = self.inner.begin(here.problem, here.upper, lower, state)
            if self.first > 0:
                moved = structure.zeros_like(fixed.lower)
                if self.skipped == "identity":
                    moved = structure.subtract(iterate.lower, begun.lower)
                start = structure.add(fixed.lower, moved)
                iterate = fixed._replace(lower=start)
            if self.first_order:
                end = self._with_constant_gradients(at, fixed, here, iterate, stop)
            else:
                end, _ = self._rest(here, here.upper, iterate, stop)
            return here.problem.upper_loss(here.upper, end.lower, here.batches.upper)

        return value

    def _prepared(self, problem: Problem, upper: Any, batches: Batches) -> Prepared:
        here = problem.prepared(upper, batches)
        return here if self.aggregate is None else self.aggregate.applied(here)

    def _skip(self, here: Prepared, iterate: Iterate) -> Iterate:
        """The steps that are not differentiated."""
        iterate, _ = self.inner.run(
            here.problem, here.upper, here.batches, iterate, 0, self.first, self.first
        )
        return iterate

    def _total(self, here: Prepared, partial: Any, response: Any) -> Any:
        if not self.first_order:
            return here.gradient(partial, response)
        # Nothing through y is what the method says, where f depends on x itself.
        nothing = derivatives.scale_partial(0.0, partial)
        response = derivatives.add_partials(response, nothing)
        try:
            return here.gradient(partial, response)
        except derivatives.UnconnectedGradientError as error:
            raise derivatives.UnconnectedGradientError(
                error.level,
                error.index,
                error.name,
                "A first-order unroll (upper loss, start and rate)",
            ) from None

    def _stop(self, made: "_Run") -> Any:
        """How many steps lead to the end point."""
        return made.worst.steps if self.end == "pessimistic" else self.inner.steps

    def _rest(
        self, here: Prepared, c: Any, iterate: Iterate, stop: Any
    ) -> tuple[Iterate, Any]:
        """The differentiated steps, from the iterate before them."""
        return self.inner.run(
            here.problem,
            c,
            here.batches,
            iterate,
            self.first,
            stop,
            self.differentiated,
            self.first_order,
        )

    def _with_constant_gradients(
        self, at: Prepared, fixed: Iterate, here: Prepared, start: Iterate, stop: Any
    ) -> Iterate:
        """The differentiated steps along the gradients met at another x."""

        def body(t: tf.Tensor, other: Iterate, now: Iterate) -> tuple:
            _, gradient = self.inner.gradient(
                at.problem, at.upper, at.batches, other, t
            )
            other = self.inner.move(at.problem, at.upper, other, gradient)
            return (
                t + 1,
                other,
                self.inner.move(here.problem, here.upper, now, gradient),
            )

        _, _, end = tf.while_loop(
            lambda t, *_: t < stop,
            body,
            (tf.constant(self.first), fixed, start),
            maximum_iterations=self.differentiated,
        )
        return end


class _Worst(NamedTuple):
    """The iterate of largest upper loss so far, the first one on ties."""

    upper_loss: tf.Tensor
    steps: tf.Tensor
    lower: Any

    def against(self, here: Prepared, steps: tf.Tensor, lower: Any) -> "_Worst":
        loss = here.problem.upper_loss(here.upper, lower, here.batches.upper)
        # NaN wins and stays, so that it is seen.
        worse = tf.logical_not(
            (loss <= self.upper_loss) | tf.math.is_nan(self.upper_loss)
        )
        return _Worst(
            tf.where(worse, loss, self.upper_loss),
            tf.where(worse, steps, self.steps),
            structure.where(worse, lower, self.lower),
        )


class _Run(NamedTuple):
    """Where some inner steps led.

    Attributes:
        end: the last iterate.
        lower_loss: the lower loss before the last step.
        worst: the worst iterate; `()` unless the end is pessimistic.
    """

    end: Iterate
    lower_loss: tf.Tensor
    worst: Any


class _Loop(NamedTuple):
    """The differentiated part of an inner loop.

    Attributes:
        made: where the steps led.
        pullback: adjoint of the end point's y -> (adjoint of c, `None` where not
            connected; adjoint of the first y).
    """

    made: _Run
    pullback: Callable[[Any], tuple[Any, Any]]


def _tape(method: Unroll, here: Prepared, iterate: Iterate) -> _Loop:
    stop: Any = method.inner.steps
    searched = None
    if method.end == "pessimistic":
        # Once to find the worst iterate, once more to record the way there.
        searched = _search(method, here, iterate)
        stop = searched.worst.steps

    def rest(c: Any, y: Any) -> tuple[Any, _Run]:
        end, value = method._rest(here, c, iterate._replace(lower=y), stop)
        return end.lower, _Run(end, value, ())

    _, made, both = derivatives.vjp(rest, here.upper, iterate.lower)

    def pullback(adjoint: Any) -> tuple[Any, Any]:
        response, start = both(adjoint)
        return response, derivatives.fill_zeros(start, iterate.lower)

    return _Loop(made if searched is None else searched, pullback)


def _replay(method: Unroll, here: Prepared, iterate: Iterate) -> _Loop:
    first, last = method.first, method.inner.steps
    begun, kept = _begun(method, here, iterate), _arrays(iterate, last - first)
    made, kept = _make(method, here, begun, kept, first, last, last - first)
    stop = method._stop(made)

    def pullback(adjoint: Any) -> tuple[Any, Any]:
        sweep = _Sweep(method, here, iterate)
        carried = sweep.run(kept, first, stop, sweep.begin(adjoint))
        return sweep.response(carried), carried.lower

    return _Loop(made, pullback)


def _checkpoint(method: Unroll, here: Prepared, iterate: Iterate) -> _Loop:
    first, last = method.first, method.inner.steps
    length = math.isqrt(last - first - 1) + 1
    segments = -(-(last - first) // length)

    def ends(segment: tf.Tensor, stop: Any) -> tuple[tf.Tensor, tf.Tensor]:
        begin = first + segment * length
        return begin, tf.minimum(begin + length, stop)

    def forward(segment: tf.Tensor, made: _Run, kept: list) -> tuple:
        kept = _write(kept, segment, made.end)
        made, _ = _make(method, here, made, [], *ends(segment, last), length)
        return segment + 1, made, kept

    begun = _begun(method, here, iterate)
    _, made, kept = tf.while_loop(
        lambda *_: True,
        forward,
        (tf.constant(0), begun, _arrays(iterate, segments)),
        maximum_iterations=segments,
        parallel_iterations=SERIAL,
    )
    stop = method._stop(made)

    def pullback(adjoint: Any) -> tuple[Any, Any]:
        sweep = _Sweep(method, here, iterate)

        def backward(segment: tf.Tensor, carried: _Adjoint) -> tuple:
            begin, end = ends(segment, stop)
            now = _Run(
                _read(kept, segment, iterate, begin - first), begun.lower_loss, ()
            )
            _, trajectory = _make(
                method, here, now, _arrays(iterate, length), begin, end, length
            )
            return segment - 1, sweep.run(trajectory, begin, end, carried)

        _, carried = tf.while_loop(
            lambda segment, _: segment >= 0,
            backward,
            (tf.convert_to_tensor((stop - first - 1) // length), sweep.begin(adjoint)),
            maximum_iterations=segments,
            parallel_iterations=SERIAL,
        )
        return sweep.response(carried), carried.lower

    return _Loop(made, pullback)


def _search(method: Unroll, here: Prepared, iterate: Iterate) -> _Run:
    """All differentiated steps; nothing is stored but the worst iterate."""
    first, last = method.first, method.inner.steps
    begun = _begun(method, here, iterate)
    return _make(method, here, begun, [], first, last, last - first)[0]


def _begun(method: Unroll, here: Prepared, iterate: Iterate) -> _Run:
    value = tf.zeros([], tf.nest.flatten(iterate.lower)[0].dtype)
    if method.end == "final":
        return _Run(iterate, value, ())
    loss = here.problem.upper_loss(here.upper, iterate.lower, here.batches.upper)
    lowest = tf.constant(-float("inf"), loss.dtype)
    return _Run(iterate, value, _Worst(lowest, tf.constant(0), iterate.lower))


def _make(
    method: Unroll,
    here: Prepared,
    begun: _Run,
    kept: list,
    first: Any,
    last: Any,
    most: int,
) -> tuple[_Run, list]:
    """Steps first, ..., last - 1; the iterate before each is stored in `kept`, if any
    arrays are given."""

    def body(t: tf.Tensor, now: _Run, kept: list) -> tuple:
        if kept:
            kept = _write(kept, t - first, now.end)
        after, value = method.inner.advance(
            here.problem, here.upper, here.batches, now.end, t
        )
        worst = now.worst
        if isinstance(worst, _Worst):
            worst = worst.against(here, t + 1, after.lower)
        return t + 1, _Run(after, tf.cast(value, now.lower_loss.dtype), worst), kept

    _, made, kept = tf.while_loop(
        lambda t, *_: t < last,
        body,
        (tf.convert_to_tensor(first), begun, kept),
        maximum_iterations=most,
        parallel_iterations=SERIAL,
    )
    return made, kept


class _Adjoint(NamedTuple):
    """What the reverse sweep carries: adjoints of y, of the slots and of c."""

    lower: Any
    slots: list
    upper: Any


class _Sweep:
    """The reverse sweep over stored iterates, each step's map derived anew."""

    def __init__(self, method: Unroll, here: Prepared, iterate: Iterate):
        self.method, self.here, self.start = method, here, iterate
        # Which leaves of c the inner map reaches: known once its step was traced.
        self._connected: set[int] = set()

    def begin(self, adjoint: Any) -> _Adjoint:
        return _Adjoint(
            adjoint,
            structure.zeros_like(self.start.optimizer.slots),
            structure.zeros_like(self.here.upper),
        )

    def run(self, trajectory: list, first: Any, last: Any, start: _Adjoint) -> _Adjoint:
        """Steps last - 1, ..., first; the trajectory begins at step `first`."""

        def body(t: tf.Tensor, after: _Adjoint) -> tuple:
            passed = t - self.method.first
            now = _read(trajectory, t - first, self.start, passed)

            def inner_map(c: Any, y: Any, slots: list) -> tuple[Any, None]:
                optimizer = now.optimizer._replace(slots=slots)
                end, _ = self.method.inner.advance(
                    self.here.problem,
                    c,
                    self.here.batches,
                    Iterate(y, optimizer),
                    t,
                    self.method.first_order,
                )
                return (end.lower, end.optimizer.slots), None

            _, _, pullback = derivatives.vjp(
                inner_map, self.here.upper, now.lower, now.optimizer.slots
            )
            upper, lower, slots = pullback((after.lower, after.slots))
            self._connected.update(
                i for i, e in enumerate(tf.nest.flatten(upper)) if e is not None
            )
            return t - 1, _Adjoint(
                derivatives.fill_zeros(lower, now.lower),
                derivatives.fill_zeros(slots, now.optimizer.slots),
                structure.add(
                    after.upper, derivatives.fill_zeros(upper, self.here.upper)
                ),
            )

        _, carried = tf.while_loop(
            lambda t, _: t >= first,
            body,
            (tf.convert_to_tensor(last) - 1, start),
            maximum_iterations=self.method.differentiated,
            parallel_iterations=OVERLAPPED,
        )
        return carried

    def response(self, carried: _Adjoint) -> Any:
        return tf.nest.pack_sequence_as(
            self.here.upper,
            [
                entry if index in self._connected else None
                for index, entry in enumerate(tf.nest.flatten(carried.upper))
            ],
        )


def _stored(iterate: Iterate) -> list[tf.Tensor]:
    """What a trajectory keeps of an iterate: the rest follows from the step number."""
    return tf.nest.flatten((iterate.lower, iterate.optimizer.slots))


def _arrays(iterate: Iterate, size: int) -> list[tf.TensorArray]:
    return [
        tf.TensorArray(
            leaf.dtype, size, element_shape=leaf.shape, clear_after_read=False
        )
        for leaf in _stored(iterate)
    ]


def _write(arrays: list, index: tf.Tensor, iterate: Iterate) -> list:
    leaves = _stored(iterate)
    return [a.write(index, leaf) for a, leaf in zip(arrays, leaves, strict=True)]


def _read(arrays: list, index: tf.Tensor, start: Iterate, passed: Any) -> Iterate:
    """The stored iterate at `index`, `passed` steps after the loop's start."""
    like = (start.lower, start.optimizer.slots)
    leaves = [array.read(index) for array in arrays]
    lower, slots = tf.nest.pack_sequence_as(like, leaves)
    iteration = start.optimizer.iteration
    iteration += tf.cast(passed, iteration.dtype)
    return Iterate(lower, start.optimizer._replace(iteration=iteration, slots=slots))
