"""Many tasks as one problem."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfbilevel import _structure as structure
from tfbilevel._arguments import require_choice
from tfbilevel._problem import Batches, Problem, StackedBatches, require_problem
from tfbilevel._randomness import PROJECT_LOWER, START, noisy, of_entries
from tfbilevel._task_loss import (
    TaskLoss,
    map_tasks,
    map_written_out,
    mapped_loss,
    of_same_tasks,
    require_dense,
)

WRITTEN_OUT = 32  # tasks at most: every one is traced, in 0.1 seconds


def over_tasks(problem: Problem, mapping: str = "auto") -> Problem:
    r"""The problem of many tasks that share their upper variables (meta-learning).

        min_x  1/M sum_i f(x, y_i*(x), D_i)   with   y_i*(x) in argmin_y g(x, y, S_i)

    from the problem of one task. The lower variables and the batches carry the M
    tasks along a leading axis of every leaf (draws of stacked lower batches before
    it). Every method applies as it is, and does to each task what it would do to that
    task alone: inner steps with their rate and tolerance, pessimistic ends, linear
    solves with their stopping, penalties. The upper gradient is the mean of the
    tasks' own, and so are the losses in the metrics; metrics of single tasks
    (`truncation`, `residual`, `iterations` where tasks differ) have one entry each.

    `lower_start` still returns one task's variables (MAML: the upper variables); every
    task begins there. `project_lower` and `prepare` see one task too.

    Cost: that of M one-task problems. "vectorized" turns the M small operations of
    each step into one large one, several times as fast for heads and small dense
    networks. It cannot for convolutions whose kernels differ between the tasks:
    those are taken "in turn", which is faster than any rewriting as one matrix
    product that we measured, and keeps memory and graph at one task's size. What
    `prepare` makes of images (batches with five axes) is written out, task after task,
    for up to 32 of them, unless the mapping is "vectorized".

    Args:
        problem: of one task.
        mapping: "vectorized", "in-turn", or "auto": in turn if a lower variable of
            one task has four or more axes, as convolution kernels have.

    Returns:
        A `tb.Problem`.

    Raises:
        ValueError: for an unknown `mapping`, a problem over tasks already, or batches
            that do not carry the tasks of the lower variables.

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
        >>> step = maml.step(tasks, x, y, batches, maml.init(tasks, x, y))
        >>> step.lower.numpy().tolist(), float(step.upper_gradient)
        ([0.5, 1.5], -0.5)

    References:
        Finn, Abbeel, Levine (2017), Model-agnostic meta-learning. arXiv:1703.03400.
        Franceschi, Frasconi, Salzo, Grazzi, Pontil (2018), Bilevel programming for
        hyperparameter optimization and meta-learning. arXiv:1806.04910.
    """
    require_problem(problem)
    require_choice(mapping, "mapping", ("auto", "vectorized", "in-turn"))
    if problem.leading:
        raise ValueError(
            "`problem` must be the problem of one task. Call tb.over_tasks once. "
            "Received: a problem over tasks"
        )

    def in_turn(y: Any) -> bool:
        return takes_in_turn(mapping, y)

    project, prepare = problem.project_lower, problem.prepare
    return OverTasks(
        one=problem,
        mapping=mapping,
        upper_loss=TaskLoss(mapped_loss(noisy(problem.upper_loss), in_turn), mean=True),
        lower_loss=TaskLoss(mapped_loss(noisy(problem.lower_loss), in_turn), mean=True),
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
    """A problem over tasks, which knows the problem of one.

    Attributes:
        one: the problem of one task.
        mapping: how tasks are mapped.
    """

    one: Problem = dataclasses.field(kw_only=True)
    mapping: str = dataclasses.field(kw_only=True)

    def one_in_turn(self, lower: Any) -> Problem | None:
        if not takes_in_turn(self.mapping, lower):
            return None
        # These are all tasks' own, whatever they sample.
        start, project = (
            self._fixed(function, role)
            for function, role in (
                (self.one.lower_start, START),
                (self.one.project_lower, PROJECT_LOWER),
            )
        )
        return dataclasses.replace(
            self.one, lower_start=start, project_lower=project, seed=self.seed
        )

    def prepared_before(self) -> "OverTasks":
        """The same for batches that were prepared."""
        one = dataclasses.replace(self.one, prepare=None)
        return dataclasses.replace(self, one=one, prepare=None)


def apart(batches: Batches) -> tuple[Any, Any]:
    """The upper and the lower batches with the tasks along the first axis."""
    require_dense(batches)
    stacked = isinstance(batches, StackedBatches)
    return batches.upper, _swapped(batches.lower) if stacked else batches.lower


def together(upper: Any, lower: Any, like: Batches) -> Batches:
    """The batches again, from what `apart` made."""
    stacked = isinstance(like, StackedBatches)
    return type(like)(upper, _swapped(lower) if stacked else lower)


def takes_in_turn(mapping: str, y: Any) -> bool:
    """Whether the tasks of stacked lower variables are taken one after the other."""
    leaves = tf.nest.flatten(structure.to_tensors(y))
    kernels = any(leaf.shape.rank > 4 for leaf in leaves)
    return mapping == "in-turn" or (mapping == "auto" and kernels)


def of_few_images(tasks: Any) -> bool:
    """Whether the data of not too many tasks have images, [tasks, n, height, width, c].

    Then what is prepared is made of convolutions. Taken at once, these are as fast, but
    normalisation by the statistics of each task's images takes transposed copies of all
    activations, and a loop keeps lists of them: a quarter and two fifths more time.
    """
    shapes = [leaf.shape for leaf in tf.nest.flatten(tasks) if leaf is not None]
    images = any(shape.rank is not None and shape.rank > 4 for shape in shapes)
    counts = [shape[0] if shape.rank else None for shape in shapes]
    return images and all(n is not None and n <= WRITTEN_OUT for n in counts)


def first_task(batches: Batches) -> Batches:
    """The batches of the first task alone."""

    def first(leaf: Any) -> Any:
        return None if leaf is None else leaf[0]

    return type(batches)(*tf.nest.map_structure(first, apart(batches)))


def _prepared_tasks(prepare: Callable, mapping: str) -> Callable:
    def made(x: Any, batches: Batches) -> Batches:
        def one(task: tuple) -> tuple:
            upper, lower = prepare(x, type(batches)(*task))
            return upper, lower

        upper_tasks, lower_tasks = apart(batches)
        named = of_same_tasks({"upper": upper_tasks, "lower": lower_tasks})
        tasks = named["upper"], named["lower"]
        written_out = mapping != "vectorized" and of_few_images(tasks)
        made = map_written_out if written_out else map_tasks
        first = next(leaf for leaf in tf.nest.flatten(tasks) if leaf is not None)
        numbered = (tasks, tf.range(first.shape[0] or tf.shape(first)[0]))
        return together(*made(of_entries(one), numbered), like=batches)

    return made


def _swapped(batch: Any) -> Any:
    """Draws and tasks, the two leading axes, exchanged."""

    def swap(leaf: Any) -> Any:
        if leaf is None:
            return None
        leaf = tf.convert_to_tensor(leaf)
        return tf.transpose(leaf, [1, 0, *range(2, leaf.shape.rank)])

    return tf.nest.map_structure(swap, batch)
