"""tfbilevel. Variants: plain, xla (one `Method.step` per call), fit (Keras).

`fit` chooses plain or XLA itself; fit-xla is told to use it, fit-bfloat16 computes in
bfloat16, and fit-xla-bfloat16 does both.
"""

import argparse

import keras
import numpy as np
import protocol
import tensorflow as tf
from tensorflow_losses import (
    compiled_ahead,
    device_peak,
    lower_loss,
    minibatch_loss,
    upper_loss,
    use_threads,
    wait,
)

import tfbilevel as tb


def make_method(name: str, inner_steps: int) -> tb.Method:
    lower_optimizer = keras.optimizers.SGD(protocol.LOWER_RATE)
    if name == "v-pbgd":
        inner = tb.InnerSolver(keras.optimizers.SGD(protocol.AUXILIARY_RATE), steps=1)
        return tb.ValueGap(inner, lower_optimizer, protocol.WEIGHT[name])
    if name == "g-pbgd":
        return tb.GradientNorm(lower_optimizer, protocol.WEIGHT[name])
    optimizer = keras.optimizers.SGD(protocol.INNER_RATE)
    if name == "rhg":
        return tb.Unroll(tb.InnerSolver(optimizer, steps=inner_steps, start="cold"))
    if name == "stocbio":
        inner = tb.InnerSolver(optimizer, steps=protocol.STOCHASTIC_STEPS)
        return tb.StocBiO(inner, protocol.FACTORS, protocol.SERIES_RATE)
    # A tolerance of 0, so that all steps are made.
    solver = {"aid-cg": tb.ConjugateGradient, "aid-fp": tb.FixedPoint}[name](
        protocol.SOLVER_STEPS, rtol=0.0
    )
    return tb.Implicit(tb.InnerSolver(optimizer, steps=1), solver)


class Steps:
    """A compiled step of tensors."""

    def __init__(self, arguments: argparse.Namespace, instance: protocol.Instance):
        use_threads(arguments.threads)
        stochastic = arguments.method == "stocbio"
        problem = tb.Problem(
            upper_loss=upper_loss,
            lower_loss=minibatch_loss if stochastic else lower_loss,
        )
        method = make_method(arguments.method, instance.inner_steps)
        batches = make_batches(arguments.method, instance)
        x = tf.constant(instance.upper)
        y = [tf.constant(leaf) for leaf in instance.lower]
        self.start = self.now = (x, y, _state(method, problem, x, y, instance))

        def step(x: tf.Tensor, y: list, state: object) -> tuple:
            done = problem.step(method, x, y, batches, state)
            gradient = done.upper_gradient
            # Metrics are not returned, so TensorFlow drops them: the other contestants
            # compute none either.
            return gradient, (
                x - protocol.UPPER_RATE * gradient,
                done.lower,
                done.state,
            )

        self.step = compiled_ahead(step, arguments.variant, *self.start)

    def hypergradient(self) -> np.ndarray:
        return self.step(*self.start)[0].numpy()

    def run(self, steps: int, clock: protocol.Clock) -> int:
        del clock
        for _ in range(steps):
            _, self.now = self.step(*self.now)
        wait(self.now)
        return steps


class Fit:
    """`BilevelModel.fit` with Keras models."""

    def __init__(self, arguments: argparse.Namespace, instance: protocol.Instance):
        use_threads(arguments.threads)
        self.instance = instance
        self.per_execution = 1 if arguments.method == "rhg" else 10
        weights = tb.ExampleWeights(len(instance.upper))
        sizes = [len(bias) for bias in instance.lower[1::2]]
        activations = ["sigmoid"] * (len(sizes) - 1) + [None]
        options = arguments.variant.split("-")[1:]
        policy = "mixed_bfloat16" if "bfloat16" in options else "float32"
        network = keras.Sequential([keras.Input([instance.train.shape[1]])])
        for size, activation in zip(sizes, activations, strict=True):
            network.add(keras.layers.Dense(size, activation, dtype=policy))
        weights.set_weights([instance.upper])
        network.set_weights(instance.lower)

        def cross_entropy(network: keras.Model, batch: tuple) -> tf.Tensor:
            images, labels = batch
            logits = tf.cast(network(images), tf.float32)
            log_probabilities = tf.nn.log_softmax(logits)
            return -tf.reduce_sum(tf.one_hot(labels, 10) * log_probabilities, axis=1)

        self.model = tb.BilevelModel(
            weights,
            network,
            upper_loss=lambda upper, lower, batch: tf.reduce_mean(
                cross_entropy(lower, batch)
            ),
            lower_loss=lambda upper, lower, batch: tf.reduce_mean(
                upper(None) * cross_entropy(lower, batch)
            ),
        )
        self.model.compile(
            make_method(arguments.method, instance.inner_steps),
            keras.optimizers.SGD(protocol.UPPER_RATE),
            steps_per_execution=self.per_execution,
            jit_compile=True if "xla" in options else "auto",
        )
        self.batches = make_batches(arguments.method, instance)
        self.data = tb.pair(
            tf.data.Dataset.from_tensors(self.batches.upper),
            tf.data.Dataset.from_tensors(self.batches.lower),
        ).repeat()

    def hypergradient(self) -> np.ndarray:
        """The gradient of the step in `fit`, which itself only shows the updated x."""
        method, problem = self.model.method, self.model.problem
        x = [tf.constant(self.instance.upper)]
        y = [tf.constant(leaf) for leaf in self.instance.lower]
        state = _state(method, problem, x, y, self.instance)

        @tf.function(autograph=False)
        def gradient(x: list, y: list, state: object) -> tf.Tensor:
            done = problem.step(method, x, y, self.batches, state)
            return done.upper_gradient[0]

        return gradient(x, y, state).numpy()

    def run(self, steps: int, clock: protocol.Clock) -> int:
        executions = -(-steps // self.per_execution)
        self.model.fit(
            self.data,
            # The first execution includes the start of `fit` and is not timed.
            steps_per_epoch=(1 + executions) * self.per_execution,
            callbacks=[StartAfterFirst(clock)],
            verbose=0,
        )
        return executions * self.per_execution


class StartAfterFirst(keras.callbacks.Callback):
    def __init__(self, clock: protocol.Clock):
        super().__init__()
        self.clock = clock
        self.first = True

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if self.first:
            self.clock.start()
            self.first = False


def make_batches(method: str, instance: protocol.Instance) -> tb.Batches:
    made = protocol.make_batches(method, instance)
    upper, lower = tf.nest.map_structure(tf.constant, made)
    kind = tb.StackedBatches if method == "stocbio" else tb.Batches
    return kind(upper=upper, lower=lower)


def _state(
    method: tb.Method,
    problem: tb.Problem,
    x: object,
    y: list,
    instance: protocol.Instance,
) -> object:
    state = method.init(problem, x, y)
    if isinstance(method, tb.ValueGap):
        state["auxiliary"] = [tf.constant(leaf) for leaf in instance.auxiliary]
    return state


def build(arguments: argparse.Namespace, instance: protocol.Instance) -> Steps | Fit:
    kind = Fit if arguments.variant.startswith("fit") else Steps
    return kind(arguments, instance)


if __name__ == "__main__":
    protocol.serve(build, device_peak=device_peak)
