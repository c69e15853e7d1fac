"""tfbilevel on few-shot tasks. Variants: plain, xla (one `Method.step` per call)."""

import argparse
import pathlib
import sys

import few_shot_protocol
import keras
import numpy as np
import protocol
import tensorflow as tf
from tensorflow_losses import use_threads, wait

import tfbilevel as tb

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "experiments/common"))
import networks  # noqa: E402


def cross_entropy(network: keras.Model, batch: tuple) -> tf.Tensor:
    images, labels = batch
    return tf.reduce_mean(
        tf.nn.sparse_softmax_cross_entropy_with_logits(labels, network(images))
    )


def upper_loss(upper: keras.Model, lower: keras.Model, batch: tuple) -> tf.Tensor:
    return cross_entropy(lower, batch)


def prepare(encoder: keras.Model, batches: tb.Batches) -> tb.Batches:
    (query, answers), (support, labels) = batches
    return tb.Batches(upper=(encoder(query), answers), lower=(encoder(support), labels))


def build_model(method: str, instance: few_shot_protocol.Instance) -> tb.BilevelModel:
    side, width = few_shot_protocol.SIDE, few_shot_protocol.FILTERS
    make = networks.Initializers(0)
    tasks = len(instance.support)

    def encoder() -> keras.Model:
        blocks = networks.norm_relu_pool_conv4(width, make)
        flatten = [keras.layers.Flatten()]
        return networks.sequential([*blocks, flatten], (side, side, 1), "features")

    head = keras.Sequential(
        [keras.Input((width,)), keras.layers.Dense(few_shot_protocol.WAYS)]
    )
    head.set_weights(instance.weights[-2:])
    if method == "anil":
        features = encoder()
        features.set_weights(instance.weights[:-2])
        return tb.BilevelModel(
            features,
            head,
            upper_loss,
            upper_loss,
            lower_start="learned",
            prepare=prepare,
            tasks=tasks,
        )
    start, lower = (
        keras.Sequential(
            [
                keras.Input((side, side, 1)),
                encoder(),
                keras.layers.Dense(few_shot_protocol.WAYS),
            ]
        )
        for _ in range(2)
    )
    start.set_weights(instance.weights)
    return tb.BilevelModel(
        start,
        lower,
        upper_loss,
        upper_loss,
        lower_start=lambda upper: upper.trainable_variables,
        tasks=tasks,
    )


class Steps:
    """A compiled step of tensors."""

    def __init__(
        self, arguments: argparse.Namespace, instance: few_shot_protocol.Instance
    ):
        use_threads(arguments.threads)
        model = build_model(arguments.method, instance)
        rate = keras.optimizers.SGD(few_shot_protocol.INNER_RATE)
        method = tb.Unroll(tb.InnerSolver(rate, instance.steps))
        batches = tb.Batches(
            upper=(tf.constant(instance.query), tf.constant(instance.query_labels)),
            lower=(tf.constant(instance.support), tf.constant(instance.support_labels)),
        )
        self.now = [tf.constant(np.array(v)) for v in model.upper_variables]
        tasks = len(instance.support)
        y = [tf.zeros([tasks, *v.shape]) for v in model.lower.trainable_variables]
        state = method.init(model.problem, self.now, y)

        def step(x: list) -> tuple:
            done = model.problem.step(method, x, y, batches, state)
            pairs = zip(x, done.upper_gradient, strict=True)
            after = [v - few_shot_protocol.UPPER_RATE * g for v, g in pairs]
            return done.upper_gradient, after

        self.step = tf.function(
            step, autograph=False, jit_compile=arguments.variant == "xla"
        )

    def hypergradient(self) -> np.ndarray:
        return few_shot_protocol.flat([g.numpy() for g in self.step(self.now)[0]])

    def run(self, steps: int, clock: protocol.Clock) -> int:
        del clock
        for _ in range(steps):
            _, self.now = self.step(self.now)
        wait(self.now)
        return steps


if __name__ == "__main__":
    protocol.serve(Steps, few_shot_protocol.load, few_shot_protocol.METHODS)
