"""One update of the penalty method and of ApproxGrad on the MNIST network.

    python benchmarks/denoising.py --out runs/bench-denoising

All make T = 20 steps of the network's weights (1,389,578) on batches of 200 + 200
images; ApproxGrad makes 20 more on its linear system. They run alternately in one
process. ApproxGrad runs in two versions: the library's, and that of the published
script (`as-published`), in which each step is a separate call and each solver step
computes both gradients again, while the library's solver steps share one pass. Its
hypergradient is compared with the library's. The floor counts the multiplications of
convolutions and dense layers only, in units of one forward pass over a batch:

    gradient of a loss            3     forward, weight gradients, input gradients
    Hessian-vector product        6     if the gradient's forward pass is available
    penalty, inner step          12     gradients of f and g, one product
    ApproxGrad, inner step        3     gradient of g
    ApproxGrad, solver step      12     two products: the residual and its gradient
      as published               18     and the gradients of f and g

and divides them by the rate of a large matrix product, measured in the same run.
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
# The first layer has no input gradient.
FIRST = LAYERS["convolution 1"]
FORWARD = sum(LAYERS.values())
GRADIENT = 3 * FORWARD - FIRST
PRODUCT = 6 * FORWARD - 3 * FIRST


def floor(method: str, steps: int, solver_steps: int) -> float:
    """Floating-point operations of one update."""
    if method == "penalty":
        each = 2 * GRADIENT + PRODUCT
        return BATCH * (steps + 1) * each
    gradients = steps + 2
    if method == "as-published":
        gradients += 2 * solver_steps
    return BATCH * (gradients * GRADIENT + (2 * solver_steps + 1) * PRODUCT)


def build(method: str, steps: int) -> tuple[Any, tuple]:
    """The model and the arguments of one step."""
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
        return model.problem.step(model.method, x, y, batches, state)

    return step


def as_published(model: Any, xla: bool) -> Callable:
    """One update of ApproxGrad in 41 calls with plain automatic differentiation."""
    problem, inner, solver = model.problem, model.method.inner, model.method.solver

    @tf.function(autograph=False, jit_compile=xla)
    def inner_step(x: list, y: list, batches: tb.Batches, slots: Any) -> tuple:
        return inner.rule.update(
            gradient(problem.lower_loss, x, y, batches.lower), slots, y
        )

    @tf.function(autograph=False, jit_compile=xla)
    def solver_step(
        x: list, y: list, batches: tb.Batches, p: list, slots: Any
    ) -> tuple:
        rhs = gradient(problem.upper_loss, x, y, batches.upper)
        product = products(problem.lower_loss, x, y, batches.lower)

        def damped(v: list) -> list:
            return [
                a + solver.damping * b for a, b in zip(product(y, v), v, strict=True)
            ]

        residual = [a - b for a, b in zip(damped(p), rhs, strict=True)]
        return solver.rule.update([2.0 * a for a in damped(residual)], slots, p)

    @tf.function(autograph=False, jit_compile=xla)
    def to_upper(x: list, y: list, batches: tb.Batches, p: list) -> list:
        # f does not depend on x.
        product = products(problem.lower_loss, x, y, batches.lower)
        return [-tf.convert_to_tensor(a) for a in product(x, p)]

    def step(x: list, y: list, batches: tb.Batches, state: Any) -> list:
        del state
        slots = inner.rule.init(y)
        for _ in range(inner.steps):
            y, slots = inner_step(x, y, batches, slots)
        p = [tf.zeros_like(leaf) for leaf in y]
        slots = solver.rule.init(p)
        for _ in range(solver.max_steps):
            p, slots = solver_step(x, y, batches, p, slots)
        return to_upper(x, y, batches, p)

    return step


def gradient(loss: Callable, x: list, y: list, batch: tuple) -> list:
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(y)
        value = loss(x, y, batch)
    return tape.gradient(value, y)


def products(loss: Callable, x: list, y: list, batch: tuple) -> Callable:
    """(sources, v) -> the derivative of <loss_y, v> in x or y."""
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch([x, y])
        found = gradient(loss, x, y, batch)
    return lambda sources, v: tape.gradient(found, sources, output_gradients=v)


def seconds_of(step: Callable, arguments: tuple) -> tuple[float, np.ndarray]:
    """The seconds, and the hypergradient."""
    begun = time.perf_counter()
    made = step(*arguments)
    found = (made.upper_gradient if isinstance(made, tb.Step) else made)[0].numpy()
    return time.perf_counter() - begun, found


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
    penalty, penalty_arguments = build("penalty", args.inner_steps)
    approxgrad, arguments = build("approxgrad", args.inner_steps)
    contestants = {
        "penalty": (compiled(penalty, args.xla), penalty_arguments),
        "approxgrad": (compiled(approxgrad, args.xla), arguments),
        "as-published": (as_published(approxgrad, args.xla), arguments),
    }
    found: dict[str, Any] = {"matrix_gflops": rate / 1e9, "xla": args.xla}
    _, ours = seconds_of(*contestants["approxgrad"])  # the first calls trace
    _, published = seconds_of(*contestants["as-published"])
    error = np.linalg.norm(published - ours) / np.linalg.norm(ours)
    found["as-published_difference"] = float(error)
    seconds_of(*contestants["penalty"])
    times: dict[str, list[float]] = {method: [] for method in contestants}
    for _ in range(args.rounds):
        for method, contestant in contestants.items():
            times[method].append(seconds_of(*contestant)[0])
    for method, values in times.items():
        operations = floor(method, args.inner_steps, args.inner_steps)
        found[method] = {
            "milliseconds": 1000 * statistics.median(values),
            "all_milliseconds": [1000 * value for value in values],
            "gflop": operations / 1e9,
            "floor_milliseconds": 1000 * operations / rate,
        }
    for method in ("approxgrad", "as-published"):
        pairs = zip(times["penalty"], times[method], strict=True)
        ratios = [b / a for a, b in pairs]
        found[f"{method}_over_penalty"] = statistics.median(ratios)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "denoising.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return found


if __name__ == "__main__":
    main()
