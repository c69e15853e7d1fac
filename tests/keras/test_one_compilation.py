"""XLA compiles a step once, however many batches, seeds and steps it is called with."""

import gc
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb

SGD = keras.optimizers.SGD
STEPS = 4
INNER = tb.InnerSolver(SGD(0.1), 3)
RAMP = tb.LinearRamp(0.1, 0.5, 10)
X = tf.constant(np.random.default_rng(0).normal(size=(40, 4)), tf.float32)
Y = tf.range(40) % 3


def by_index(method: tb.Method, *layers: keras.layers.Layer) -> None:
    """Trains on batches of indices, all different."""
    network = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(3)])

    def losses(network, index):
        logits = network(tf.gather(X, index), training=True)
        return tb.sparse_cross_entropy(logits, tf.gather(Y, index))

    model = tb.BilevelModel(
        tb.ExampleWeights(40),
        network,
        lambda weights, network, index: tf.reduce_mean(losses(network, index)),
        lambda weights, network, index: weights.mean(losses(network, index), index),
    )
    draws = getattr(method, "draws", 1)
    data = tb.pair(
        tb.index_batches(40, 5, seed=1), tb.index_batches(40, 5, seed=2), draws
    )
    model.compile(method, SGD(0.1), jit_compile=True, steps_per_execution=2)
    model.fit(data, steps_per_epoch=STEPS, verbose=0)


def over_tasks() -> None:
    """Every task's weights for its own batch's indices."""
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])

    def loss(weights, network, index):
        logits = network(tf.gather(X, index))
        losses = tb.sparse_cross_entropy(logits, tf.gather(Y, index))
        return weights.mean(losses, index)

    model = tb.BilevelModel(tb.ExampleWeights(40), network, loss, loss, tasks=2)
    data = [tb.index_batches(40, 5, seed=seed).batch(2) for seed in (1, 2)]
    model.compile(tb.Unroll(INNER), SGD(0.1), jit_compile=True)
    model.fit(tb.pair(*data), steps_per_epoch=STEPS, verbose=0)


CASES = {
    "unroll": lambda: by_index(tb.Unroll(INNER)),
    "implicit": lambda: by_index(tb.Implicit(INNER, tb.ConjugateGradient(3))),
    "value-gap": lambda: by_index(tb.ValueGap(INNER, SGD(0.1), weight=RAMP)),
    "stocbio": lambda: by_index(tb.StocBiO(INNER, 3, 0.1)),
    "bsa": lambda: by_index(tb.BSA(INNER, 3, 0.1, seed=0)),
    "ttsa": lambda: by_index(tb.TTSA(SGD(0.1), 3, 0.1, seed=0)),
    "seeds and statistics": lambda: by_index(
        tb.Unroll(INNER), keras.layers.Dropout(0.5), keras.layers.BatchNormalization()
    ),
    "tasks": over_tasks,
}


@pytest.mark.slow
def test_every_method_is_compiled_once():
    """By TensorFlow's own log. Steps of other indices were once compiled again."""
    here = pathlib.Path(__file__)
    path = os.pathsep.join([str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
    log = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "device_compiler=1"}
    done = subprocess.run(
        [sys.executable, here],
        capture_output=True,
        text=True,
        env=os.environ | log | {"PYTHONPATH": path},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _, *parts = done.stderr.split("case: ")
    counts = {
        part.partition("\n")[0]: part.count("Compilation of XLA executable")
        for part in parts
    }
    assert counts == dict.fromkeys(CASES, 1)


if __name__ == "__main__":
    gc.set_threshold(50_000, 20, 50)  # as in tests/conftest.py
    for name, train in CASES.items():
        print("case:", name, file=sys.stderr, flush=True)
        keras.utils.set_random_seed(0)
        train()
