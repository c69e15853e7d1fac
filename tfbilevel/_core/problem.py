"""The bilevel problem."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._calculus.derivatives import (
    add_partials,
    fill_zeros,
    require_connected,
    vjp,
)
from tfbilevel._core.arguments import require_callable, require_count, takes_two
from tfbilevel._core.batches import Batches, count_tasks, require_batches
from tfbilevel._core.loss import Loss, TaskLoss, rewired
from tfbilevel._core.prepared import (
    NumberedBatches,
    Prepared,
    SeededBatches,
    seeded_batch,
)
from tfbilevel._randomness.seeds import (
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

if TYPE_CHECKING:
    from tfbilevel._core.method import Method, Step


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    r"""Choose upper variables x so that the lower solution minimises the upper loss.

        min_x  f(x, y*(x))      with      y*(x) in argmin_y g(x, y)

    x and y are any `tf.nest` structures of floating-point tensors.

    Args:
        upper_loss: f, called as `upper_loss(x, y, batch) -> scalar tensor`.
        lower_loss: g, called as `lower_loss(x, y, batch) -> scalar tensor`.
        lower_start: x -> y, the start of every inner solve; methods that unroll
            differentiate through it. `None`: the start is set by the inner solver's
            `start`.
        project_upper: x -> x, applied after every upper step (boxes, simplices).
        project_lower: y -> y, applied after every lower step; unrolling differentiates
            it as a part of the inner map. A function with two required parameters is
            (x, y) -> y, such as a proximal step with learned strength. Methods that
            do not differentiate projections reject one that depends on x.
        prepare: (x, batches) -> batches, computed once per outer step and
            differentiated through, such as features of a shared encoder that no inner
            step changes.
        reads: (function, x) -> the function's result; how an inner solver's
            `learned_rate` and `hyperparameters` are called. `None`: with x.
            `tb.BilevelModel` calls them with the upper model. For the constraints of
            `tb.GAFFA`, (function, x, y, batch) -> the result.
        seed: an integer, the seed of everything that the functions sample. Within an
            outer step they are fixed functions, with any way of sampling (`tf.random`,
            `keras.random`, random layers); `seeded` gives each outer step other
            samples.

    Raises:
        ValueError: if a loss or option is not callable, or the seed is not an integer.

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
    lower_start: Callable[[Nest], Nest] | None = None
    project_upper: Callable[[Nest], Nest] | None = None
    project_lower: Callable[..., Any] | None = None
    prepare: Callable[[Any, Batches], Batches] | None = None
    reads: Callable[..., Any] | None = dataclasses.field(default=None, kw_only=True)
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
    def has_tasks(self) -> bool:
        """Whether it is a problem over tasks, as made by `tb.over_tasks`."""
        return isinstance(self.upper_loss, TaskLoss)

    @property
    def inner_product(self) -> structure.InnerProduct:
        """The `dot` and `norm` of lower variables; over tasks, one value per task."""
        return structure.InnerProduct(leading=int(self.has_tasks))

    def step(
        self,
        method: "Method",
        upper: Nest,
        lower: Nest,
        batches: Batches,
        state: State,
    ) -> "Step":
        """One outer step: the result of `method.step` for this problem.

        `fit`, `tb.minimize` and `tb.check_hypergradient` call this, and so should your
        own loop: over tasks, it makes the steps one task after the other if needed.
        """
        return method.step(self, upper, lower, batches, state)

    def seeded(self, number: Any) -> "Problem":
        """The same problem with other samples, such as those of an outer step.

        `BilevelModel` and `tb.minimize` call this at every outer step. Your own loop
        should too; otherwise every step has the same noise.

        Args:
            number: an integer or a scalar tensor.
        """
        return dataclasses.replace(self, seed=of_step(as_seed(self.seed), number))

    def _one_lower(self, lower: Nest) -> Nest:
        """The lower variables; over tasks, those of the first task."""
        return lower

    def _started(self, upper: Nest, lower: Nest) -> Nest:
        """Lower variables like `lower`, at the problem's own start."""
        assert self.lower_start is not None
        begun = with_seed(as_seed(self.seed), START, self.lower_start)
        start = structure.to_tensors(begun(upper))
        if self.has_tasks:
            return _repeated(start, lower, "lower_start")
        _require_like_lower(start, lower, "lower_start")
        return start

    def _sampled(self, start: Callable, step: tf.Tensor, lower: Nest) -> Nest:
        """Lower variables like `lower`, from a function of the outer step."""
        made = structure.to_tensors(start(step))
        _require_like_lower(made, structure.to_tensors(lower), "start")
        return made

    def projected_upper(self, upper: Nest) -> Nest:
        """`project_upper` applied; without it, the upper variables unchanged."""
        project = self._fixed(self.project_upper, PROJECT_UPPER)
        return _projected(project, upper, "project_upper")

    def projected_lower(self, upper: Nest, lower: Nest) -> Nest:
        """`project_lower` applied; without it, the lower variables unchanged."""
        project = self.project_lower
        if project is not None and takes_two(project):
            own, of_both = self._own_upper(upper), project
            project = lambda y: of_both(own, y)  # noqa: E731
        return _projected(self._fixed(project, PROJECT_LOWER), lower, "project_lower")

    def _reading(self, function: Callable, upper: Nest) -> Nest:
        """The value of a function of the upper variables, such as the learned rate."""
        own = self._own_upper(upper)
        return function(own) if self.reads is None else self.reads(function, own)

    def _evaluated(
        self, function: Callable, upper: Nest, lower: Nest, batch: Any
    ) -> Nest:
        """The value of a function of both levels' variables and a lower batch."""

        def at(*arguments: Any) -> Any:
            if self.reads is None:
                return function(*arguments)
            return self.reads(function, *arguments)

        return structure.to_tensors(noisy(at)(upper, lower, batch))

    def _fixed(self, function: Callable | None, role: int) -> Callable | None:
        return function and with_seed(as_seed(self.seed), role, function)

    def _own_upper(self, upper: Nest) -> Nest:
        """The user's upper variables, without those added by `prepared`."""
        return upper

    def prepared(self, upper: Nest, batches: Batches) -> Prepared:
        """This problem for one outer step, with `prepare` applied: the first line of a
        method's `step`.

        The floating-point leaves of the prepared batches are added to the upper
        variables, so a method differentiates in both automatically.
        """
        require_batches(batches)
        seed = as_seed(self.seed)
        if not self.has_tasks:
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
        return dataclasses.replace(here, tasks=tasks)

    def _prepared(self, upper: Nest, batches: Batches, seed: Any) -> Prepared:
        """`prepared`, with the seed of this step; over tasks, one seed per task."""
        upper_seed, lower_seed = (
            folded(seed, ROLE, role) for role in (UPPER_LOSS, LOWER_LOSS)
        )
        if self.prepare is None:
            seeded = SeededBatches(
                Noisy(batches.upper, upper_seed), Noisy(batches, lower_seed)
            )
            return Prepared(self, upper, seeded, _total_gradient(upper))
        prepare = with_seed(as_seed(self.seed), PREPARE, self.prepare)

        def floating_part(x: Nest) -> tuple[list[tf.Tensor], Batches]:
            made = prepare(x, batches)
            if type(made) is not type(batches):
                raise ValueError(
                    "`prepare` must return batches of the kind it receives (stacked "
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

        def at_upper(joined: dict, y: Nest, empty: Noisy) -> tuple:
            return joined["upper"], y, empty._replace(batch=merged(joined).upper)

        def at_lower(joined: dict, y: Nest, draw: Noisy) -> tuple:
            return (
                joined["upper"],
                y,
                seeded_batch(merged(joined), draw.seed, draw.batch),
            )

        def gradient(partial: dict, response: dict) -> Nest:
            joined = add_partials(partial, response)
            through = pullback(fill_zeros(joined["prepared"], floating))[0]
            total = add_partials(joined["upper"], through)
            return require_connected(total, upper, "upper", "the problem")

        start = self.lower_start
        problem = _Joined(
            of=self,
            at_lower=at_lower,
            upper_loss=rewired(self.upper_loss, at_upper),
            lower_loss=rewired(self.lower_loss, at_lower),
            lower_start=start and (lambda joined: start(joined["upper"])),
            project_lower=self.project_lower,
            reads=self.reads,
            seed=self.seed,
        )
        joined = {"upper": upper, "prepared": floating}
        numbered = NumberedBatches(upper=Noisy((), upper_seed), lower=lower_seed)
        return Prepared(problem, joined, numbered, gradient)


@dataclasses.dataclass(frozen=True, eq=False)
class _Joined(Problem):
    """A prepared problem: its upper variables include the prepared batches.

    Attributes:
        of: the problem.
        at_lower: the arguments of the lower loss here -> those of the problem's own.
    """

    of: Problem = dataclasses.field(kw_only=True)
    at_lower: Callable[..., tuple] = dataclasses.field(kw_only=True)

    def _own_upper(self, upper: Nest) -> Nest:
        return upper["upper"]

    def _sampled(self, start: Callable, step: tf.Tensor, lower: Nest) -> Nest:
        return self.of._sampled(start, step, lower)

    def _evaluated(
        self, function: Callable, upper: Nest, lower: Nest, batch: Any
    ) -> Nest:
        return self.of._evaluated(function, *self.at_lower(upper, lower, batch))


def _total_gradient(upper: Nest) -> Callable[[Nest, Nest], Nest]:
    def gradient(partial: Nest, response: Nest) -> Nest:
        source = "the lower problem (lower loss, start and rate)"
        response = require_connected(response, upper, "upper", source)
        return add_partials(partial, response)

    return gradient


def _leaves(batches: Any) -> list:
    """All leaves; for a sparse tensor, its indices, values and shape."""
    return tf.nest.flatten(batches, expand_composites=True)


def _is_floating(leaf: Any) -> bool:
    return leaf is not None and tf.convert_to_tensor(leaf).dtype.is_floating


def _projected(project: Callable | None, variables: Nest, name: str) -> Nest:
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


def _require_like_lower(made: Any, lower: Nest, name: str) -> None:
    rule = "return variables like the lower ones"
    structure.require_like(made, lower, name, rule)


def _repeated(made: Any, stacked: Nest, name: str) -> Any:
    """One task's variables repeated for every task; raises an error with their name."""
    first = tf.nest.map_structure(
        lambda leaf: tf.TensorSpec(leaf.shape[1:], leaf.dtype), stacked
    )
    rule = "return one task's lower variables"
    structure.require_like(made, first, name, rule)
    return tf.nest.map_structure(
        lambda one, all_tasks: tf.broadcast_to(one, tf.shape(all_tasks)), made, stacked
    )
