"""`tb.HyperparameterTuner`."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._core.arguments import require_choice, require_count, require_number
from tfbilevel._core.inner_solver import InnerSolver
from tfbilevel._jobs.estimator import Estimator
from tfbilevel._jobs.random_state import random_state_kept
from tfbilevel._jobs.tuning.fixed_training import Trained, Trainer
from tfbilevel._jobs.tuning.hyperparameter import Hyperparameter
from tfbilevel._jobs.tuning.job import Job, of_arrays, of_datasets
from tfbilevel._jobs.tuning.losses import Losses
from tfbilevel._jobs.tuning.metrics import (
    MEASURED,
    metrics,
    softmax,
    validation_metrics,
)
from tfbilevel._jobs.tuning.optimizers import optimizer_for, upper_optimizer
from tfbilevel._jobs.tuning.record import Recorder, columns, picture, table
from tfbilevel._jobs.tuning.streams import inputs
from tfbilevel._jobs.tuning.values import Values
from tfbilevel._keras.model import BilevelModel
from tfbilevel._keras.pair import pair
from tfbilevel._methods.hypergradient.unroll import Unroll

REFIT = ("auto", False, True, "all")
MONITOR = ("auto", "score", "loss")


class HyperparameterTuner(Estimator):
    r"""Learns continuous hyperparameters of a Keras network in one training run.

        min_h  f(y_T(h)),      y_{t+1} = y_t - update( grad g(h, y_t) )

    f is the loss on validation data and g that on training data: with augmentation,
    dropout, smooth labels and penalties, as the hyperparameters h say. The network's
    weights y make `inner_steps` steps on training batches. Then h makes one step along
    the hypergradient of a validation batch through the last `horizon` of them, and y
    goes on from where it is (`tb.Unroll`, warm and truncated).

    A short horizon sees only what helps within that many steps. It makes the learning
    rate too small, and also noise and penalties, which slow a training down before they
    help, while the network does not overfit yet. Take a longer `horizon` for
    `tb.hyper.LearningRate`. [The guide](tuning.md) shows the bias in numbers.

    The search minimises the validation loss, and that is not the accuracy: smooth
    labels, for instance, raise both. So a network is also trained at the starts of the
    hyperparameters, and kept if it has the higher validation score (`guard`). Where the
    starts are good, this happens.

    Cost: about two trainings of the network for the search, one for the guard, and one
    more with `refit`; memory about that of four training batches, and of `horizon`
    copies of the weights. Choices that are no numbers (layers, units) stay with a
    search such as keras-tuner's, see the guide.

    Args:
        model: a Keras model, which is cloned; or a function () -> Keras model, or
            (shape of an example, number of classes) -> Keras model. A softmax at its
            end is noticed.
        search: a list of hyperparameters, `tb.hyper.*` or your own.
        optimizer: trains the network: a Keras optimizer that `tb.differentiable`
            supports, or its name. `None`: that of a compiled `model`, else Adam with a
            rate of 1e-3 that decays to 0 by a cosine (SGD if momentum is learned, AdamW
            if weight decay is, and a constant rate if the rate is).
        loss: a Keras loss, its name, or a list with one for each output. `None`: that
            of a compiled `model`, else cross-entropy for labels that are integers, text
            or one-hot rows, and mean squared error for floating numbers.
        inner_steps: training steps for each step of the hyperparameters.
        horizon: how many of them are differentiated; more than `inner_steps` raises
            that number.
        warmup: the share of the epochs, from 0 to below 1, in which the hyperparameters
            stay at their starts: early on, everything that slows the training down
            looks harmful. Only for the default `upper_optimizer`.
        upper_optimizer: a Keras optimizer for the hyperparameters' variables without
            bounds. `None`: Adam(0.1, beta_2=0.9), after the warm-up.
        refit: False: the network that was trained while the values changed takes part
            in the choice. True: a new one, trained with the values found. "auto": both.
            "all": the network kept is trained again on the validation data too;
            nothing is then left to measure it by.
        guard: whether a network trained with the starts takes part in the choice.
        monitor: what the choice goes by, on the validation data. "score": the accuracy,
            for numbers R^2, of the first output; of equal ones the lower loss. "loss".
            "auto": the score, and the loss for a network with several outputs.
        jit_compile: as in `tb.BilevelModel.compile`.
        seed: of the weights, the batches and the split.

    Attributes:
        best_: name -> number, or array for a hyperparameter with several: of what was
            kept. Values found are the mean over the last fifth of the epochs.
        names_: name -> the names of these numbers; `None` for one number.
        choice_: what was kept: "search", the network that was trained while the values
            changed; "refit", a new one with the values found; "starts", the guard's.
        scores_: the validation metrics of all that took part in the choice, by these
            names.
        model_: the tuned network, a Keras model; dropout rates are set, input scales
            are built in.
        history_: the losses and validation metrics of each epoch.
        hyperparameters_: a table (pandas, or a dictionary of arrays without it): a row
            for each epoch, from the start in row 0; a column for each number.
        classes_: the classes of a classification.

    Raises:
        ValueError: for hyperparameters that do not fit the network, the labels or the
            optimizer; for data of different lengths or with NaN; before training.

    Example:
        >>> x = tf.random.stateless_normal([80, 5], seed=[0, 0]).numpy()
        >>> y = ["yes" if row[0] > 0 else "no" for row in x]
        >>> network = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
        >>> tuner = tb.HyperparameterTuner(
        ...     network, [tb.hyper.L2("global")], optimizer=keras.optimizers.Adam(0.1)
        ... )
        >>> tuner = tuner.fit(x, y, epochs=20, batch_size=16, verbose=0)
        >>> sorted(tuner.best_), tuner.score(x, y) > 0.8
        (['l2'], True)

    References:
        Luketina, Berglund, Greff, Raiko (2016), Scalable gradient-based tuning of
        continuous regularization hyperparameters. arXiv:1511.06727.
        Baydin, Cornish, Martinez Rubio, Schmidt, Wood (2018), Online learning rate
        adaptation with hypergradient descent. arXiv:1703.04782.
        Wu, Ren, Liao, Grosse (2018), Understanding short-horizon bias in stochastic
        meta-optimization. arXiv:1803.02021.
    """

    def __init__(
        self,
        model: Any = None,
        search: Any = (),
        *,
        optimizer: Any = None,
        loss: Any = None,
        inner_steps: int = 5,
        horizon: int = 1,
        warmup: float = 0.25,
        upper_optimizer: Any = None,
        refit: bool | str = False,
        guard: bool = True,
        monitor: str = "auto",
        jit_compile: bool | str = False,
        seed: int = 0,
    ):
        self.model = model
        self.search = search
        self.optimizer = optimizer
        self.loss = loss
        self.inner_steps = inner_steps
        self.horizon = horizon
        self.warmup = warmup
        self.upper_optimizer = upper_optimizer
        self.refit = refit
        self.guard = guard
        self.monitor = monitor
        self.jit_compile = jit_compile
        self.seed = seed

    @random_state_kept()
    def fit(
        self,
        x: Any,
        y: Any = None,
        *,
        validation_data: Any = None,
        validation_split: float = 0.2,
        epochs: int = 20,
        batch_size: int = 64,
        callbacks: list | None = None,
        verbose: Any = "auto",
    ) -> "HyperparameterTuner":
        """Learn the hyperparameters, then train the network with them.

        Args:
            x: examples, [n, ...], an array or a pandas table; or a `tf.data.Dataset` of
                batches (inputs, labels), shuffled by you.
            y: labels: integers, text, one-hot rows, or numbers. For a network with
                several outputs a list, or a dictionary by the outputs' names.
            validation_data: (x, y) like these; a dataset where `x` is one.
            validation_split: the share of `x` held out without `validation_data`.
            epochs: passes through the training data, of the search and of the refit.
            batch_size: of both levels; a dataset has its own.
            callbacks: Keras callbacks for the search; `val_loss`, `val_accuracy` (for
                numbers `val_r2`) are among the logs.
            verbose: as in `keras.Model.fit`.

        Returns:
            The tuner.
        """
        self._require_arguments()
        require_count(epochs, "epochs")
        require_count(batch_size, "batch_size")
        loss = self.loss
        if loss is None and isinstance(self.model, keras.Model):
            loss = getattr(self.model, "loss", None)
        if isinstance(x, tf.data.Dataset):
            job = of_datasets(self.model, loss, x, validation_data, self.seed)
        else:
            job = of_arrays(
                self.model, loss, x, y, validation_data, validation_split, self.seed
            )
        tuned, starts = self._tuned(job, epochs, batch_size, callbacks, verbose)
        train = Trainer(
            job,
            self.search,
            lambda steps: optimizer_for(self.model, self.optimizer, self.search, steps),
            epochs,
            batch_size,
            self.seed,
            self.jit_compile,
            verbose,
        )
        made = {"search": tuned} if self.refit in (False, "auto", "all") else {}
        if self.refit in (True, "auto"):
            made["refit"] = train(tuned.values)
        if self.guard:
            made["starts"] = train(starts)
        self.scores_ = {
            name: validation_metrics(one.losses, one.values, job)
            for name, one in made.items()
        }
        self.choice_ = self._best(job)
        best = made[self.choice_]
        if self.refit == "all":
            best = train(best.values, everything=True)
            self.choice_ = "refit" if self.choice_ == "search" else self.choice_
        network = best.losses.setting.network
        for one in self.search:
            network = one.built_in(best.values[one.name], network)
        self.outputs_ = job.outputs
        self.model_ = network
        self.best_ = {k: v if v.ndim else float(v) for k, v in best.values.items()}
        first = job.outputs[0].classes
        if first is not None:
            self.classes_ = first.values
        self.n_features_in_ = job.shape[-1]
        return self

    def _require_arguments(self) -> None:
        search = self.search
        if (
            not isinstance(search, (list, tuple))
            or not search
            or not all(isinstance(one, Hyperparameter) for one in search)
        ):
            raise ValueError(
                "`search` must be a list of hyperparameters, such as "
                "[tb.hyper.L2('per-layer'), tb.hyper.LabelSmoothing()]. "
                f"Received: search={search!r}"
            )
        names = [one.name for one in search]
        double = {name for name in names if names.count(name) > 1}
        if double:
            raise ValueError(
                "`search` must not hold two hyperparameters of one name. Give one of "
                f"them another: name='other'. Received: {', '.join(sorted(double))}"
            )
        require_count(self.inner_steps, "inner_steps")
        require_count(self.horizon, "horizon")
        require_choice(self.refit, "refit", REFIT)
        require_choice(self.guard, "guard", (True, False))
        require_choice(self.monitor, "monitor", MONITOR)
        rule = "from 0 to below 1"
        require_number(self.warmup, "warmup", lambda v: 0 <= v < 1, rule)

    def _best(self, job: Job) -> str:
        """The name of the network to keep; the first of equal ones."""
        by_loss = self.monitor == "loss"
        if self.monitor == "auto":
            by_loss = len(job.outputs) > 1

        def rank(name: str) -> tuple[float, float]:
            found = self.scores_[name]
            score = 0.0 if by_loss else found[job.outputs[0].metric]
            ranked = score, -found["loss"]
            return ranked if np.isfinite(ranked).all() else (-np.inf, -np.inf)

        return max(self.scores_, key=rank)

    def _tuned(
        self, job: Job, epochs: int, batch_size: int, callbacks: Any, verbose: Any
    ) -> tuple[Trained, dict]:
        """The network of the search with the values found, and their starts."""
        steps = max(self.inner_steps, self.horizon)
        per_epoch = max(1, round(job.counts(batch_size)[0] / steps))
        total = epochs * per_epoch * steps
        optimizer = optimizer_for(self.model, self.optimizer, self.search, total)
        losses = Losses.of(job, self.search, optimizer)
        network = losses.setting.network
        values = Values(self.search, losses.setting)
        starts = values.numbers()
        learns = bool(values.options())
        inner = InnerSolver(
            optimizer,
            steps,
            optimizer_state="carry",
            hyperparameters=(lambda upper: upper.options()) if learns else None,
        )
        model = BilevelModel(
            values,
            network,
            lambda upper, lower, batch: losses.validation(upper.values(), *batch),
            lambda upper, lower, batch: losses.training(upper.values(), *batch),
        )
        model.compile(
            Unroll(inner, last=self.horizon),
            upper_optimizer(self.upper_optimizer, self.warmup, epochs * per_epoch),
            jit_compile=self.jit_compile,
        )
        recorder = Recorder(
            values, lambda: validation_metrics(losses, values.numbers(), job)
        )
        upper = job.validation(batch_size, self.seed + 1)
        stream = pair(upper, job.training(batch_size, self.seed), lower_batches=steps)
        history = model.fit(
            stream,
            epochs=epochs,
            steps_per_epoch=per_epoch,
            callbacks=[recorder, *(callbacks or [])],
            verbose=verbose,
        )
        self.history_ = history.history
        self._columns = columns(recorder.numbers, values.entries)
        self.hyperparameters_ = table(self._columns)
        # Keras has wrapped them, and its dictionaries cannot be pickled.
        self.names_ = {k: v and tuple(v) for k, v in values.entries.items()}
        last = recorder.positions[-max(1, epochs // 5) :]
        values.assign({k: np.mean([p[k] for p in last], axis=0) for k in last[0]})
        return Trained(losses, values.numbers()), starts

    def plot(self) -> Any:
        """A matplotlib figure of the hyperparameters over training.

        Save it by `figure.savefig("tuning.png")`.
        """
        return picture(self._columns, {one.name: one.scale for one in self.search})

    def predict(self, x: Any) -> Any:
        """The predicted classes, in the kind of the labels; or numbers.

        For a network with several outputs, a list.
        """
        made = []
        for one, output in zip(self.outputs_, self._outputs(x), strict=True):
            if one.classes is not None:
                output = one.classes.original(output.argmax(-1))
            elif output.ndim == 2 and output.shape[1] == 1:
                output = output[:, 0]
            made.append(output)
        return made if len(made) > 1 else made[0]

    def predict_proba(self, x: Any) -> Any:
        """The probabilities of the classes, [n, K]; for several outputs, a list."""
        made = []
        for one, output in zip(self.outputs_, self._outputs(x), strict=True):
            if one.classes is None:
                raise ValueError(
                    "`predict_proba` is for a classification. Use `predict`. "
                    "Received: a regression"
                )
            made.append(output if one.probabilities else softmax(output))
        return made if len(made) > 1 else made[0]

    def evaluate(self, x: Any, y: Any) -> dict[str, float]:
        """The loss, and the accuracy (for numbers R^2), on examples."""
        labels = y if isinstance(y, (list, tuple)) and len(self.outputs_) > 1 else [y]
        targets = [
            one.targets(each, "y")
            for one, each in zip(self.outputs_, labels, strict=True)
        ]
        return metrics(self.outputs_, targets, self._outputs(x))

    def score(self, x: Any, y: Any) -> float:
        """The accuracy; for numbers R^2; of the first output."""
        return self.evaluate(x, y)[self.outputs_[0].metric]

    def _outputs(self, x: Any) -> list[np.ndarray]:
        made = self.model_.predict(inputs(x, "x"), batch_size=MEASURED, verbose=0)
        return [np.asarray(part) for part in tf.nest.flatten(made)]
