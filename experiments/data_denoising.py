"""Importance learning: which training labels a large network should trust.

    python experiments/data_denoising.py --out runs/denoising
    python experiments/data_denoising.py --dataset mnist --noise 0.5 --preset hour \\
        --out runs/mnist-50

Upper variables: one number a_i per training example, its importance
s_i = (tanh(a_i) + 1) / 2. Lower variables: a classifier's weights.

    f(y)    = mean cross-entropy on a clean validation batch
    g(a, y) = sum of s_i * cross-entropy_i / sum of s_i    on a noisy training batch

A share of the training labels is replaced by wrong ones. The classifier is first
trained on the validation data. The initial a_i depends on whether it agrees with the
given label. Then every training batch, with a validation batch sampled for it, makes
one update of the method. After each epoch the importances are scaled to a mean of 1/2.
The Adam optimizer of a has moments and a step count per example (in the published
script, all examples that ever had the same position in a batch share them).

| method     | one update                                                            |
|------------|-----------------------------------------------------------------------|
| penalty    | T Adam steps of y, one of a, on the augmented Lagrangian              |
| approxgrad | T Adam steps of y on g, T of Adam on the linear system, one of a      |
| oracle     | trained on clean training examples and validation data                |
| val-only   | trained on validation data                                            |
| train+val  | trained on all training labels, right and wrong, and validation data  |

Reproduces the denoising experiments of Mehra and Hamm (2021), arXiv:1911.03432: MNIST
small (logistic regression, finally retrained on the trusted examples) and large,
CIFAR10 and SVHN, with the networks and settings of the published code as defaults.
FashionMNIST, which is not published, has those of MNIST. `digits` is included in the
installed packages and takes a minute. The tolerance of the penalty method applies to
the gradient's norm. The published script compares the norm's fourth power, so its
numbers appear here as their square roots. SVHN needs --data-file, made by
data_prep/svhn.py.

`test_accuracy` is that of the last epoch (mnist-small and digits: after retraining).
"""

import argparse
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import common
import keras
import numpy as np
import sklearn.metrics
import tensorflow as tf
from common import cleaning
from common.classifiers import NETS
from common.importances import Renormalise, importance, renormalised, to_logits
from settings.data_denoising import (
    BASELINE_EPOCHS,
    BASELINES,
    DATASETS,
    METHODS,
    PRESETS,
    Settings,
    dataset_of,
)

import tfbilevel as tb
from data_prep import images, label_noise, svhn

SAVED = 60  # updates between backups if an epoch has more: the most that a kill costs


class Data(NamedTuple):
    """Images in [0, 1] and labels.

    Attributes:
        train: with the labels that the methods see.
        validation, test: clean.
        true_labels: the true labels of the training images.
        clean: whether a training label is the true one.
    """

    train: images.Part
    validation: images.Part
    test: images.Part
    true_labels: np.ndarray
    clean: np.ndarray


# Flags.


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.Parser(description=__doc__)
    add, above = parser.add_argument, common.positive
    add("--dataset", choices=DATASETS, default="digits")
    parser.add_data_flags("folder of tensorflow-datasets, or of the published files")
    add("--data-file", type=pathlib.Path, help="svhn: made by data_prep/svhn.py")
    add("--net", choices=NETS, help="by data set")
    add("--method", choices=METHODS + BASELINES, default="penalty")
    add(
        "--preset",
        choices=PRESETS,
        default="published",
        help="hour: what two processor cores do in one",
    )
    add("--noise", type=float, help="share of wrong labels, in [0, 1); by data set")
    add("--train-size", type=above(int), help="by data set")
    add("--validation-size", type=above(int), help="by data set")
    add("--test-size", type=above(int), help="default: all")
    add("--trials", type=above(int), default=1, help="runs, at seeds SEED, SEED + 1..")
    add("--epochs", type=above(int), help="over the training data; by method")
    add("--seconds", type=above(float), help="stop after this training time")
    add("--batch-size", type=above(int), default=200)
    Settings.add_flags(parser, "epochs")
    add("--pretrain-epochs", type=above(int), help="on validation data; by data set")
    add("--pretrain-lr", type=above(float), help="default 0.001")
    add("--baseline-epochs", type=above(int), help="default 100; --preset hour: 10")
    add("--baseline-lr", type=above(float), help="default 0.001")
    add(
        "--retrain-threshold",
        type=float,
        help="smallest importance of examples to retrain on; 0: no retraining",
    )
    add("--retrain-epochs", type=above(int), help="default 500")
    add("--retrain-lr", type=above(float), help="default 0.0001")
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="rotate, shift, zoom and flip; by data set and preset",
    )
    add("--dropout", action=argparse.BooleanOptionalAction, help="default: none")
    add("--jit", choices=common.JIT, help="default auto")
    args = parser.parse_args(argv)
    return complete(parser, args)


def reject_ineffective_flags(parser: common.Parser, args: argparse.Namespace) -> None:
    bilevel = args.method in METHODS
    threshold = args.retrain_threshold
    if threshold is None:
        threshold = DATASETS[args.dataset].retrain_threshold
    for_methods = ("seconds", "jit", "pretrain_epochs", "pretrain_lr")
    retraining = bilevel and bool(threshold)
    dropping = (args.net or DATASETS[args.dataset].net) != "logistic"
    files = args.dataset not in ("digits", "svhn")
    parser.reject_ineffective_flags(
        args,
        {
            **dict.fromkeys(for_methods, (bilevel, "a bilevel --method")),
            "retrain_threshold": (bilevel, "a bilevel --method"),
            **dict.fromkeys(
                ("data_dir", "download"), (files, "a --dataset of tensorflow-datasets")
            ),
            "dropout": (dropping, "a --net with dropout"),
            **dict.fromkeys(
                ("retrain_epochs", "retrain_lr"), (retraining, "--retrain-threshold")
            ),
            **dict.fromkeys(
                ("baseline_epochs", "baseline_lr"), (not bilevel, "a baseline")
            ),
        },
    )


def complete(parser: common.Parser, args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what follows from the data set and the method; check for errors."""
    dataset = dataset_of(args.dataset, args.preset)
    if args.preset == "hour" and dataset.net == "logistic":
        parser.error(
            f"--preset hour is for the large data sets, got --dataset {args.dataset}, "
            "which takes minutes as it is"
        )
    published = PRESETS[args.preset].get((args.method, args.dataset), Settings())
    parser.reject_unused_flags(args, [published], f"--method {args.method}")
    reject_ineffective_flags(parser, args)
    if args.noise is not None and args.method == "val-only":
        parser.warn("--noise changes nothing: --method val-only sees no training label")
    args = common.filled(args, published)
    defaults = {
        "pretrain_lr": 1e-3,
        "baseline_epochs": BASELINE_EPOCHS[args.preset],
        "baseline_lr": 1e-3,
        "retrain_epochs": 500,
        "retrain_lr": 1e-4,
        "jit": "auto",
        "net": dataset.net,
        "noise": dataset.noise,
        "train_size": dataset.sizes[0],
        "validation_size": dataset.sizes[1],
        "pretrain_epochs": dataset.pretrain_epochs,
        "retrain_threshold": dataset.retrain_threshold or 0.0,
        "augment": dataset.augment,
        "dropout": False,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not 0 <= args.noise < 1:
        parser.error(f"--noise must be at least 0 and below 1, got {args.noise}")
    if not 0 <= args.retrain_threshold < 1:
        parser.error(
            f"--retrain-threshold must be at least 0 and below 1, got "
            f"{args.retrain_threshold}"
        )
    for part in ("train", "validation"):
        size = getattr(args, f"{part}_size")
        if args.method in METHODS and size < args.batch_size:
            parser.error(
                f"--{part}-size must be at least --batch-size, got {size} of "
                f"{args.batch_size}: raise it or lower --batch-size"
            )
    if (args.dataset == "svhn") != (args.data_file is not None):
        parser.error("--data-file FILE goes with --dataset svhn, and with it alone")
    return args


# Data.


def with_noise(args: argparse.Namespace, parts: list[images.Part]) -> Data:
    """The three parts with noise, which depends on the seed."""
    train, validation, test = parts
    noisy, clean = label_noise.pollute(
        train.labels, args.noise, np.random.default_rng(args.seed), "strict"
    )
    return Data(images.Part(train.images, noisy), validation, test, train.labels, clean)


def load_parts(args: argparse.Namespace) -> list[images.Part]:
    """Training, validation and test examples with their true labels."""
    if args.dataset == "svhn":
        parts = svhn.load(args.data_file)
        file, validation, test = (parts[name] for name in svhn.PARTS)
        asked = (args.train_size, args.validation_size)
        held = (len(file.labels), len(validation.labels))
        if any(size > most for size, most in zip(asked, held, strict=True)):
            raise ValueError(
                f"--train-size and --validation-size must fit in {args.data_file}, "
                f"got {asked[0]} of {held[0]} and "
                f"{asked[1]} of {held[1]}"
            )
        chosen = [first(file, args.train_size), first(validation, args.validation_size)]
        return [*chosen, tested(args, test)]
    if args.dataset == "digits":
        whole = scaled(images.load_digits())
        cut = len(whole.labels) - 2000
        file = images.Part(whole.images[:cut], whole.labels[:cut])
        test = images.Part(whole.images[cut:], whole.labels[cut:])
    else:
        name = args.dataset.removesuffix("-small")
        loaded = (
            images.load_file(name, split, args.data_dir, args.download)
            for split in ("train", "test")
        )
        file, test = map(scaled, loaded)
        file = images.in_published_order(file, "train")
    if args.train_size + args.validation_size > len(file.labels):
        raise ValueError(
            f"--train-size and --validation-size must fit in {len(file.labels)} "
            f"images, got {args.train_size} and {args.validation_size}"
        )
    # As published: the validation data follow the small training set, but are at the
    # end of the file for the large ones.
    small = args.dataset == "mnist-small"
    begin = args.train_size if small else len(file.labels) - args.validation_size
    place = slice(begin, begin + args.validation_size)
    validation = images.Part(file.images[place], file.labels[place])
    return [first(file, args.train_size), validation, tested(args, test)]


def tested(args: argparse.Namespace, test: images.Part) -> images.Part:
    if args.test_size is not None and args.test_size > len(test.labels):
        raise ValueError(
            f"--test-size must fit in {len(test.labels)} test images, got "
            f"{args.test_size}"
        )
    return first(test, args.test_size)


def first(part: images.Part, size: int | None) -> images.Part:
    return images.Part(part.images[:size], part.labels[:size])


def scaled(part: images.Part) -> images.Part:
    pixels = part.images.astype(np.float32) / 255
    return images.Part(pixels, part.labels.astype(np.int32))


def batches(args: argparse.Namespace, data: Data, first_step: int) -> tf.data.Dataset:
    """The batches of an update: new validation examples with every training batch."""
    level = {
        name: tb.index_batches(
            len(part.labels), args.batch_size, 2 * args.seed + number, first_step
        ).map(gather(part))
        for number, (name, part) in enumerate(
            [("lower", data.train), ("upper", data.validation)]
        )
    }
    if args.augment:
        augment = keras.Sequential(augmentation(args.seed))
        for name, dataset in level.items():
            level[name] = dataset.map(
                lambda pixels, labels, index: (
                    augment(pixels, training=True),
                    labels,
                    index,
                )
            )
    upper = level["upper"].map(lambda pixels, labels, index: (pixels, labels))
    return tb.pair(upper, level["lower"]).prefetch(2)


def gather(part: images.Part) -> Callable:
    pixels, labels = tf.constant(part.images), tf.constant(part.labels)
    return lambda index: (tf.gather(pixels, index), tf.gather(labels, index), index)


def augmentation(seed: int) -> list[keras.layers.Layer]:
    """The published transformations, except a shear of 0.2 degrees, for training."""
    options: dict[str, Any] = {"fill_mode": "nearest", "interpolation": "bilinear"}
    return [
        keras.layers.RandomRotation(40 / 360, seed=seed, **options),
        keras.layers.RandomTranslation(0.2, 0.2, seed=seed + 1, **options),
        keras.layers.RandomZoom((-0.2, 0.2), (-0.2, 0.2), seed=seed + 2, **options),
        keras.layers.RandomFlip("horizontal", seed=seed + 3),
    ]


def build_net(net: str, shape: tuple[int, ...], seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input(shape), *NETS[net]()])


def fit_plainly(
    args: argparse.Namespace,
    net: keras.Model,
    parts: list[images.Part],
    rate: float,
    epochs: int,
    augment: bool = False,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> None:
    """Train with Adam on all given parts, trusting every label."""
    # A model of net(inputs, training=False) would not do: `fit` would train it anyway.
    layers = augmentation(args.seed) if augment else []
    layers += net.layers if args.dropout else without_dropout(net)
    trained = keras.Sequential([keras.Input(net.input_shape[1:]), *layers])
    optimizer, name = common.adam(rate), f"{args.out}, plain training"
    cleaning.fit(trained, parts, optimizer, args.batch_size, epochs, name, callbacks)


def without_dropout(net: keras.Model) -> list:
    return [one for one in net.layers if not isinstance(one, keras.layers.Dropout)]


def accuracy(net: keras.Model, part: images.Part) -> float:
    """Accuracy in percent, with every image used once."""
    return 100 * float(np.mean(predict(net, part.images) == part.labels))


def predict(net: keras.Model, pixels: np.ndarray) -> np.ndarray:
    return net.predict(pixels, batch_size=1000, verbose=0).argmax(axis=1)


# The bilevel problem.


def build_model(
    args: argparse.Namespace, net: keras.Model, importances: np.ndarray, per_epoch: int
) -> tb.BilevelModel:
    weights = tb.ExampleWeights(args.train_size, activation=importance)
    weights.logits.assign(to_logits(importances))

    def upper_loss(upper: tb.ExampleWeights, lower: keras.Model, batch: tuple):
        pixels, labels = batch
        logits = lower(pixels, training=args.dropout)
        return tf.reduce_mean(tb.sparse_cross_entropy(logits, labels))

    def lower_loss(upper: tb.ExampleWeights, lower: keras.Model, batch: tuple):
        pixels, labels, index = batch
        losses = tb.sparse_cross_entropy(lower(pixels, training=args.dropout), labels)
        s = upper(index)
        return tf.reduce_sum(s * losses) / (tf.reduce_sum(s) + 1e-12)

    model = tb.BilevelModel(weights, net, upper_loss, lower_loss)
    model.compile(
        Settings.method(args, per_epoch),
        tb.LazyAdam(Settings.upper_rate(args, per_epoch), epsilon=1e-8),
        jit_compile=common.JIT[args.jit],
    )
    return model


def measure(
    args: argparse.Namespace, model: tb.BilevelModel, data: Data
) -> Callable[[], dict[str, float]]:
    """A function that evaluates the model after an epoch."""

    def evaluate() -> dict[str, float]:
        s = importance(model.upper.logits.value).numpy()
        predicted = predict(model.lower, data.train.images)
        values = {
            "test_accuracy": accuracy(model.lower, data.test),
            "validation_accuracy": accuracy(model.lower, data.validation),
            "train_accuracy": 100 * float(np.mean(predicted == data.train.labels)),
            "clean_train_accuracy": 100 * float(np.mean(predicted == data.true_labels)),
            "mean_importance": float(s.mean()),
        }
        if 0 < data.clean.mean() < 1:
            values["auc"] = 100 * float(sklearn.metrics.roc_auc_score(data.clean, s))
        for level in (0.5, 0.9):
            scores = label_noise.cleaning_scores(s > level, data.clean)
            values |= {f"{name}_at_{level}": score for name, score in scores.items()}
        return values

    return evaluate


def pretrain(args: argparse.Namespace, run: common.Run, data: Data) -> keras.Model:
    """The network trained on validation data, which is saved for --resume."""
    shape, path = data.train.images.shape[1:], run.out / "pretrained.weights.h5"
    if not path.exists():
        net = build_net(args.net, shape, args.seed)
        rate, epochs = args.pretrain_lr, args.pretrain_epochs
        fit_plainly(args, net, [data.validation], rate, epochs)
        partial = run.out / "partial.weights.h5"
        net.save_weights(partial)
        os.replace(partial, path)
    # Built again, as with --resume, because training changed the dropout seeds.
    net = build_net(args.net, shape, args.seed)
    net.load_weights(path)
    return net


def denoise(args: argparse.Namespace, run: common.Run, data: Data) -> dict:
    """Run a bilevel method: train, evaluate, draw the figures, retrain."""
    net = pretrain(args, run, data)
    dataset = DATASETS[args.dataset]
    agrees = predict(net, data.train.images) == data.train.labels
    per_epoch = args.train_size // args.batch_size
    start = np.where(agrees, dataset.high, dataset.low)
    pretrained = accuracy(net, data.test)
    model = build_model(args, net, start, per_epoch)
    common.train(
        model,
        lambda first: batches(args, data, first),
        run,
        measure(args, model, data),
        every=per_epoch,
        epoch=min(per_epoch, SAVED),
        steps=args.epochs * per_epoch,
        seconds=args.seconds,
        callbacks=[Renormalise(model.upper.logits, per_epoch)],
    )
    after: dict[str, float] = {}
    if model.outer_step % per_epoch:  # the time limit was reached within an epoch
        model.upper.logits.assign(renormalised(model.upper.logits.numpy()))
        after = measure(args, model, data)()
        after["f1"] = after["f1_at_0.5"]
    s = importance(model.upper.logits.value).numpy()
    np.savez_compressed(run.out / "importances.npz", importance=s, clean=data.clean)
    draw_importances(run.out / "importances.png", s, data.clean)
    draw_distrusted(run.out / "distrusted.png", s, data, net)
    draw_curves(run, args)
    summary = summarise(args, run) | after | {"pretrained_test_accuracy": pretrained}
    if args.retrain_threshold:
        believed = s > args.retrain_threshold
        kept = images.Part(data.train.images[believed], data.train.labels[believed])
        fresh = build_net(args.net, data.train.images.shape[1:], args.seed + 1)
        rate, epochs = args.retrain_lr, args.retrain_epochs
        fit_plainly(args, fresh, [kept, data.validation], rate, epochs)
        summary["last_epoch_test_accuracy"] = summary["test_accuracy"]
        summary["test_accuracy"] = accuracy(fresh, data.test)
        summary["retrained_on"] = int(believed.sum()) + len(data.validation.labels)
    return summary


def train_baseline(args: argparse.Namespace, run: common.Run, data: Data) -> dict:
    pixels, labels = data.train
    right = images.Part(pixels[data.clean], labels[data.clean])
    parts = {
        "oracle": [right, data.validation],
        "val-only": [data.validation],
        "train+val": [data.train, data.validation],
    }[args.method]
    net = build_net(args.net, pixels.shape[1:], args.seed)
    rate, epochs = args.baseline_lr, args.baseline_epochs

    def evaluate() -> dict[str, float]:
        return {
            "test_accuracy": accuracy(net, data.test),
            "validation_accuracy": accuracy(net, data.validation),
        }

    log = common.EvaluateEpochs(run, evaluate)
    fit_plainly(args, net, parts, rate, epochs, args.augment, [log])
    draw_curves(run, args)
    final = {name: run.column(name)[-1] for name in evaluate()}
    return {**about(args), "epochs": epochs, "seconds": log.seconds, **final}


# Results.


def about(args: argparse.Namespace) -> dict:
    names = ("method", "dataset", "net", "noise", "seed")
    return {name: getattr(args, name) for name in names}


def summarise(args: argparse.Namespace, run: common.Run) -> dict:
    rows = common.numbers(run.rows())
    final = rows[-1]
    chosen = common.best_row(rows, "validation_accuracy")
    hidden = ("step", "seconds")
    return {
        **about(args),
        "epochs": final["step"] / (args.train_size // args.batch_size),
        "seconds": final["seconds"],
        "seconds_per_outer_step": final["seconds"] / max(final["step"], 1),
        **{name: value for name, value in final.items() if name not in hidden},
        "f1": final["f1_at_0.5"],
        "best_validation_step": int(chosen["step"]),
        "test_accuracy_at_best_validation": chosen["test_accuracy"],
        "best_test_accuracy": max(row["test_accuracy"] for row in rows),
    }


def draw_importances(path: pathlib.Path, s: np.ndarray, clean: np.ndarray) -> None:
    with common.figure(path, (6, 4)) as page:
        axes = page.subplots()
        cleaning.draw_histograms(axes, s, clean, np.linspace(0, 1, 51))
        axes.set(xlabel="importance", ylabel="training examples")


def draw_distrusted(
    path: pathlib.Path, s: np.ndarray, data: Data, net: keras.Model
) -> None:
    """The training images with the lowest importance."""
    pixels, given = data.train
    cleaning.draw_distrusted(
        path, pixels, s, given, ~data.clean, lambda worst: predict(net, pixels[worst])
    )


def draw_curves(run: common.Run, args: argparse.Namespace) -> None:
    measured = ("test", "validation", "clean_train", "train")
    scores = ("precision", "recall", "f1")
    columns = {
        "accuracy": {m.replace("_", " "): f"{m}_accuracy" for m in measured},
        "examples of importance above 0.5": {name: f"{name}_at_0.5" for name in scores},
    }
    # A baseline has no importances and is not evaluated on the training data.
    known, panels = run.rows()[0], []
    for title, names in columns.items():
        names = {label: name for label, name in names.items() if name in known}
        if names:
            panels.append(common.Panel(names, title, "percent"))
    common.plot_columns(run, panels, f"{args.method}, {args.net}, {args.dataset}")


def one_trial(
    args: argparse.Namespace, run: common.Run, parts: list[images.Part]
) -> dict:
    data = with_noise(args, parts)
    if args.method in BASELINES:
        return train_baseline(args, run, data)
    return denoise(args, run, data)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    with common.one_line_errors(__file__):
        parts = load_parts(args)
        run = common.begin(args, common.settings(args))
    one = functools.partial(one_trial, parts=parts)
    summary = common.trials(args, run, one)
    for name in ("test_accuracy", "test_accuracy_std", "last_epoch_test_accuracy",
                 "pretrained_test_accuracy", "auc", "precision_at_0.5",
                 "recall_at_0.5"):  # fmt: skip
        if name in summary:
            print(f"{name:28s}{summary[name]:8.2f}")
    print(run.files())
    return summary


if __name__ == "__main__":
    main()
