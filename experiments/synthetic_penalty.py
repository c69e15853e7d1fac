"""Four problems in which y*(x) moves, lies near a saddle point, or is not unique.

    python experiments/synthetic_penalty.py --out runs/synthetic
    python experiments/synthetic_penalty.py --problem ex3 --method approxgrad penalty \\
        --inner-steps 10 --out runs/ex3

Upper variables u and lower variables v have 20 entries each, all in [-5, 5]. A is block
diagonal with two random blocks of 5 x 10, so it has a null space. P is the projection
onto its row space.

| name | f                    | g                | solution        | error       |
|------|----------------------|------------------|-----------------|-------------|
| ex1  | |u|^2 + |v|^2        | |1 - u - v|^2    | u = v = 1/2     | of u, v     |
| ex2  | |v|^2 - |u - v|^2    | |u - v|^2        | u = v = 0       | of u, v     |
| ex3  | |u|^2 + |v|^2        | |A(1 - u - v)|^2 | u = v = P 1 / 2 | of P u, P v |
| ex4  | |v|^2 - |A(u - v)|^2 | |A(u - v)|^2     | v = 0, A u = 0  | of P u, v   |

The error is the Euclidean distance from the solution. That of ex3 is measured in the
row space only; `full_error` is that of u and v themselves, which methods with an
inverse Hessian cannot reduce, because they do not see the null space.

| method     | moves v by                     | moves u by                           |
|------------|--------------------------------|--------------------------------------|
| gd         | T Adam steps on g              | Adam along f_u, v held constant      |
| rmd        | T gradient steps on g          | backpropagation through all T steps  |
| approxgrad | T Adam steps on g              | Adam on f_u - g_uv p, p after T Adam |
|            |                                | steps on |(g_vv + 1e-6) p - f_v|^2   |
| penalty    | T Adam steps on the Lagrangian | Adam on the Lagrangian               |

Reproduces figures 1 and 2 and table 4 of Mehra and Hamm (2021), arXiv:1911.03432;
their settings are the defaults. All methods use the same starts and the same A. The
starts of a run form one vectorised problem, so its seconds are those of all starts.
"""

import argparse
import os
import pathlib
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import keras
import numpy as np
import tensorflow as tf

import tfbilevel as tb

METHODS = ("gd", "rmd", "approxgrad", "penalty")
BLOCK, BOUND = 10, 5.0


class Example(NamedTuple):
    """One of the four problems.

    Attributes:
        problem: losses summed over a leading axis of starts, with box constraints.
        solution: the values of u and v from which errors are measured, [20].
        seen: (u, v) -> the parts of the differences that count in the error.
    """

    problem: tb.Problem
    solution: np.ndarray
    seen: Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


# Flags of single methods, with their defaults.
OWN = {
    "approxgrad": {"damping": 1e-6},
    "penalty": {"weight": 1.0, "lower_weight": 10.0, "tolerance": 1.0, "growth": 1.1},
}


class Job(NamedTuple):
    """One run: a method with T inner steps, applied to a problem."""

    problem: str
    method: str
    inner_steps: int

    @property
    def name(self) -> str:
        return f"{self.problem}-{self.method}-T{self.inner_steps}"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.Parser(description=__doc__)
    add, above = parser.add_argument, common.positive
    names = ("ex1", "ex2", "ex3", "ex4")
    add("--problem", nargs="+", choices=names, default=list(names))
    add("--method", nargs="+", choices=METHODS, default=list(METHODS))
    add("--inner-steps", nargs="+", type=above(int), default=[1, 5, 10], help="T")
    add("--starts", "--trials", type=above(int), default=20)
    add("--outer-steps", type=above(int), default=40_001)
    add(
        "--eval-every",
        "--record-every",
        type=above(int),
        default=10,
        help="updates between points of the curves",
    )
    add("--upper-lr", type=above(float), default=1e-3)
    add("--lower-lr", type=above(float), default=1e-4, help="for v and for p")
    add("--damping", type=common.at_least(float, 0), help="approxgrad; default 1e-6")
    add("--weight", type=above(float), help="penalty: rho at the start; default 1")
    add(
        "--lower-weight",
        type=common.at_least(float, 0),
        help="penalty: lambda at the start; default 10",
    )
    add("--tolerance", type=above(float), help="penalty: initial epsilon; default 1")
    add(
        "--growth",
        type=common.at_least(float, 1),
        help="penalty: factor per schedule update; default 1.1",
    )
    add("--jit", choices=("on", "off"), default="on")
    args = parser.parse_args(argv)
    for method, own in OWN.items():
        need = method in args.method, f"--method {method}"
        parser.reject_ineffective_flags(args, dict.fromkeys(own, need))
        for name, value in own.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    return args


def draw(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A and the starts of u and v, which depend only on the seed."""
    generator = np.random.default_rng(args.seed)
    blocks = [generator.normal(size=(BLOCK // 2, BLOCK)) for _ in range(2)]
    matrix = np.zeros((BLOCK, 2 * BLOCK))
    matrix[: BLOCK // 2, :BLOCK], matrix[BLOCK // 2 :, BLOCK:] = blocks
    shape = (args.starts, 2 * BLOCK)
    u, v = (generator.uniform(-BOUND, BOUND, shape) for _ in range(2))
    return matrix, u, v


def build_example(name: str, matrix: np.ndarray) -> Example:
    basis = np.linalg.qr(matrix.T)[0]
    projector = basis @ basis.T
    adds_up, singular = name in ("ex1", "ex3"), name in ("ex3", "ex4")
    solution = np.full(2 * BLOCK, 0.5 if adds_up else 0.0)
    if singular:
        solution = projector @ solution

    def squares(z: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(z * z)

    def rows(z: tf.Tensor) -> tf.Tensor:
        return z @ tf.constant(matrix.T)

    def project(z: tf.Tensor) -> tf.Tensor:
        return z @ tf.constant(projector)

    def gap(u: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        difference = 1.0 - u - v if adds_up else u - v
        return squares(rows(difference) if singular else difference)

    def upper_loss(u: tf.Tensor, v: tf.Tensor, batch: Any) -> tf.Tensor:
        return squares(u) + squares(v) if adds_up else squares(v) - gap(u, v)

    def lower_loss(u: tf.Tensor, v: tf.Tensor, batch: Any) -> tf.Tensor:
        return gap(u, v)

    def seen(u: tf.Tensor, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if not singular:
            return u, v
        return project(u), project(v) if adds_up else v

    def box(z: tf.Tensor) -> tf.Tensor:
        return tf.clip_by_value(z, -BOUND, BOUND)

    problem = tb.Problem(upper_loss, lower_loss, project_upper=box, project_lower=box)
    return Example(problem, solution, seen)


def build_method(
    args: argparse.Namespace, job: Job
) -> tuple[tb.Method, keras.optimizers.Optimizer]:
    """The method and its upper optimizer."""
    steps = job.inner_steps

    def inner(optimizer: keras.optimizers.Optimizer) -> tb.InnerSolver:
        return tb.InnerSolver(optimizer, steps, optimizer_state="carry")

    if job.method == "rmd":
        sgd = keras.optimizers.SGD
        return tb.Unroll(inner(sgd(args.lower_lr))), sgd(args.upper_lr)
    if job.method == "gd":
        method = tb.Unroll(inner(common.adam(args.lower_lr)), first_order=True)
    elif job.method == "approxgrad":
        solver = tb.GradientSolver(
            common.adam(args.lower_lr),
            steps,
            "residual",
            rtol=0.0,
            damping=args.damping,
        )
        method = tb.Implicit(inner(common.adam(args.lower_lr)), solver)
    else:
        method = tb.AugmentedLagrangian(
            common.adam(args.lower_lr),
            steps,
            weight=args.weight,
            lower_weight=args.lower_weight,
            atol=args.tolerance,
            independent_starts=args.starts,
            schedule=tb.PenaltySchedule(args.growth, *[1 / args.growth] * 3),
        )
    return method, common.adam(args.upper_lr)


def errors(example: Example, u: Any, v: Any) -> dict[str, tf.Tensor]:
    """Distances from the solution, [starts]."""

    def distance(parts: tuple) -> tf.Tensor:
        return tf.sqrt(tf.add_n([tf.reduce_sum(part**2, axis=1) for part in parts]))

    differences = u - example.solution, v - example.solution
    return {
        "error": distance(example.seen(*differences)),
        "full_error": distance(differences),
    }


def solve(args: argparse.Namespace, job: Job, path: pathlib.Path) -> None:
    """Run one job and write its curves atomically."""
    matrix, u, v = draw(args)
    example = build_example(job.problem, matrix)
    method, optimizer = build_method(args, job)

    def trace(point: tb.Point) -> dict[str, tf.Tensor]:
        measured = errors(example, point.upper, point.lower)
        names = {"weight", "residual"} & set(point.metrics)
        return measured | {name: point.metrics[name] for name in names}

    # In equal parts: the first one includes compilation, the others are timed.
    parts = max(d for d in range(1, 21) if args.outer_steps % d == 0)
    seconds, traces, state = [], [], None
    start = errors(example, tf.constant(u), tf.constant(v))
    for _ in range(parts):
        begun = time.perf_counter()
        result = tb.minimize(
            example.problem,
            method,
            u,
            v,
            optimizer,
            tb.Batches(None, None),
            args.outer_steps // parts,
            trace=trace,
            state=state,
            jit_compile=args.jit == "on",
        )
        u, v, state = result.upper, result.lower, result.state
        traces.append({name: value.numpy() for name, value in result.trace.items()})
        seconds.append(time.perf_counter() - begun)
    curves = {name: np.concatenate([one[name] for one in traces]) for name in traces[0]}
    steps = np.arange(1, args.outer_steps + 1)
    kept = (steps % args.eval_every == 0) | (steps == args.outer_steps)
    curves = {name: values[kept] for name, values in curves.items()}
    for name, value in start.items():
        curves[name] = np.concatenate([value.numpy()[None], curves[name]])
    timed = np.array(seconds[1:] if parts > 1 else seconds)
    partial = path.with_name(path.stem + ".partial.npz")
    np.savez_compressed(
        partial,
        step=np.concatenate([[0], steps[kept]]),
        seconds_per_10000=timed * 10_000 * parts / args.outer_steps,
        compile_seconds=seconds[0] - timed.mean() if parts > 1 else np.nan,
        upper=u.numpy(),
        lower=v.numpy(),
        **curves,
    )
    os.replace(partial, path)


def draw_curves(out: pathlib.Path, problem: str, found: dict[Job, Any]) -> None:
    """Draw rows of T and columns of methods: starts in thin lines, means in thick."""
    jobs = [job for job in found if job.problem == problem]
    counts = sorted({job.inner_steps for job in jobs})
    methods = [m for m in METHODS if any(job.method == m for job in jobs)]
    shape = len(counts), len(methods)
    size = 3 * len(methods), 2.3 * len(counts)
    with common.figure(out / f"{problem}.png", size) as page:
        panels = page.subplots(*shape, sharex=True, sharey=True, squeeze=False)
        for axes, count in zip(panels, counts, strict=True):
            for panel, method in zip(axes, methods, strict=True):
                curves = found[Job(problem, method, count)]
                panel.plot(
                    curves["step"], curves["error"], "y", linewidth=0.6, alpha=0.5
                )
                panel.plot(
                    curves["step"], curves["error"].mean(axis=1), "b", linewidth=2
                )
                panel.set(title=f"{method}, T = {count}", ylim=(0, 40))
                panel.grid(alpha=0.3)
        for panel in panels[-1]:
            panel.set_xlabel("updates of u")
        for panel in panels[:, 0]:
            panel.set_ylabel("error")
        page.suptitle(f"{problem}: every start, and their mean")


def summarise(job: Job, curves: Any) -> dict[str, Any]:
    times = curves["seconds_per_10000"]
    made: dict[str, Any] = job._asdict()
    for name in ("error", "full_error"):
        made[name] = float(curves[name][-1].mean())
        made[f"{name}_std"] = float(curves[name][-1].std())
    made |= {
        "largest_error": float(curves["error"][-1].max()),
        "seconds_per_10000_updates": float(times.mean()),
        "seconds_per_10000_updates_std": float(times.std()),
        "compile_seconds": float(curves["compile_seconds"]),
    }
    for name in ("weight", "residual"):
        if name in curves:
            made[name] = float(curves[name][-1])
    return made


def print_table(summaries: list[dict], name: str, unit: str) -> None:
    methods = [m for m in METHODS if any(s["method"] == m for s in summaries)]
    print(f"\n{unit}\n{'':12s}" + "".join(f"{method:>20s}" for method in methods))
    rows = dict.fromkeys((s["problem"], s["inner_steps"]) for s in summaries)
    for problem, steps in rows:
        cells = {
            s["method"]: f"{s[name]:.4f} +- {s[name + '_std']:.4f}"
            for s in summaries
            if (s["problem"], s["inner_steps"]) == (problem, steps)
        }
        line = "".join(f"{cells.get(method, ''):>20s}" for method in methods)
        print(f"{problem}, T = {steps:<3d}{line}")


def log(run: common.Run, found: dict[Job, Any]) -> None:
    """Log about forty rows per run: mean and standard deviation over its starts."""
    run.rewind(-1)
    for job, curves in found.items():
        last = len(curves["step"]) - 1
        rate = float(curves["seconds_per_10000"].mean()) / 10_000
        for i in sorted({round(last * part / 40) for part in range(41)}):
            step = int(curves["step"][i])
            row = {**job._asdict(), "step": step, "seconds": round(step * rate, 4)}
            for name in ("error", "full_error"):
                row[name] = float(curves[name][i].mean())
                row[f"{name}_std"] = float(curves[name][i].std())
            run.log(row)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    with common.one_line_errors(__file__):
        run = common.begin(args, common.settings(args))
    # approxgrad's T steps cannot keep up with the moving solution. The residual, which
    # the results contain, is the subject of the comparison, so no warning is needed.
    warnings.simplefilter("ignore", tb.DivergenceWarning)
    folder = run.out / "curves"
    folder.mkdir(exist_ok=True)
    jobs = [
        Job(problem, method, steps)
        for problem in args.problem
        for steps in args.inner_steps
        for method in args.method
    ]
    progress = common.Progress(run.out, len(jobs), "runs")
    for number, job in enumerate(jobs, 1):
        path = folder / f"{job.name}.npz"
        if not path.exists():
            with common.one_line_nonfinite():
                solve(args, job, path)
        progress.update(number)
    found = {}
    for job in jobs:
        with np.load(folder / f"{job.name}.npz") as file:
            found[job] = dict(file)
    log(run, found)
    for problem in args.problem:
        draw_curves(run.out, problem, found)
    summaries = [summarise(job, curves) for job, curves in found.items()]
    print_table(summaries, "error", "error after the last update")
    print_table(summaries, "full_error", "the same of u and v themselves (full_error)")
    unit = f"seconds for 10,000 updates of {args.starts} starts"
    print_table(summaries, "seconds_per_10000_updates", unit)
    summary = {"runs": summaries}
    run.summarise(summary)
    return summary


if __name__ == "__main__":
    main()
