"""Clean wrong labels of real digits: `tb.LabelCleaner` beside cleanlab and others.

    python experiments/label_cleaning.py --out runs/demo
    python experiments/label_cleaning.py --noise-kind symmetric --out runs/symmetric

3,300 of the 5,000 digits that are included in the installed packages have doubtful
labels, 40 percent of them wrong. 200 more have labels that are known to be right. What
is left over tests. By `--noise-kind`, a wrong label is

    class-dependent   the digit that looks most like the right one: a 4 is called 9
    symmetric         any other digit, all of them equally often

| row                        | what it does                                            |
|----------------------------|---------------------------------------------------------|
| labels as given            | nothing                                                 |
| plain training             | trains on all labels, doubtful and trusted; a label is  |
|                            | suspicious if the network says something else           |
| trusted only               | trains on the trusted labels alone; likewise            |
| cleanlab, cross-validated  | five trainings, each without a fifth of the labels;     |
|                            | cleanlab finds issues; trains on what is left           |
| cleanlab, trusted network  | cleanlab with the probabilities of `trusted only`       |
| LabelCleaner               | `tb.LabelCleaner` with its default settings             |

Every row has the same network, random shifts, optimizer and number of steps in each
training. All but the first see the trusted labels in every training. What cleanlab
flags is corrected to the likeliest class of the same probabilities.

The table has, in percent: the accuracy of the last network on the test digits; the
share of right labels after correction; and F1, the harmonic mean of precision and
recall, of finding the wrong labels. `report.html` shows what LabelCleaner found.
"""

import argparse
import contextlib
import csv
import importlib.util
import pathlib
import sys
import time
import webbrowser
from typing import Any, NamedTuple

import common
import keras
import numpy as np
import tensorflow as tf

import tfbilevel as tb
from data_prep import images, label_noise

NOISES = ("class-dependent", "symmetric")
ALIKE = np.array([6, 7, 7, 8, 9, 6, 0, 1, 3, 4])  # a 0 is taken for a 6, and so on
RATE, BATCH, FOLDS = 2e-3, 128, 5  # rate and batch: those of LabelCleaner
PICTURES = 24
OF_A_DIGIT = 3  # pictures at most
COLUMNS = {
    "test_accuracy": "test accuracy",
    "labels_right": "labels right",
    "f1": "F1 of finding",
}


class Data(NamedTuple):
    """The digits.

    Attributes:
        train: with the labels as given, some of them wrong.
        trusted, test: with right labels.
        right: the right labels of `train`, [n]; only for the scores.
    """

    train: images.Part
    trusted: images.Part
    test: images.Part
    right: np.ndarray


class Found(NamedTuple):
    """What one row of the table makes of the doubtful labels.

    Attributes:
        suspicious: which given labels it takes for wrong, [n].
        suggested: the labels after correction, [n].
        predicted: of the test digits by its last network; `None` without one.
    """

    suspicious: np.ndarray
    suggested: np.ndarray
    predicted: np.ndarray | None


def share_of_noise(text: str) -> float:
    """`common.fraction`, with the remedy for command lines from before --noise-kind."""
    if text in NOISES:
        raise argparse.ArgumentTypeError(
            f"is the share of wrong labels; their kind is --noise-kind {text}"
        )
    return common.fraction(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.Parser(description=__doc__)
    add, positive = parser.add_argument, common.positive(int)
    add("--noise-kind", choices=NOISES, default="class-dependent")
    add(
        "--noise",
        "--noise-rate",
        type=share_of_noise,
        default=0.4,
        help="share of wrong labels",
    )
    add("--train-size", type=positive, default=3300, help="doubtful labels")
    add(
        "--validation-size",
        "--trusted-size",
        type=positive,
        default=200,
        help="labels known to be right",
    )
    add("--test-size", type=positive, default=1500)
    add("--epochs", type=positive, default=16, help="of every training")
    add(
        "--replicas",
        type=positive,
        default=1,
        help="logical CPU devices on which LabelCleaner trains, by MirroredStrategy",
    )
    add("--open", action="store_true", help="open the report in a browser")
    return parser.parse_args(argv)


def load_data(args: argparse.Namespace) -> Data:
    generator = np.random.default_rng(args.seed)
    sizes = [args.train_size, args.validation_size, args.test_size]
    train, trusted, test = images.split(
        images.load_training_file("digits"), sizes, generator
    )
    missing = {*range(10)} - {*trusted.labels.tolist()}
    if missing:
        raise ValueError(
            "among the trusted digits every class must occur. Raise --validation-size. "
            f"Received: none of class {', '.join(map(str, sorted(missing)))} among "
            f"{args.validation_size}"
        )
    given = with_noise(train.labels, args.noise_kind, args.noise, generator)
    return Data(train._replace(labels=given), trusted, test, train.labels)


def with_noise(
    labels: np.ndarray, noise: str, rate: float, generator: np.random.Generator
) -> np.ndarray:
    """A copy of which floor(rate * n) labels are wrong."""
    changed, clean = label_noise.pollute(labels, rate, generator, "strict")
    if noise == "symmetric":
        return changed
    return np.where(clean, labels, ALIKE[labels]).astype(labels.dtype)


def build_network() -> keras.Model:
    """A small convolutional network with 115,306 weights, which ends with logits."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 5, strides=2, padding="same", activation="relu"),
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


def shifts(seed: int) -> keras.layers.Layer:
    """The augmentation of every training: up to a tenth in each direction."""
    return keras.layers.RandomTranslation(0.1, 0.1, fill_mode="constant", seed=seed)


def trained(args: argparse.Namespace, name: str, *parts: images.Part) -> keras.Model:
    """The network, trained on all given parts."""
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    keras.utils.set_random_seed(args.seed)
    network, move = build_network(), shifts(args.seed)
    per_epoch = steps_per_epoch(args)
    decay = keras.optimizers.schedules.CosineDecay(RATE, args.epochs * per_epoch)
    network.compile(
        keras.optimizers.Adam(decay),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,  # XLA's convolutions are slow on a CPU
    )
    batches = (
        tf.data.Dataset.from_tensor_slices((pixels, labels))
        .shuffle(len(labels), args.seed)
        .repeat()
        .batch(BATCH)
        .map(lambda x, y: (move(x, training=True), y))
        .prefetch(2)
    )
    network.fit(
        batches,
        epochs=args.epochs,
        steps_per_epoch=per_epoch,
        shuffle=False,  # the data are shuffled already
        callbacks=[common.FitProgress(name)],
        verbose=0,
    )
    return network


def steps_per_epoch(args: argparse.Namespace) -> int:
    return max(1, args.train_size // BATCH)  # as LabelCleaner counts


def probabilities(network: keras.Model, pixels: np.ndarray) -> np.ndarray:
    logits = network.predict(pixels, batch_size=1024, verbose=0).astype("float64")
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def classes(network: keras.Model, pixels: np.ndarray) -> np.ndarray:
    return probabilities(network, pixels).argmax(axis=1)


def as_given(args: argparse.Namespace, run: common.Run, data: Data) -> Found:
    given = data.train.labels
    return Found(np.zeros(len(given), bool), given, None)


def by_network(data: Data, network: keras.Model) -> Found:
    """A label is suspicious if the network says something else."""
    said = classes(network, data.train.images)
    return Found(said != data.train.labels, said, classes(network, data.test.images))


def plainly(args: argparse.Namespace, run: common.Run, data: Data) -> Found:
    network = trained(args, "plain training", data.train, data.trusted)
    return by_network(data, network)


def by_trusted(args: argparse.Namespace, run: common.Run, data: Data) -> Found:
    return by_network(data, trained(args, "trusted only", data.trusted))


def by_cleanlab(args: argparse.Namespace, data: Data, shares: np.ndarray) -> Found:
    """What cleanlab finds with these probabilities; then training on the rest."""
    from cleanlab.filter import find_label_issues

    given = data.train.labels
    flagged = np.asarray(
        find_label_issues(labels=given, pred_probs=shares, n_jobs=1), bool
    )
    rest = images.Part(*(array[~flagged] for array in data.train))
    network = trained(args, "cleanlab, last training", rest, data.trusted)
    suggested = np.where(flagged, shares.argmax(axis=1), given)
    return Found(flagged, suggested, classes(network, data.test.images))


def cross_validated(args: argparse.Namespace, run: common.Run, data: Data) -> Found:
    """Each fifth by a network of the other four, and of the trusted digits."""
    fold = np.random.default_rng(args.seed).permutation(args.train_size) % FOLDS
    shares = np.zeros((args.train_size, 10))
    for number in range(FOLDS):
        inside = fold == number
        others = images.Part(*(array[~inside] for array in data.train))
        name = f"cross-validation {number + 1} of {FOLDS}"
        network = trained(args, name, others, data.trusted)
        shares[inside] = probabilities(network, data.train.images[inside])
    return by_cleanlab(args, data, shares)


def by_trusted_cleanlab(args: argparse.Namespace, run: common.Run, data: Data) -> Found:
    network = trained(args, "trusted only, again", data.trusted)
    return by_cleanlab(args, data, probabilities(network, data.train.images))


def scope_of(replicas: int) -> Any:
    """The scope of a strategy with so many logical devices; of none for one."""
    if replicas == 1:
        return contextlib.nullcontext()
    devices = [f"CPU:{number}" for number in range(replicas)]
    return tf.distribute.MirroredStrategy(devices).scope()


def by_cleaner(args: argparse.Namespace, run: common.Run, data: Data) -> Found:
    cleaner = tb.LabelCleaner(
        build_network,
        augmentation=shifts(args.seed),
        seed=args.seed,
        backup=run.out / "trainings",  # `--resume` goes on there
    )
    with scope_of(args.replicas):
        cleaner.fit(
            *data.train,
            trusted=tuple(data.trusted),
            epochs=args.epochs,
            verbose=1 if sys.stdout.isatty() else 0,
        )
    issues = {
        name: np.asarray(cleaner.label_issues_[name])
        for name in ("row", "given_label", "suggested_label", "probability_right")
    }
    with (run.out / "issues.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(issues)
        writer.writerows(zip(*(v.tolist() for v in issues.values()), strict=True))
    draw_suspicious(run.out / "suspicious.png", data, issues)
    cleaner.report(
        run.out / "report.html",
        np.round(255 * data.train.images).astype("uint8"),
        title="Wrong labels among digits",
        commands=[f"python experiments/label_cleaning.py {flags(args)} --out FOLDER"],
    )
    suspicious = np.zeros(args.train_size, bool)
    suspicious[issues["row"]] = True
    predicted = cleaner.predict(data.test.images)
    return Found(suspicious, np.asarray(cleaner.corrected_labels_), predicted)


def flags(args: argparse.Namespace) -> str:
    """What repeats the run."""
    names = common.settings(args, "open")
    return " ".join(f"--{k.replace('_', '-')} {v}" for k, v in names.items())


def draw_suspicious(
    path: pathlib.Path, data: Data, issues: dict[str, np.ndarray]
) -> None:
    """The most suspicious digits, with given and suggested label.

    At most three look like the same digit: the network is surest of one of them, which
    would fill the picture.
    """
    looks = issues["suggested_label"]
    before = [np.sum(looks[:n] == looks[n]) for n in range(len(looks))]
    shown = np.flatnonzero(np.less(before, OF_A_DIGIT))[:PICTURES]
    rows, given = issues["row"][shown], issues["given_label"][shown]
    labels = zip(given, looks[shown], strict=True)
    common.draw_images(
        path,
        data.train.images[rows],
        [f"given {given}, looks {better}" for given, better in labels],
        "The most suspicious labels of each digit (red: the given label is wrong)",
        red=(data.train.labels != data.right)[rows].tolist(),
    )


WAYS = {
    "labels as given": as_given,
    "plain training": plainly,
    "trusted only": by_trusted,
    "cleanlab, cross-validated": cross_validated,
    "cleanlab, trusted network": by_trusted_cleanlab,
    "LabelCleaner": by_cleaner,
}


def scores(found: Found, data: Data) -> dict[str, float | None]:
    """In percent; `None` where there is nothing to measure."""
    wrong = data.train.labels != data.right
    finding = label_noise.cleaning_scores(found.suspicious, wrong)
    tested = found.predicted is not None
    return {
        "test_accuracy": share(found.predicted == data.test.labels) if tested else None,
        "labels_right": share(found.suggested == data.right),
        **{k: v if tested else None for k, v in finding.items()},
    }


def share(mask: Any) -> float:
    return 100 * float(np.mean(mask))


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    with common.one_line_errors(__file__):
        if importlib.util.find_spec("cleanlab") is None:
            raise ValueError(
                "cleanlab must be installed: pip install '.[experiments]'. "
                "Received: no package of this name"
            )
        data = load_data(args)
        run = common.begin(args, common.settings(args, "open"))
    if args.replicas > 1:  # before TensorFlow is used
        logical = [tf.config.LogicalDeviceConfiguration()] * args.replicas
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, logical)
    done = {row["method"] for row in run.rows()}
    for step, (name, way) in enumerate(WAYS.items(), start=1):
        if name in done:
            continue
        print(f"{step}/{len(WAYS)} {name}", flush=True)
        begun = time.perf_counter()
        with common.many_runs():
            found = way(args, run, data)
        seconds = time.perf_counter() - begun
        row = {"step": step, "method": name, **scores(found, data), "seconds": seconds}
        run.log({k: "" if v is None else v for k, v in row.items()})
    summary = summarise(args, run)
    run.summarise(summary)
    print_table(summary["methods"])
    report = (run.out / "report.html").resolve()
    print(f"{run.files()}\nReport: {report}")
    if args.open:
        webbrowser.open(report.as_uri())
    return summary


def summarise(args: argparse.Namespace, run: common.Run) -> dict:
    rows = common.numbers(run.rows())
    return {
        "noise_kind": args.noise_kind,
        "noise": args.noise,
        "seed": args.seed,
        "seconds": sum(row["seconds"] for row in rows),
        "methods": {
            row["method"]: {
                name: None if value == "" else value
                for name, value in row.items()
                if name not in ("step", "method")
            }
            for row in rows
        },
    }


def print_table(methods: dict[str, dict[str, float | None]]) -> None:
    print(f"\n{'percent':26}" + "".join(f"{name:>15}" for name in COLUMNS.values()))
    for name, row in methods.items():
        values = ("" if row[k] is None else f"{row[k]:.1f}" for k in COLUMNS)
        print(f"{name:26}" + "".join(f"{value:>15}" for value in values))
    print()


if __name__ == "__main__":
    main()
