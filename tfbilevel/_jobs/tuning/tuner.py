"""`tb.HyperparameterTuner`."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._core.arguments import require_choice, require_count, require_number
from tfbilevel._core.inner_solver import InnerSolver
from tfbilevel._jobs.estimator import Estimator
from tfbilevel._jobs.random_state import random_state_kept
from tfbilevel._jobs.tuning.hyperparameter import Hyperparameter, Setting
from tfbilevel._jobs.tuning.job import Job, of_arrays, of_datasets
from tfbilevel._jobs.tuning.losses import FixedTraining, Losses
from tfbilevel._jobs.tuning.optimizers import (
    optimizer_for,
    upper_optimizer,
    with_found,
)
from tfbilevel._jobs.tuning.record import Recorder, columns, picture, table
from tfbilevel._jobs.tuning.streams import inputs
from tfbilevel._jobs.tuning.values import Values
from tfbilevel._keras.model import BilevelModel
from tfbilevel._keras.pair import pair
from tfbilevel._methods.hypergradient.unroll import Unroll

REFIT = ("auto", False, True, "all")
MEASURED = 1000  # examples in a batch that is only evaluated


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

    Cost: about two trainings of the network with the defaults, and one more with
    `refit`; memory about that of four training batches, and of `horizon` copies of the
    weights. Choices that are no numbers (layers, units) stay with a search such as
    keras-tuner's, see the guide.

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
        refit: True: train a new network with the values found. False: keep the network
            that was trained while they changed. "auto": train a new one, and keep that
            of the two with the lower validation loss. "all": train a new one on the
            validation data too; nothing is then left to measure it by.
        jit_compile: as in `tb.BilevelModel.compile`.
        seed: of the weights, the batches and the split.

    Attributes:
        best_: name -> number, or array for a hyperparameter with several; the mean over
            the last fifth of the epochs.
        names_: name -> the names of these numbers; `None` for one number.
        refitted_: whether `model_` was trained with the values found from its start.
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
        refit: bool | str = "auto",
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
        tuned, values, found = self._tuned(job, epochs, batch_size, callbacks, verbose)
        best = tuned
        if self.refit:
            best = self._refitted(job, values, found, epochs, batch_size, verbose)
        if self.refit == "auto":
            best = min(
                (tuned, best), key=lambda one: _measured(one, found, job)["loss"]
            )
        self.refitted_ = best is not tuned
        network = best.setting.network
        for one in self.search:
            network = one.built_in(found[one.name], network)
        self.outputs_ = job.outputs
        self.model_ = network
        self.best_ = {k: v if v.ndim else float(v) for k, v in found.items()}
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
        rule = "from 0 to below 1"
        require_number(self.warmup, "warmup", lambda v: 0 <= v < 1, rule)

    def _tuned(
        self, job: Job, epochs: int, batch_size: int, callbacks: Any, verbose: Any
    ) -> tuple:
        """The losses with their network, and the hyperparameters, after training on
        both levels."""
        steps = max(self.inner_steps, self.horizon)
        per_epoch = max(1, round(job.counts(batch_size)[0] / steps))
        total = epochs * per_epoch * steps
        network = job.network()
        optimizer = optimizer_for(self.model, self.optimizer, self.search, total)
        setting = Setting(network, job.classes, job.deviation, job.shape, optimizer)
        values = Values(self.search, setting)
        losses = Losses(tuple(self.search), tuple(job.outputs), setting)
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
            self.upper_optimizer or upper_optimizer(self.warmup, epochs * per_epoch),
            jit_compile=self.jit_compile,
        )
        recorder = Recorder(values, lambda: _measured(losses, values.numbers(), job))
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
        return losses, values, values.numbers()

    def _refitted(
        self,
        job: Job,
        values: Values,
        found: dict[str, np.ndarray],
        epochs: int,
        batch_size: int,
        verbose: Any,
    ) -> Losses:
        """The losses with a new network, trained with the values found."""
        everything = self.refit == "all"
        counts = job.counts(batch_size)
        per_epoch = counts[2] if everything else counts[0]
        network = job.network()
        optimizer = optimizer_for(
            self.model, self.optimizer, self.search, epochs * per_epoch
        )
        options = {k: float(v) for k, v in values.options().items()}
        setting = Setting(network, job.classes, job.deviation, job.shape, optimizer)
        losses = Losses(tuple(self.search), tuple(job.outputs), setting)
        training = FixedTraining(losses, found)
        training.compile(
            optimizer=with_found(optimizer, options), jit_compile=self.jit_compile
        )
        stream = (job.everything if everything else job.training)(batch_size, self.seed)
        training.fit(
            stream.map(lambda x, y: ((x, y),)),
            epochs=epochs,
            steps_per_epoch=per_epoch,
            shuffle=False,
            verbose=verbose,
        )
        return losses

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
            made.append(output if one.probabilities else _softmax(output))
        return made if len(made) > 1 else made[0]

    def evaluate(self, x: Any, y: Any) -> dict[str, float]:
        """The loss, and the accuracy (for numbers R^2), on examples."""
        labels = y if isinstance(y, (list, tuple)) and len(self.outputs_) > 1 else [y]
        targets = [
            one.targets(each, "y")
            for one, each in zip(self.outputs_, labels, strict=True)
        ]
        return _metrics(self.outputs_, targets, self._outputs(x))

    def score(self, x: Any, y: Any) -> float:
        """The accuracy; for numbers R^2; of the first output."""
        return self.evaluate(x, y)[self.outputs_[0].metric]

    def _outputs(self, x: Any) -> list[np.ndarray]:
        made = self.model_.predict(inputs(x, "x"), batch_size=MEASURED, verbose=0)
        return [np.asarray(part) for part in tf.nest.flatten(made)]


def _measured(losses: Losses, values: dict, job: Job) -> dict[str, float]:
    """The metrics of all validation examples."""
    made, targets = [], []
    for x, y in job.measured(MEASURED):
        made.append([np.asarray(o) for o in losses.predicted(values, x)])
        targets.append([part.numpy() for part in tf.nest.flatten(y)])
    joined = [
        [np.concatenate(p) for p in zip(*e, strict=True)] for e in (targets, made)
    ]
    return _metrics(losses.outputs, *joined)


def _metrics(outputs: Any, targets: list, made: list) -> dict[str, float]:
    each = list(zip(outputs, targets, made, strict=True))
    result = {"loss": sum(float(np.mean(o.losses(t, m))) for o, t, m in each)}
    for number, (one, target, output) in enumerate(each):
        name = one.metric if number == 0 else f"{one.metric}_{number}"
        result[name] = one.score(target, output)
    return result


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
