"""The bilevel problem and its batches."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfbilevel import _structure as structure
from tfbilevel._arguments import require_callable, require_count, takes_two
from tfbilevel._derivatives import (
    Pullback,
    add_partials,
    fill_zeros,
    require_connected,
    require_scalar,
    value_and_partials,
    vjp,
)
from tfbilevel._randomness import (
    DRAW,
    LOWER_LOSS,
    PREPARE,
    PROJECT_LOWER,
    PROJECT_UPPER,
    ROLE,
    START,
    UPPER_LOSS,
    Noisy,
    as_seed,
    folded,
    noisy,
    of_step,
    of_tasks,
    with_seed,
)
from tfbilevel._task_loss import (
    Loss,
    TaskLoss,
    losses,
    one_like,
    require_dense,
    rewired,
)


class Batches(NamedTuple):
    """The data of one outer step, named so that the levels cannot be swapped.

    Attributes:
        upper: what `upper_loss` receives as its batch (validation data).
        lower: what `lower_loss` receives as its batch (training data).
    """

    upper: Any
    lower: Any

    def lower_at(self, draw: Any) -> Any:
        """The lower batch of one draw (inner step): here always the same."""
        del draw
        return self.lower


class StackedBatches(Batches):
    """Batches whose lower part has a leading axis: one slice per draw.

    Inner step t takes slice t; a stochastic linear solve goes on after the last
    inner step; draws beyond the last slice start again at the first. Leaves may be
    sparse, with their entries in order, as datasets give them.
    """

    __slots__ = ()

    def lower_at(self, draw: Any) -> Any:
        leaves = [leaf for leaf in tf.nest.flatten(self.lower) if leaf is not None]
        if not leaves:
            return self.lower
        count = tf.shape(leaves[0])[0]
        index = tf.math.floormod(tf.cast(draw, tf.int32), count)
        return tf.nest.map_structure(lambda leaf: _slice(leaf, index), self.lower)


def _slice(leaf: Any, index: tf.Tensor) -> Any:
    """leaf[index] along the first axis of a tensor, dense, ragged or sparse."""
    if leaf is None:
        return None
    if not isinstance(leaf, tf.SparseTensor):
        return tf.gather(leaf, index)
    # Its entries lie side by side; `tf.sparse.slice` would read those of all slices.
    index = tf.cast(index, tf.int64)
    begin, end = (_first_entry(leaf.indices, number) for number in (index, index + 1))
    made = tf.SparseTensor(
        leaf.indices[begin:end, 1:], leaf.values[begin:end], leaf.dense_shape[1:]
    )
    made.set_shape(leaf.shape[1:])
    return made


def _first_entry(indices: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """Where slice `number` begins among the entries: on a coarse grid, then between
    two of its points, so that finding it copies no long column."""
    stride = 1024
    before = tf.searchsorted(indices[::stride, 0], number[None], out_type=tf.int64)[0]
    first = tf.maximum(before - 1, 0) * stride
    near = indices[first : first + stride, 0]
    return first + tf.searchsorted(near, number[None], out_type=tf.int64)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    r"""Choose upper variables x so that the lower problem's solution does well.

        min_x  f(x, y*(x))      with      y*(x) in argmin_y g(x, y)

    x and y are any `tf.nest` structures of floating-point tensors.

    Args:
        upper_loss: f, called as `upper_loss(x, y, batch) -> scalar tensor`.
        lower_loss: g, called as `lower_loss(x, y, batch) -> scalar tensor`.
        lower_start: x -> y, where every inner solve starts; differentiated through
            by the methods that unroll. `None`: where the inner solver's `start`
            says.
        project_upper: x -> x, applied after every upper step (boxes, simplices).
        project_lower: y -> y, applied after every lower step; part of the inner map
            that unrolling differentiates. A function of two required parameters is
            (x, y) -> y: a proximal step whose strength is learned. Methods that do not
            differentiate projections refuse one that depends on x.
        prepare: (x, batches) -> batches, computed once per outer step and
            differentiated through: features of a shared encoder that no inner
            step changes.
        reads: (function, x) -> what the function gives: how `learning_rate` of an
            inner solver is called. `None`: with x. `tb.BilevelModel` calls it with
            the upper model.
        seed: an integer, of all that the functions sample. Within an outer step they
            are fixed functions, whatever they sample by (`tf.random`, `keras.random`,
            random layers); `seeded` gives each outer step other numbers.

    Raises:
        ValueError: if a loss or an option is not callable, or the seed no integer.

    Example:
        >>> import tensorflow as tf
        >>> import tfbilevel as tb
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: tf.reduce_sum((y - batch) ** 2),
        ...     lower_loss=lambda x, y, batch: tf.reduce_sum((y - x * batch) ** 2),
        ... )
        >>> float(problem.lower_loss(tf.constant(2.0), tf.constant([1.0]), 1.0))
        1.0
    """

    upper_loss: Loss
    lower_loss: Loss
    lower_start: Callable[[Any], Any] | None = None
    project_upper: Callable[[Any], Any] | None = None
    project_lower: Callable[..., Any] | None = None
    prepare: Callable[[Any, Batches], Batches] | None = None
    reads: Callable[[Callable, Any], Any] | None = dataclasses.field(
        default=None, kw_only=True
    )
    seed: Any = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not tf.is_tensor(self.seed) and not isinstance(self.seed, np.ndarray):
            require_count(self.seed, "seed", least=0)
        for field in dataclasses.fields(Problem):
            value = getattr(self, field.name)
            if field.name == "seed":
                continue
            if not (value is None and field.default is None):
                require_callable(value, field.name)

    @property
    def leading(self) -> int:
        """How many axes the lower variables of all tasks share: 1 over tasks."""
        return int(isinstance(self.upper_loss, TaskLoss))

    def seeded(self, number: Any) -> "Problem":
        """The same problem, sampling other numbers: those of an outer step, say.

        `BilevelModel` and `tb.minimize` do this at every outer step. A loop of your own
        does it too, or every step has the same noise.

        Args:
            number: an integer, or a scalar tensor.
        """
        return dataclasses.replace(self, seed=of_step(as_seed(self.seed), number))

    def one_in_turn(self, lower: Any) -> "Problem | None":
        """The problem of one task, if tasks are better taken one after the other."""
        del lower
        return None

    def started(self, upper: Any, lower: Any) -> Any:
        """Lower variables like `lower` at the problem's own start."""
        assert self.lower_start is not None
        begun = with_seed(as_seed(self.seed), START, self.lower_start)
        start = structure.to_tensors(begun(upper))
        if self.leading:
            return one_like(start, lower, "lower_start")
        rule = "return variables like the lower ones"
        structure.require_like(start, lower, "lower_start", rule)
        return start

    def projected_upper(self, upper: Any) -> Any:
        """`project_upper` applied, or the upper variables as they are."""
        project = self._fixed(self.project_upper, PROJECT_UPPER)
        return _projected(project, upper, "project_upper")

    def projected_lower(self, upper: Any, lower: Any) -> Any:
        """`project_lower` applied, or the lower variables as they are."""
        project = self.project_lower
        if project is not None and takes_two(project):
            own, of_both = self.own_upper(upper), project
            project = lambda y: of_both(own, y)  # noqa: E731
        return _projected(self._fixed(project, PROJECT_LOWER), lower, "project_lower")

    def reading(self, function: Callable, upper: Any) -> Any:
        """What a function of the upper variables gives, the learned rate say."""
        own = self.own_upper(upper)
        return function(own) if self.reads is None else self.reads(function, own)

    def _fixed(self, function: Callable | None, role: int) -> Callable | None:
        return function and with_seed(as_seed(self.seed), role, function)

    def own_upper(self, upper: Any) -> Any:
        """The user's upper variables, to which `prepared` may have added."""
        return upper

    def prepared(self, upper: Any, batches: Batches) -> "Prepared":
        """This problem for one outer step, with `prepare` done.

        The prepared batches' floating-point leaves join the upper variables, so a
        method differentiates with respect to both without knowing it.
        """
        require_batches(batches)
        seed = as_seed(self.seed)
        if not self.leading:
            one = dataclasses.replace(
                self,
                upper_loss=noisy(self.upper_loss),
                lower_loss=noisy(self.lower_loss),
            )
            return one._prepared(upper, batches, seed)
        summed = {
            name: dataclasses.replace(getattr(self, name), mean=False)
            for name in ("upper_loss", "lower_loss")
        }
        tasks = count_tasks(batches)
        summed = dataclasses.replace(self, **summed)
        here = summed._prepared(upper, batches, of_tasks(seed, tasks))
        total = here.gradient

        def mean(partial: Any, response: Any) -> Any:
            gradient = total(partial, response)
            return tf.nest.map_structure(
                lambda g: g / tf.cast(tasks, g.dtype), gradient
            )

        return here._replace(gradient=mean, tasks=tasks)

    def _prepared(self, upper: Any, batches: Batches, seed: Any) -> "Prepared":
        """`prepared`, with the seed of this step, over tasks of every task."""
        upper_seed, lower_seed = (
            folded(seed, ROLE, role) for role in (UPPER_LOSS, LOWER_LOSS)
        )
        if self.prepare is None:
            drawn = _Seeded(
                Noisy(batches.upper, upper_seed), Noisy(batches, lower_seed)
            )
            return Prepared(self, upper, drawn, _total_gradient(upper))
        prepare = with_seed(as_seed(self.seed), PREPARE, self.prepare)

        def floating_part(x: Any) -> tuple[list[tf.Tensor], Batches]:
            made = prepare(x, batches)
            if type(made) is not type(batches):
                raise ValueError(
                    "`prepare` must return batches of the kind it is given (stacked "
                    "lower batches stay stacked). Return batches._replace(upper=..., "
                    f"lower=...). Received: {type(made)} for {type(batches)}"
                )
            floating = filter(_is_floating, _leaves(made))
            return [tf.convert_to_tensor(leaf) for leaf in floating], made

        floating, template, pullback = vjp(floating_part, upper)

        def merged(joined: dict) -> Batches:
            remaining = iter(joined["prepared"])
            leaves = [
                next(remaining) if _is_floating(leaf) else leaf
                for leaf in _leaves(template)
            ]
            return tf.nest.pack_sequence_as(template, leaves, expand_composites=True)

        def at_upper(joined: dict, y: Any, empty: Noisy) -> tuple:
            return joined["upper"], y, empty._replace(batch=merged(joined).upper)

        def at_lower(joined: dict, y: Any, draw: Noisy) -> tuple:
            return joined["upper"], y, _drawn(merged(joined), draw.seed, draw.batch)

        def gradient(partial: dict, response: dict) -> Any:
            joined = add_partials(partial, response)
            through = pullback(fill_zeros(joined["prepared"], floating))[0]
            total = add_partials(joined["upper"], through)
            return require_connected(total, upper, "upper", "the problem")

        start = self.lower_start
        problem = _Joined(
            upper_loss=rewired(self.upper_loss, at_upper),
            lower_loss=rewired(self.lower_loss, at_lower),
            lower_start=start and (lambda joined: start(joined["upper"])),
            project_lower=self.project_lower,
            reads=self.reads,
            seed=self.seed,
        )
        joined = {"upper": upper, "prepared": floating}
        drawn = _Draws(upper=Noisy((), upper_seed), lower=lower_seed)
        return Prepared(problem, joined, drawn, gradient)


class _Joined(Problem):
    """A prepared problem: its upper variables hold the prepared batches too."""

    def own_upper(self, upper: Any) -> Any:
        return upper["upper"]


class Prepared(NamedTuple):
    """One outer step's problem, in which nothing is left to prepare.

    Attributes:
        problem: its losses, with `prepare` folded in.
        upper: its upper variables.
        batches: its batches.
        gradient: (partial, response) -> the gradient in the problem's own x, where
            `partial` is the partial derivative of f in `upper` (`None` leaves count
            as zero) and `response` is all that reaches f through y.
        tasks: how many tasks the problem's losses are sums over; `None`: it has none.
    """

    problem: Problem
    upper: Any
    batches: Batches
    gradient: Callable[[Any, Any], Any]
    tasks: Any = None

    def mean(self, value: tf.Tensor) -> tf.Tensor:
        """What a user sees of a sum over tasks."""
        return value if self.tasks is None else value / tf.cast(self.tasks, value.dtype)

    def upper_loss(self, lower: Any) -> tf.Tensor:
        """f as a user sees it."""
        return self.mean(self.problem.upper_loss(self.upper, lower, self.batches.upper))

    def upper_losses(self, lower: Any) -> tf.Tensor:
        """f of every task, or the scalar f."""
        values = losses(self.problem.upper_loss)(self.upper, lower, self.batches.upper)
        return values if self.problem.leading else require_scalar(values)

    def upper_partials(self, lower: Any) -> tuple[tf.Tensor, Any, Any]:
        """f as a user sees it, f_x (`None` where not connected) and f_y, every leaf
        connected."""
        value, (partial, response) = value_and_partials(
            lambda c, y: self.problem.upper_loss(c, y, self.batches.upper),
            self.upper,
            lower,
        )
        response = require_connected(response, lower, "lower", "the upper loss")
        return self.mean(value), partial, response

    def lower_pullback(self, lower: Any, draw: Any) -> tuple[tf.Tensor, Pullback]:
        """g as a user sees it, and weights -> (sum of weight * g_x, weight * g_y).

        One weight, or one per task; entries are `None` where not connected.
        """
        batch = self.batches.lower_at(draw)

        def at(c: Any, y: Any) -> tuple[tf.Tensor, None]:
            values = losses(self.problem.lower_loss)(c, y, batch)
            return (values if self.problem.leading else require_scalar(values)), None

        values, _, pullback = vjp(at, self.upper, lower)
        value = self.mean(tf.reduce_sum(values))
        return value, lambda weights: pullback(tf.cast(weights, values.dtype))


def _total_gradient(upper: Any) -> Callable[[Any, Any], Any]:
    def gradient(partial: Any, response: Any) -> Any:
        source = "the lower problem (lower loss, start and rate)"
        response = require_connected(response, upper, "upper", source)
        return add_partials(partial, response)

    return gradient


class _Seeded(Batches):
    """Batches and what a loss samples with each; `lower` holds those not seeded."""

    __slots__ = ()

    def lower_at(self, draw: Any) -> Noisy:
        return _drawn(self.lower.batch, self.lower.seed, draw)


class _Draws(Batches):
    """Stands for prepared batches: a lower batch is just its draw number, and the
    seed that all have."""

    __slots__ = ()

    def lower_at(self, draw: Any) -> Noisy:
        return Noisy(draw, self.lower)


def _drawn(batches: Batches, seed: Any, draw: Any) -> Noisy:
    """A lower batch, with a seed of its own where every draw has a batch of its own."""
    if isinstance(batches, StackedBatches):
        seed = folded(seed, DRAW, draw)
    return Noisy(batches.lower_at(draw), seed)


def count_tasks(batches: Batches) -> Any:
    """How many tasks the batches carry: a number, or a tensor where it may vary."""
    require_dense(batches)
    axis = int(isinstance(batches, StackedBatches))
    for part, where in ((batches.upper, 0), (batches.lower, axis)):
        for leaf in tf.nest.flatten(part):
            if leaf is None:
                continue
            leaf = tf.convert_to_tensor(leaf)
            if leaf.shape.rank is not None and leaf.shape.rank > where:
                known = leaf.shape[where]
                return tf.shape(leaf)[where] if known is None else known
    raise ValueError(
        "`batches` must carry the tasks along a leading axis of every tensor. Stack "
        f"each task's data. Received: {batches!r}"
    )


def _leaves(batches: Any) -> list:
    """All leaves; of a sparse tensor its indices, values and shape."""
    return tf.nest.flatten(batches, expand_composites=True)


def _is_floating(leaf: Any) -> bool:
    return leaf is not None and tf.convert_to_tensor(leaf).dtype.is_floating


def _projected(project: Callable | None, variables: Any, name: str) -> Any:
    if project is None:
        return variables
    projected = structure.to_tensors(project(variables))
    structure.require_like(
        projected, variables, name, "return variables like those it is given"
    )
    return projected


def require_problem(problem: Any) -> None:
    """Raise unless `problem` is a `tb.Problem`."""
    if not isinstance(problem, Problem):
        raise ValueError(
            "`problem` must be a tb.Problem(upper_loss=..., lower_loss=...). "
            f"Received: {type(problem)}"
        )


def require_batches(batches: Any, name: str = "`batches`") -> None:
    """Raise unless `batches` is a `tb.Batches`."""
    if not isinstance(batches, Batches):
        raise ValueError(
            f"{name} must be tb.Batches(upper=..., lower=...), so that the levels "
            "cannot be swapped. Build it by name, or make a dataset of them with "
            f"tb.pair(upper_dataset, lower_dataset). Received: {type(batches)}"
        )
