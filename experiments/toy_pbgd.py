"""The toy problem of penalty-based bilevel gradient descent, from 1,000 starts.

    python experiments/toy_pbgd.py --out runs/toy
    python experiments/toy_pbgd.py --method g-pbgd --out runs/toy-g

    f(x, y) = cos(4y + 2) / (1 + exp(2 - 4x)) + 1/2 ln((4x - 2)^2 + 1)
    g(x, y) = (x + y)^2 + x sin^2(x + y),         x in [0, 3],  y free

The lower problem is solved by y = -x, and its least value is 0 for every x. Along that
curve f has three local minima. For a penalty weight of 10 those of the penalised
problem are near (0.37, -0.33), (1.19, -1.21) and (2.82, -2.83), and every start must
end at one of them. All starts run as one vectorised problem in float64, each until its
own projected gradient is small. Reproduces the numerical verification of Shen and Chen
(2023), arXiv:2302.05185, with the correct gradient (the published script's is wrong).
"""

import argparse
import csv
import json
import pathlib
import time

import common
import keras
import numpy as np
import tensorflow as tf

import tfbilevel as tb

UPPER_BOUNDS = (0.0, 3.0)


def upper_objective(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """f at every start, [starts]."""
    ripple = tf.cos(4 * y + 2) / (1 + tf.exp(2 - 4 * x))
    return ripple + 0.5 * tf.math.log((4 * x - 2) ** 2 + 1)


def lower_objective(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """g at every start, [starts]."""
    return (x + y) ** 2 + x * tf.sin(x + y) ** 2


PROBLEM = tb.Problem(
    # Sums over the starts, so that their gradients are independent.
    upper_loss=lambda x, y, batch: tf.reduce_sum(upper_objective(x, y)),
    lower_loss=lambda x, y, batch: tf.reduce_sum(lower_objective(x, y)),
    project_upper=lambda x: tf.clip_by_value(x, *UPPER_BOUNDS),
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.Parser(description=__doc__)
    add, above = parser.add_argument, common.positive
    add("--method", choices=("v-pbgd", "g-pbgd"), default="v-pbgd")
    add("--gammas", type=above(float), nargs="+", default=[10.0], help="one per stage")
    add("--upper-lr", type=above(float), default=0.1, help="alpha_0: both rates")
    add("--tolerance", type=above(float), default=1e-5, help="projected gradient norm")
    add("--starts", type=above(int), default=1000)
    add("--outer-steps", type=above(int), default=20_000, help="at most, per stage")
    return parser.parse_args(argv)


def build_method(name: str, gamma: float, rate: float) -> tb.Method:
    optimizer = keras.optimizers.SGD(rate)
    if name == "g-pbgd":
        return tb.GradientNorm(optimizer, gamma)
    # The lower problem's least value is known, so no inner solver is needed.
    return tb.ValueGap(None, optimizer, gamma)


def solve(args: argparse.Namespace, gamma: float, x: tf.Tensor, y: tf.Tensor):
    step_size = args.upper_lr * min(1 / gamma, 1)

    def projected_gradient_norm(before: tb.Point, after: tb.Point) -> tf.Tensor:
        moved = (before.upper - after.upper) ** 2 + (before.lower - after.lower) ** 2
        return tf.sqrt(moved) / step_size

    return tb.minimize(
        PROBLEM,
        build_method(args.method, gamma, args.upper_lr),
        upper=x,
        lower=y,
        upper_optimizer=keras.optimizers.SGD(args.upper_lr),
        batches=tb.Batches(None, None),
        steps=args.outer_steps,
        stop=lambda a, b: projected_gradient_norm(a, b) <= args.tolerance,
        trace=lambda point: tf.reduce_mean(tf.abs(point.upper + point.lower)),
    )


def draw(out: pathlib.Path, x: np.ndarray, y: np.ndarray) -> None:
    """Draw f's surface, the hyper-objective along y = -x, and the end points."""
    grid_x, grid_y = np.meshgrid(np.linspace(0, 3.5, 150), np.linspace(-4, 1, 150))
    surface = upper_objective(tf.constant(grid_x), tf.constant(grid_y)).numpy()
    line = np.linspace(*UPPER_BOUNDS, 300)
    along = upper_objective(tf.constant(line), tf.constant(-line)).numpy()
    ends = upper_objective(tf.constant(x), tf.constant(y)).numpy()

    with common.figure(out / "end_points.png", (12, 5)) as page:
        axes = page.add_subplot(1, 2, 1, projection="3d", computed_zorder=False)
        axes.plot_surface(grid_x, grid_y, surface, cmap="viridis", alpha=0.6)
        axes.plot(line, -line, along, "k--", zorder=5, label="f(x, -x)")
        axes.scatter(x, y, zs=ends, color="red", s=24, zorder=6, label="end points")
        axes.set(xlabel="x", ylabel="y", zlabel="f")
        axes.legend(loc="upper right")  # "best" would check the positions of all points
        axes.view_init(elev=35, azim=-60)
        flat = page.add_subplot(1, 2, 2)
        flat.plot(line, along, "k--", label="hyper-objective f(x, -x)")
        flat.scatter(
            x, ends, color="red", s=24, zorder=3, label="end points (x, f(x, y))"
        )
        flat.set(xlabel="x", ylabel="f")
        flat.grid(alpha=0.3)
        flat.legend(loc="upper left")


def clusters(x: np.ndarray, y: np.ndarray, width: float = 0.05) -> list[dict]:
    """The distinct end points: their mean positions and numbers of starts."""
    found, left = [], np.ones(len(x), bool)
    while left.any():
        first = np.flatnonzero(left)[0]
        near = left & (np.hypot(x - x[first], y - y[first]) < width)
        found.append(
            {"x": x[near].mean(), "y": y[near].mean(), "starts": int(near.sum())}
        )
        left &= ~near
    return sorted(found, key=lambda cluster: cluster["x"])


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    with common.one_line_errors(__file__):
        run = common.begin(args, common.settings(args))
    run.rewind(0)  # a resumed run starts from the beginning, since it takes seconds
    generator = np.random.default_rng(args.seed)
    x = tf.constant(generator.uniform(0, 3.5, args.starts))
    y = tf.constant(generator.uniform(-5, 8.5, args.starts))
    steps = np.zeros(args.starts, int)
    stopped, start, done = np.ones(args.starts, bool), time.perf_counter(), 0
    for gamma in args.gammas:
        with common.one_line_nonfinite():
            result = solve(args, gamma, x, y)
        x, y = result.upper, result.lower
        steps += result.steps.numpy()
        stopped = result.stopped.numpy()
        seconds = time.perf_counter() - start
        for k, distance in enumerate(result.trace.numpy(), 1):
            if k % 10 == 0 or k == len(result.trace):
                row = {"step": done + k, "seconds": round(seconds, 3), "gamma": gamma}
                run.log(row | {"mean_distance_to_solutions": distance})
        done += len(result.trace)
    x, y = x.numpy(), y.numpy()
    with (run.out / "end_points.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["x", "y", "steps", "converged"])
        writer.writerows(zip(x, y, steps, stopped, strict=True))
    draw(run.out, x, y)
    summary = {
        "method": args.method,
        "seconds": time.perf_counter() - start,
        "converged": float(np.mean(stopped)),
        "mean_steps": float(np.mean(steps)),
        "median_steps": float(np.median(steps)),
        "mean_residual": float(np.mean(np.abs(x + y))),
        "end_points": clusters(x, y),
    }
    run.summarise(summary)
    print(json.dumps(summary, indent=2, default=float))
    return summary


if __name__ == "__main__":
    main()
