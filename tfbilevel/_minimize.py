"""The outer loop for plain tensors, compiled as a whole."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Metrics, Nest, State
from tfbilevel._check.example_indices import explain
from tfbilevel._check.look import require_second_derivatives
from tfbilevel._core.arguments import require_callable, require_count
from tfbilevel._core.batches import Batches, require_batches
from tfbilevel._core.method import Method, require_method
from tfbilevel._core.nonfinite import NonFiniteError, first_nonfinite, warn_diverged
from tfbilevel._core.problem import Problem, require_problem
from tfbilevel._optimizers.update_rule import UpdateRule, configuration, widest
from tfbilevel._workarounds.memory_optimizer import without_memory_rewrites
from tfbilevel._workarounds.row_exchange import called_in_loop


class Point(NamedTuple):
    """The state of the outer loop that `stop` and `trace` receive.

    Attributes:
        step: the number of outer steps so far, including those of the runs it
            continues; int32 scalar.
        upper: the upper variables.
        lower: the lower variables.
        metrics: the metrics of the last step; `{}` before the first.
    """

    step: tf.Tensor
    upper: Nest
    lower: Nest
    metrics: Metrics


class Result(NamedTuple):
    """The result of `tb.minimize`.

    Attributes:
        upper: the final upper variables.
        lower: the final lower variables.
        state: the state of the method and the upper optimizer, to continue the run. It
            contains the compiled loop; a copy, or a saved one, is compiled again.
            `state.at(other)` is another state with the same compiled loop.
        steps: outer steps made; one number per start if `stop` returns a vector.
        stopped: whether `stop` ended the run; likewise per start.
        metrics: the last step's metrics.
        trace: the results of `trace` at every step, with a leading axis of steps;
            `None` without `trace`.
    """

    upper: Nest
    lower: Nest
    state: State
    steps: tf.Tensor
    stopped: tf.Tensor
    metrics: Metrics
    trace: Any


def minimize(
    problem: Problem,
    method: Method,
    upper: Nest,
    lower: Nest,
    upper_optimizer: keras.optimizers.Optimizer,
    batches: Batches | tf.data.Dataset | Callable[[tf.Tensor], Batches],
    steps: int,
    stop: Callable[[Point, Point], tf.Tensor] | None = None,
    trace: Callable[[Point], Any] | None = None,
    *,
    state: State = None,
    jit_compile: bool = False,
) -> Result:
    """Solve a bilevel problem over plain tensors in one compiled loop.

        x <- P( x - upper_optimizer(hypergradient) ),    `steps` times

    For toys, tests and full-batch problems; `BilevelModel.fit` is for networks. All
    outer steps run in one call that is traced once. Continuing with the same objects
    (no dataset) and the last result's variables and `state` does not trace again.
    Memory: that of one step, plus the trace.

    Many starts run as one problem if the losses are sums over a leading axis that all
    variables share, since the gradients of different starts do not mix. But a quantity
    that a method computes from all its variables together is then shared by all
    starts: the coefficient of `tb.RankOne`, the end of `end="pessimistic"`, the exact
    step of `tb.BAMM`, an inner `atol`. With these, use `tb.over_tasks`, or one start
    per call. `stop` may return one bool per start; a start that has stopped keeps its
    values and its step count. The result's `state` changes with the other starts, so
    continue only runs that stop as a whole.

    Args:
        problem: the problem.
        method: the method.
        upper: x at the start, a nest of floating-point tensors.
        lower: y at the start, likewise.
        upper_optimizer: a Keras optimizer that `tb.differentiable` supports.
        batches: the same `tb.Batches` for every step, a dataset of them, or a function
            of the step number (int32 scalar, from 0, counting earlier runs too).
        steps: maximal number of outer steps, at least 1.
        stop: (point before, point after) -> bool, scalar or one per start.
        trace: point after -> nest of tensors to record at every step.
        state: the `state` of an earlier result, to continue it.
        jit_compile: compile the loop with XLA.

    Returns:
        A `tb.Result`.

    Raises:
        ValueError: for variables, batches or optimizers of the wrong kind, or a
            dataset with fewer elements than `steps` (if its length is unknown,
            `tf.errors.OutOfRangeError` when it ends).
        tb.MissingSecondDerivativeError: if the method takes second derivatives of the
            lower loss that are missing or wrong in TensorFlow.
        tb.NonFiniteError: if a loss, gradient or variable stops being finite; its
            `point` holds the variables from before that step.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.5), steps=20)
        >>> result = tb.minimize(
        ...     problem, tb.Unroll(inner), upper=0.0, lower=0.0,
        ...     upper_optimizer=keras.optimizers.SGD(0.5),
        ...     batches=tb.Batches(None, None), steps=30)
        >>> round(float(result.upper), 4)
        1.0
    """
    require_count(steps, "steps")
    require_method(method)
    require_problem(problem)
    for name, option in (("stop", stop), ("trace", trace)):
        if option is not None:
            require_callable(option, name)
    upper, lower = structure.to_tensors(upper), structure.to_tensors(lower)
    structure.require_floating(upper, "upper")
    structure.require_floating(lower, "lower")
    UpdateRule(upper_optimizer, "upper_optimizer")  # raises if it is not supported
    if jit_compile and isinstance(batches, tf.data.Dataset):
        raise ValueError(
            "`jit_compile` cannot compile the reading of a dataset. Pass fixed batches "
            "or a function of the step number, or leave it False. "
            f"Received: jit_compile=True, batches={batches!r}"
        )
    dtype = widest(tf.nest.flatten((upper, lower)))
    source, data = _batch_source(batches, steps, dtype)
    options = repr(configuration(upper_optimizer))
    parts = (problem, method, upper_optimizer, options, source, steps)
    loop = _loop_of((*parts, stop, trace, jit_compile), state)
    rule = loop.rule
    if state is None:
        state = (method.init(problem, upper, lower), rule.init(upper))
    elif not rule.scheduled:  # the current rate, not that of when the state was made
        rate = tf.constant(rule.learning_rate, state[1].learning_rate.dtype)
        state = (state[0], state[1]._replace(learning_rate=rate))
    with without_memory_rewrites():
        made = loop.run(upper, lower, tuple(state), data)
    k, start, upper, lower, state, bad, diverged, stopped, taken, metrics, record = made
    if int(bad) >= 0:
        point = Point(start + k - 1, upper, lower, {})
        if not isinstance(batches, tf.data.Dataset):
            data = batches(point.step) if callable(batches) else data
            explain(problem, upper, problem._one_lower(lower), data)
        raise NonFiniteError(int(bad), int(point.step), point)
    if int(diverged) >= 0:
        warn_diverged(method, int(diverged))
    state, made = _Carried().at(state, loop), int(k)
    record = tf.nest.map_structure(lambda leaf: leaf[:made], record)
    rows = None if trace is None else record
    return Result(upper, lower, state, taken, stopped, metrics, rows)


class _Loop(NamedTuple):
    """A compiled loop.

    Attributes:
        parts: the objects it was compiled from.
        rule: the update of the upper variables.
        run: (x, y, state, batches) -> the final values of the loop.
    """

    parts: tuple
    rule: UpdateRule
    run: Callable


def _compile(
    problem: Problem,
    method: Method,
    upper_optimizer: keras.optimizers.Optimizer,
    options: str,
    source: Any,
    steps: int,
    stop: Callable | None,
    trace: Callable | None,
    jit_compile: bool,
) -> tuple[UpdateRule, Callable]:
    """The compiled loop, a function of (x, y, state, batches), and its upper rule."""
    del options  # only part of the key that identifies the loop
    rule = UpdateRule(upper_optimizer)
    if not isinstance(source, _Source):
        function = source
        source = _Source(lambda k, _: function(k), lambda _: function(tf.constant(0)))

    @called_in_loop()
    def outer_step(
        k: tf.Tensor, x: Nest, y: Nest, carried: State, batch: Batches
    ) -> tuple:
        here = problem.seeded(k)
        step = here.step(method, x, y, batch, carried[0])
        moved, optimizer = rule.update(step.upper_gradient, carried[1], x)
        moved = here.projected_upper(step.scaled(x, moved))
        after = Point(k + 1, moved, step.lower, step.metrics)
        done = tf.constant(False)
        if stop is not None:
            done = tf.convert_to_tensor(stop(Point(k, x, y, {}), after))
            if done.dtype != tf.bool:
                raise ValueError(
                    "`stop` must return a bool, scalar or one per start. Compare what "
                    f"it measures with a tolerance. Received: dtype {done.dtype.name}"
                )
        bad = first_nonfinite(step, moved)
        return after, (step.state, optimizer), bad, done

    def recorded(point: Point) -> Any:
        return () if trace is None else trace(point)

    def loop(x: Nest, y: Nest, carried: State, data: Any) -> tuple:
        start = tf.cast(carried[1].iteration, tf.int32)  # 0 for a new run
        # Trace one step first, to know the structure of its results.
        first = source.first(data)
        require_second_derivatives(problem, method, *_specs((x, y, first)))
        compiled = tf.function(outer_step, autograph=False).get_concrete_function(
            *_specs((tf.constant(0), x, y, carried)), _specs(first)
        )
        like = compiled.structured_outputs
        record = tf.function(recorded, autograph=False).get_concrete_function(
            _specs(like[0])
        )
        metrics = _zeros(like[0].metrics)
        done = _zeros(like[3])
        arrays = [
            tf.TensorArray(leaf.dtype, steps, element_shape=leaf.shape)
            for leaf in tf.nest.flatten(record.structured_outputs)
        ]

        def unfinished(
            k: Any, x: Nest, y: Nest, s: Any, seen: Any, done: Any, *_: Any
        ) -> Any:
            return (seen[0] < 0) & ~tf.reduce_all(done)

        def body(
            k: Any,
            x: Nest,
            y: Nest,
            s: Any,
            seen: tuple,
            done: Any,
            taken: Any,
            m: Any,
            a: Nest,
        ) -> tuple:
            number = start + k
            after, s, bad, now = compiled(number, x, y, s, source.at(number, data))
            diverged = tf.reduce_any(after.metrics.get("diverged", 0.0) > 0)
            diverged = tf.where(diverged & (seen[1] < 0), number, seen[1])
            taken = taken + tf.cast(~done, tf.int32)
            frozen = (bad >= 0) | (done if done.shape.rank else False)
            x = structure.where(frozen, x, after.upper)
            y = structure.where(frozen, y, after.lower)
            kept = recorded(Point(number + 1, x, y, after.metrics))
            return (
                k + 1,
                x,
                y,
                s,
                (bad, diverged),
                done | now,
                taken,
                after.metrics,
                [
                    array.write(k, leaf)
                    for array, leaf in zip(a, tf.nest.flatten(kept), strict=True)
                ],
            )

        k, x, y, carried, seen, done, taken, metrics, arrays = tf.while_loop(
            unfinished,
            body,
            (
                tf.constant(0),
                x,
                y,
                carried,
                (tf.constant(-1), tf.constant(-1)),
                done,
                tf.zeros_like(done, tf.int32),
                metrics,
                arrays,
            ),
            maximum_iterations=steps,
        )
        rows = [array.stack() for array in arrays]
        rows = tf.nest.pack_sequence_as(record.structured_outputs, rows)
        return k, start, x, y, carried, *seen, done, taken, metrics, rows

    return rule, tf.function(loop, autograph=False, jit_compile=jit_compile)


class _Carried(tuple):
    """A state as `Result` holds it, with the compiled loop that computed it.

    A copy, or one from a file, has no loop: its run is compiled again.
    """

    loop: _Loop | None = None

    def __reduce__(self) -> tuple:
        return tuple, (tuple(self),)

    def at(self, state: State, loop: _Loop | None = None) -> "_Carried":
        """Another state, of a new run, with the same compiled loop."""
        made = _Carried(state)
        made.loop = loop or self.loop
        return made


def _loop_of(parts: tuple, state: State) -> _Loop:
    """The compiled loop for exactly these objects.

    A loop is reused only to continue from its own state. A new run is traced again,
    because a loss may read Python values that have changed since.
    """
    made = getattr(state, "loop", None)
    if made is not None:
        pairs = zip(made.parts, parts, strict=True)
        if all(a is b or (isinstance(a, (str, int)) and a == b) for a, b in pairs):
            return made
    return _Loop(parts, *_compile(*parts))


class _Source(NamedTuple):
    """The source of the loop's batches.

    Attributes:
        at: (step, data) -> batches.
        first: data -> batches or their specification, for tracing a step.
    """

    at: Callable[[tf.Tensor, Any], Any]
    first: Callable[[Nest], Nest]


_FIXED = _Source(at=lambda k, data: data, first=lambda data: data)


def _batch_source(batches: Any, steps: int, dtype: tf.DType) -> tuple[Any, Any]:
    """A source, or the user's function of the step number, and the loop's data."""
    if isinstance(batches, tf.data.Dataset):
        require_batches(batches.element_spec, "every element of the dataset `batches`")
        count = int(batches.cardinality())
        if 0 <= count < steps:
            raise ValueError(
                "`batches` must have an element for every step. Use `.repeat()` or "
                f"lower `steps`. Received: {count} elements, steps={steps}"
            )
        iterator = iter(batches)
        spec = batches.element_spec
        return _Source(lambda k, data: iterator.get_next(), lambda data: spec), ()
    if callable(batches):
        return batches, ()
    require_batches(batches)
    return _FIXED, _to_tensors(batches, dtype)


def _to_tensors(batches: Batches, dtype: tf.DType) -> Batches:
    def convert(leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, (tf.SparseTensor, tf.RaggedTensor)):
            return leaf
        return tf.convert_to_tensor(leaf, dtype if type(leaf) is float else None)

    return tf.nest.map_structure(convert, batches)


def _specs(values: Any) -> Any:
    def spec(leaf: Any) -> Any:
        return tf.type_spec_from_value(leaf) if tf.is_tensor(leaf) else leaf

    return tf.nest.map_structure(spec, values)


def _zeros(like: Nest) -> Any:
    return tf.nest.map_structure(lambda leaf: tf.zeros(leaf.shape, leaf.dtype), like)
