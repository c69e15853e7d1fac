"""Time to the first step and per step of jit_compile "auto", False and True.

    python benchmarks/compilation.py [--nets linear mlp cnn] [--ways auto off on]

Each way runs in a separate process, so that no compiled code is shared. `first` is the
time from the call of fit to the end of its first outer step, including tracing and the
trial of "auto"; `step` is the median of the later steps. Floor of a step: an `Unroll`
of 5 inner steps takes 6 gradients, and 5 vector-Jacobian products that cost about two
gradients each.
"""

import argparse
import json
import subprocess
import sys
import time

import keras
import numpy as np
import tensorflow as tf

import tfbilevel as tb

NETS = ("linear", "mlp", "cnn")
WAYS = {"auto": "auto", "off": False, "on": True}


def build(net: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    if net == "cnn":
        body = [
            layers.Reshape((28, 28, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
        ]
    else:
        body = [layers.Dense(300, "relu")] if net == "mlp" else []
    return keras.Sequential([keras.Input((784,)), *body, layers.Dense(10)])


class Clock(keras.callbacks.Callback):
    """Records when each outer step ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        del batch, logs
        self.ends.append(time.perf_counter())


def measure(net: str, way: str, examples: int, steps: int) -> dict[str, float | str]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(examples, 784)).astype("float32")
    y = generator.integers(0, 10, examples)

    def losses(network: keras.Model, batch: tuple) -> tf.Tensor:
        logits = network(batch[0])
        return tf.nn.sparse_softmax_cross_entropy_with_logits(batch[1], logits)

    model = tb.BilevelModel(
        tb.ExampleWeights(examples),
        build(net),
        lambda weights, network, batch: tf.reduce_mean(losses(network, batch)),
        lambda weights, network, batch: weights.mean(losses(network, batch)),
    )
    inner = tb.InnerSolver(keras.optimizers.SGD(0.1), 5)
    model.compile(tb.Unroll(inner), keras.optimizers.Adam(0.1), jit_compile=WAYS[way])
    full = tf.data.Dataset.from_tensors((x, y))
    clock = Clock()
    begun = time.perf_counter()
    model.fit(tb.pair(full, full).repeat(steps), verbose=0, callbacks=[clock])
    return {
        "first": clock.ends[0] - begun,
        "step": float(np.median(np.diff(clock.ends))),
        "xla": str(model.jit_compile),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the ways of compilation.")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--steps", type=int, default=20, help="outer steps, at least 2")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        row = measure(args.nets[0], args.ways[0], args.examples, args.steps)
        print(json.dumps(row))
        return
    print(f"{'net':8}{'jit':6}{'first, s':>10}{'step, ms':>10}  XLA")
    for net in args.nets:
        for way in args.ways:
            command = [sys.executable, __file__, "--one", "--nets", net, "--ways", way]
            command += ["--examples", str(args.examples), "--steps", str(args.steps)]
            made = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(made.stdout.splitlines()[-1])
            print(
                f"{net:8}{way:6}{row['first']:10.2f}{1000 * row['step']:10.2f}"
                f"  {row['xla']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
