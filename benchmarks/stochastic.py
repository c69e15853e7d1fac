"""Stochastic methods on a quadratic bilevel problem whose value function is known.

    python benchmarks/stochastic.py --out runs/bench-stochastic

Two linear regressions with 10,000 examples each, 100 variables at both levels:

    g(x, y) = mean_i (a_i y - b_i x)^2 / 2
    f(x, y) = mean_j (d_j y - e_j)^2 / 2 + |x|^2 / 20

The lower Hessian has the condition number --condition. Batches of 64 random examples
at both levels. Every method has the same grid: a lower rate, the ratio of the upper to
the lower rate, and whether both decay like (k + 1)^(-0.4). The best of the grid by the
suboptimality h(x) - min h after --seconds (one thread, compiled by XLA, compilation not
counted) is run with two more seeds. The table has the median of the three.

One oracle call is one gradient of f or g on a batch; a product with g_yy or g_xy counts
as two. Full-batch methods count a call for every 64 examples.

Writes stochastic.json, a table and a picture (with matplotlib).
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import tfbilevel as tb  # noqa: E402

SIZE, EXAMPLES, BATCH = 100, 10_000, 64
TERMS = 10  # of series, and steps of y and v where a method makes several
STEPS = 5  # of y in VRBO
TOGETHER = 50  # outer steps between two looks at h
RATES, RATIOS = (0.1, 0.3, 1.0), (0.01, 0.1, 1.0)  # times 1 / (largest eigenvalue)
GOAL = 1e-4


class Quadratic(NamedTuple):
    """The data, and what is known of the value function h."""

    a: np.ndarray
    b: np.ndarray
    d: np.ndarray
    e: np.ndarray
    largest: float  # eigenvalue of the lower Hessian

    def value(self, x: np.ndarray) -> float:
        """h(x)."""
        y = self.response() @ x
        return float(0.5 * np.mean((self.d @ y - self.e) ** 2) + 0.05 * x @ x)

    def response(self) -> np.ndarray:
        """y*(x) = R x."""
        return np.linalg.solve(self.a.T @ self.a, self.a.T @ self.b)

    def least(self) -> float:
        """min h."""
        z = self.d @ self.response()
        hessian = z.T @ z / len(z) + 0.1 * np.eye(SIZE)
        return self.value(np.linalg.solve(hessian, z.T @ self.e / len(z)))


def quadratic(condition: float, seed: int = 0) -> Quadratic:
    generator = np.random.default_rng(seed)
    roots = np.sqrt(np.geomspace(1 / condition, 1.0, SIZE))
    basis, _ = np.linalg.qr(generator.normal(size=(SIZE, SIZE)))
    a = generator.normal(size=(EXAMPLES, SIZE)) * roots @ basis.T
    # y*(x) follows x through a map of moderate size, and every example has noise.
    through = generator.normal(size=(SIZE, SIZE)) / math.sqrt(SIZE)
    noise = generator.normal(size=(EXAMPLES, SIZE)) / SIZE
    b = a @ through + noise
    d = generator.normal(size=(EXAMPLES, SIZE)) / math.sqrt(SIZE)
    e = d @ (through @ generator.normal(size=SIZE))
    e += 0.1 * generator.normal(size=EXAMPLES)
    largest = float(np.linalg.eigvalsh(a.T @ a / EXAMPLES)[-1])
    return Quadratic(a, b, d, e, largest)


PROBLEM = tb.Problem(
    lambda x, y, batch: (
        0.5 * tf.reduce_mean((tf.linalg.matvec(batch[0], y) - batch[1]) ** 2)
        + 0.05 * tf.reduce_sum(x * x)
    ),
    lambda x, y, batch: (
        0.5
        * tf.reduce_mean(
            (tf.linalg.matvec(batch[0], y) - tf.linalg.matvec(batch[1], x)) ** 2
        )
    ),
)


@keras.saving.register_keras_serializable("tfbilevel-benchmarks")
class Decay(keras.optimizers.schedules.LearningRateSchedule):
    """rate * (k + 1)^(-power)."""

    def __init__(self, rate: float, power: float):
        self.rate, self.power = rate, power

    def __call__(self, step: Any) -> Any:
        return self.rate * tf.pow(tf.cast(step, tf.float32) + 1, -self.power)


class Entry(NamedTuple):
    """A method: how it is built from a rate and a power, its calls per outer step, and
    whether it takes all examples, fixed batches with their number, or all examples in
    blocks, of which it takes what it needs."""

    build: Callable[[float, float], tb.Method]
    calls: float
    batches: str = "random"


def sgd(rate: float, power: float = 0.0) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(Decay(rate, power) if power else rate)


def inner(rate: float, steps: int) -> tb.InnerSolver:
    return tb.InnerSolver(sgd(rate), steps)


FIXED = EXAMPLES // BATCH  # batches of SABA; blocks of SRBA and VRBO
PERIOD = 10  # outer steps of VRBO from one full batch to the next
FULL = EXAMPLES / BATCH
ENTRIES: dict[str, Entry] = {
    "SOBA": Entry(lambda r, p: tb.SOBA(sgd(r, p), Decay(r, p)), 4),
    "SABA": Entry(
        lambda r, p: tb.SABA(
            sgd(r, p), Decay(r, p), lower_batches=FIXED, upper_batches=FIXED
        ),
        4,
        "fixed",
    ),
    "SRBA": Entry(
        lambda r, p: tb.SRBA(sgd(r, p), Decay(r, p), upper_parts=FIXED),
        # Every FIXED steps all blocks, otherwise one block at two points.
        4 + 8 * (FIXED - 1) / FIXED,
        "blocks",
    ),
    "FSLA": Entry(lambda r, p: tb.FSLA(sgd(r, p), Decay(r, p), 0.9), 9),
    "AmIGO": Entry(
        lambda r, p: tb.AmIGO(inner(r, TERMS), TERMS, Decay(r, p)), 3 * TERMS + 3
    ),
    "MRBO": Entry(
        lambda r, p: tb.MRBO(
            sgd(r), TERMS, r, scale=tb.InversePower(1.0, p) if p else 1.0
        ),
        4 * TERMS + 8,
    ),
    "VRBO": Entry(
        lambda r, p: tb.VRBO(
            sgd(r, p), TERMS, r, STEPS, period=PERIOD, upper_parts=FIXED
        ),
        (STEPS + 1) * (4 * TERMS + 8) + FIXED * (2 * TERMS + 4) / PERIOD,
        "blocks",
    ),
    "SUSTAIN": Entry(
        lambda r, p: tb.SUSTAIN(
            sgd(r), TERMS, r, scale=tb.InversePower(1.0, p) if p else 1.0
        ),
        2 * TERMS + 6,
    ),
    "StocBiO": Entry(lambda r, p: tb.StocBiO(inner(r, TERMS), TERMS, r), 3 * TERMS + 3),
    "BSA": Entry(lambda r, p: tb.BSA(inner(r, TERMS), TERMS, r), 2 * TERMS + 2),
    "TTSA": Entry(
        lambda r, p: tb.TTSA(sgd(r), TERMS, r, upper_power=p, lower_power=p), TERMS + 3
    ),
    "BAMM": Entry(lambda r, p: tb.BAMM(sgd(r), 1.0, p), 4),
    "ValueGap": Entry(
        lambda r, p: tb.ValueGap(inner(r, 1), sgd(r, p), tb.LinearRamp(1, 100, 5000)), 5
    ),
    "F2SA": Entry(
        lambda r, p: tb.F2SA(
            inner(r, TERMS), sgd(r, p), tb.LinearRamp(1.0, 100.0, 5000)
        ),
        3 * TERMS + 3,
    ),
    "BOME": Entry(lambda r, p: tb.BOME(inner(r, TERMS), sgd(r, p)), TERMS + 3),
    "MEHA": Entry(lambda r, p: tb.MEHA(sgd(r, p)), 6),
    "Implicit, full batch": Entry(
        lambda r, p: tb.Implicit(
            inner(r, TERMS), tb.ConjugateGradient(TERMS, warm_start=True)
        ),
        FULL * (3 * TERMS + 3),
        "full",
    ),
}


class Setting(NamedTuple):
    rate: float
    ratio: float
    power: float


class Trace(NamedTuple):
    """What was reached after how many outer steps and seconds."""

    steps: list[int]
    seconds: list[float]
    left: list[float]


def batches_of(data: Quadratic, kind: str, draws: int) -> Callable[[tf.Tensor], Any]:
    """Outer step -> its batches, drawn in the graph; `seed` is part of the step."""
    arrays = [tf.constant(each, tf.float32) for each in data[:4]]
    a, b, d, e = arrays
    if kind == "full":
        whole = tb.Batches((d, e), (a, b))
        return lambda key: whole
    blocks = [
        tf.reshape(each[: FIXED * BATCH], [FIXED, BATCH, *each.shape[1:]])
        for each in arrays
    ]
    if kind == "blocks":
        stacked = tb.StackedBatches(
            (d[: FIXED * BATCH], e[: FIXED * BATCH]), tuple(blocks[:2])
        )
        return lambda key: stacked
    if kind == "fixed":

        def one(key: tf.Tensor) -> Any:
            i, j = tf.unstack(tf.random.stateless_uniform([2], key, 0, FIXED, tf.int32))
            taken = [
                tf.gather(each, row)
                for each, row in zip(blocks, (i, i, j, j), strict=True)
            ]
            return tb.Batches((taken[2], taken[3], j), (taken[0], taken[1], i))

        return one

    def random(key: tf.Tensor) -> Any:
        rows = tf.random.stateless_uniform(
            [draws + 1, BATCH], key, 0, EXAMPLES, tf.int32
        )
        lower = tf.gather(a, rows[1:]), tf.gather(b, rows[1:])
        return tb.StackedBatches((tf.gather(d, rows[0]), tf.gather(e, rows[0])), lower)

    return random


def run(
    entry: Entry, data: Quadratic, setting: Setting, seed: int, seconds: float
) -> Trace:
    """From x = 0 and y = 0, until the time is over."""
    lower_rate = setting.rate / data.largest
    upper_rate = lower_rate * setting.ratio
    method = entry.build(lower_rate, setting.power)
    batches = batches_of(data, entry.batches, getattr(method, "draws", 1))

    def body(k: tf.Tensor, x: Any, y: Any, state: Any) -> tuple:
        made = PROBLEM.step(
            method, x, y, batches(tf.stack([tf.constant(seed, tf.int64), k])), state
        )
        count = tf.cast(k + 1, tf.float32)
        # Methods that scale the upper step decay it themselves.
        power = setting.power if isinstance(made.upper_scale, tuple) else 0.0
        moved = x - upper_rate * tf.pow(count, -power) * made.upper_gradient
        return k + 1, made.scaled(x, moved), made.lower, made.state

    @tf.function(autograph=False, jit_compile=True)
    def several(k: tf.Tensor, x: Any, y: Any, state: Any) -> tuple:
        return tf.while_loop(
            lambda now, *_: now < k + TOGETHER,
            body,
            (k, x, y, state),
            maximum_iterations=TOGETHER,
        )

    x = y = tf.zeros([SIZE])
    now = (tf.constant(0, tf.int64), x, y, method.init(PROBLEM, x, y))
    several(*now)  # compiles
    least, trace, spent = data.least(), Trace([], [], []), 0.0
    while spent < seconds:
        began = time.perf_counter()
        now = several(*now)
        x = now[1].numpy()
        spent += time.perf_counter() - began
        left = data.value(x.astype(np.float64)) - least
        trace.steps.append(int(now[0]))
        trace.seconds.append(spent)
        trace.left.append(left)
        if not math.isfinite(left) or left > 1e6:
            break
    return trace


def end(trace: Trace) -> float:
    left = trace.left[-1]
    return left if math.isfinite(left) else math.inf


def first_below(trace: Trace, goal: float) -> int | None:
    """The number of looks after which it stays below the goal."""
    above = [i for i, left in enumerate(trace.left) if not left < goal]
    at = above[-1] + 1 if above else 0
    return at if at < len(trace.left) else None


def best_of(
    entry: Entry, data: Quadratic, settings: list[Setting], seconds: float, look: float
) -> dict[str, Any]:
    """The best setting by a shorter run, then three seeds of it."""
    tried = [(end(run(entry, data, each, 0, look)), each) for each in settings]
    _, setting = min(tried)
    traces = [run(entry, data, setting, seed, seconds) for seed in range(3)]
    ends = [end(each) for each in traces]
    reached = [first_below(each, GOAL) for each in traces]
    found: dict[str, Any] = {
        "setting": setting._asdict(),
        "left": statistics.median(ends),
        "all": ends,
        "outer_steps_per_second": traces[0].steps[-1] / traces[0].seconds[-1],
        "calls_per_step": entry.calls,
        "trace": traces[ends.index(statistics.median_low(ends))]._asdict(),
    }
    if None not in reached:
        pairs = zip(traces, reached, strict=True)
        found["calls_to_goal"] = statistics.median(
            entry.calls * trace.steps[i] for trace, i in pairs
        )
        pairs = zip(traces, reached, strict=True)
        found["seconds_to_goal"] = statistics.median(
            trace.seconds[i] for trace, i in pairs
        )
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"| method | h(x) - min h | calls to {GOAL:g} | seconds to {GOAL:g} "
        "| outer steps per second | calls per step | rate, ratio, power |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in sorted(results.items(), key=lambda item: item[1]["left"]):
        calls, seconds = r.get("calls_to_goal"), r.get("seconds_to_goal")
        lines.append(
            f"| {name} | {r['left']:.1e} "
            f"| {'-' if calls is None else f'{calls:,.0f}'} "
            f"| {'-' if seconds is None else f'{seconds:.2f}'} "
            f"| {r['outer_steps_per_second']:,.0f} | {r['calls_per_step']:,.0f} "
            f"| {', '.join(f'{v:g}' for v in r['setting'].values())} |"
        )
    return "\n".join([*lines, ""])


def picture(results: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for name, r in results.items():
        trace = r["trace"]
        calls = np.array(trace["steps"]) * r["calls_per_step"]
        for axis, against in zip(axes, (calls, trace["seconds"]), strict=True):
            axis.loglog(against, trace["left"], label=name)
    axes[0].set(xlabel="oracle calls", ylabel="h(x) - min h")
    axes[1].set(xlabel="seconds")
    axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=ENTRIES, default=list(ENTRIES))
    parser.add_argument("--condition", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--look", type=float, default=1.0, help="seconds, of the grid")
    parser.add_argument("--quick", action="store_true", help="one setting")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    data, results = quadratic(arguments.condition), {}
    settings = [Setting(*each) for each in itertools.product(RATES, RATIOS, (0.0, 0.4))]
    if arguments.quick:
        settings = [Setting(0.3, 0.1, 0.0)]
    for name in arguments.methods:
        entry = ENTRIES[name]
        results[name] = best_of(
            entry, data, settings, arguments.seconds, arguments.look
        )
        print(f"{name}: {results[name]['left']:.1e}", file=sys.stderr, flush=True)
        path = arguments.out / "stochastic.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (arguments.out / "stochastic.md").write_text(text)
    print(text)
    picture(results, arguments.out / "stochastic.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
