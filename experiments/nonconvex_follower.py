"""Three small problems in which the choice of the lower solution matters.

    python experiments/nonconvex_follower.py --out runs/follower
    python experiments/nonconvex_follower.py --problem sine \\
        --method ia-gm iaptt-gm --project-inner --out runs/projected

sine: a nonconvex follower with three starts (x0, y0).

    F(x, y) = x + x y,    f(x, y) = -sin(x y),    x in [1, 10],  y in [-2, 2]

The solution is (11 pi / 4, -2). ls and ns are implicit gradients (ls: conjugate
gradients on the normal equations, since f is concave in y at some points; ns: Neumann
series). rhg and bda unroll from y0. ia-gm learns the start z of the inner steps.
iaptt-gm also does, and ends at the inner iterate with the largest F. Its y is that
iterate; the y of all others is the last one. Published settings: 500 outer steps with
rate 0.1 for x and z, 40 inner steps with rate 5e-4. Not mentioned in the paper:

- Inner iterates must be allowed to leave [-2, 2], as in the published script's first
  version. Only the pessimistic end then keeps y feasible, and only iaptt-gm arrives.
  With `--project-inner` ia-gm arrives too. x and z are always projected.
- (7 pi / 4, -2) is a local solution. 20 to 40 inner steps pass it and reach
  (11 pi / 4, -2); with 42 or more the first two starts end at the local solution.
- At a constant rate x oscillates around the solution by up to 0.1, so the last fifth of
  the outer steps uses a tenth of the rate (`--settle 0`: as published).

counter: BDA's counterexample, in which f does not determine y2.

    F = (x - y2)^2 / 2 + (y1 - 1)^2 / 2,    f = y1^2 / 2 - x y1,    x in [-100, 100]

The solution is x = 1, y = (1, 1). From y = (0, 0) rhg never moves y2 and ends at
x = 1/2. bda moves it by the aggregated gradient of F, ia-gm by learning its start.

convex: 50 dimensions, solution e = (1, ..., 1), with (ia-gm-a) and without (ia-gm)
Nesterov's acceleration of the inner steps.

    F = |x - y2|^4 + |y1 - e|^4,    f = |y1|^2 / 2 - x'y1,    x in [-100, 100]^50

The rates and steps of the last two problems are our choice. With 12 or more inner steps
plain steps are sufficient, and the acceleration overshoots. Reproduces the numerical
examples of Liu, Liu, Zeng and Zhang (2021), arXiv:2110.00455; the counterexample is
from Liu, Mu, Yuan, Zeng and Zhang (2020), arXiv:2006.04045.

`--start X Y` sets x = X and y = Y in every component at the start. `--dimension` makes
sine a sum over that many equal components; for convex it is the number of components.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import common
import keras
import numpy as np
import tensorflow as tf

import tfbilevel as tb

METHODS = ("ls", "ns", "rhg", "bda", "ia-gm", "iaptt-gm", "ia-gm-a")
LEARNED_START = ("ia-gm", "iaptt-gm", "ia-gm-a")
# The methods that use a setting; it is rejected for all others.
USERS = {"alpha": ("bda",), "alpha_decay": ("bda",), "solver_steps": ("ls", "ns")}

Objective = Callable[[Any, Any], tf.Tensor]
Paths = dict[str, dict[str, "Path"]]  # for one example: method -> start -> path


@dataclasses.dataclass(frozen=True)
class Settings:
    outer_steps: int
    inner_steps: int
    upper_lr: float
    inner_lr: float
    settle: float = 0.0
    alpha: float = 0.4
    alpha_decay: float = 0.9
    solver_steps: int = 10
    project_inner: bool = False


@dataclasses.dataclass(frozen=True)
class Example:
    """A problem with its starts and its solution.

    Attributes:
        upper_objective: F.
        lower_objective: f.
        shapes: dimension -> shapes of x and y.
        dimension: `None` if it is fixed.
        solution: x and y, the same in every component.
        starts: name -> x and y, the same in every component.
        upper_bounds: bounds of every component of x.
        lower_bounds: bounds of every component of y, if any.
        methods: the methods that apply to the problem.
        settings: the defaults.
    """

    upper_objective: Objective
    lower_objective: Objective
    shapes: Callable[[Any], tuple[tuple, tuple]]
    dimension: int | None
    solution: tuple[float, float]
    starts: dict[str, tuple[float, float]]
    upper_bounds: tuple[float, float]
    lower_bounds: tuple[float, float] | None
    methods: tuple[str, ...]
    settings: Settings

    def point(self, x: float, y: float) -> tuple[tf.Tensor, tf.Tensor]:
        """x and y with the same value in every component."""
        of_x, of_y = (tf.zeros(s, tf.float64) for s in self.shapes(self.dimension))
        return of_x + x, of_y + y

    def bounds(self) -> dict[str, tuple[float, float]]:
        """The closed bounds of x and y."""
        free = -np.inf, np.inf
        return {"X": self.upper_bounds, "Y": self.lower_bounds or free}


EXAMPLES = {
    "sine": Example(
        upper_objective=lambda x, y: tf.reduce_sum(x + x * y),
        lower_objective=lambda x, y: -tf.reduce_sum(tf.sin(x * y)),
        shapes=lambda d: ((), ()) if d == 1 else ((d,), (d,)),
        dimension=1,
        solution=(11 * np.pi / 4, -2.0),
        starts={"(1, 2)": (1.0, 2.0), "(5, 1)": (5.0, 1.0), "(7, -1)": (7.0, -1.0)},
        upper_bounds=(1.0, 10.0),
        lower_bounds=(-2.0, 2.0),
        methods=METHODS[:6],
        settings=Settings(500, 40, upper_lr=0.1, inner_lr=5e-4, settle=0.2),
    ),
    "counter": Example(
        upper_objective=lambda x, y: ((x - y[1]) ** 2 + (y[0] - 1) ** 2) / 2,
        lower_objective=lambda x, y: y[0] ** 2 / 2 - x * y[0],
        shapes=lambda d: ((), (2,)),
        dimension=None,
        solution=(1.0, 1.0),
        starts={"0": (0.0, 0.0)},
        upper_bounds=(-100.0, 100.0),
        lower_bounds=None,
        methods=("rhg", "bda", "ia-gm"),
        settings=Settings(
            200, 100, upper_lr=0.3, inner_lr=0.5, alpha=0.5, alpha_decay=0.95
        ),
    ),
    "convex": Example(
        upper_objective=lambda x, y: (
            tf.reduce_sum((x - y[1]) ** 2) ** 2 + tf.reduce_sum((y[0] - 1) ** 2) ** 2
        ),
        lower_objective=lambda x, y: tf.reduce_sum(y[0] ** 2 / 2 - x * y[0]),
        shapes=lambda d: ((d,), (2, d)),
        dimension=50,
        solution=(1.0, 1.0),
        starts={"0": (0.0, 0.0)},
        upper_bounds=(-100.0, 100.0),
        lower_bounds=None,
        methods=("ia-gm", "ia-gm-a"),
        settings=Settings(500, 10, upper_lr=1e-3, inner_lr=0.1),
    ),
}


class Path(NamedTuple):
    """One method from one start; every array has a leading axis of outer steps.

    Attributes:
        x: the upper variables, before the step.
        y: the end point of the inner steps; y_{k*} for a pessimistic end.
        y_last: the last inner iterate.
        upper: F(x, y).
        lower: f(x, y).
        truncation: k*.
        diverged: whether a linear solve diverged; only ls and ns have one.
        seconds: the time for the whole path.
    """

    x: np.ndarray
    y: np.ndarray
    y_last: np.ndarray
    upper: np.ndarray
    lower: np.ndarray
    truncation: np.ndarray
    diverged: np.ndarray
    seconds: float


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.Parser(description=__doc__)
    add, above = parser.add_argument, common.positive
    add(
        "--problem",
        "--example",
        choices=EXAMPLES,
        nargs="+",
        help="default: all with the --method",
    )
    add("--method", choices=METHODS, nargs="+", help="default: all of the examples")
    add("--outer-steps", type=above(int))
    add("--inner-steps", type=above(int))
    add("--upper-lr", type=above(float), help="rate of x and of a learned start")
    add("--inner-lr", type=above(float))
    add("--settle", type=float, help="share of last steps with a tenth of the rate")
    add("--alpha", type=common.share, help="bda: weight of F at the first step")
    add("--alpha-decay", type=common.share, help="bda: factor on alpha per inner step")
    add("--solver-steps", type=above(int), help="ls, ns: Hessian products")
    add(
        "--project-inner",
        action=argparse.BooleanOptionalAction,
        help="sine: project every inner iterate onto [-2, 2]",
    )
    add(
        "--start",
        type=common.finite,
        nargs=2,
        action="append",
        metavar=("X", "Y"),
        help="start of x and y; may be repeated; default by example",
    )
    add("--dimension", type=above(int), help="sine: default 1; convex: 50")
    add("--tolerance", type=above(float), default=0.05, help="distance of an arrival")
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def check(parser: common.Parser, args: argparse.Namespace) -> None:
    """Reject unused flags; fill in the methods and each example's settings."""
    if args.problem is None:  # those that have one of the methods
        args.problem = [
            name
            for name, example in EXAMPLES.items()
            if args.method is None or {*args.method} & {*example.methods}
        ]
    known = {m for name in args.problem for m in EXAMPLES[name].methods}
    args.method = [m for m in METHODS if m in (args.method or known)]
    for method in args.method:
        if method not in known:
            parser.error(
                f"--method {method} has no effect with --problem "
                f"{' '.join(args.problem)}: leave it out"
            )
    for name in args.problem:
        if not {*args.method} & {*EXAMPLES[name].methods}:
            parser.error(
                f"--problem {name} has none of --method {' '.join(args.method)}: add "
                f"one of {', '.join(EXAMPLES[name].methods)}"
            )
    for name, users in USERS.items():
        if getattr(args, name) is not None and not {*users} & {*args.method}:
            parser.error(
                f"{common.flag(name)} has no effect with --method "
                f"{' '.join(args.method)}: leave it out"
            )
    if args.project_inner and "sine" not in args.problem:
        parser.error("--project-inner needs --problem sine: only its y is bounded")
    if args.settle is not None and not 0 <= args.settle <= 1:
        parser.error(f"--settle must be between 0 and 1, got {args.settle}")
    sizes = [EXAMPLES[name].dimension for name in args.problem]
    if args.dimension is not None and not any(sizes):
        parser.error("--dimension needs --problem sine or convex: counter's is fixed")
    for name in args.problem:
        for start in args.start or ():
            check_start(parser, name, start)
    args.examples = {name: chosen(EXAMPLES[name], args) for name in args.problem}
    names = [field.name for field in dataclasses.fields(Settings)]
    given = {k: getattr(args, k) for k in names if getattr(args, k) is not None}
    args.settings = {
        name: dataclasses.replace(EXAMPLES[name].settings, **given)
        for name in args.problem
    }


def check_start(parser: common.Parser, name: str, start: list[float]) -> None:
    """Raise an error for a start that the example's projections would move."""
    bounds = EXAMPLES[name].bounds()
    for value, (axis, (least, most)) in zip(start, bounds.items(), strict=True):
        if not least <= value <= most:
            parser.error(
                f"--start X Y needs {axis} in [{least:g}, {most:g}] with --problem "
                f"{name}, got {value:g}"
            )


def chosen(example: Example, args: argparse.Namespace) -> Example:
    """The example with the dimension and the starts that the flags select."""
    if args.dimension is not None and example.dimension is not None:
        example = dataclasses.replace(example, dimension=args.dimension)
    if args.start is not None:
        starts = {f"({x:g}, {y:g})": (x, y) for x, y in args.start}
        example = dataclasses.replace(example, starts=starts)
    return example


def build_problem(
    example: Example, learned_start: bool, project_inner: bool
) -> tb.Problem:
    """The problem; its upper variables are x and, if learned, the start."""

    def bounded_lower(y: tf.Tensor) -> tf.Tensor:
        bounds = example.lower_bounds
        return y if bounds is None else tf.clip_by_value(y, *bounds)

    def bounded_upper(upper: dict) -> dict:
        start = {"start": bounded_lower(upper["start"])} if learned_start else {}
        return {"x": tf.clip_by_value(upper["x"], *example.upper_bounds)} | start

    return tb.Problem(
        upper_loss=lambda upper, y, batch: example.upper_objective(upper["x"], y),
        lower_loss=lambda upper, y, batch: example.lower_objective(upper["x"], y),
        lower_start=(lambda upper: upper["start"]) if learned_start else None,
        project_upper=bounded_upper,
        project_lower=bounded_lower if project_inner else None,
    )


def build_method(name: str, settings: Settings) -> tb.Method:
    optimizer = keras.optimizers.SGD(settings.inner_lr)
    accelerated = name == "ia-gm-a"
    inner = tb.InnerSolver(
        optimizer, settings.inner_steps, start="cold", accelerated=accelerated
    )
    if name == "ls":
        return tb.Implicit(inner, tb.NormalConjugateGradient(settings.solver_steps))
    if name == "ns":
        return tb.Implicit(inner, tb.Neumann(settings.solver_steps))
    if name == "bda":
        aggregation = tb.Aggregation(settings.alpha, decay=settings.alpha_decay)
        return tb.Unroll(inner, aggregate=aggregation)
    return tb.Unroll(inner, end="pessimistic" if name == "iaptt-gm" else "final")


def solve(example: Example, method: str, start: str, settings: Settings) -> Path:
    learned_start = method in LEARNED_START
    x, y = example.point(*example.starts[start])
    settling = round(settings.outer_steps * (1 - settings.settle))
    rate = keras.optimizers.schedules.PiecewiseConstantDecay(
        [settling - 1],  # the last step before it
        [settings.upper_lr, settings.upper_lr / 10],
    )
    begun = time.perf_counter()
    with warnings.catch_warnings():
        # Neumann's series diverges where f is concave in y; such steps are counted.
        warnings.simplefilter("ignore", tb.DivergenceWarning)
        result = tb.minimize(
            build_problem(example, learned_start, settings.project_inner),
            build_method(method, settings),
            upper={"x": x, "start": y} if learned_start else {"x": x},
            lower=y,
            upper_optimizer=keras.optimizers.SGD(rate),
            batches=tb.Batches(None, None),
            # One step more, to evaluate the result of the last one.
            steps=settings.outer_steps + 1,
            trace=lambda point: (point.upper["x"], point.lower, point.metrics),
        )
    return follow(example, x, result.trace, settings, time.perf_counter() - begun)


def follow(
    example: Example, x0: tf.Tensor, trace: tuple, settings: Settings, seconds: float
) -> Path:
    after, last, metrics = trace
    x, end = tf.concat([x0[None], after[:-1]], axis=0), last
    if "truncation" in metrics:
        # F = sum of x (1 + y), with all components equal, determines y_{k*}.
        total = tf.reduce_sum(tf.reshape(x, [len(x), -1]), axis=1)
        each = metrics["upper_loss"] / total - 1
        end = tf.zeros_like(last) + tf.reshape(each, [-1] + [1] * (last.ndim - 1))

    def along(objective: Objective) -> np.ndarray:
        return tf.vectorized_map(lambda at: objective(*at), (x, end)).numpy()

    steps = len(x)
    return Path(
        x.numpy(),
        end.numpy(),
        last.numpy(),
        along(example.upper_objective),
        along(example.lower_objective),
        np.array(metrics.get("truncation", [settings.inner_steps] * steps)),
        np.array(metrics.get("diverged", np.zeros(steps))) > 0,
        seconds,
    )


def distances(example: Example, path: Path) -> dict[str, np.ndarray]:
    """The Euclidean distances to the solution at every step."""

    def away(values: np.ndarray, solution: Any) -> np.ndarray:
        return np.linalg.norm((values - solution).reshape(len(values), -1), axis=1)

    best_x, best_y = example.solution
    x, y, last = away(path.x, best_x), away(path.y, best_y), away(path.y_last, best_y)
    return {
        "x_distance": x,
        "y_distance": y,
        "distance": np.hypot(x, y),
        "distance_last": np.hypot(x, last),
    }


def log(run: common.Run, labels: dict, example: Example, path: Path) -> None:
    """Log one row per outer step; x and y only if they are scalars."""
    columns = {"x": path.x, "y": path.y, "y_last": path.y_last}
    columns |= {"F": path.upper, "f": path.lower, **distances(example, path)}
    columns |= {"truncation": path.truncation}
    for step in range(len(path.x)):
        row = {name: values[step] for name, values in columns.items()}
        row = {name: v if np.ndim(v) == 0 else "" for name, v in row.items()}
        run.log({**labels, "step": step, "seconds": round(path.seconds, 3), **row})


def summarise(example: Example, path: Path, tolerance: float) -> dict[str, Any]:
    numbers = distances(example, path)
    if path.x.ndim == path.y.ndim == 1:
        numbers = {"x": path.x, "y": path.y} | numbers
    return {
        **{name: float(values[-1]) for name, values in numbers.items()},
        "arrived": bool(numbers["distance"][-1] < tolerance),
        "mean_truncation": float(path.truncation.mean()),
        "diverged_steps": int(path.diverged.sum()),
        "seconds": path.seconds,
    }


def draw_sine(out: pathlib.Path, example: Example, paths: Paths) -> None:
    """Draw relative residuals of x and F against the outer step, a column per start."""
    solution = example.point(*example.solution)
    size, best = np.linalg.norm(solution[0]), float(example.upper_objective(*solution))
    count = len(example.starts)
    title, area = "A follower that is not convex", (1 + 4 * count, 6.5)
    with panels(out / "sine.png", title, (2, count), area, sharex=True) as grid:
        for (above, below), start in zip(grid.T, example.starts, strict=True):
            above.set(title=f"from (x, y) = {start}")
            below.set(xlabel="outer step")
            for thinner, (method, of_start) in enumerate(paths.items()):
                path, width = of_start[start], 4 - 0.6 * thinner  # many lines coincide
                away = distances(example, path)["x_distance"]
                above.plot(away / size, label=method, lw=width)
                below.plot(
                    np.abs(path.upper - best) / abs(best), label=method, lw=width
                )
        grid[0, 0].set(ylabel="|x - x*| / |x*|")
        grid[1, 0].set(ylabel="|F - F*| / |F*|")


def draw_truncation(
    out: pathlib.Path, example: Example, paths: Paths, window: int = 50
) -> None:
    """Draw the number of inner steps up to the iterate with the largest F."""
    count = len(example.starts)
    title, size = "Where iaptt-gm's inner steps end", (1 + 4 * count, 3.6)
    with panels(out / "truncation.png", title, (1, count), size, sharey=True) as grid:
        for axes, start in zip(grid[0], example.starts, strict=True):
            indices = paths["iaptt-gm"][start].truncation
            means = [
                indices[max(0, k - window + 1) : k + 1].mean()
                for k in range(len(indices))
            ]
            axes.plot(indices, ".", markersize=2, color="tab:gray", label="k*")
            axes.plot(means, label=f"mean of the last {window}")
            axes.set(xlabel="outer step", title=f"from (x, y) = {start}")
        grid[0, 0].set(ylabel="truncation index k*")


def draw_counter(out: pathlib.Path, example: Example, paths: Paths) -> None:
    title = "BDA's counter-example: f leaves y2 undetermined"
    with panels(out / "counter.png", title, (1, 1), (6, 4)) as grid:
        for label, path in lines(paths):
            grid[0, 0].plot(path.x, label=label)
        grid[0, 0].axhline(1, color="black", linestyle=":", label="solution")
        grid[0, 0].set(xlabel="outer step", ylabel="x")


def draw_convex(out: pathlib.Path, example: Example, paths: Paths) -> None:
    title = f"A convex follower in {example.dimension} dimensions"
    with panels(out / "convex.png", title, (1, 2), (10, 4)) as grid:
        for label, path in lines(paths):
            away = distances(example, path)
            grid[0, 0].plot(away["x_distance"], label=label)
            grid[0, 1].plot(away["y_distance"], label=label)
        for axes, name in zip(grid[0], "xy", strict=True):
            axes.set(xlabel="outer step", ylabel=f"|{name} - {name}*|", yscale="log")


def lines(paths: Paths) -> list[tuple[str, Path]]:
    """A label and a path for every method and, if there are several, every start."""
    return [
        (method if len(of_start) == 1 else f"{method} from {start}", path)
        for method, of_start in paths.items()
        for start, path in of_start.items()
    ]


@contextlib.contextmanager
def panels(
    file: pathlib.Path, title: str, shape: tuple, size: tuple, **shared: bool
) -> Iterator[np.ndarray]:
    """A picture's axes, [rows, columns], with grids, and a legend in the first."""
    with common.figure(file, size) as page:
        grid = page.subplots(*shape, squeeze=False, **shared)
        yield grid
        for axes in grid.flat:
            axes.grid(alpha=0.3)
        grid.flat[0].legend(fontsize=8)
        page.suptitle(title)


def draw(
    out: pathlib.Path, examples: dict[str, Example], found: dict[str, Paths]
) -> None:
    pictures = {"sine": draw_sine, "counter": draw_counter, "convex": draw_convex}
    for name, paths in found.items():
        pictures[name](out, examples[name], paths)
        if name == "sine" and "iaptt-gm" in paths:
            draw_truncation(out, examples[name], paths)


def print_table(summary: dict) -> None:
    print(f"{'':9s}{'method':10s}{'start':9s}{'|x - x*|':>10s}{'|y - y*|':>10s}")
    for name, methods in summary["examples"].items():
        for method, starts in methods.items():
            for start, end in starts.items():
                away = f"{end['x_distance']:10.4f}{end['y_distance']:10.4f}"
                arrived = "  arrived" if end["arrived"] else ""
                print(f"{name:9s}{method:10s}{start:9s}{away}{arrived}")


def solve_all(args: argparse.Namespace, run: common.Run) -> dict[str, Paths]:
    jobs = [
        (name, method, start)
        for name in args.problem
        for method in args.method
        if method in EXAMPLES[name].methods
        for start in args.examples[name].starts
    ]
    progress = common.Progress(run.out, len(jobs), "paths")
    found: dict[str, Paths] = {}
    for done, (name, method, start) in enumerate(jobs, 1):
        with common.one_line_nonfinite():
            path = solve(args.examples[name], method, start, args.settings[name])
        labels = {"example": name, "method": method, "start": start}
        log(run, labels, args.examples[name], path)
        found.setdefault(name, {}).setdefault(method, {})[start] = path
        progress.update(done)
    return found


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    kept = ("problem", "method", "start", "dimension", "tolerance", "seed")
    config = {name: getattr(args, name) for name in kept}
    config |= {name: dataclasses.asdict(s) for name, s in args.settings.items()}
    with common.one_line_errors(__file__):
        run = common.begin(args, config)
    run.rewind(-1)  # a resumed run starts from the beginning, since it takes seconds
    begun = time.perf_counter()
    with common.many_runs():
        found = solve_all(args, run)
    draw(run.out, args.examples, found)
    ends = {
        name: {
            method: {
                start: summarise(args.examples[name], path, args.tolerance)
                for start, path in of_start.items()
            }
            for method, of_start in paths.items()
        }
        for name, paths in found.items()
    }
    summary = {
        "tolerance": args.tolerance,
        "seconds": time.perf_counter() - begun,
        "arrived_from_every_start": {
            name: [m for m, at in methods.items() if all_arrived(at)]
            for name, methods in ends.items()
        },
        "examples": ends,
    }
    run.summarise(summary)
    print_table(summary)
    return summary


def all_arrived(ends: dict[str, dict]) -> bool:
    return all(end["arrived"] for end in ends.values())


if __name__ == "__main__":
    main()
