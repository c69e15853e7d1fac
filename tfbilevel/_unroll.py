"""Reverse-mode differentiation through the inner loop."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tfbilevel import _derivatives as derivatives
from tfbilevel import _structure as structure
from tfbilevel._inner import (
    SERIAL,
    InnerSolver,
    Iterate,
    require_choice,
    require_count,
    require_inner,
)
from tfbilevel._method import Method, Step
from tfbilevel._problem import Batches, Prepared, Problem


@dataclasses.dataclass(frozen=True, eq=False)
class Unroll(Method):
    r"""Hypergradient by reverse mode through the inner steps (RHG, ITD, T-RHG).

        y_{t+1} = Phi(x, y_t),  t < T;        dF/dx = d/dx f(x, y_T(x))

    computed by the adjoint recursion a_T = f_y, a_t = Phi_y' a_{t+1}, adding
    Phi_x' a_{t+1} to f_x at each of the last `last` steps. It is the exact gradient
    of f(x, y_T(x)) for every T; with `last = K` it takes y_{T-K} for constant, an
    error that decays like (1 - rate * curvature)^K.

    Cost: T inner steps and, for each differentiated one, a vector-Jacobian product
    of about two more gradients. Memory besides one step's: "replay" the K iterates,
    "checkpoint" 2 sqrt(K) iterates for one more inner step per step, "tape"
    everything that every step computed. No assumption on the lower loss but that it
    is twice differentiable. Prefer `Implicit` when the inner solve is long and
    converges.

    Args:
        inner: the inner solver whose steps are differentiated.
        last: K, how many last steps to differentiate; `None`: all.
        memory: "replay", "checkpoint" or "tape". All give the same gradient.

    Raises:
        ValueError: if `last` is not between 1 and `inner.steps`, or `memory` is
            unknown.

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
    """

    inner: InnerSolver
    last: int | None = None
    memory: str = "replay"

    def __post_init__(self) -> None:
        require_inner(self.inner)
        require_choice(self.memory, "memory", ("replay", "checkpoint", "tape"))
        if self.last is not None:
            require_count(self.last, "last")
            if self.last > self.inner.steps:
                raise ValueError(
                    "`last` must not exceed the inner solver's steps: only steps that "
                    "are made can be differentiated. Lower `last` or raise `steps`. "
                    f"Received: last={self.last}, steps={self.inner.steps}"
                )

    @property
    def differentiated(self) -> int:
        """K, how many inner steps are differentiated."""
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
        here = problem.prepared(upper, batches)
        loop = {"replay": _replay, "checkpoint": _checkpoint, "tape": _tape}[
            self.memory
        ]
        iterate, pull_start = self._begin(here, lower, state)
        iterate, _ = self.inner.run(
            here.problem, here.upper, here.batches, iterate, 0, self.first, self.first
        )
        end, lower_loss, pullback = loop(self, here, iterate)
        upper_loss, partial, adjoint = here.upper_partials(end.lower)
        response, adjoint = pullback(adjoint)
        if self.first == 0 and pull_start is not None:
            response = derivatives.add_partials(response, pull_start(adjoint)[0])
        return Step(
            upper_gradient=here.gradient(partial, response),
            lower=end.lower,
            state=self.inner.carried(end, state),
            metrics={"upper_loss": upper_loss, "lower_loss": lower_loss},
        )

    def objective(
        self, problem: Problem, upper: Any, lower: Any, batches: Batches, state: Any
    ) -> Callable[[Any], tf.Tensor]:
        if self.first == 0:
            return super().objective(problem, upper, lower, batches, state)
        at = problem.prepared(upper, batches)
        iterate = self.inner.begin(at.problem, at.upper, lower, state)
        fixed, _ = self.inner.run(
            at.problem, at.upper, at.batches, iterate, 0, self.first, self.first
        )

        def value(x: Any) -> tf.Tensor:
            here = problem.prepared(x, batches)
            end, _ = self._rest(here, here.upper, fixed)
            return here.problem.upper_loss(here.upper, end.lower, here.batches.upper)

        return value

    def _begin(
        self, here: Prepared, lower: Any, state: Any
    ) -> tuple[Iterate, derivatives.Pullback | None]:
        if here.problem.lower_start is None:
            return self.inner.begin(here.problem, here.upper, lower, state), None

        def start(c: Any) -> tuple[Any, Iterate]:
            iterate = self.inner.begin(here.problem, c, lower, state)
            return iterate.lower, iterate

        _, iterate, pullback = derivatives.vjp(start, here.upper)
        return iterate, pullback

    def _rest(self, here: Prepared, c: Any, iterate: Iterate) -> tuple[Iterate, Any]:
        """The differentiated steps, from the iterate before them."""
        return self.inner.run(
            here.problem,
            c,
            here.batches,
            iterate,
            self.first,
            self.inner.steps,
            self.differentiated,
        )


class _Loop(NamedTuple):
    """The differentiated part of an inner loop.

    Attributes:
        end: the last iterate.
        lower_loss: the lower loss before the last step.
        pullback: adjoint of the last y -> (adjoint of c, `None` where not
            connected; adjoint of the first y).
    """

    end: Iterate
    lower_loss: tf.Tensor
    pullback: Callable[[Any], tuple[Any, Any]]


def _tape(method: Unroll, here: Prepared, iterate: Iterate) -> _Loop:
    def rest(c: Any, y: Any) -> tuple[Any, tuple[Iterate, tf.Tensor]]:
        end, value = method._rest(here, c, iterate._replace(lower=y))
        return end.lower, (end, value)

    _, (end, value), both = derivatives.vjp(rest, here.upper, iterate.lower)

    def pullback(adjoint: Any) -> tuple[Any, Any]:
        response, start = both(adjoint)
        return response, derivatives.fill_zeros(start, iterate.lower)

    return _Loop(end, value, pullback)


def _replay(method: Unroll, here: Prepared, iterate: Iterate) -> _Loop:
    first, last = method.first, method.inner.steps
    trajectory, end, value = _record(method, here, iterate, first, last, last - first)

    def pullback(adjoint: Any) -> tuple[Any, Any]:
        sweep = _Sweep(method, here, iterate)
        carried = sweep.run(trajectory, first, last, sweep.begin(adjoint))
        return sweep.response(carried), carried.lower

    return _Loop(end, value, pullback)


def _checkpoint(method: Unroll, here: Prepared, iterate: Iterate) -> _Loop:
    first, last = method.first, method.inner.steps
    length = math.isqrt(last - first - 1) + 1
    segments = -(-(last - first) // length)
    dtype = tf.nest.flatten(iterate.lower)[0].dtype

    def ends(segment: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        begin = first + segment * length
        return begin, tf.minimum(begin + length, last)

    def forward(segment: tf.Tensor, now: Iterate, value: Any, kept: list) -> tuple:
        del value
        kept = _write(kept, segment, now)
        after, value = method.inner.run(
            here.problem, here.upper, here.batches, now, *ends(segment), length
        )
        return segment + 1, after, value, kept

    _, end, value, kept = tf.while_loop(
        lambda *_: True,
        forward,
        (tf.constant(0), iterate, tf.zeros([], dtype), _arrays(iterate, segments)),
        maximum_iterations=segments,
        parallel_iterations=SERIAL,
    )

    def pullback(adjoint: Any) -> tuple[Any, Any]:
        sweep = _Sweep(method, here, iterate)

        def backward(segment: tf.Tensor, carried: _Adjoint) -> tuple:
            begin, stop = ends(segment)
            now = _read(kept, segment, iterate, begin - first)
            trajectory, _, _ = _record(method, here, now, begin, stop, length)
            return segment - 1, sweep.run(trajectory, begin, stop, carried)

        _, carried = tf.while_loop(
            lambda *_: True,
            backward,
            (tf.constant(segments - 1), sweep.begin(adjoint)),
            maximum_iterations=segments,
            parallel_iterations=SERIAL,
        )
        return sweep.response(carried), carried.lower

    return _Loop(end, value, pullback)


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
                    self.here.problem, c, self.here.batches, Iterate(y, optimizer), t
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
            parallel_iterations=SERIAL,
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


def _record(
    method: Unroll, here: Prepared, iterate: Iterate, first: Any, last: Any, most: int
) -> tuple[list, Iterate, tf.Tensor]:
    """Steps first, ..., last - 1, and the iterate before each of them."""
    dtype = tf.nest.flatten(iterate.lower)[0].dtype

    def body(t: tf.Tensor, now: Iterate, value: Any, kept: list) -> tuple:
        del value
        kept = _write(kept, t - first, now)
        after, value = method.inner.advance(
            here.problem, here.upper, here.batches, now, t
        )
        return t + 1, after, tf.cast(value, dtype), kept

    _, end, value, kept = tf.while_loop(
        lambda t, *_: t < last,
        body,
        (
            tf.convert_to_tensor(first),
            iterate,
            tf.zeros([], dtype),
            _arrays(iterate, most),
        ),
        maximum_iterations=most,
        parallel_iterations=SERIAL,
    )
    return kept, end, value


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
