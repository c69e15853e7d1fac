"""Few-shot tasks of one network as a bilevel problem."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._core.batches import Batches
from tfbilevel._jobs.few_shot import networks
from tfbilevel._jobs.few_shot.presets import Plan
from tfbilevel._jobs.networks import gives_probabilities, log_probabilities
from tfbilevel._keras.losses import sparse_cross_entropy
from tfbilevel._keras.model import BilevelModel


class Tasks:
    """A network, and what of it each task adapts, as a `tb.BilevelModel`.

    A task's upper batch is (queries, labels, support): the support examples give the
    statistics by which queries are normalised, unless that is transductive. Its lower
    batch is (support, labels).

    Args:
        plan: the learner's.
        transductive: whether each set of examples is normalised by its own statistics.
        make: () -> a new network; each has the same weights.
        training: whether layers such as dropout are in their mode for training.
        examples: some, to see whether the network's outputs are probabilities.

    Attributes:
        model: the `tb.BilevelModel`.
        network: the network at its start; all that adapts is in its variables, unless
            `model.start` holds the learned start of the head.
    """

    def __init__(
        self, plan: Plan, transductive: bool, make: Any, training: bool, examples: Any
    ):
        self.plan, self.training, self.transductive = plan, training, transductive
        self.network = self._new(make)
        self._apart = not transductive and bool(networks.normalisations(self.network))
        self.probabilities = gives_probabilities(self.network, examples)
        if plan.adapts == "all":
            lower = self._new(make)
            lower.set_weights(self.network.get_weights())
            self.model = BilevelModel(
                self.network,
                lower,
                self._upper_loss,
                self._lower_loss,
                lower_start=lambda upper: upper.trainable_variables,
                tasks=plan.tasks,
            )
        else:
            encoder, head = networks.split(self.network)
            self.model = BilevelModel(
                encoder,
                head,
                lambda encoder, head, batch: self._loss(head(batch[0]), batch[1]),
                lambda encoder, head, batch: self._loss(head(batch[0]), batch[1]),
                lower_start="learned",
                prepare=self._prepare,
                tasks=plan.tasks,
            )
        self._predicted = tf.function(self._predictions, autograph=False)
        self._solved = tf.function(self._solutions, autograph=False)

    def _new(self, make: Any) -> keras.Model:
        made = make()
        if not self.training:
            networks.without_dropout(made)
        if self.transductive:
            return networks.transductive(made)
        for layer in networks.normalisations(made):
            layer.momentum = 0.0  # the moving statistics become those of the support
        return made

    def predicted(self, batches: Batches) -> np.ndarray:
        """The predicted classes of all queries, [tasks, queries]."""
        return self._predicted(batches).numpy()

    def solved(self, batches: Batches) -> list[tf.Tensor]:
        """What the first task adapted: values of the lower model's variables."""
        return [value[0] for value in self._solved(batches)]

    def weights(self) -> list[np.ndarray]:
        """Of everything that training changes."""
        return [variable.numpy() for variable in self._learned()]

    def set_weights(self, weights: list[np.ndarray]) -> None:
        """Take over the weights of the same network, trained.

        For another number of classes every output of the head starts at the mean of
        the trained ones: the order of the classes in a task means nothing.
        """
        for variable, value in zip(self._learned(), weights, strict=True):
            variable.assign(_resized(value, tuple(variable.shape)))

    def _learned(self) -> list[Any]:
        start = self.model.start
        return [
            *self.model.upper.variables,
            *([] if start is None else start.variables),
        ]

    def variables_after(self, solution: list[tf.Tensor]) -> list[tf.Tensor]:
        """The network's trainable variables for what a task adapted."""
        if self.plan.adapts == "all":
            return solution
        adapted = dict(zip(self._ids(self.model.lower), solution, strict=True))
        return [
            adapted.get(id(v), tf.convert_to_tensor(v.value))
            for v in self.network.trainable_variables
        ]

    @property
    def dtype(self) -> str:
        """The dtype of the network's inputs."""
        inputs = getattr(self.network, "inputs", None)
        return inputs[0].dtype if inputs else self.network.variable_dtype

    @staticmethod
    def _ids(model: keras.Model) -> list[int]:
        return [id(variable) for variable in model.trainable_variables]

    # The problem.

    def _upper_loss(self, start: Any, network: Any, batch: tuple) -> tf.Tensor:
        queries, labels, support = batch
        return self._loss(self._of_queries(network, queries, support), labels)

    def _lower_loss(self, start: Any, network: Any, batch: tuple) -> tf.Tensor:
        support, labels = batch
        loss = self._loss(self._of_support(network, support), labels)
        if self.plan.proximal:
            pairs = zip(
                network.trainable_variables, start.trainable_variables, strict=True
            )
            squares = [tf.reduce_sum(tf.square(y - x)) for y, x in pairs]
            loss += 0.5 * self.plan.proximal * tf.add_n(squares)
        return loss

    def _prepare(self, encoder: Any, batches: Batches) -> Batches:
        (queries, labels, _), (support, support_labels) = batches
        known = self._of_support(encoder, support)  # first: it gives the statistics
        asked = encoder(queries, training=self.training and not self._apart)
        return Batches(upper=(asked, labels), lower=(known, support_labels))

    def _of_support(self, network: Any, support: Any) -> tf.Tensor:
        return network(support, training=self.training or self._apart)

    def _of_queries(self, network: Any, queries: Any, support: Any) -> tf.Tensor:
        if not self._apart:
            return network(queries, training=self.training)
        self._of_support(network, support)
        return network(queries, training=False)

    def _loss(self, outputs: Any, labels: Any) -> tf.Tensor:
        if self.probabilities:
            # Their softmax are the probabilities again.
            outputs = log_probabilities(outputs, True)
        return tf.reduce_mean(sparse_cross_entropy(outputs, labels))

    # New tasks.

    def _predictions(self, batches: Batches) -> tf.Tensor:
        def predictions(upper: Any, lower: Any, batch: Batches) -> tf.Tensor:
            if self.plan.adapts == "head":
                outputs = lower(batch.upper[0])
            else:
                outputs = self._of_queries(lower, batch.upper[0], batch.upper[2])
            return tf.argmax(outputs, axis=-1, output_type=tf.int32)

        return self.model.adapt(batches, self.plan.inner, predictions)

    def _solutions(self, batches: Batches) -> list[tf.Tensor]:
        def solution(upper: Any, lower: Any, batch: Batches) -> list:
            return list(lower.trainable_variables)

        return self.model.adapt(batches, self.plan.inner, solution)


def _resized(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A weight of the head for another number of classes, its last axis."""
    if value.shape == shape:
        return value
    if value.shape[:-1] != shape[:-1]:
        raise ValueError(
            "`network` must return networks that differ in the number of outputs only. "
            f"Received: weights of shape {shape} where training had {value.shape}"
        )
    mean = value.mean(axis=-1, keepdims=True)
    return np.broadcast_to(mean, shape)
