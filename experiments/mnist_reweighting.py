"""Reweighting 20,000 MNIST digits with wrong labels: stochastic bilevel methods.

    python experiments/mnist_reweighting.py --method stocbio --noise 0.4 \\
        --out runs/stocbio
    python experiments/mnist_reweighting.py --compare --seconds 150 --out runs/compare

Upper variables: one logit x_i per training example, whose weight is s(x_i), where s is
the logistic function; initially x = 0. Lower variables: the weights y of a linear
classifier, including its bias.

    f(y)    = mean cross-entropy on clean validation data
    g(x, y) = mean of s(x_i) * cross-entropy_i on noisy training data
              + 0.001 * sum of squares of y

A share of the training labels is replaced by wrong ones, once, before training. (The
published script corrupts its labels again whenever it reads them.) An example counts as
kept if s(x_i) >= 0.5. Training and validation data are the first 20,000 and the last
5,000 images of MNIST's training file in the published order.

| method  | lower steps, each on           | hypergradient                             |
|---------|--------------------------------|-------------------------------------------|
| stocbio | 200, 50 new examples           | Neumann series, 3 factors of 50 examples  |
| aid-fp  | 200, all examples              | 3 fixed-point iterations                  |
| aid-cg  | 200, all examples              | 3 conjugate-gradient iterations           |
| reverse | 200, all examples              | backpropagation through the last 3 steps  |
| hoag    | at most 200, to a tolerance    | conjugate gradients to a tolerance        |
| bsa     | 200, 1 example                 | product of 0 to 2 factors of 1 example    |
| ttsa    | 1, 1 example, decaying rates   | as bsa                                    |

Reproduces the hyper-cleaning comparison of Ji, Yang and Liang (2021),
arXiv:2010.07962. Their settings are the defaults, with these exceptions:

- eta, the step of the factors, must be below 2 / (curvature of g). With fixed labels
the
  curvature is about 3 on all examples, 7 to 12 on 50 and up to 500 on one: with the
  published 0.5 the series grows (the metric `growth` is then above 1). The defaults are
  0.1 on 50 examples and 0.001 on one.
- ttsa makes 10,000 outer steps, as many lower steps as the others make in 50.
- hoag solves to tolerances 0.5 * 0.9^k, absolute for |g_y|, relative for the linear
  system; the published script's version makes 200 steps and sums a series.

The hypergradient is the paper's. The published script's is about twice as long, so its
outer rate of 0.1 corresponds to our `--upper-lr 0.2`. At such rates the weights hardly
leave 0.5 in 50 outer steps, and the curves compare how fast y is found. `--noise
0.4 --upper-lr 50 --inner-lr 0.02 --seconds 60` shows stocbio reweighting. bsa's inner
rate of 0.1 is far above 2 / (curvature on one example), so its y never converges;
`--inner-lr 0.003` corrects that.

`seconds` counts training steps only, without compilation and evaluation.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import keras
import numpy as np
import tensorflow as tf
from common import cleaning

import tfbilevel as tb
from data_prep import images, label_noise

REGULARISATION = 0.001
MEAN, DEVIATION = 0.1307, 0.3081  # MNIST's pixels in [0, 1]
SCORES = ("test_loss", "test_accuracy", "precision", "recall", "f1")
COLUMNS = ("method", "seed", "step", "seconds", "train_loss", "validation_loss")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A method's settings; `None` where it has no such setting."""

    outer_steps: int = 50
    inner_steps: int | None = 200
    solver_steps: int = 3
    eta: float | None = None
    batch_size: int | None = None  # None: all examples
    tolerance: float | None = None
    tolerance_decay: float | None = None
    upper_lr: float = 0.1
    inner_lr: float = 0.1
    eval_every: int = 1  # at most; a run is evaluated at least five times
    jit: str = "off"


# With XLA small batches are up to six times as fast, full ones three times as slow.
DEFAULTS = {
    "stocbio": Settings(eta=0.1, batch_size=50, eval_every=20, jit="on"),
    "aid-fp": Settings(),
    "aid-cg": Settings(),
    "reverse": Settings(),
    "hoag": Settings(solver_steps=100, tolerance=0.5, tolerance_decay=0.9),
    "bsa": Settings(eta=0.001, batch_size=1, eval_every=100, jit="on"),
    "ttsa": Settings(10_000, None, eta=0.001, batch_size=1, eval_every=1000, jit="on"),
}
METHODS = tuple(DEFAULTS)
# Flags that the published script accepts with every method, even without effect.
IGNORED = ("batch_size", "eta", "inner_steps")
DATASETS = ("mnist", "fashion_mnist", "digits")
SIZES = {"digits": (2000, 1000, 1500)}


class Examples(NamedTuple):
    """Pixels, [n, inputs], and labels as rows of the identity matrix, [n, 10]."""

    pixels: tf.Tensor
    targets: tf.Tensor


class Data(NamedTuple):
    """The training and evaluation data of one run.

    Attributes:
        train: the training examples with the labels that the methods see.
        validation, test: clean.
        true_train: the training examples with their true labels.
        clean: whether a training label is the true one, [n].
    """

    train: Examples
    validation: Examples
    test: Examples
    true_train: Examples
    clean: np.ndarray


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.Parser(description=__doc__)
    add, above = parser.add_argument, common.positive
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--method", choices=(*METHODS, "all"), default="stocbio")
    which.add_argument("--compare", action="store_true", help="as --method all")
    add("--dataset", choices=DATASETS, help="default: mnist, without its files digits")
    parser.add_data_flags("tensorflow-datasets folder, or of IDX files")
    add(
        "--noise", "--noise-rate", type=float, default=0.1, help="share of wrong labels"
    )
    add("--train-size", type=above(int), help="default 20000 (digits 2000)")
    add("--validation-size", type=above(int), help="default 5000 (digits 1000)")
    add("--test-size", type=above(int), help="default 10000 (digits 1500)")
    add("--trials", type=above(int), default=1, help="runs, at seeds SEED, SEED + 1..")
    add("--seconds", type=above(float), help="training time; --compare: 150 each")
    add("--outer-steps", type=above(int), help="default 50 (ttsa 10000), or no limit")
    add("--inner-steps", type=above(int), help="default 200; hoag: at most")
    add(
        "--solver-steps",
        "--hessian-q",
        type=above(int),
        help="Hessian products; reverse: steps differentiated",
    )
    add("--eta", type=above(float), help="stocbio, bsa, ttsa: step of the factors")
    add("--batch-size", type=above(int), help="stocbio, bsa, ttsa")
    add("--tolerance", type=above(float), help="hoag: initial value")
    add("--tolerance-decay", type=above(float), help="hoag: factor per outer step")
    add("--upper-lr", type=above(float))
    add("--inner-lr", type=above(float))
    add("--eval-every", type=above(int), help="outer steps between evaluations")
    add("--jit", choices=("on", "off"), help="XLA; default by method")
    args = parser.parse_args(argv)
    if args.compare:
        args.method = "all"
    del args.compare
    other = parser.choose_dataset(args, "mnist", images.is_prepared, "digits")
    sizes = SIZES.get(args.dataset, (20_000, 5000, 10_000))
    for part, size in zip(("train", "validation", "test"), sizes, strict=True):
        if getattr(args, f"{part}_size") is None:
            setattr(args, f"{part}_size", size)
    if args.method == "all" and args.outer_steps is None and args.seconds is None:
        args.seconds = 150.0
    methods = METHODS if args.method == "all" else [args.method]
    published = [DEFAULTS[method] for method in methods]
    parser.reject_unused_flags(args, published, f"--method {args.method}", IGNORED)
    files = args.dataset != "digits", "a --dataset with files"
    parser.reject_ineffective_flags(
        args, dict.fromkeys(("data_dir", "download"), files)
    )
    try:
        args.jobs = [
            job_of(args, method, args.seed + trial)
            for trial in range(args.trials)
            for method in methods
        ]
    except ValueError as error:
        parser.error(str(error))
    parser.warn(other)
    return args


def job_of(args: argparse.Namespace, method: str, seed: int) -> argparse.Namespace:
    """The complete settings of one run: one method, one seed."""
    job = common.filled(args, DEFAULTS[method])
    job.method, job.seed = method, seed
    if method == "reverse" and args.solver_steps is None:
        job.solver_steps = min(job.solver_steps, job.inner_steps)
    if args.outer_steps is None and args.seconds is not None:
        job.outer_steps = None
    if method == "reverse" and job.solver_steps > job.inner_steps:
        raise ValueError(
            "--solver-steps must not exceed --inner-steps with --method reverse, got "
            f"{job.solver_steps} of {job.inner_steps}: lower one or raise the other"
        )
    if job.outer_steps is not None and args.eval_every is None:
        job.eval_every = min(job.eval_every, max(1, job.outer_steps // 5))
    for part in ("train", "validation"):
        if (job.batch_size or 1) > getattr(job, f"{part}_size"):
            raise ValueError(
                f"--batch-size must not exceed --{part}-size, got {job.batch_size}"
            )
    return job


def load_parts(args: argparse.Namespace) -> list[images.Part]:
    """Training, validation and test images with their true labels."""
    if args.dataset == "digits":
        whole = images.load_digits()
        split = len(whole.labels) - args.test_size
        file = images.Part(whole.images[:split], whole.labels[:split])
        test = images.Part(whole.images[split:], whole.labels[split:])
    else:
        file, test = (
            images.in_published_order(
                images.load_file(args.dataset, split, args.data_dir, args.download),
                split,
            )
            for split in ("train", "test")
        )
    size = len(file.labels)
    if args.train_size + args.validation_size > size or args.test_size > len(
        test.labels
    ):
        raise ValueError(
            f"the parts must fit in {size} training and {len(test.labels)} test "
            f"images. Received: sizes {args.train_size}, {args.validation_size}, "
            f"{args.test_size}"
        )
    chosen = [(file, slice(args.train_size)), (test, slice(args.test_size))]
    chosen.insert(1, (file, slice(size - args.validation_size, size)))
    return [images.Part(part.images[s], part.labels[s]) for part, s in chosen]


def add_noise(parts: list[images.Part], job: argparse.Namespace) -> Data:
    """The parts as tensors, with training labels corrupted once."""
    train, validation, test = parts
    noisy, clean = label_noise.pollute(
        train.labels, job.noise, np.random.default_rng(job.seed), "strict"
    )
    pixels = scale(train.images)
    return Data(
        train=Examples(pixels, one_hot(noisy)),
        validation=Examples(scale(validation.images), one_hot(validation.labels)),
        test=Examples(scale(test.images), one_hot(test.labels)),
        true_train=Examples(pixels, one_hot(train.labels)),
        clean=clean,
    )


def scale(pixels: np.ndarray) -> tf.Tensor:
    flat = pixels.reshape(len(pixels), -1).astype(keras.config.floatx())
    return tf.constant((flat / 255 - MEAN) / DEVIATION)


def one_hot(labels: np.ndarray) -> tf.Tensor:
    return tf.one_hot(labels, 10, dtype=keras.config.floatx())


def build_net(inputs: int, seed: int) -> keras.Model:
    """A net whose kernel and bias are normal with variance 2 / outputs (Kaiming)."""
    net = keras.Sequential([keras.Input((inputs,)), keras.layers.Dense(10)])
    generator = np.random.default_rng([seed, 1])
    net.set_weights([generator.normal(0, 0.2**0.5, w.shape) for w in net.weights])
    return net


def cross_entropy(net: Callable, examples: Examples) -> tf.Tensor:
    log_probabilities = tf.nn.log_softmax(net(examples.pixels))
    return -tf.reduce_sum(examples.targets * log_probabilities, axis=1)


def build_model(job: argparse.Namespace, data: Data) -> tb.BilevelModel:
    """The two losses. A batch is the indices of its examples."""

    def pick(examples: Examples, index: tf.Tensor) -> Examples:
        if job.batch_size is None:
            return examples
        # Gathered where they are used, one inner step at a time, so that the pipeline
        # moves the indices of 200 inner steps instead of 32 MB of pixels.
        return Examples(*(tf.gather(tensor, index) for tensor in examples))

    def upper_loss(upper: tb.ExampleWeights, lower: keras.Model, index: tf.Tensor):
        return tf.reduce_mean(cross_entropy(lower, pick(data.validation, index)))

    def lower_loss(upper: tb.ExampleWeights, lower: keras.Model, index: tf.Tensor):
        weights = upper(None if job.batch_size is None else index)
        loss = tf.reduce_mean(weights * cross_entropy(lower, pick(data.train, index)))
        squares = [tf.reduce_sum(tf.square(v)) for v in lower.trainable_variables]
        return loss + REGULARISATION * tf.add_n(squares)

    net = build_net(data.train.pixels.shape[1], job.seed)
    weights = tb.ExampleWeights(job.train_size)
    model = tb.BilevelModel(weights, net, upper_loss, lower_loss)
    model.compile(
        build_method(job),
        keras.optimizers.SGD(job.upper_lr),
        jit_compile=job.jit == "on",
        steps_per_execution=per_execution(job),
    )
    return model


def per_execution(job: argparse.Namespace) -> int:
    """Outer steps per compiled call, chosen so that rows and the end fall between."""
    return math.gcd(job.eval_every, job.outer_steps or 0)


def build_method(job: argparse.Namespace) -> tb.Method:
    optimizer = keras.optimizers.SGD(job.inner_lr)
    if job.method == "ttsa":
        return tb.TTSA(optimizer, job.solver_steps, job.eta, seed=job.seed)
    if job.method == "hoag":
        tolerance = tb.Geometric(job.tolerance, job.tolerance_decay)
        inner = tb.InnerSolver(optimizer, job.inner_steps, atol=tolerance)
        solver = tb.ConjugateGradient(job.solver_steps, rtol=tolerance)
        return tb.Implicit(inner, solver)
    inner = tb.InnerSolver(optimizer, job.inner_steps)
    if job.method == "stocbio":
        return tb.StocBiO(inner, job.solver_steps, job.eta)
    if job.method == "bsa":
        return tb.BSA(inner, job.solver_steps, job.eta, seed=job.seed)
    if job.method == "reverse":
        return tb.Unroll(inner, last=job.solver_steps)
    solver = {"aid-fp": tb.FixedPoint, "aid-cg": tb.ConjugateGradient}[job.method]
    return tb.Implicit(inner, solver(job.solver_steps, rtol=1e-12))


def index_batches(
    count: int, size: int | None, seed: int, first: int
) -> tf.data.Dataset:
    """Indices of examples; for `size` `None`, all examples are used without indices."""
    if size is None:
        return tf.data.Dataset.from_tensors(tf.zeros([], tf.int32)).repeat()
    return tb.index_batches(count, size, seed, first)


def outer_batches(
    job: argparse.Namespace, method: tb.Method, first: int = 0
) -> tf.data.Dataset:
    """Batches of the outer steps, starting at step `first`."""
    draws = 1 if job.batch_size is None else method.draws
    validation, train = (
        index_batches(count, job.batch_size, 2 * job.seed + level, first * per_step)
        for level, (count, per_step) in enumerate(
            [(job.validation_size, 1), (job.train_size, draws)]
        )
    )
    return tb.pair(validation, train, lower_batches=draws).prefetch(2)


def measure(model: tb.BilevelModel, data: Data) -> Callable[[], dict[str, Any]]:
    """A function that evaluates the model."""
    net, logits = model.lower, model.upper.logits

    @tf.function(autograph=False)
    def on_all_parts() -> dict[str, tf.Tensor]:
        values = {
            "train_loss": tf.reduce_mean(cross_entropy(net, data.true_train)),
            "validation_loss": tf.reduce_mean(cross_entropy(net, data.validation)),
            "test_loss": tf.reduce_mean(cross_entropy(net, data.test)),
        }
        predictions = tf.argmax(net(data.test.pixels), axis=1)
        right = predictions == tf.argmax(data.test.targets, axis=1)
        return values | {"test_accuracy": 100 * tf.reduce_mean(tf.cast(right, "float"))}

    def evaluate() -> dict[str, Any]:
        measured = {name: float(value) for name, value in on_all_parts().items()}
        # Equivalent to s(x) >= 0.5, which rounding makes true for small negative x too.
        return measured | label_noise.cleaning_scores(logits.numpy() >= 0, data.clean)

    return evaluate


def train(job: argparse.Namespace, run: common.Run, data: Data) -> dict:
    """Run one method with one seed: rows are logged in `run`, a summary is returned."""
    model = build_model(job, data)
    begun = time.perf_counter()
    with common.one_line_nonfinite():
        model.warm_up(outer_batches(job, model.method))
    compile_seconds = time.perf_counter() - begun
    evaluate = measure(model, data)

    def labelled() -> dict[str, Any]:
        return {"method": job.method, "seed": job.seed, **evaluate()}

    common.train(
        model,
        lambda first: outer_batches(job, model.method, first),
        run,
        labelled,
        every=job.eval_every,
        epoch=job.eval_every,
        steps=job.outer_steps,
        seconds=job.seconds,
    )
    draw_run(run, job, data, model.upper.logits.numpy())
    summary = summarise(job, run.rows()) | {"compile_seconds": compile_seconds}
    return summary


def summarise(job: argparse.Namespace, rows: list[dict[str, str]]) -> dict:
    first, *later = common.numbers(rows)
    final = later[-1]
    chosen = common.best_row(later, "validation_loss", lowest=True)
    names = ("train_loss", "validation_loss", *SCORES)
    growth = [row["growth"] for row in later if "growth" in row]
    return {
        "method": job.method,
        "dataset": job.dataset,
        "noise": job.noise,
        "seed": job.seed,
        "outer_steps": int(final["step"]),
        "seconds": final["seconds"],
        "seconds_per_outer_step": final["seconds"] / final["step"],
        **{name: final[name] for name in names},
        "before": {name: first[name] for name in names},
        "best_validation_step": int(chosen["step"]),
        "best_by_validation": {name: chosen[name] for name in names},
        "best_test_loss": min(row["test_loss"] for row in later),
        "best_test_accuracy": max(row["test_accuracy"] for row in later),
        "best_f1": max(row["f1"] for row in later),
        **({"mean_growth": float(np.mean(growth))} if growth else {}),
    }


def draw_run(
    run: common.Run, job: argparse.Namespace, data: Data, logits: np.ndarray
) -> None:
    seconds = run.column("seconds")
    losses = {part: f"{part}_loss" for part in ("train", "validation", "test")}
    scores = ("test_accuracy", "f1", "precision", "recall")
    scores = {name.replace("_", " "): name for name in scores}
    panels = [
        common.Panel(losses, "cross-entropy, true labels"),
        common.Panel(scores, "test accuracy and examples kept", "percent"),
    ]
    with common.figure(run.out / "curves.png", (15, 4)) as page:
        *curves, weights = page.subplots(1, 3)
        for axes, panel in zip(curves, panels, strict=True):
            panel.draw(axes, run, seconds)
            axes.set_xlabel("seconds")
        curves[0].set(yscale="log")
        bins = np.linspace(logits.min(), logits.max() + 1e-9, 60)
        cleaning.draw_histograms(weights, logits, data.clean, bins)
        weights.set(xlabel="x_i", title="logits of the weights")
        weights.grid(alpha=0.3)
        page.suptitle(f"{job.method}, {job.dataset}, {job.noise:.0%} wrong labels")


def draw_comparison(args: argparse.Namespace, rows: list[dict[str, str]]) -> None:
    """Draw test loss and accuracy of every run against seconds."""
    with common.figure(args.out / "comparison.png", (12, 4.5)) as page:
        axes = page.subplots(1, 2)
        for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            for seed in dict.fromkeys(row["seed"] for row in rows):
                chosen = [r for r in rows if (r["method"], r["seed"]) == (method, seed)]
                seconds = [float(row["seconds"]) for row in chosen]
                for plot, name in zip(
                    axes, ("test_loss", "test_accuracy"), strict=True
                ):
                    values = [float(row[name]) for row in chosen]
                    label = method if seed == rows[0]["seed"] else None
                    options = {"color": f"C{number}", "label": label, "alpha": 0.8}
                    common.draw_line(plot, seconds, values, **options)
        axes[0].set(xlabel="seconds", title="test loss", yscale="log")
        axes[1].set(xlabel="seconds", ylabel="percent", title="test accuracy")
        for plot in axes:
            plot.grid(alpha=0.3)
            plot.legend()
        page.suptitle(f"{args.dataset}, {args.noise:.0%} wrong labels")


def compare(
    args: argparse.Namespace, run: common.Run, parts: list[images.Part]
) -> dict:
    """Run every method with every seed in a separate folder; means over seeds."""
    shown: list[dict] = []

    def show(summary: dict) -> None:
        print_table([summary], header=not shown)
        shown.append(summary)

    one = common.in_folder(lambda job, own: train(job, own, add_noise(parts, job)))
    jobs = {f"{job.method}-{job.seed}": job for job in args.jobs}
    done, failed = common.sweep(run, jobs, one, show)
    columns = (*COLUMNS, *SCORES)
    rows = [
        {name: row[name] for name in columns}
        for folder in done
        for row in common.rows_of(run.out / folder)
    ]
    if rows:
        draw_comparison(args, rows)
        run.replace(rows)
    made = {"methods": means(shown), "runs": shown}
    return common.concluded(run, made, failed)


def means(summaries: list[dict]) -> dict[str, dict[str, float]]:
    """The mean and standard deviation of each method's final scores over its seeds."""
    table: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(summary["method"] for summary in summaries):
        runs = [summary for summary in summaries if summary["method"] == method]
        table[method] = {"trials": len(runs)}
        for name in ("outer_steps", "seconds", "seconds_per_outer_step", *SCORES):
            values = [summary[name] for summary in runs]
            table[method][name] = float(np.mean(values))
            table[method][f"{name}_std"] = float(np.std(values))
    return table


def print_table(summaries: list[dict], header: bool = True) -> None:
    names = ("outer_steps", "seconds", *SCORES)
    if header:
        print(f"{'method':10s}" + "".join(f"{name:>14s}" for name in names))
    for summary in summaries:
        values = "".join(f"{summary[name]:14.6g}" for name in names)
        print(f"{summary['method']:10s}{values}", flush=True)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    alone = len(args.jobs) == 1
    with common.one_line_errors(__file__):
        parts = load_parts(args)
        data = add_noise(parts, args.jobs[0])
        config = common.settings(args.jobs[0] if alone else args, "jobs")
        run = common.begin(args, config)
    if alone:
        summary = run.summary() or train(args.jobs[0], run, data)
        print_table([summary])
    else:
        summary = compare(args, run, parts)
    run.summarise(summary)
    print(run.files())
    return summary


if __name__ == "__main__":
    main()
