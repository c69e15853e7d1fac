"""Many tasks as one problem."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.arguments import require_choice
from tfbilevel._core.batches import Batches, apart, together
from tfbilevel._core.loss import TaskLoss
from tfbilevel._core.method import Method, Step
from tfbilevel._core.microbatched_loss import MicrobatchedLoss
from tfbilevel._core.problem import Problem, require_problem
from tfbilevel._randomness.seeds import PROJECT_LOWER, START, noisy, of_entries
from tfbilevel._tasks.mapping import (
    map_sequentially,
    map_tasks,
    map_unrolled,
    mapped_loss,
    of_same_tasks,
)
from tfbilevel._tasks.sequential import OneOfTasks, sequential_step

UNROLLED = 32  # tasks at most, because tracing takes 0.1 seconds per task
MAPPINGS = ("auto", "vectorized", "sequential")


def over_tasks(problem: Problem, mapping: str = "auto") -> Problem:
    r"""The problem of many tasks that share their upper variables (meta-learning).

        min_x  1/M sum_i f(x, y_i*(x), D_i)   with   y_i*(x) in argmin_y g(x, y, S_i)

    built from the problem of one task. The lower variables and the batches carry the M
    tasks along a leading axis of every leaf (stacked lower batches have their axis
    before it). Every method works without changes and does to each task what it would
    do to that task alone: inner steps with their rate and tolerance, pessimistic ends,
    linear solves with their stopping, penalties. The upper gradient is the mean of the
    tasks' gradients, and the losses in the metrics are means over tasks. Metrics of
    single tasks (`truncation`, `residual`, `iterations` where tasks differ) have one
    entry per task. Make steps by `problem.step(method, ...)`, as `fit` and
    `tb.minimize` do.

    `lower_start` still returns one task's variables (MAML: the upper variables); every
    task starts there. `project_lower` and `prepare` receive one task too.

    Cost: that of M one-task problems. "vectorized" turns the M small operations of
    each step into one large one, which is several times as fast for heads and small
    dense networks. Convolutions whose kernels differ between tasks cannot be vectorized
    well. Such tasks are sequential, which was faster than every matrix-product version
    that we measured, and needs the memory and graph of one task only. The whole step is
    then done for one task before the next, unless the method couples tasks
    (`Method.couples_tasks`): then only the losses are sequential. For images (batches
    with five axes), `prepare` is unrolled over up to 32 tasks, unless the mapping is
    "vectorized".

    Args:
        problem: the problem of one task.
        mapping: "vectorized", "sequential" (also "in-turn", its former name), or
            "auto": sequential if a lower variable of one task has four or more axes,
            as convolution kernels have.

    Returns:
        A `tb.Problem`.

    Raises:
        ValueError: for an unknown `mapping`, a problem that is over tasks already, or
            batches whose tasks differ from those of the lower variables.

    Example:
        >>> one = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - batch) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - batch) ** 2,
        ...     lower_start=lambda x: x,
        ... )
        >>> tasks = tb.over_tasks(one)
        >>> maml = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.5), steps=1))
        >>> x, y = tf.constant(0.0), tf.zeros([2])
        >>> batches = tb.Batches(
        ...     upper=tf.constant([1.0, 3.0]), lower=tf.constant([1.0, 3.0]))
        >>> step = tasks.step(maml, x, y, batches, maml.init(tasks, x, y))
        >>> step.lower.numpy().tolist(), float(step.upper_gradient)
        ([0.5, 1.5], -0.5)

    References:
        Finn, Abbeel, Levine (2017), Model-agnostic meta-learning. arXiv:1703.03400.
        Franceschi, Frasconi, Salzo, Grazzi, Pontil (2018), Bilevel programming for
        hyperparameter optimization and meta-learning. arXiv:1806.04910.
    """
    require_problem(problem)
    if mapping == "in-turn":
        warnings.warn(
            'mapping="in-turn" of tb.over_tasks is now called "sequential"',
            DeprecationWarning,
            stacklevel=2,
        )
        mapping = "sequential"
    require_choice(mapping, "mapping", MAPPINGS)
    if problem.has_tasks:
        raise ValueError(
            "`problem` must be the problem of one task. Call tb.over_tasks once. "
            "Received: a problem over tasks"
        )

    def sequential(y: Nest) -> bool:
        return _are_sequential(mapping, y)

    project, prepare = problem.project_lower, problem.prepare
    return OverTasks(
        one=problem,
        mapping=mapping,
        upper_loss=_mean(problem.upper_loss, sequential),
        lower_loss=_mean(problem.lower_loss, sequential),
        lower_start=problem.lower_start,
        project_upper=problem.project_upper,
        reads=problem.reads,
        project_lower=project
        and (lambda x, y: map_tasks(lambda one: problem.projected_lower(x, one), y)),
        prepare=prepare and _prepared_tasks(prepare, mapping),
        seed=problem.seed,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class OverTasks(Problem):
    """A problem over tasks, with the problem of one task.

    Attributes:
        one: the problem of one task.
        mapping: how tasks are mapped, see `tb.over_tasks`.
    """

    one: Problem = dataclasses.field(kw_only=True)
    mapping: str = dataclasses.field(kw_only=True)

    def step(
        self, method: Method, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        if method.couples_tasks or not _are_sequential(self.mapping, lower):
            return super().step(method, upper, lower, batches, state)
        one = self._one_of(structure.to_tensors(lower))
        return sequential_step(one, method, upper, lower, batches, state)

    def each(self, function: Callable, lower: Nest, *parts: Any) -> Any:
        """A function of one task's (lower variables, *parts), applied to every task.

        Args:
            function: takes the tuple, returns a nest of tensors.
            lower: the lower variables of all tasks.
            *parts: nests with the tasks along a leading axis.
        """
        sequential = _are_sequential(self.mapping, lower)
        mapped = map_sequentially if sequential else map_tasks
        return mapped(function, (lower, *parts))

    def _one_lower(self, lower: Nest) -> Nest:
        return tf.nest.map_structure(lambda leaf: leaf[0], lower)

    def _one_of(self, lower: Nest) -> OneOfTasks:
        """The problem of the first task of these lower variables."""
        fields = {
            f.name: getattr(self.one, f.name) for f in dataclasses.fields(Problem)
        }
        fields |= {
            # The same for all tasks, even if they sample.
            "lower_start": self._fixed(self.one.lower_start, START),
            "project_lower": self._fixed(self.one.project_lower, PROJECT_LOWER),
            "seed": self.seed,
        }
        return OneOfTasks(**fields, number=0, every=lower)

    def prepared_before(self) -> "OverTasks":
        """The same problem for batches that are already prepared."""
        one = dataclasses.replace(self.one, prepare=None)
        return dataclasses.replace(self, one=one, prepare=None)


def _are_sequential(mapping: str, y: Nest) -> bool:
    """Whether the tasks of stacked lower variables run one after the other."""
    leaves = tf.nest.flatten(structure.to_tensors(y))
    kernels = any(leaf.shape.rank > 4 for leaf in leaves)
    return mapping == "sequential" or (mapping == "auto" and kernels)


def _mean(loss: Callable, sequential: Callable[[Any], bool]) -> TaskLoss:
    """The mean of a loss over tasks."""
    if isinstance(loss, MicrobatchedLoss):
        # The same part of every task at once; around the mapping, whose derivative
        # would be that of the loop over the parts.
        every = mapped_loss(noisy(loss.whole), sequential)
        parts = dataclasses.replace(loss, whole=every, axis=1)
        return TaskLoss(parts, mean=True)
    return TaskLoss(mapped_loss(noisy(loss), sequential), mean=True)


def _of_few_images(tasks: Any) -> bool:
    """Whether few tasks have images as data, [tasks, n, height, width, channels].

    `prepare` then consists of convolutions. Vectorized they are as fast as unrolled,
    but normalisation by the statistics of each task's images makes transposed copies of
    all activations, which takes a quarter more time. A loop stores lists of
    activations, which takes two fifths more.
    """
    shapes = [leaf.shape for leaf in tf.nest.flatten(tasks) if leaf is not None]
    images = any(shape.rank is not None and shape.rank > 4 for shape in shapes)
    counts = [shape[0] if shape.rank else None for shape in shapes]
    return images and all(n is not None and n <= UNROLLED for n in counts)


def _prepared_tasks(prepare: Callable, mapping: str) -> Callable:
    def made(x: Nest, batches: Batches) -> Batches:
        def one(task: tuple) -> tuple:
            upper, lower = prepare(x, type(batches)(*task))
            return upper, lower

        upper_tasks, lower_tasks = apart(batches)
        named = of_same_tasks({"upper": upper_tasks, "lower": lower_tasks})
        tasks = named["upper"], named["lower"]
        unrolled = mapping != "vectorized" and _of_few_images(tasks)
        mapped = map_unrolled if unrolled else map_tasks
        first = next(leaf for leaf in tf.nest.flatten(tasks) if leaf is not None)
        numbered = (tasks, tf.range(first.shape[0] or tf.shape(first)[0]))
        return together(*mapped(of_entries(one), numbered), like=batches)

    return made
