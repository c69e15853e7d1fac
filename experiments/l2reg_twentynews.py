"""20 Newsgroups: one L2 coefficient per feature of a linear classifier.

    python experiments/l2reg_twentynews.py --method stocbio --out runs/stocbio
    python experiments/l2reg_twentynews.py --method all --seconds 60 --out runs/news

Upper variables: one number x_d per feature, whose coefficient is exp(x_d); initially 0.
Lower variables: weights W, features x classes, without bias; initially 0.

    f(W)    = mean cross-entropy of X W on the validation documents
    g(x, W) = mean cross-entropy of X W on the training documents
              + 1/2 * mean over features d and classes c of exp(x_d) W_dc^2

Documents are word counts, scaled to length 1, as returned by scikit-learn's
`fetch_20newsgroups_vectorized`; they stay sparse. Its training part is divided into two
halves, training and validation, with the same proportions of classes. Its test part is
used only for the figures. Where 20 Newsgroups is missing, documents are generated:
2,000 and 1,000, of 20 classes with 20 words of their own each and 1,600 common words.

Reproduces the figure of Ji, Yang and Liang (2021), arXiv:2010.07962: test loss against
seconds of training. The published settings of each method are its defaults (those of
hoag, which the published script lacks, are our choice). Several methods, or `all`, are
compared: each one runs in a separate process, one after the other, for the same seconds
of training.

The figure mainly measures how fast W is trained. The largest curvature of g is 0.02 to
0.03. With an eta of 0.5 stocbio therefore sums eleven almost equal terms, far from an
inverse Hessian, and its x stays within 0.01 of zero. With an inner rate of 100 the
solve of aid-fp diverges in the first few outer steps, and a warning says so. Conjugate
gradients do learn coefficients, large ones for words such as "in" and "the", and are
better than stocbio after about 130 outer steps. These took longer than the published
seconds, but take less than a minute now. With --eta 20 --upper-lr 2000 stocbio learns
the coefficients too, and stays ahead.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import common
import keras
import numpy as np
import tensorflow as tf
from scipy import sparse

import tfbilevel as tb
from data_prep import twentynews
from data_prep.twentynews import Data, Minibatches, Part, take, tensors


@dataclasses.dataclass(frozen=True)
class Settings:
    """A method's published settings; `None` where it has no such setting."""

    inner_steps: int = 10
    solver_steps: int = 10
    inner_lr: float = 100.0
    upper_lr: float = 100.0
    eta: float | None = None
    batch_size: int | None = None
    validation_batch_size: int | None = None
    tolerance: float | None = None
    tolerance_decay: float | None = None
    eval_every: int = 1


DEFAULTS = {
    "stocbio": Settings(
        eta=0.5, batch_size=100, validation_batch_size=100, eval_every=5
    ),
    "aid-fp": Settings(tolerance=1e-12),
    "aid-cg": Settings(tolerance=1e-12),
    "reverse": Settings(),
    # Tolerances are our choice, starting at a quarter of the first gradient; T only
    # limits the steps.
    "hoag": Settings(inner_steps=100, tolerance=0.01, tolerance_decay=0.9),
}
METHODS = tuple(DEFAULTS)
# Flags that the published script accepts with every method, even without effect.
IGNORED = ("batch_size", "validation_batch_size", "eta")
OUTER_STEPS, SECONDS = 50, 60.0
EPOCH = 20  # evaluations between backups, the most that a kill can cost
TIMES = ("seconds", "step")
MARKS = (1, 2, 5, 10, 20, 30, 60, 120)  # seconds at which a table compares methods


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.Parser(description=__doc__)
    add, above = parser.add_argument, common.positive
    add(
        "--method",
        nargs="+",
        choices=(*METHODS, "all"),
        default=["stocbio"],
        help="several, or all: a comparison",
    )
    add(
        "--dataset",
        choices=twentynews.DATASETS,
        help="default: 20news, without its files generated documents",
    )
    parser.add_data_flags("scikit-learn's data folder")
    add("--features", choices=("counts", "tfidf"), default="counts")
    add("--max-features", type=above(int), help="keep the most frequent; default all")
    add("--outer-steps", type=above(int), help=f"default {OUTER_STEPS}, or no limit")
    add("--seconds", type=above(float), help="training time; comparisons: default 60")
    add("--inner-steps", type=above(int), help="T (hoag: at most)")
    add("--solver-steps", type=above(int), help="Q; reverse: steps differentiated")
    add("--inner-lr", type=above(float))
    add("--inner-momentum", type=common.fraction, default=0.0)
    add("--upper-lr", type=above(float))
    add("--upper-momentum", type=common.fraction, default=0.0)
    add("--eta", type=above(float), help="stocbio: rate of the series")
    add("--batch-size", type=above(int), help="stocbio: training documents")
    add("--validation-batch-size", type=above(int), help="stocbio")
    add("--tolerance", type=above(float), help="of the solve; hoag: initial value")
    add(
        "--tolerance-decay",
        "--tolerance-ratio",
        type=above(float),
        help="hoag: factor per outer step",
    )
    add("--eval-every", type=above(int), help="outer steps between evaluations")
    add(
        "--retrain-steps",
        "--final-steps",
        type=above(int),
        help="of a training on both halves",
    )
    args = parser.parse_args(argv)
    other = parser.choose_dataset(args, "20news", twentynews.is_there, "generated")
    files = args.dataset == "20news", "--dataset 20news"
    parser.reject_ineffective_flags(args, {"data_dir": files, "download": files})
    if "all" in args.method:
        args.method = list(METHODS)
    args.method = list(dict.fromkeys(args.method))
    published = [DEFAULTS[method] for method in args.method]
    chosen = f"--method {' '.join(args.method)}"
    parser.reject_unused_flags(args, published, chosen, IGNORED)
    parser.warn(other)
    return args


def with_defaults(args: argparse.Namespace, method: str) -> argparse.Namespace:
    """The settings of one method's run: the flags that apply to it, its published
    settings, and one of the two limits."""
    plan = common.filled(args, DEFAULTS[method])
    plan.method = method
    if method == "reverse" and args.solver_steps is None:
        plan.solver_steps = min(plan.solver_steps, plan.inner_steps)
    if plan.outer_steps is None and plan.seconds is None:
        if len(args.method) == 1:
            plan.outer_steps = OUTER_STEPS
        else:
            plan.seconds = SECONDS
    return plan


# The problem.


def logits_of(classifier: keras.layers.Dense, features: Any) -> tf.Tensor:
    kernel = tf.convert_to_tensor(classifier.kernel)
    return tf.sparse.sparse_dense_matmul(features, kernel)


def cross_entropy(classifier: keras.layers.Dense, batch: tuple) -> tf.Tensor:
    features, labels = batch
    logits = logits_of(classifier, features)
    return tf.reduce_mean(tb.sparse_cross_entropy(logits, labels))


def penalty(upper: tb.FeaturePenalties, lower: keras.layers.Dense) -> tf.Tensor:
    kernel = tf.convert_to_tensor(lower.kernel)
    return upper(kernel) / tf.cast(tf.size(kernel), kernel.dtype)


def upper_loss(upper: Any, lower: keras.layers.Dense, batch: tuple) -> tf.Tensor:
    return cross_entropy(lower, batch)


def lower_loss(
    upper: tb.FeaturePenalties, lower: keras.layers.Dense, batch: tuple
) -> tf.Tensor:
    return cross_entropy(lower, batch) + penalty(upper, lower)


def build_model(data: Data) -> tb.BilevelModel:
    features = data.train.features.shape[1]
    classifier = keras.layers.Dense(
        data.classes, use_bias=False, kernel_initializer="zeros"
    )
    classifier.build((None, features))
    return tb.BilevelModel(
        tb.FeaturePenalties(features), classifier, upper_loss, lower_loss
    )


def build_method(args: argparse.Namespace) -> tb.Method:
    def inner_steps(**options: Any) -> tb.InnerSolver:
        optimizer = keras.optimizers.SGD(args.inner_lr, args.inner_momentum)
        return tb.InnerSolver(optimizer, args.inner_steps, **options)

    steps = args.solver_steps
    if args.method == "stocbio":
        return tb.StocBiO(inner_steps(), steps, args.eta)
    if args.method == "reverse":
        return tb.Unroll(inner_steps(), last=steps)
    if args.method == "hoag":
        tolerance = tb.Geometric(args.tolerance, args.tolerance_decay)
        solver = tb.ConjugateGradient(steps, rtol=tolerance)
        return tb.Implicit(inner_steps(atol=tolerance), solver)
    kind = {"aid-fp": tb.FixedPoint, "aid-cg": tb.ConjugateGradient}[args.method]
    return tb.Implicit(inner_steps(), kind(steps, rtol=args.tolerance))


def full_batches(data: Data) -> tf.data.Dataset:
    """The whole data of both levels, repeated."""
    validation, train = (
        tf.data.Dataset.from_tensors(tensors(part))
        for part in (data.validation, data.train)
    )
    return tb.pair(validation, train).repeat()


def minibatches(
    args: argparse.Namespace, data: Data, draws: int, first: int
) -> tf.data.Dataset:
    """Endless minibatches, starting at outer step `first`, with `draws` lower ones per
    step."""
    lower = Minibatches(data.train, args.batch_size, (args.seed, 0))
    upper = Minibatches(data.validation, args.validation_batch_size, (args.seed, 1))

    def draw() -> Iterator[tuple]:
        for step in itertools.count(first):
            documents = take(data.validation, upper.documents(step))
            yield tensors(documents), lower.stack(step * draws, draws)

    def kind(*documents: int) -> tuple:
        shape = (*documents, data.train.features.shape[1])
        labels = tf.TensorSpec(documents, tf.int32)
        return tf.SparseTensorSpec(shape, tf.float32), labels

    dataset = tf.data.Dataset.from_generator(
        draw, output_signature=(kind(upper.size), kind(draws, lower.size))
    )
    return dataset.map(tb.StackedBatches).prefetch(2)


# Training.


def peak_memory() -> float:
    """The peak memory of this process so far, in MB (Linux reports KB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train(args: argparse.Namespace, run: common.Run, data: Data) -> dict:
    """Train with one method, from zero weights to the last outer step or second."""
    model = build_model(data)
    model.compile(
        build_method(args),
        keras.optimizers.SGD(args.upper_lr, args.upper_momentum),
        jit_compile=False,  # XLA has no sparse matrix product
    )
    measure = measurements(args.method, model, data)

    def batches(first: int) -> tf.data.Dataset:
        if args.method == "stocbio":
            return minibatches(args, data, model.method.draws, first)
        return full_batches(data)

    measure()  # traced now, so that the peak memory of training excludes it
    before = peak_memory()
    common.train(
        model,
        batches,
        run,
        measure,
        every=args.eval_every,
        epoch=EPOCH * args.eval_every,
        steps=args.outer_steps,
        seconds=args.seconds,
    )
    memory = {"peak_memory_mb": peak_memory(), "peak_memory_before_training_mb": before}
    draw_curves(run.out / "curves.png", {args.method: common.numbers(run.rows())})
    coefficients = model.upper.coefficients.numpy()
    np.save(run.out / "coefficients.npy", coefficients)
    draw_coefficients(run, model.upper.logits.numpy(), data.words)
    retrained = retrain(args, model, data) if args.retrain_steps else {}
    return summarise(args, common.numbers(run.rows())) | memory | retrained


def largest_divisor(number: int, most: int) -> int:
    return max(n for n in range(1, min(number, most) + 1) if number % n == 0)


def measurements(method: str, model: tb.BilevelModel, data: Data) -> Callable:
    parts = {"test": data.test, "validation": data.validation, "train": data.train}
    batches = {name: tensors(part) for name, part in parts.items()}

    @tf.function(autograph=False)
    def values() -> dict[str, tf.Tensor]:
        made = {}
        for name, batch in batches.items():
            made |= loss_and_accuracy(model.lower, name, batch)
        logits = tf.convert_to_tensor(model.upper.logits)
        return made | {
            "largest_x": tf.reduce_max(logits),
            "smallest_x": tf.reduce_min(logits),
        }

    return lambda: {"method": method} | {k: float(v) for k, v in values().items()}


def loss_and_accuracy(
    classifier: keras.layers.Dense, name: str, batch: tuple
) -> dict[str, tf.Tensor]:
    features, labels = batch
    predictions = tf.argmax(
        logits_of(classifier, features), axis=1, output_type=labels.dtype
    )
    right = tf.cast(predictions == labels, tf.float32)
    return {
        f"{name}_loss": cross_entropy(classifier, batch),
        f"{name}_accuracy": 100 * tf.reduce_mean(right),
    }


def retrain(args: argparse.Namespace, model: tb.BilevelModel, data: Data) -> dict:
    """Train new weights from zero, with the learned coefficients, on both halves.

    hypertorch's script ends in this way: the purpose of tuning is a classifier trained
    on all documents.
    """
    both = Part(
        sparse.vstack([data.train.features, data.validation.features]).tocsr(),
        np.concatenate([data.train.labels, data.validation.labels]),
    )
    every = largest_divisor(args.retrain_steps, 100)
    optimizer = keras.optimizers.SGD(args.inner_lr, args.inner_momentum)
    inner = tb.InnerSolver(optimizer, every, optimizer_state="carry")
    x = tb.functional(model.upper).initial()
    weights = [tf.zeros_like(model.lower.kernel.value)]
    batches = tb.Batches(upper=None, lower=tensors(both))
    state = inner.init(model.problem, x, weights)

    @tf.function(autograph=False)
    def advance(weights: list, state: dict) -> tuple:
        here = model.problem.prepared(x, batches)
        weights, state, _ = inner.solve(here, weights, state)
        return weights, state

    test, losses, accuracies = tensors(data.test), [], []
    progress = common.Progress(args.out, args.retrain_steps, "steps of retraining")
    for part in range(args.retrain_steps // every):
        weights, state = advance(weights, state)
        model.lower.kernel.assign(weights[0])
        made = loss_and_accuracy(model.lower, "test", test)
        losses.append(float(made["test_loss"]))
        accuracies.append(float(made["test_accuracy"]))
        progress.update(every * (part + 1))
    return {
        "retrained_steps": every * len(losses),
        "retrained_test_loss": losses[-1],
        "retrained_test_accuracy": accuracies[-1],
        "retrained_test_losses": losses,
    }


# Results.


def summarise(args: argparse.Namespace, rows: list[dict]) -> dict:
    final = rows[-1]
    seconds, steps = (np.diff([row[name] for row in rows]) for name in TIMES)
    chosen = common.best_row(rows, "validation_loss", lowest=True)
    best = common.best_row(rows, "test_loss", lowest=True)
    return {
        "method": args.method,
        "outer_steps": int(final["step"]),
        "seconds": final["seconds"],
        # The median excludes tracing, which is in the first interval.
        "seconds_per_outer_step": float(np.median(seconds / steps)),
        "test_loss": final["test_loss"],
        "test_accuracy": final["test_accuracy"],
        "seconds_to_test_loss_1": first_below(rows, 1.0),
        "best_validation_step": int(chosen["step"]),
        "test_loss_at_best_validation": chosen["test_loss"],
        "test_accuracy_at_best_validation": chosen["test_accuracy"],
        "best_test_loss": best["test_loss"],
        "best_test_accuracy": max(row["test_accuracy"] for row in rows),
        "test_loss_after": {
            str(mark): at(rows, mark)["test_loss"]
            for mark in MARKS
            if mark <= final["seconds"]
        },
    }


def first_below(rows: list[dict], loss: float) -> float | None:
    """The seconds until the test loss is first below a value."""
    return next((row["seconds"] for row in rows if row["test_loss"] < loss), None)


def at(rows: list[dict], seconds: float) -> dict:
    """The last row within the given seconds."""
    return [row for row in rows if row["seconds"] <= seconds][-1]


def draw_curves(path: pathlib.Path, curves: dict[str, list[dict]]) -> None:
    """Draw test loss and accuracy against seconds, with one line per method."""
    with common.figure(path, (11, 4)) as page:
        panels = page.subplots(1, 2)
        for axes, name in zip(panels, ("test_loss", "test_accuracy"), strict=True):
            for method, rows in curves.items():
                seconds = [row["seconds"] for row in rows]
                values = [row[name] for row in rows]
                common.draw_line(axes, seconds, values, label=method)
            axes.set(xlabel="seconds of training", ylabel=name.replace("_", " "))
            axes.grid(alpha=0.3)
            axes.legend()
        panels[0].axhline(1.0, color="black", linewidth=0.7, linestyle=":")
        panels[1].set(ylabel="test accuracy, percent")


def draw_coefficients(run: common.Run, logits: np.ndarray, words: np.ndarray) -> None:
    """Draw up to 20 words whose weights are regularised less than initially (x = 0),
    and up to 20 that are regularised more."""
    order = np.argsort(logits, kind="stable")
    # Logarithms, because the bars of coefficients near 1 would look alike.
    groups = {
        "smallest": [word for word in order[:20][::-1] if logits[word] < 0],
        "largest": [word for word in order[-20:] if logits[word] > 0],
    }
    with common.figure(run.out / "coefficients.png", (9, 5)) as page:
        panels = page.subplots(1, 2)
        for axes, (name, group) in zip(panels, groups.items(), strict=True):
            places = np.arange(len(group))
            # The words may contain characters that are special in matplotlib.
            labels = [str(word).replace("$", r"\$") for word in words[group]]
            axes.barh(places, logits[group])
            axes.set_yticks(places, labels, fontsize=8)
            title = (
                f"{name} coefficients" if group else f"no {name}: none has moved there"
            )
            axes.set(
                title=title, xlabel="x, logarithm of the coefficient; 0 at the start"
            )
            axes.locator_params("x", nbins=4)


def print_table(summaries: list[dict]) -> None:
    """Print one line per method, with the peak memory of its own process."""
    print(
        f"{'method':9s}{'steps':>7s}{'ms/step':>9s}{'seconds':>9s}{'loss':>9s}"
        f"{'acc %':>8s}{'to loss 1':>11s}{'peak MB':>9s}"
    )
    for row in summaries:
        below = row["seconds_to_test_loss_1"]
        print(
            f"{row['method']:9s}{row['outer_steps']:7d}"
            f"{1000 * row['seconds_per_outer_step']:9.1f}{row['seconds']:9.1f}"
            f"{row['test_loss']:9.4f}{row['test_accuracy']:8.2f}"
            f"{'never' if below is None else f'{below:.1f} s':>11s}"
            f"{row['peak_memory_mb']:9.0f}"
        )
    marks = [m for m in MARKS if all(str(m) in r["test_loss_after"] for r in summaries)]
    if marks:
        print("\ntest loss after   " + "".join(f"{mark:>7d} s" for mark in marks))
        for row in summaries:
            after = (f"{row['test_loss_after'][str(mark)]:9.4f}" for mark in marks)
            print(f"{row['method']:18s}" + "".join(after))


# One method, or a comparison of several.


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    plans = [with_defaults(args, method) for method in args.method]
    alone = plans[0] if len(plans) == 1 else None
    with common.one_line_errors(__file__):
        data = twentynews.load(
            args.data_dir,
            args.features,
            args.max_features,
            args.seed,
            args.download,
            args.dataset,
        )
        for plan in plans:
            require_sizes(plan, data)
            require_steps(plan)
        config = common.settings(alone or args)
        run = common.begin(args, config)
    keras.utils.set_random_seed(args.seed)
    if alone:
        # Not trained again: the peak memory would be that of an idle process.
        summary = run.summary() or train(alone, run, data)
        summaries = [summary]
    else:
        del data  # every method loads it in its own process
        summary = compare(args, plans, run)
        summaries = list(summary["methods"].values())
    run.summarise(summary)
    print_table(summaries)
    print(run.files())
    return summary


def require_sizes(plan: argparse.Namespace, data: Data) -> None:
    """Raise unless a minibatch fits into its part."""
    sizes = {"batch_size": data.train, "validation_batch_size": data.validation}
    for name, part in sizes.items():
        size = getattr(plan, name)
        if size is not None and size > len(part.labels):
            raise ValueError(
                f"{common.flag(name)} must not exceed the documents of its "
                f"half, got {size} of {len(part.labels)}: lower it"
            )


def require_steps(plan: argparse.Namespace) -> None:
    """Raise if more steps are to be differentiated than made."""
    if plan.method == "reverse" and plan.solver_steps > plan.inner_steps:
        raise ValueError(
            "--solver-steps must not exceed --inner-steps for --method reverse, which "
            f"differentiates so many of them, got {plan.solver_steps} of "
            f"{plan.inner_steps}: lower it"
        )


def compare(
    args: argparse.Namespace, plans: list[argparse.Namespace], run: common.Run
) -> dict:
    """Run every method in a separate process, one after the other."""

    def one(plan: argparse.Namespace, out: pathlib.Path) -> dict:
        if not (out / "summary.json").exists():
            resume = ["--resume"] if (out / "config.json").exists() else []
            if run_alone([*flags_of(args, plan), "--out", str(out), *resume]):
                raise SystemExit(1)
        return json.loads((out / "summary.json").read_text())

    done, failed = common.sweep(run, {plan.method: plan for plan in plans}, one)
    curves = {method: common.rows_of(run.out / method) for method in done}
    rows = [row for own in curves.values() for row in own]
    # Some metrics exist only for some methods.
    shared = (
        [name for name in rows[0] if all(map({name}.issubset, rows))] if rows else []
    )
    run.replace([{name: row[name] for name in shared} for row in rows])
    if rows:
        numbers = {method: common.numbers(own) for method, own in curves.items()}
        draw_curves(run.out / "curves.png", numbers)
    if failed:
        print_table(list(done.values()))
    return common.concluded(run, {"methods": done}, failed)


def flags_of(args: argparse.Namespace, plan: argparse.Namespace) -> list[str]:
    """The command line of one method's run in a comparison: the given flags that apply
    to it."""
    flags = ["--method", plan.method]
    if args.seconds is None and plan.seconds is not None:
        flags += ["--seconds", str(plan.seconds)]
    for name, value in common.settings(args).items():
        meaningless = getattr(plan, name) is None
        if name != "method" and value is not None and not meaningless:
            flags += [common.flag(name), str(value)]
    return flags


def run_alone(argv: list[str]) -> int:
    return subprocess.run([sys.executable, __file__, *argv], check=False).returncode


if __name__ == "__main__":
    main()
