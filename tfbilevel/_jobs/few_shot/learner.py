"""Few-shot learning from arrays: a network that learns new classes quickly."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._core.arguments import require_count
from tfbilevel._core.batches import Batches
from tfbilevel._jobs.estimator import Estimator
from tfbilevel._jobs.few_shot import networks
from tfbilevel._jobs.few_shot.accuracy import FewShotScore, Validation, accuracies
from tfbilevel._jobs.few_shot.arrays import (
    Examples,
    examples_of,
    numbers,
    require_episodes,
    validation_examples,
)
from tfbilevel._jobs.few_shot.episodes import Sizes, meta_batches, sizes_of
from tfbilevel._jobs.few_shot.presets import cosine_head, new_optimizer, plan
from tfbilevel._jobs.few_shot.tasks import Tasks
from tfbilevel._jobs.random_state import random_state_kept

# Seeds of tasks to measure by are far from those of training.
VALIDATION_SEED, SCORE_SEED = 2**40, 2**41
# Attributes that are made from the others.
MADE = "_trained", "_solvers", "model_"


class FewShotLearner(Estimator):
    r"""Learns from many classes how to learn new ones from a few examples of each.

        min_x  mean over tasks of f(x, y_i)    with    y_i = k steps on g(x, y, S_i)

    A task has `ways` classes of the training data, sampled in every outer step: a few
    support examples S_i of each, on which the lower variables y_i are trained
    (*adapted*), and other examples, the queries, on which their cross-entropy f is
    measured. g is the cross-entropy on the support examples. Afterwards `adapt` takes
    the same k steps for classes that were never seen.

    | method | adapts | hypergradient | defaults: steps, rate, tasks |
    |---|---|---|---|
    | "anil" | the last layer | through all steps | 5, 0.4 or 0.1, 8 |
    | "iaptt" | the last layer | to each task's largest f | 10, 0.4 or 0.1, 4 |
    | "maml" | all weights | through all steps | 5, 0.1, 8 |
    | "fomaml" | all weights | steps taken as constant | 5, 0.1, 8 |
    | "imaml" | all weights, near x | implicit | 16, 0.1, 16 |

    The rate is 0.4 with the published network's cosine head, else 0.1. "anil" is the
    default, because it needs a fraction of the time of "maml" (which differentiates
    convolutions twice), and new tasks may have another number of classes.

    Batch normalisation. Published results of MAML are *transductive*: queries are
    normalised by the statistics of all queries of the task, so a prediction depends on
    what else is asked. Here queries are normalised by the statistics of the support
    examples, unless `transductive=True`: a model of `adapt` then predicts one example
    as it predicts a thousand. Compare published figures with `transductive=True` only.

    Cost: one outer step costs `tasks` times k gradients of g, and their products with
    second derivatives ("maml", "imaml": of the whole network). The training data stay
    in memory twice.

    Args:
        network: a function ways -> Keras model with so many outputs (or without an
            argument, or of the shape of an example and ways); or such a model, which is
            cloned, with new weights. Logits or a softmax. `None`: the published network
            for images, four convolutions of 64 filters with batch normalisation; with
            a cosine head if the head adapts.
        method: a name of the table; or a method of the library with an inner solver,
            such as tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.1), 5), last=2).
        inner_steps: k. `None`: see the table.
        inner_learning_rate: of SGD on a task. `None`: see the table.
        tasks: tasks of an outer step. `None`: see the table.
        optimizer: a Keras optimizer of the shared weights, or its name. `None`: Adam at
            0.002 for "anil", else 0.001.
        transductive: whether batch normalisation takes the statistics of the very set
            it is given, also for queries.
        adapts: "head" or "all", what a method of the library adapts; `None`: "head".
        seed: of the initial weights and all sampling. Two fits with the same arguments
            are equal.

    Attributes:
        history_: dict, what Keras's `fit` reports per epoch: `upper_loss` (queries),
            `lower_loss` (support), and `val_accuracy` with validation data.
        classes_: the classes of the training data, sorted.
        model_: the trained `tb.BilevelModel`; not compiled in a learner that was loaded
            by `pickle` or `joblib`.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> def classes(count):  # 8 examples of each
        ...     centres = np.repeat(generator.normal(size=(count, 4)), 8, axis=0)
        ...     x = centres + 0.1 * generator.normal(size=centres.shape)
        ...     return x.astype("float32"), np.repeat(np.arange(count), 8)
        >>> def network(ways):
        ...     layers = [keras.layers.Dense(16, "relu"), keras.layers.Dense(ways)]
        ...     return keras.Sequential([keras.Input((4,)), *layers])
        >>> learner = tb.FewShotLearner(network, method="anil")
        >>> _ = learner.fit(*classes(40), ways=3, epochs=1, verbose=0)
        >>> x, y = classes(3)  # new ones
        >>> model = learner.adapt(x[::8], ["cat", "dog", "owl"])
        >>> predicted = model.classes_[model.predict(x, verbose=0).argmax(axis=1)]
        >>> float(np.mean(predicted == np.repeat(["cat", "dog", "owl"], 8))) > 0.8
        True

    References:
        Finn, Abbeel, Levine (2017), arXiv:1703.03400 (MAML). Raghu, Raghu, Bengio,
        Vinyals (2020), arXiv:1909.09157 (ANIL). Rajeswaran, Finn, Kakade, Levine
        (2019), arXiv:1909.04630 (iMAML). Liu, Liu, Zeng, Zhang (2021), arXiv:2110.00455
        (IAPTT-GM). Bronskill and others (2020), arXiv:2003.03284 (normalisation by the
        support set).
    """

    def __init__(
        self,
        network: Any = None,
        method: Any = "anil",
        *,
        inner_steps: int | None = None,
        inner_learning_rate: float | None = None,
        tasks: int | None = None,
        optimizer: Any = None,
        transductive: bool = False,
        adapts: str | None = None,
        seed: int = 0,
    ):
        self.network = network
        self.method = method
        self.inner_steps = inner_steps
        self.inner_learning_rate = inner_learning_rate
        self.tasks = tasks
        self.optimizer = optimizer
        self.transductive = transductive
        self.adapts = adapts
        self.seed = seed

    @random_state_kept()
    def fit(
        self,
        x: Any,
        y: Any = None,
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 5,
        epochs: int = 10,
        steps_per_epoch: int = 100,
        validation_data: Any = None,
        validation_episodes: int = 100,
        callbacks: list | None = None,
        verbose: Any = "auto",
    ) -> "FewShotLearner":
        """Learn from examples of many classes.

        A run that is killed and started again with `tb.Backup(folder, steps_per_epoch)`
        among the callbacks ends with the same weights as an uninterrupted one. (Also:
        `fit` with the folder of a finished run loads it without training.)

        Args:
            x: examples, [n, ...], such as images; or a `tf.data.Dataset` of (x, y). It
                is read into memory.
            y: their classes: integers, strings or one-hot rows.
            ways: classes of a task, at least 2.
            shots: support examples of each class.
            queries: query examples of each class.
            epochs: number of epochs; the shared weights make steps_per_epoch steps in
                each.
            steps_per_epoch: outer steps of an epoch.
            validation_data: (x, y) of other classes, or a dataset. After every epoch
                `val_accuracy` is the mean accuracy on the same `validation_episodes`
                tasks of it: callbacks such as keras.callbacks.EarlyStopping(
                "val_accuracy", mode="max", patience=5, restore_best_weights=True) can
                follow it.
            validation_episodes: tasks to validate by.
            callbacks: Keras callbacks.
            verbose: as in Keras.

        Raises:
            ValueError: before training, for arguments out of range, data that are not
                finite or of different lengths, fewer classes than `ways`, a class
                with fewer than shots + queries examples, or a network that does not
                fit them.
        """
        sizes = sizes_of(ways, shots, queries)
        require_count(epochs, "epochs")
        require_count(steps_per_epoch, "steps_per_epoch")
        require_count(validation_episodes, "validation_episodes")
        require_count(self.seed, "seed", 0)
        planned = plan(
            self.method,
            self.adapts,
            self.inner_steps,
            self.inner_learning_rate,
            self.tasks,
            cosine_head(self.method, self.network),
        )
        optimizer = new_optimizer(self.optimizer, planned.outer_rate)
        examples = examples_of(x, y)
        require_episodes(examples, sizes)
        before = []
        if validation_data is not None:
            held = validation_examples(validation_data, examples.x.shape[1:], sizes)
            measure = functools.partial(self._validated, held, validation_episodes)
            before = [Validation(measure)]
        self.__dict__.pop("history_", None)  # not fitted, should this fit fail
        self._plan, self._like, self._sizes = planned, examples.x[:1], sizes
        networks.require_new(lambda: self._new_network(ways))
        trained = self._start()
        # Not "auto", which may choose differently in two equal fits.
        trained.model.compile(planned.method, optimizer, jit_compile=False)
        self.classes_ = examples.classes.values

        def to_come() -> Any:  # called when the iterator is made: a backup is restored
            return itertools.count(trained.model.outer_step)

        history = trained.model.fit(
            self._episodes(examples, sizes, self.seed, to_come),
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            callbacks=[*before, *(callbacks or [])],
            verbose=verbose,
        )
        self.history_ = history.history
        self._load_solvers()
        return self

    @random_state_kept()
    def adapt(self, x_support: Any, y_support: Any) -> keras.Model:
        """A Keras model for new classes, learned from a few examples of each.

        Its outputs are those of the network (logits, or probabilities after a softmax),
        one per class in sorted order: `model.classes_[outputs.argmax(axis=1)]` are
        labels as in `y_support`. The attribute `classes_` is not saved with the model.
        It is compiled, so `evaluate` takes class numbers. With transductive=True all
        queries of a call are normalised together: give them in one batch.

        Args:
            x_support: the examples, any number of each class.
            y_support: their classes: integers, strings or one-hot rows.

        Raises:
            ValueError: before `fit`; for examples of another shape, that are not
                finite, or of another number than the labels; for a class without any;
                for another number of classes than in training if all weights adapt.
        """
        self._require_fitted("adapt")
        support = examples_of(x_support, y_support, ("x_support", "y_support"))
        numbers(support.x, "x_support", self._like.shape[1:])
        ways = len(support.classes)
        tasks = self._solver(ways, "y_support")
        x = tf.cast(support.x, tasks.dtype)
        y = tf.constant(support.labels)
        one = x[None], y[None]
        solution = tasks.solved(Batches(upper=(*one, x[None]), lower=one))
        made = self._new_network(ways)
        if self.transductive:
            made = networks.transductive(made)
        after = tasks.variables_after(solution)
        for variable, value in zip(made.trainable_variables, after, strict=True):
            variable.assign(value)
        networks.keep_statistics(made, x)
        loss = keras.losses.SparseCategoricalCrossentropy(not tasks.probabilities)
        made.compile("sgd", loss, metrics=["accuracy"])
        made.classes_ = support.classes.values
        return made

    def predict(self, x_support: Any, y_support: Any, x_query: Any) -> np.ndarray:
        """The classes of the queries, after `adapt` to the support examples.

        The labels are of the kind of `y_support`. All queries form one batch.

        Raises:
            ValueError: as `adapt`, and for queries of another shape or not finite.
        """
        self._require_fitted("predict")
        query = numbers(x_query, "x_query", self._like.shape[1:])
        classes = examples_of(x_support, y_support, ("x_support", "y_support")).classes
        outputs = self.adapt(x_support, y_support)(query, training=False)
        return classes.original(np.asarray(outputs).argmax(axis=1))

    @random_state_kept()
    def score(
        self,
        x: Any,
        y: Any = None,
        *,
        episodes: int = 600,
        ways: int | None = None,
        shots: int | None = None,
        queries: int | None = None,
        seed: int = 0,
    ) -> FewShotScore:
        """The mean accuracy on tasks sampled from new classes, with its interval.

        Args:
            x: examples, or a dataset of (x, y).
            y: their classes, none of which training has seen.
            episodes: number of tasks, at least 2.
            ways, shots, queries: of each task. `None`: as in `fit`.
            seed: of the tasks.

        Raises:
            ValueError: as `fit`, and for another number of ways than in training if
                all weights adapt.
        """
        self._require_fitted("score")
        require_count(episodes, "episodes", 2)
        require_count(seed, "seed", 0)
        given = {"ways": ways, "shots": shots, "queries": queries}
        chosen = {name: n for name, n in given.items() if n is not None}
        sizes = sizes_of(**{**self._sizes._asdict(), **chosen})
        examples = examples_of(x, y)
        numbers(examples.x, "x", self._like.shape[1:])
        require_episodes(examples, sizes)
        solver = self._solver(sizes.ways, "ways")
        dataset = self._episodes(examples, sizes, SCORE_SEED + seed, itertools.count)
        found = accuracies(solver, dataset, episodes)
        margin = 1.96 * found.std(ddof=1) / np.sqrt(episodes)
        return FewShotScore(float(found.mean()), float(margin))

    # Networks and tasks.

    def _start(self) -> Tasks:
        """The model that is trained, with its first weights."""
        self._solvers: dict[int, Tasks] = {}
        self._trained = self._tasks_of(self._sizes.ways, training=True)
        self.model_ = self._trained.model
        return self._trained

    def __getstate__(self) -> dict[str, Any]:
        """What `pickle` and `copy.deepcopy` keep: of models, which hold functions that
        Python cannot save, their weights alone."""
        state = {k: v for k, v in vars(self).items() if k not in MADE}
        if "history_" in state:
            state["_weights"] = self._trained.weights()
        return state

    @random_state_kept()
    def __setstate__(self, state: dict[str, Any]) -> None:
        weights = state.pop("_weights", None)
        vars(self).update(state)
        if weights is not None:
            self._start().set_weights(weights)

    def _new_network(self, ways: int, seed: int | None = None) -> keras.Model:
        cosine = cosine_head(self.method, self.network)
        return networks.new_network(self.network, self._like, ways, seed, cosine)

    def _tasks_of(self, ways: int, training: bool) -> Tasks:
        # Other networks get trained weights: the user's random numbers are left alone.
        seed = self.seed if training else None
        make = functools.partial(self._new_network, ways, seed)
        return Tasks(self._plan, self.transductive, make, training, self._like)

    def _solver(self, ways: int, argument: str) -> Tasks:
        """The trained network for so many classes, which solves new tasks."""
        if ways != self._sizes.ways and self._plan.adapts == "all":
            raise ValueError(
                f"`{argument}` must have {self._sizes.ways} classes, as in training: a "
                "method that adapts all weights has learned a start for that number of "
                'outputs. Take method="anil", whose head is made again, or fit with '
                f"ways={ways}. Received: {ways} classes"
            )
        if ways not in self._solvers:
            made = self._tasks_of(ways, training=False)
            made.set_weights(self._trained.weights())
            self._solvers[ways] = made
        return self._solvers[ways]

    def _load_solvers(self) -> None:
        for solver in self._solvers.values():
            solver.set_weights(self._trained.weights())

    def _episodes(
        self, examples: Examples, sizes: Sizes, seed: int, first: Callable
    ) -> tf.data.Dataset:
        tasks, dtype = self._plan.tasks, self._trained.dtype
        counts = examples.sizes
        return meta_batches(examples.x, counts, sizes, tasks, seed, first, dtype)

    def _validated(self, examples: Examples, episodes: int) -> float:
        """The mean accuracy now, always on the same tasks."""
        solver = self._solver(self._sizes.ways, "ways")
        self._load_solvers()
        seed = VALIDATION_SEED + self.seed
        dataset = self._episodes(examples, self._sizes, seed, itertools.count)
        return float(accuracies(solver, dataset, episodes).mean())

    def _require_fitted(self, name: str) -> None:
        if not hasattr(self, "history_"):
            raise ValueError(
                f"`{name}` needs a trained learner. Call `fit` first. Received: a "
                "FewShotLearner that is not fitted"
            )
