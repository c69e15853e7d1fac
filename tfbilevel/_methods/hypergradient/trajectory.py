"""Parts of an inner loop with a reverse sweep, and three ways to store them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Nest
from tfbilevel._calculus.collectives import unread_losses
from tfbilevel._calculus.loops import serial_loop
from tfbilevel._core.inner_solver import InnerSolver, Iterate
from tfbilevel._core.prepared import Prepared
from tfbilevel._methods.hypergradient.stored_iterates import arrays, read, write

ENDS = ("final", "pessimistic")

# In the reverse sweep each step is linearised again at a stored iterate. This can begin
# before the adjoint of the previous step is available.
OVERLAPPED = 2


class Span(NamedTuple):
    """The inner steps that are differentiated, and how.

    Attributes:
        inner: the solver that makes the steps.
        first: the number of the first step.
        first_order: whether the inner gradients are treated as constants.
        pessimistic: whether they end at the iterate with the largest upper loss.
        host: whether the iterates are kept in the host's memory.
    """

    inner: InnerSolver
    first: int
    first_order: bool
    pessimistic: bool
    host: bool = False

    @property
    def last(self) -> int:
        """The step after the last one."""
        return self.inner.steps

    @property
    def most(self) -> int:
        """The number of steps."""
        return self.last - self.first

    def stop(self, made: "Run") -> Any:
        """The number of steps up to the end point; one per task if tasks differ."""
        return made.worst.steps if self.pessimistic else self.last

    def run(self, here: Prepared, iterate: Iterate, stop: Any) -> tuple[Iterate, Any]:
        """The steps up to `stop`, from the iterate before them."""
        return self.inner.run(
            here, iterate, self.first, stop, self.most, self.first_order
        )


class Worst(NamedTuple):
    """The iterate with the largest upper loss so far, the first one on ties; one per
    task."""

    upper_loss: tf.Tensor
    steps: tf.Tensor
    lower: Nest

    def against(self, here: Prepared, steps: tf.Tensor, lower: Nest) -> "Worst":
        loss = here.upper_losses(lower)
        # NaN wins and stays, so that it is reported.
        worse = tf.logical_not(
            (loss <= self.upper_loss) | tf.math.is_nan(self.upper_loss)
        )
        return Worst(
            tf.where(worse, loss, self.upper_loss),
            tf.where(worse, steps, self.steps),
            here.where(worse, lower, self.lower),
        )


class Run(NamedTuple):
    """The result of some inner steps.

    Attributes:
        end: the last iterate.
        lower_loss: the lower loss before the last step.
        worst: the worst iterate; `()` unless the end is pessimistic.
    """

    end: Iterate
    lower_loss: tf.Tensor
    worst: Any


class Loop(NamedTuple):
    """The differentiated part of an inner loop.

    Attributes:
        made: the result of the steps.
        pullback: adjoint of the end point's y -> (adjoint of c, `None` where not
            connected; adjoint of the first y).
    """

    made: Run
    pullback: Callable[[Any], tuple[Any, Any]]


def tape(span: Span, here: Prepared, iterate: Iterate) -> Loop:
    stop: Any = span.last
    searched = None
    if span.pessimistic:
        # One pass finds the worst iterate, and a second one records the steps to it.
        searched = search(span, here, iterate)
        stop = searched.worst.steps

    def rest(c: Nest, y: Nest) -> tuple[Any, Run]:
        end, value = span.run(here.at(c), iterate._replace(lower=y), stop)
        return end.lower, Run(end, value, ())

    _, made, both = derivatives.vjp(rest, here.upper, iterate.lower)

    def pullback(adjoint: Nest) -> tuple[Any, Any]:
        response, start = both(adjoint)
        return response, derivatives.fill_zeros(start, iterate.lower)

    return Loop(made if searched is None else searched, pullback)


def replay(span: Span, here: Prepared, iterate: Iterate) -> Loop:
    first, last = span.first, span.last
    begun, kept = _begun(span, here, iterate), arrays(iterate, last - first, span.host)
    made, kept = _make(span, here, begun, kept, first, last, last - first)
    stop = span.stop(made)

    def pullback(adjoint: Nest) -> tuple[Any, Any]:
        sweep = _Sweep(span, here, iterate, stop)
        carried = sweep.run(kept, first, _latest(stop), sweep.begin(adjoint))
        return sweep.response(carried), carried.lower

    return Loop(made, pullback)


def checkpoint(span: Span, here: Prepared, iterate: Iterate) -> Loop:
    first, last = span.first, span.last
    length = math.isqrt(last - first - 1) + 1
    segments = -(-(last - first) // length)

    def ends(segment: tf.Tensor, stop: Any) -> tuple[tf.Tensor, tf.Tensor]:
        begin = first + segment * length
        return begin, tf.minimum(begin + length, stop)

    def forward(segment: tf.Tensor, made: Run, kept: list) -> tuple:
        after, _ = _make(span, here, made, [], *ends(segment, last), length)
        return segment + 1, after, write(kept, segment, made.end, span.host)

    begun = _begun(span, here, iterate)
    _, made, kept = serial_loop(
        lambda *_: True,
        forward,
        (tf.constant(0), begun, arrays(iterate, segments, span.host)),
        segments,
    )
    stop = span.stop(made)
    latest = _latest(stop)

    def pullback(adjoint: Nest) -> tuple[Any, Any]:
        sweep = _Sweep(span, here, iterate, stop)

        def backward(segment: tf.Tensor, carried: _Adjoint) -> tuple:
            begin, end = ends(segment, latest)
            now = Run(
                read(kept, segment, iterate, begin - first, span.host),
                begun.lower_loss,
                (),
            )
            _, trajectory = _make(
                span, here, now, arrays(iterate, length, span.host), begin, end, length
            )
            return segment - 1, sweep.run(trajectory, begin, end, carried)

        final = tf.convert_to_tensor((latest - first - 1) // length)
        _, carried = serial_loop(
            lambda segment, _: segment >= 0,
            backward,
            (final, sweep.begin(adjoint)),
            segments,
        )
        return sweep.response(carried), carried.lower

    return Loop(made, pullback)


def search(span: Span, here: Prepared, iterate: Iterate) -> Run:
    """All differentiated steps; only the worst iterate is stored."""
    first, last = span.first, span.last
    begun = _begun(span, here, iterate)
    return _make(span, here, begun, [], first, last, last - first)[0]


def _latest(stop: Any) -> Any:
    """The largest stop over all tasks."""
    return tf.reduce_max(stop) if tf.is_tensor(stop) else stop


def _begun(span: Span, here: Prepared, iterate: Iterate) -> Run:
    value = tf.zeros([], tf.nest.flatten(iterate.lower)[0].dtype)
    if not span.pessimistic:
        return Run(iterate, value, ())
    loss = here.upper_losses(iterate.lower)
    lowest = tf.fill(loss.shape, tf.constant(-float("inf"), loss.dtype))
    none = tf.zeros(loss.shape, tf.int32)
    return Run(iterate, value, Worst(lowest, none, iterate.lower))


def _make(
    span: Span,
    here: Prepared,
    begun: Run,
    kept: list,
    first: Any,
    last: Any,
    most: int,
) -> tuple[Run, list]:
    """Steps first, ..., last - 1; the iterate before each is stored in `kept` if arrays
    are given."""

    def body(t: tf.Tensor, now: Run, kept: list) -> tuple:
        after, value = span.inner.advance(here, now.end, t)
        worst = now.worst
        if isinstance(worst, Worst):
            worst = worst.against(here, t + 1, after.lower)
        if kept:  # at the end: after an error TensorFlow complains of unused writes
            kept = write(kept, t - first, now.end, span.host)
        return t + 1, Run(after, tf.cast(value, now.lower_loss.dtype), worst), kept

    _, made, kept = serial_loop(
        lambda t, *_: t < last,
        body,
        (tf.convert_to_tensor(first), begun, kept),
        most,
    )
    return made, kept


class _Adjoint(NamedTuple):
    """The state of the reverse sweep: adjoints of y, of the slots and of c."""

    lower: Nest
    slots: list
    upper: Nest


class _Sweep:
    """The reverse sweep over stored iterates, with each step linearised again."""

    def __init__(self, span: Span, here: Prepared, iterate: Iterate, stop: Any):
        self.span, self.here, self.start, self.stop = span, here, iterate, stop
        self._each = tf.is_tensor(stop) and stop.shape.rank == 1
        # The leaves of c that affect the inner map, known once a step is traced.
        self._connected: set[int] = set()

    def begin(self, adjoint: Nest) -> _Adjoint:
        self._given = adjoint
        return _Adjoint(
            # If tasks have separate ends, each task's adjoint enters at its own end.
            structure.zeros_like(adjoint) if self._each else adjoint,
            structure.zeros_like(self.start.optimizer.slots),
            structure.zeros_like(self.here.upper),
        )

    def run(self, trajectory: list, first: Any, last: Any, start: _Adjoint) -> _Adjoint:
        """Steps last - 1, ..., first; the trajectory starts at step `first`."""

        def body(t: tf.Tensor, after: _Adjoint) -> tuple:
            passed = t - self.span.first
            if self._each:
                ends = tf.equal(self.stop, t + 1)
                after = after._replace(
                    lower=structure.where(ends, self._given, after.lower)
                )
            now = read(trajectory, t - first, self.start, passed, self.span.host)

            def inner_map(c: Nest, y: Nest, slots: list) -> tuple[Any, None]:
                optimizer = now.optimizer._replace(slots=slots)
                with unread_losses():
                    end, _ = self.span.inner.advance(
                        self.here.at(c), Iterate(y, optimizer), t, self.span.first_order
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
            maximum_iterations=self.span.most,
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
