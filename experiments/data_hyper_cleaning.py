"""Data hyper-cleaning: one learned weight per training example under label noise.

    python experiments/data_hyper_cleaning.py --out runs/cleaning
    python experiments/data_hyper_cleaning.py --dataset mnist --net mlp \\
        --method g-pbgd --seed 1 --out runs/g-pbgd-mlp

Upper variables: one logit x_i per training example, its weight s(x_i). Lower
variables: a classifier's weights y.

    f(y)    = mean cross-entropy on clean validation data
    g(x, y) = mean of s(x_i) * cross-entropy_i on polluted training data
              + reg * sum of squares of y

An example is kept if x_i >= 0. The penalty methods fit y to the validation data, so the
step to report is chosen on a fourth part, `selection`: clean images that are used for
nothing else. (The published tables report the best step on the test data; that number
is also written, as `best_test_accuracy`.)

Reproduces the hyper-cleaning tables of Shen and Chen (2023), arXiv:2302.05185, and of
Liu et al. (2021), arXiv:2110.00455 (iaptt-gm and bda, on the net mlp-linear: two
layers without an activation). Defaults are the published settings of every method and
net. For aid-cg, aid-fp, neumann, penalty, approxgrad and bda's mixing weights none are
published, and the defaults are our choice; bda's inner rate is that of its authors'
code. The default dataset, `digits`, is included in the installed packages and takes
about a minute.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import common
import keras
import numpy as np
import tensorflow as tf
from common import cleaning
from settings.data_hyper_cleaning import BASELINES, DEFAULTS, METHODS, NETS, Settings

import tfbilevel as tb
from data_prep import images, label_noise

SCORES = ("test_accuracy", "precision", "recall", "f1")
PARTS = ("train", "validation", "test", "selection")
SIZES = {"digits": (2000, 1000, 1500, 500)}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.Parser(description=__doc__)
    add, above = parser.add_argument, common.positive
    add("--dataset", choices=images.DATASETS, default="digits")
    parser.add_data_flags("folder of tensorflow-datasets, or of the published files")
    add("--net", choices=NETS, default="linear")
    add("--method", choices=METHODS + BASELINES, default="v-pbgd")
    add(
        "--noise",
        "--pollution-rate",
        type=float,
        default=0.5,
        help="share of labels that are drawn again",
    )
    add(
        "--noise-kind",
        "--pollution",
        choices=label_noise.RULES,
        default="published",
        help="whether the right label may be drawn",
    )
    add("--train-size", type=above(int), help="default 5000 (digits 2000)")
    add("--validation-size", type=above(int), help="default 5000 (digits 1000)")
    add("--test-size", type=above(int), help="default 10000 (digits 1500)")
    add("--selection-size", type=above(int), help="default 5000 (digits 500)")
    add("--outer-steps", type=above(int))
    add("--last", type=above(int), help="t-rhg: inner steps differentiated")
    add("--solver-steps", type=above(int), help="aid-*, neumann: Hessian products")
    Settings.add_flags(parser, "outer steps")
    add("--upper-optimizer", choices=("sgd", "adam"))
    add("--inner-lr", type=above(float))
    add("--start-lr", type=above(float), help="iaptt-gm: rate of the learned start")
    add("--alpha", type=common.share, help="bda: weight of the upper loss")
    add("--alpha-decay", type=common.share, help="bda: factor on alpha per inner step")
    add(
        "--bda-rule",
        choices=("aggregated", "bda-repo"),
        help="bda: weight of g; 1 - that of f, or constant as in BDA's published code",
    )
    add("--dynamics", choices=("gd", "nesterov-t", "nesterov-m"), default="gd")
    add(
        "--inner-momentum",
        "--momentum",
        type=common.fraction,
        help="nesterov-m; default 0.9",
    )
    add("--gamma-init", type=common.at_least(float, 0))
    add("--gamma-max", type=above(float))
    add("--gamma-steps", type=above(int), help="length of gamma's ramp")
    add("--auxiliary", choices=("persistent", "copy"), help="v-pbgd: start of z")
    add(
        "--regularisation",
        "--reg",
        type=common.at_least(float, 0),
        help="L2 coefficient of g",
    )
    add("--eval-every", type=above(int), help="outer steps between evaluations")
    add(
        "--baseline-epochs",
        type=above(int),
        default=30,
        help="for plain training: baselines, and the network before cleaning",
    )
    add("--kept", type=pathlib.Path, help="kept+val: .npz with labels and kept")
    add("--trials", type=above(int), default=1, help="runs at successive seeds")
    add("--memory", choices=("replay", "checkpoint", "tape"), help="for unrolled steps")
    add("--jit", choices=common.JIT)
    args = parser.parse_args(argv)
    sizes = SIZES.get(args.dataset, (5000, 5000, 10_000, 5000))
    for part, size in zip(PARTS, sizes, strict=True):
        if getattr(args, f"{part}_size") is None:
            setattr(args, f"{part}_size", size)
    return fill_defaults(parser, args)


def fill_defaults(
    parser: common.Parser, args: argparse.Namespace
) -> argparse.Namespace:
    published = DEFAULTS[args.method, args.net]
    if args.dataset == "digits" and published.gamma_steps and published.outer_steps:
        # There is less than half the data, and a demo should not take minutes.
        published = dataclasses.replace(
            published,
            outer_steps=published.outer_steps // 4,
            gamma_steps=published.gamma_steps // 4,
        )
    parser.reject_unused_flags(args, [published], f"--method {args.method}")
    files = args.dataset != "digits", "a --dataset with files"
    of_file = args.method == "kept+val"
    parser.reject_ineffective_flags(
        args,
        {"data_dir": files, "download": files, "kept": (of_file, "--method kept+val")},
    )
    if of_file and (args.kept is None or args.trials > 1):
        parser.error(
            "--method kept+val needs --kept FILE, made with one seed: pass it, and "
            "no --trials"
        )
    given, args = args, common.filled(args, published)
    if given.last is None and args.last is not None:
        args.last = min(args.last, args.inner_steps)
    if args.last is not None and args.last > args.inner_steps:
        parser.error(
            f"--last must not exceed --inner-steps, got {args.last} of "
            f"{args.inner_steps}: lower one or raise the other"
        )
    if args.gamma_max is not None and args.gamma_max < args.gamma_init:
        parser.error(
            f"--gamma-max must not be below --gamma-init, got {args.gamma_max} and "
            f"{args.gamma_init}: raise it"
        )
    if args.dynamics != "gd" and args.inner_lr is None:
        parser.error(
            f"--dynamics has no effect with --method {args.method}, which makes no "
            "inner steps of gradient descent: leave it out"
        )
    if args.dynamics == "nesterov-t" and args.inner_steps == 1:
        parser.error(
            "--dynamics nesterov-t has no effect with a single inner step, because the "
            "first step is the same: raise --inner-steps"
        )
    with_momentum = args.dynamics == "nesterov-m"
    needs = {"inner_momentum": (with_momentum, "--dynamics nesterov-m")}
    parser.reject_ineffective_flags(args, needs)
    if with_momentum and args.inner_momentum is None:
        args.inner_momentum = 0.9
    return args


class TwoLinearLayers(keras.Model):
    """x K + b with K = K1 K2, b = b1 K2 + b2: the two layers of `mlp-linear`.

    The kernels are multiplied first. With 5,000 images this takes 5,000 x 784 x 10 +
    784 x 300 x 10 multiplications, where (x K1) K2 takes 5,000 x 784 x 300. The
    gradients are the same.
    """

    def __init__(self, inputs: int):
        super().__init__()
        self.layers_in_turn = [keras.layers.Dense(300), keras.layers.Dense(10)]
        self.layers_in_turn[0].build((None, inputs))
        self.layers_in_turn[1].build((None, 300))
        self.built = True

    def call(self, pixels: tf.Tensor) -> tf.Tensor:
        (first, shift), (second, bias) = (
            (layer.kernel, layer.bias) for layer in self.layers_in_turn
        )
        kernel = tf.matmul(first, second)
        return tf.matmul(pixels, kernel) + (
            tf.linalg.matvec(second, shift, True) + bias
        )


def build_net(net: str, inputs: int, seed: int) -> keras.Model:
    if net == "mlp-linear":
        network = TwoLinearLayers(inputs)
    else:
        hidden = [keras.layers.Dense(300, "sigmoid")] if net == "mlp" else []
        layers = [keras.Input((inputs,)), *hidden, keras.layers.Dense(10)]
        network = keras.Sequential(layers)
    shapes = [tuple(v.shape) for v in network.trainable_variables]
    network.set_weights(draw_weights(shapes, seed, tf.constant(-1, tf.int64)))
    return network


def draw_weights(shapes: list[tuple], seed: int, step: tf.Tensor) -> list[tf.Tensor]:
    """Kernels and biases sampled uniformly in +-1/sqrt(fan_in), as in published nets.

    RHG samples them again at every outer step.
    """
    values, limit = [], 1.0
    for index, shape in enumerate(shapes):
        if len(shape) == 2:  # a kernel; the bias after it has the same bounds
            limit = shape[0] ** -0.5
        key = tf.stack([step, tf.constant(seed * len(shapes) + index, tf.int64)])
        values.append(tf.random.stateless_uniform(shape, key, -limit, limit))
    return values


def cross_entropy(network: keras.Model, batch: tuple) -> tf.Tensor:
    pixels, labels = batch
    return tb.sparse_cross_entropy(network(pixels), labels)


def build_method(args: argparse.Namespace, network: keras.Model) -> tb.Method:
    sgd = keras.optimizers.SGD

    def inner_steps(**options: Any) -> tb.InnerSolver:
        momentum = args.inner_momentum or 0.0
        return tb.InnerSolver(
            sgd(args.inner_lr, momentum, nesterov=momentum > 0),
            args.inner_steps,
            accelerated=args.dynamics == "nesterov-t",
            **options,
        )

    if args.method in ("penalty", "approxgrad"):
        return Settings.method(args)
    if args.method in ("v-pbgd", "g-pbgd"):
        weight = tb.LinearRamp(args.gamma_init, args.gamma_max, args.gamma_steps)
        if args.method == "g-pbgd":
            return tb.GradientNorm(sgd(args.lower_lr), weight)
        return tb.ValueGap(inner_steps(), sgd(args.lower_lr), weight, args.auxiliary)
    if args.method in ("rhg", "t-rhg"):
        shapes = [tuple(v.shape) for v in network.trainable_variables]
        inner = inner_steps(start=lambda step: draw_weights(shapes, args.seed, step))
        return tb.Unroll(inner, last=args.last, memory=args.memory)
    if args.method == "iaptt-gm":
        return tb.Unroll(inner_steps(), end="pessimistic", memory=args.memory)
    if args.method == "bda":
        constant = args.bda_rule == "bda-repo"
        mixture = tb.Aggregation(args.alpha, args.alpha_decay, constant)
        inner = inner_steps(start="cold")
        return tb.Unroll(inner, aggregate=mixture, memory=args.memory)
    if args.method == "aid-cg":
        solver = tb.ConjugateGradient(args.solver_steps, damping=args.damping)
    elif args.method == "aid-fp":
        solver = tb.FixedPoint(args.solver_steps, warm_start=True)
    else:
        solver = tb.Neumann(args.solver_steps)
    return tb.Implicit(inner_steps(), solver)


def accuracy(network: Callable, part: tuple) -> tf.Tensor:
    pixels, labels = part
    predictions = tf.argmax(
        network(pixels, training=False), axis=1, output_type="int32"
    )
    return 100 * tf.reduce_mean(tf.cast(predictions == labels, tf.float32))


def train_plainly(
    args: argparse.Namespace, network: keras.Model, parts: list[tuple], *callbacks: Any
) -> None:
    """Train with Adam on all given parts, trusting every label."""
    optimizer, name = keras.optimizers.Adam(1e-3), f"{args.out}, plain training"
    cleaning.fit(network, parts, optimizer, 100, args.baseline_epochs, name, callbacks)


def train_baseline(
    args: argparse.Namespace, run: common.Run, data: dict, network: keras.Model
) -> dict:
    """Train a baseline on the data that it may use. It keeps the examples it was told
    to keep, or those whose given label it predicts."""
    pixels, labels = (tensor.numpy() for tensor in data["train"])
    used = {
        "oracle": data["true_labels"] == labels,
        "val-only": np.zeros(len(labels), bool),
        "train+val": np.ones(len(labels), bool),
        "kept+val": data["kept"],
    }[args.method]
    parts = [data["validation"]]
    if used.any():
        parts.insert(0, (pixels[used], labels[used]))

    def kept() -> np.ndarray:
        if args.method == "kept+val":
            return used
        return network(pixels).numpy().argmax(axis=1) == labels

    def evaluate() -> dict[str, float]:
        return {
            **{f"{p}_accuracy": float(accuracy(network, data[p])) for p in PARTS[1:]},
            **label_noise.cleaning_scores(kept(), data["clean"]),
        }

    epochs = common.EvaluateEpochs(run, evaluate)
    train_plainly(args, network, parts, epochs)
    probabilities = tf.nn.softmax(network(pixels)).numpy()
    np.savez_compressed(
        run.out / "predictions.npz",
        labels=labels,
        kept=kept(),
        probabilities=probabilities,
        clean=data["clean"],
    )
    draw_curves(run, args)
    trusted = probabilities[np.arange(len(labels)), labels]
    draw_distrusted(run, data, trusted, network)
    return {
        "method": args.method,
        "net": args.net,
        "dataset": args.dataset,
        "seconds": epochs.seconds,
        **{name: float(run.rows()[-1][name]) for name in SCORES},
    }


def before_cleaning(args: argparse.Namespace, data: dict) -> dict[str, float]:
    """The scores when everything is kept, and the accuracy when every label is used."""
    network = build_net(args.net, data["train"][0].shape[1], args.seed)
    train_plainly(args, network, [data["train"], data["validation"]])
    everything = np.ones_like(data["clean"])
    return {
        "test_accuracy": float(accuracy(network, data["test"])),
        **label_noise.cleaning_scores(everything, data["clean"]),
    }


def draw_curves(run: common.Run, args: argparse.Namespace) -> None:
    unit = "epoch" if args.method in BASELINES else "outer step"
    accuracies = {part: f"{part}_accuracy" for part in PARTS[1:]}
    scores = {name: name for name in ("f1", "precision", "recall")}
    panels = [
        common.Panel(accuracies, "accuracy", "percent"),
        common.Panel(scores, "clean examples kept", "percent"),
    ]
    title = f"{args.method}, {args.net}, {args.dataset}"
    common.plot_columns(run, panels, title, ("step", unit))


def draw_distrusted(
    run: common.Run, data: dict, trust: np.ndarray, network: keras.Model
) -> None:
    """The least trusted training images, with given and predicted label."""
    pixels, given = (tensor.numpy() for tensor in data["train"])
    cleaning.draw_distrusted(
        run.out / "distrusted.png",
        data["train_images"] / data["train_images"].max(),
        trust,
        given,
        data["true_labels"] != given,
        lambda worst: np.argmax(network(pixels[worst]), axis=1),
    )


def inner_curve(model: tb.BilevelModel, data: dict) -> Callable[[], np.ndarray]:
    """A function that returns the accuracies of all inner iterates of the next outer
    step on the selection and the test images, [2, steps]."""
    method, network = model.method, tb.functional(model.lower)
    inner, first = method.inner, network.initial()  # the start of cold starts
    batches = tb.Batches(upper=data["validation"], lower=data["train"])

    @tf.function(autograph=False)
    def accuracies(x: list, step: tf.Tensor) -> tf.Tensor:
        here = model.problem.prepared(x, batches)
        if method.aggregate is not None:
            here = method.aggregate.applied(here)
        state = inner.init(here.problem, x, first)
        if "step" in state:
            state["step"] = step

        def measured(weights: list) -> tf.Tensor:
            predict = functools.partial(network, weights)
            parts = [data["selection"], data["test"]]
            return tf.stack([accuracy(predict, part) for part in parts])

        return inner.trajectory(here, first, state, of=measured)

    def curve() -> np.ndarray:
        x = [tf.identity(v.value) for v in model.upper_variables]
        step = tf.constant(model.outer_step, tf.int64)
        return accuracies(x, step).numpy().T

    return curve


def draw_inner_curve(run: common.Run, curve: np.ndarray) -> dict[str, float]:
    """Accuracy of every inner iterate at the final weights."""
    selection, test = curve
    steps = np.arange(1, len(test) + 1)
    with common.figure(run.out / "inner_curve.png", (5.5, 4)) as page:
        axes = page.subplots()
        for part, values in (("selection", selection), ("test", test)):
            common.draw_line(axes, steps, values, label=part)
        axes.set(xlabel="inner step", ylabel="percent", title="accuracy at the end")
        axes.grid(alpha=0.3)
        axes.legend()
    chosen = int(selection.argmax())
    return {
        "best_inner_step": chosen + 1,
        "test_accuracy_at_best_inner_step": float(test[chosen]),
        "best_inner_test_accuracy": float(test.max()),
    }


def load_data(args: argparse.Namespace) -> dict:
    generator = np.random.default_rng(args.seed)
    whole = images.load_training_file(args.dataset, args.data_dir, args.download)
    sizes = [getattr(args, f"{part}_size") for part in PARTS]
    train, *others = images.split(whole, sizes, generator)
    polluted, clean = label_noise.pollute(
        train.labels, args.noise, generator, args.noise_kind
    )

    def tensors(part: images.Part) -> tuple:
        flat = part.images.reshape(len(part.labels), -1)
        return tf.constant(flat), tf.constant(part.labels)

    polluted_train = train._replace(labels=polluted)
    return {
        **dict(zip(PARTS, map(tensors, [polluted_train, *others]), strict=True)),
        "clean": clean,
        "kept": args.kept and label_noise.load_kept(args.kept, polluted),
        "true_labels": train.labels,
        "train_images": train.images,
    }


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    with common.one_line_errors(__file__):
        data = load_data(args)
        run = common.begin(args, common.settings(args))
    drawn = {args.seed: data}

    def one(own: argparse.Namespace, run: common.Run) -> dict:
        return one_trial(own, run, drawn.pop(own.seed, None) or load_data(own))

    summary = common.trials(args, run, one)
    print_table(summary)
    print(run.files())
    return summary


def one_trial(args: argparse.Namespace, run: common.Run, data: dict) -> dict:
    keras.utils.set_random_seed(args.seed)
    network = build_net(args.net, data["train"][0].shape[1], args.seed)
    if args.method in BASELINES:
        return train_baseline(args, run, data, network)
    return clean(args, run, data, network)


def print_table(summary: dict) -> None:
    columns = {"before cleaning": summary["before"]} if "before" in summary else {}
    columns[summary["method"]] = summary
    print(f"{'percent':16s}" + "".join(f"{name:>18s}" for name in columns))
    for name in SCORES:
        values = "".join(f"{column[name]:18.2f}" for column in columns.values())
        spread = f" +- {summary[f'{name}_std']:.2f}" if "trials" in summary else ""
        print(f"{name:16s}{values}{spread}")


def upper_loss(upper: tb.ExampleWeights, lower: keras.Model, batch: tuple) -> tf.Tensor:
    return tf.reduce_mean(cross_entropy(lower, batch))


def lower_loss(
    upper: tb.ExampleWeights, lower: keras.Model, batch: tuple, reg: float
) -> tf.Tensor:
    loss = tf.reduce_mean(upper(None) * cross_entropy(lower, batch))
    if reg:
        squares = [tf.reduce_sum(tf.square(v)) for v in lower.trainable_variables]
        loss += reg * tf.add_n(squares)
    return loss


def clean(
    args: argparse.Namespace, run: common.Run, data: dict, network: keras.Model
) -> dict:
    weights = tb.ExampleWeights(args.train_size)
    optimizer = {"sgd": keras.optimizers.SGD, "adam": common.adam}
    learned = args.method == "iaptt-gm"
    model = tb.BilevelModel(
        weights,
        network,
        upper_loss,
        functools.partial(lower_loss, reg=args.regularisation),
        lower_start="learned" if learned else None,
    )
    model.compile(
        build_method(args, network),
        optimizer[args.upper_optimizer](Settings.upper_rate(args)),
        jit_compile=common.JIT[args.jit],
        steps_per_execution=math.gcd(args.outer_steps, args.eval_every),
        start_optimizer=keras.optimizers.SGD(args.start_lr) if learned else None,
    )

    @tf.function(autograph=False)
    def accuracies() -> dict[str, tf.Tensor]:
        return {f"{p}_accuracy": accuracy(network, data[p]) for p in PARTS[1:]}

    redrawn = args.method in ("rhg", "t-rhg")
    unrolled = isinstance(model.method, tb.Unroll)
    curve: Any = inner_curve(model, data) if unrolled else None

    def evaluate() -> dict[str, float]:
        keep = weights.logits.numpy() >= 0
        measured = {name: float(value) for name, value in accuracies().items()}
        if learned:
            start = tb.functional(network)
            z = [v.value for v in model.upper_variables[1:]]
            predict = functools.partial(start, z)
            measured["start_test_accuracy"] = float(accuracy(predict, data["test"]))
        if redrawn:
            # The accuracies published for RHG and T-RHG: the best of all inner iterates
            # of all outer steps on the test data.
            measured["best_inner_test_accuracy"] = float(curve()[1].max())
        return measured | label_noise.cleaning_scores(keep, data["clean"])

    evaluations = args.outer_steps // args.eval_every
    # A kill costs at most one twentieth of the run.
    full = tf.data.Dataset.from_tensors
    batches = tb.pair(full(data["validation"]), full(data["train"]))
    common.train(
        model,
        lambda first: batches.repeat(),
        run,
        evaluate,
        every=args.eval_every,
        epoch=args.eval_every * max(1, min(100, evaluations // 20)),
        steps=args.outer_steps,
    )
    rows = common.numbers(run.rows())
    draw_curves(run, args)
    draw_distrusted(run, data, weights.logits.numpy(), network)
    np.savez_compressed(
        run.out / "weights.npz",
        labels=data["train"][1].numpy(),
        kept=weights.logits.numpy() >= 0,
        weights=weights(None).numpy(),
        clean=data["clean"],
    )
    made = summarise(args, rows)
    if unrolled:
        made |= draw_inner_curve(run, curve())
    if redrawn:
        name = "best_inner_test_accuracy"
        made[name] = common.best_row(rows, name)[name]
    return made | {"before": before_cleaning(args, data)}


def summarise(args: argparse.Namespace, rows: list[dict]) -> dict:
    final, chosen = rows[-1], common.best_row(rows, "selection_accuracy")
    published = common.best_row(rows, "test_accuracy")
    return {
        "method": args.method,
        "net": args.net,
        "dataset": args.dataset,
        "seconds": final["seconds"],
        "seconds_per_outer_step": final["seconds"] / final["step"],
        **{name: chosen[name] for name in SCORES},
        "best_validation_step": int(chosen["step"]),
        "best_validation_accuracy": chosen["selection_accuracy"],
        "final": {name: final[name] for name in SCORES},
        "best_test_accuracy": published["test_accuracy"],
        "f1_at_best_test_accuracy": published["f1"],
        "best_f1": common.best_row(rows, "f1")["f1"],
        **{k: chosen[k] for k in ("start_test_accuracy",) if k in chosen},
    }


if __name__ == "__main__":
    main()
