"""One update of the penalty method against one of ApproxGrad, on the MNIST network.

    python benchmarks/denoising.py --out runs/bench-denoising

Both make T = 20 steps of the network's weights (1,389,578) on batches of 200 + 200
images, in this process and in turns; ApproxGrad 20 more on its linear system. The floor
counts the multiplications of convolutions and dense layers alone, in units of one
forward pass over a batch:

    gradient of a loss            3     forward, weight gradients, input gradients
    Hessian-vector product        6     where the gradient's forward pass is at hand
    penalty, inner step          12     gradients of f and g, one product
    ApproxGrad, inner step        3     gradient of g
    ApproxGrad, solver step      12     two products: the residual and its gradient

and divides them by the rate of a large matrix product, measured beside it.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "experiments"))

import data_denoising  # noqa: E402

import tfbilevel as tb  # noqa: E402
from data_prep import images  # noqa: E402

SHAPE, BATCH = (28, 28, 1), 200
LAYERS = {  # forward multiplications and additions of one image
    "convolution 1": 2 * 24 * 24 * 64 * 25,
    "convolution 2": 2 * 8 * 8 * 128 * 25 * 64,
    "dense": 2 * (2048 * 512 + 512 * 256 + 256 * 10),
}
# No layer is below the first: it has no input gradient.
FIRST = LAYERS["convolution 1"]
FORWARD = sum(LAYERS.values())
GRADIENT = 3 * FORWARD - FIRST
PRODUCT = 6 * FORWARD - 3 * FIRST


def floor(method: str, steps: int, solver_steps: int) -> float:
    """Floating-point operations of one update."""
    if method == "penalty":
        each = 2 * GRADIENT + PRODUCT
        return BATCH * (steps + 1) * each
    inner = steps * GRADIENT
    return BATCH * (inner + GRADIENT + GRADIENT + (2 * solver_steps + 1) * PRODUCT)


def build(method: str, steps: int) -> tuple[Any, tuple]:
    """The model, and the arguments of one step."""
    flags = ["--out", "x", "--dataset", "mnist", "--method", method]
    flags += ["--train-size", "1000", "--inner-steps", str(steps)]
    args = data_denoising.parse_args(flags)
    net = data_denoising.build_net("mnist-cnn", SHAPE, 0)
    model = data_denoising.build_model(args, net, np.full(1000, 0.5), 5)
    generator = np.random.default_rng(0)
    parts = [
        images.Part(
            generator.random((BATCH, *SHAPE)).astype(np.float32),
            generator.integers(0, 10, BATCH).astype(np.int32),
        )
        for _ in range(2)
    ]
    upper, lower = (tuple(map(tf.constant, part)) for part in parts)
    batches = tb.Batches(upper, (*lower, tf.range(BATCH)))
    x = [tf.convert_to_tensor(model.upper.logits.value)]
    y = [tf.convert_to_tensor(v.value) for v in net.trainable_variables]
    state = model.method.init(model.problem, x, y)
    return model, (x, y, batches, state)


def compiled(model: Any, xla: bool) -> Callable:
    @tf.function(autograph=False, jit_compile=xla)
    def step(x: list, y: list, batches: tb.Batches, state: Any) -> tb.Step:
        return model.method.step(model.problem, x, y, batches, state)

    return step


def seconds_of(step: Callable, arguments: tuple) -> float:
    begun = time.perf_counter()
    step(*arguments).upper_gradient[0].numpy()
    return time.perf_counter() - begun


def matrix_rate() -> float:
    """Operations per second of a large matrix product."""
    a = tf.random.normal([2000, 2000])
    product = tf.function(lambda a: a @ a)
    product(a).numpy()
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        product(a).numpy()
        times.append(time.perf_counter() - begun)
    return 2 * 2000**3 / min(times)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--inner-steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--xla", action=argparse.BooleanOptionalAction, default=False)
    args = parser.parse_args(argv)
    rate = matrix_rate()
    contestants = {}
    for method in ("penalty", "approxgrad"):
        model, arguments = build(method, args.inner_steps)
        step = compiled(model, args.xla)
        seconds_of(step, arguments)  # traces
        contestants[method] = step, arguments
    times: dict[str, list[float]] = {method: [] for method in contestants}
    for _ in range(args.rounds):
        for method, (step, arguments) in contestants.items():
            times[method].append(seconds_of(step, arguments))
    found: dict[str, Any] = {"matrix_gflops": rate / 1e9, "xla": args.xla}
    for method, values in times.items():
        operations = floor(method, args.inner_steps, args.inner_steps)
        found[method] = {
            "milliseconds": 1000 * statistics.median(values),
            "all_milliseconds": [1000 * value for value in values],
            "gflop": operations / 1e9,
            "floor_milliseconds": 1000 * operations / rate,
        }
    ratios = [b / a for a, b in zip(times["penalty"], times["approxgrad"], strict=True)]
    found["approxgrad_over_penalty"] = statistics.median(ratios)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "denoising.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return found


if __name__ == "__main__":
    main()
