"""Poisoning MNIST: a few added training images that degrade a classifier.

    python experiments/poisoning_mnist.py --out runs/poisons
    python experiments/poisoning_mnist.py --attack targeted --method approxgrad \\
        --poisons 10 20 30 40 50 60 --trials 5 --out runs/targeted

Upper variables: the poison images u, with pixels in [0, 1] and fixed wrong labels.
Lower variables: W of a linear classifier without bias.

    g(u, W) = mean cross-entropy on 1,000 clean images and the poisons
              + 0.0025 * sum of squares of W

| attack     | the poisons are                         | f(W)                       |
|------------|-----------------------------------------|----------------------------|
| untargeted | copies of training images, each with    | - mean cross-entropy on    |
|            | one of the nine wrong labels            | 1,000 validation images    |
| targeted   | threes labelled 8, eights labelled 3    | mean cross-entropy of 400  |
|            |                                         | eights that are labelled 3 |

W is first trained on clean data. Then u is optimised while W follows. Finally a new W
is trained from scratch on clean data and poisons, and only that one is evaluated.
`label-flip` leaves the images unchanged; every other method reports its result too, as
`label_flip`.

Reproduces the data-poisoning experiments of Mehra and Hamm (2021), arXiv:1911.03432;
their settings are the defaults. `test_accuracy` is measured on 8,000 further images of
MNIST's training file (untargeted) or on 5,000 class-balanced ones of its test file
(targeted). `attack_success` of targeted attacks is the share of eights that are
classified as threes. `digits`, for a first try, is included in the installed packages.
"""

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import keras
import numpy as np
import tensorflow as tf

import tfbilevel as tb
from data_prep import images

# The measures of each attack; the last one is the goal of the attack.
ATTACKS = {
    "untargeted": ("test_accuracy",),
    "targeted": ("test_accuracy", "attack_success"),
}
DECAY = 0.0025
SOURCE, GOAL = 8, 3
SCORES = ("clean", "label_flip", "poisoned")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(common.InversionFree):
    """A method's settings; `None` where it has no such setting."""

    outer_steps: int | None = None


def penalty(lower_lr: float, lower_weight: float) -> Settings:
    return Settings(
        outer_steps=5000,
        inner_steps=20,
        upper_lr=0.1,
        lower_lr=lower_lr,
        weight=10.0,
        lower_weight=lower_weight,
        tolerance=1.0,
        multiplier=0.0,
    )


def approxgrad(upper_lr: float, lower_lr: float, solver_lr: float) -> Settings:
    return Settings(
        outer_steps=5000,
        inner_steps=20,
        upper_lr=upper_lr,
        lower_lr=lower_lr,
        solver_lr=solver_lr,
        damping=1e-3,
        halve_every=1000,
    )


DEFAULTS = {
    ("penalty", "untargeted"): penalty(1e-3, 100.0),
    ("penalty", "targeted"): penalty(1e-4, 1.0),
    ("approxgrad", "untargeted"): approxgrad(1e-2, 1e-3, 1e-2),
    ("approxgrad", "targeted"): approxgrad(1e-3, 1e-4, 1e-3),
    ("label-flip", "untargeted"): Settings(),
    ("label-flip", "targeted"): Settings(),
}
METHODS = tuple(dict.fromkeys(method for method, _ in DEFAULTS))
# Numbers of training, validation and test images, besides the official test set.
SIZES = {
    ("mnist", "untargeted"): (1000, 1000, 8000),
    ("mnist", "targeted"): (1000, 4000, 5000),
    ("digits", "untargeted"): (1000, 1000, 2000),
    ("digits", "targeted"): (1000, 2000, 1000),
}


class Data(NamedTuple):
    """The data that one attack uses and is evaluated on; pixels [n, 784] in [0, 1].

    Attributes:
        train: clean.
        validation: with the labels that f uses.
        test: with true labels.
        official: MNIST's test file, `None` for digits.
        poisons: the initial images, with their wrong labels.
    """

    train: images.Part
    validation: images.Part
    test: images.Part
    official: images.Part | None
    poisons: images.Part


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.Parser(description=__doc__)
    add, above = parser.add_argument, common.positive
    add("--attack", choices=ATTACKS, default="untargeted")
    add("--method", choices=METHODS, default="penalty")
    add(
        "--dataset",
        choices=("mnist", "digits"),
        help="default: mnist, without its files digits",
    )
    parser.add_data_flags("tensorflow-datasets folder, or of IDX files")
    add("--poisons", type=above(int), nargs="+", default=[60], help="how many images")
    add("--trials", type=above(int), default=1, help="runs, at seeds SEED, SEED + 1..")
    add("--outer-steps", type=above(int))
    Settings.add_flags(parser, "outer steps")
    add(
        "--stay-close",
        type=common.at_least(float, 0),
        help="weight of |u - u_0|^2 in f; default 0",
    )
    add("--train-steps", type=above(int), default=10_001, help="plain training of W")
    add("--train-lr", type=above(float), default=1e-3)
    add("--eval-every", type=above(int), help="outer steps; default 100")
    add("--jit", choices=common.JIT, help="default auto")
    args = parser.parse_args(argv)
    other = parser.choose_dataset(args, "mnist", images.is_prepared, "digits")
    moved = args.method != "label-flip", "a --method that moves images"
    idle = {"stay_close": 0.0, "eval_every": 100, "jit": "auto"}
    files = args.dataset != "digits", "--dataset mnist"
    parser.reject_ineffective_flags(
        args,
        dict.fromkeys(idle, moved) | dict.fromkeys(("data_dir", "download"), files),
    )
    for name, value in idle.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    published = DEFAULTS[args.method, args.attack]
    parser.reject_unused_flags(args, [published], f"--method {args.method}")
    args = common.filled(args, published)
    most = SIZES[args.dataset, args.attack][0] // (
        5 if args.attack == "targeted" else 1
    )
    for count in args.poisons:
        if count > most:
            parser.error(f"--poisons must be at most {most}, got {count}")
        if args.attack == "targeted" and count % 2:
            parser.error(
                f"--poisons must be even for --attack targeted, which uses half of "
                f"them for each digit, got {count}"
            )
    parser.warn(other)
    return args


# Data.


def load_files(args: argparse.Namespace) -> list[images.Part]:
    """The training and the test file, pixels [n, 784] in [0, 1], in published order."""
    if args.dataset == "digits":
        whole = flat(images.load_digits())
        return [take(whole, np.arange(3500)), take(whole, np.arange(3500, 5000))]
    return [
        flat(
            images.in_published_order(
                images.load_file("mnist", split, args.data_dir, args.download), split
            )
        )
        for split in ("train", "test")
    ]


def flat(part: images.Part) -> images.Part:
    pixels = part.images.reshape(len(part.labels), -1).astype(np.float32) / 255
    return images.Part(pixels, part.labels.astype(np.int32))


def take(part: images.Part, numbers: np.ndarray) -> images.Part:
    return images.Part(part.images[numbers], part.labels[numbers])


def balanced(
    part: images.Part, count: int, generator: np.random.Generator
) -> images.Part:
    """count / 10 random images of each class, in random order."""
    chosen = []
    for digit in range(10):
        own = np.flatnonzero(part.labels == digit)
        if len(own) < count // 10:
            raise ValueError(
                f"a balanced set of {count} needs {count // 10} images of the digit "
                f"{digit}, of which there are {len(own)}"
            )
        chosen.append(generator.choice(own, count // 10, replace=False))
    return take(part, generator.permutation(np.concatenate(chosen)))


def relabelled(part: images.Part, digit: int, label: int) -> images.Part:
    """The images of one digit, with another label."""
    own = part.images[part.labels == digit]
    return images.Part(own, np.full(len(own), label, np.int32))


def draw_data(
    args: argparse.Namespace, files: list[images.Part], count: int, seed: int
) -> Data:
    """Sample everything random: the split, and the initial poisons."""
    generator = np.random.default_rng(seed)
    file, official = files
    sizes = SIZES[args.dataset, args.attack]
    if args.attack == "untargeted":
        order = generator.permutation(len(file.labels))
        cuts = np.split(order, np.cumsum(sizes))
        train, validation, test = (take(file, numbers) for numbers in cuts[:3])
        shift = generator.integers(1, 10, count).astype(np.int32)
        wrong = (train.labels[:count] + shift) % 10
        poisons = images.Part(train.images[:count], wrong)
    else:
        # As published: the training set is sampled from the file's first images.
        begin = 2 * sizes[0]
        train = balanced(take(file, np.arange(begin)), sizes[0], generator)
        rest = take(file, np.arange(begin, len(file.labels)))
        clean = balanced(rest, min(sizes[1], 10 * smallest_class(rest)), generator)
        validation = relabelled(clean, SOURCE, GOAL)
        test = balanced(
            official, min(sizes[2], 10 * smallest_class(official)), generator
        )
        halves = [
            relabelled(first_of(train, digit, count // 2), digit, wrong)
            for digit, wrong in ((GOAL, SOURCE), (SOURCE, GOAL))
        ]
        joined = images.Part(*map(np.concatenate, zip(*halves, strict=True)))
        poisons = take(joined, generator.permutation(count))
    return Data(
        train, validation, test, official if args.dataset == "mnist" else None, poisons
    )


def smallest_class(part: images.Part) -> int:
    return int(np.bincount(part.labels, minlength=10).min())


def first_of(part: images.Part, digit: int, count: int) -> images.Part:
    return take(part, np.flatnonzero(part.labels == digit)[:count])


# The bilevel problem.


class Poisons(keras.layers.Layer):
    """Learned images with fixed labels."""

    def __init__(self, start: images.Part):
        super().__init__()
        self.labels = tf.constant(start.labels)
        self.start = tf.constant(start.images)
        self.images = self.add_weight(shape=start.images.shape, name="images")
        self.images.assign(start.images)
        self.built = True


def build_net(inputs: int, seed: int) -> keras.Model:
    initial = keras.initializers.GlorotUniform(seed)
    layer = keras.layers.Dense(10, use_bias=False, kernel_initializer=initial)
    return keras.Sequential([keras.Input((inputs,)), layer])


def build_model(args: argparse.Namespace, data: Data, seed: int) -> tb.BilevelModel:
    poisons = Poisons(data.poisons)
    total = len(data.train.labels) + len(data.poisons.labels)

    def upper_loss(upper: Poisons, lower: keras.Model, batch: tuple) -> tf.Tensor:
        pixels, labels = batch
        loss = tf.reduce_mean(tb.sparse_cross_entropy(lower(pixels), labels))
        if args.attack == "untargeted":
            loss = -loss
        if args.stay_close:
            moved = tf.convert_to_tensor(upper.images) - upper.start
            loss += args.stay_close * tf.reduce_sum(moved**2)
        return loss

    def lower_loss(upper: Poisons, lower: keras.Model, batch: tuple) -> tf.Tensor:
        parts = [batch, (tf.convert_to_tensor(upper.images), upper.labels)]
        losses = [
            tf.reduce_sum(tb.sparse_cross_entropy(lower(pixels), labels))
            for pixels, labels in parts
        ]
        squares = tf.reduce_sum(tf.square(lower.trainable_variables[0]))
        return tf.add_n(losses) / total + DECAY * squares

    return tb.BilevelModel(
        poisons,
        build_net(data.train.images.shape[1], seed),
        upper_loss,
        lower_loss,
        project_upper=lambda x: [tf.clip_by_value(pixels, 0.0, 1.0) for pixels in x],
    )


def trainer(args: argparse.Namespace) -> Callable:
    """(digits, seed) -> W trained on them from scratch; compiled once per shape."""

    def loss(lower: list, batch: images.Part) -> tf.Tensor:
        losses = tb.sparse_cross_entropy(batch.images @ lower[0], batch.labels)
        return tf.reduce_mean(losses) + DECAY * tf.reduce_sum(tf.square(lower[0]))

    optimizer = common.adam(args.train_lr)
    solve = common.trainer(loss, optimizer, args.train_steps, args.jit != "off")

    def train(part: images.Part, seed: int) -> keras.Model:
        net = build_net(part.images.shape[1], seed)
        start = [tf.convert_to_tensor(v.value) for v in net.trainable_variables]
        found = solve(images.Part(*map(tf.constant, part)), start)
        for variable, value in zip(net.trainable_variables, found, strict=True):
            variable.assign(value)
        return net

    return train


def poisoned(data: Data, pixels: np.ndarray) -> images.Part:
    """The training data with the poisons, whose pixels are given."""
    clean, poisons = data.train, data.poisons
    return images.Part(
        np.concatenate([clean.images, pixels]),
        np.concatenate([clean.labels, poisons.labels]),
    )


def scores(args: argparse.Namespace, net: keras.Model, data: Data) -> dict[str, float]:
    """Accuracies in percent, also by class; targeted: the share of eights read as 3."""
    parts = {"test": data.test}
    if data.official is not None:
        parts["official_test"] = data.official
    made = {}
    for name, (pixels, labels) in parts.items():
        predicted = net(pixels).numpy().argmax(axis=1)
        made[f"{name}_accuracy"] = 100 * float(np.mean(predicted == labels))
        if name == "test":
            for digit in range(10):
                own = predicted[labels == digit] == digit
                made[f"accuracy_of_{digit}"] = 100 * float(np.mean(own))
            if args.attack == "targeted":
                read = predicted[labels == SOURCE] == GOAL
                made["attack_success"] = 100 * float(np.mean(read))
    return made


# One attack.


def attack(
    args: argparse.Namespace,
    run: common.Run,
    data: Data,
    seed: int,
    train: Callable,
) -> dict:
    clean = train(data.train, seed)
    found = {"clean": scores(args, clean, data)}
    flipped = poisoned(data, data.poisons.images)
    found["label_flip"] = scores(args, train(flipped, seed + 1), data)
    found["poisoned"] = found["label_flip"]
    summary: dict[str, Any] = {}
    pixels = data.poisons.images
    if args.method == "label-flip":
        run.rewind(-1)
        run.log({"step": 0, "seconds": 0.0, **found["label_flip"]})
    else:
        pixels, summary = optimise(args, run, data, clean, seed)
        retrained = train(poisoned(data, pixels), seed + 1)
        found["poisoned"] = scores(args, retrained, data)
        draw_curves(run, args)
    np.savez_compressed(
        run.out / "poisons.npz", images=pixels, labels=data.poisons.labels
    )
    draw_poisons(run.out / "poisons.png", data.poisons, pixels)
    return {
        "attack": args.attack,
        "method": args.method,
        "poisons": len(data.poisons.labels),
        "seed": seed,
        **found["poisoned"],
        **summary,
        **{name: found[name] for name in SCORES},
    }


def optimise(
    args: argparse.Namespace,
    run: common.Run,
    data: Data,
    clean: keras.Model,
    seed: int,
) -> tuple[np.ndarray, dict]:
    """The images after the last outer step."""
    model = build_model(args, data, seed)
    model.lower.set_weights(clean.get_weights())
    model.compile(
        Settings.method(args),
        common.adam(Settings.upper_rate(args)),
        jit_compile=common.JIT[args.jit],
        steps_per_execution=math.gcd(args.outer_steps, args.eval_every),
    )
    full = tf.data.Dataset.from_tensors
    pairs = tb.pair(full(tuple(data.validation)), full(tuple(data.train)))
    common.train(
        model,
        lambda first: pairs.repeat(),
        run,
        lambda: following(args, model, data),
        every=args.eval_every,
        epoch=args.eval_every,
        steps=args.outer_steps,
    )
    seconds = run.column("seconds")[-1]
    return model.upper.images.numpy(), {
        "seconds": seconds,
        "seconds_per_outer_step": seconds / args.outer_steps,
        "distance": float(
            np.linalg.norm(
                model.upper.images.numpy() - data.poisons.images, axis=1
            ).mean()
        ),
    }


def following(
    args: argparse.Namespace, model: tb.BilevelModel, data: Data
) -> dict[str, float]:
    """Scores of the W that follows the poisons, instead of one trained from scratch."""
    made = scores(args, model.lower, data._replace(official=None))
    return {name: made[name] for name in ATTACKS[args.attack]}


# Results.


def draw_poisons(path: pathlib.Path, start: images.Part, pixels: np.ndarray) -> None:
    """Draw up to 24 poisons, each before and after."""
    count = min(24, len(pixels))
    pairs = np.stack([start.images[:count], pixels[:count]], axis=1)
    captions = [
        text
        for label in start.labels[:count]
        for text in (f"before, as {label}", "after")
    ]
    side = round(pixels.shape[1] ** 0.5)
    common.draw_images(
        path,
        pairs.reshape(-1, side, side),
        captions,
        "Poisons and the labels that they carry",
        columns=8,
    )


def draw_curves(run: common.Run, args: argparse.Namespace) -> None:
    found = {name.replace("_", " "): name for name in ATTACKS[args.attack]}
    panels = [
        common.Panel({"": "upper_loss"}, "f of the classifier that follows"),
        common.Panel(found, "the same classifier", "percent"),
    ]
    title = f"{args.attack}, {args.method}"
    common.plot_columns(run, panels, title, ("step", "outer step"))


def table(
    args: argparse.Namespace, summaries: list[dict]
) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the trials, per number of poisons."""
    made: dict[str, dict[str, float]] = {}
    for count in dict.fromkeys(summary["poisons"] for summary in summaries):
        runs = [summary for summary in summaries if summary["poisons"] == count]
        made[str(count)] = {}
        for state in SCORES:
            for name in ATTACKS[args.attack]:
                values = [run[state][name] for run in runs]
                made[str(count)][f"{state}_{name}"] = float(np.mean(values))
                made[str(count)][f"{state}_{name}_std"] = float(np.std(values))
    return made


def print_table(args: argparse.Namespace, rows: dict[str, dict[str, float]]) -> None:
    name = ATTACKS[args.attack][-1]
    print(f"{name}, percent\n{'poisons':8s}" + "".join(f"{s:>18s}" for s in SCORES))
    for count, row in rows.items():
        cells = (
            f"{row[f'{s}_{name}']:.2f} +- {row[f'{s}_{name}_std']:.2f}" for s in SCORES
        )
        print(f"{count:8s}" + "".join(f"{cell:>18s}" for cell in cells))


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    with common.one_line_errors(__file__):
        files = load_files(args)
        jobs = [
            (count, args.seed + trial)
            for count in args.poisons
            for trial in range(args.trials)
        ]
        # The first job's data are sampled before anything is written.
        draw_data(args, files, *jobs[0])
        run = common.begin(args, common.settings(args))
    train = trainer(args)

    def one(own: argparse.Namespace, run: common.Run) -> dict:
        data = draw_data(own, files, own.poisons[0], own.seed)
        return attack(own, run, data, own.seed, train)

    if len(jobs) == 1:
        summary = run.summary() or one(args, run)
        run.summarise(summary)
        print_table(args, table(args, [summary]))
        return summary
    parts = {
        f"poisons-{count}-seed-{seed}": argparse.Namespace(
            **vars(args) | {"poisons": [count], "seed": seed, "trials": 1}
        )
        for count, seed in jobs
    }
    done, failed = common.sweep(run, parts, common.in_folder(one))
    summaries = list(done.values())
    rows = table(args, summaries)
    print_table(args, rows)
    made = {"by_poisons": rows, "runs": summaries}
    return common.concluded(run, made, failed)


if __name__ == "__main__":
    main()
