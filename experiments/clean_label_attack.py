"""Clean-label poisoning: one correctly labelled training image flips one test image.

    python experiments/clean_label_attack.py --out runs/clean-label
    python experiments/clean_label_attack.py --data-file dogfish.npz \\
        --features-file dogfish.h5 --weights imagenet --out runs/dogfish

A classifier is a linear head on the features phi of a frozen network. For a target, a
test image t of class c, the poison starts as the nearest training image b of the other
class and keeps that label. It is then modified until a head trained with it assigns t
to that class. Upper variables: the poison u. Lower variables: the head.

    f = cross-entropy of the head on phi(t) with the other class
        + |phi(u) - phi(t)|^2 + beta |u - b|^2
    g = mean cross-entropy of the head on the clean training features and on phi(u)

| method            | the poison                                                   |
|-------------------|--------------------------------------------------------------|
| penalty           | Adam on the augmented Lagrangian, 10 head steps per update   |
| feature-collision | Adam on f without its first term: not a bilevel problem      |

An attack succeeds if most of several heads, trained from scratch with the poison,
assign the target to the other class. Reproduces the clean-label attack of Mehra and
Hamm (2021), arXiv:1911.03432; the settings of the published code are the defaults.

Without --data-file the images are two classes of --dataset, and phi is a small
convolutional network that this script trains on the other classes. With --data-file
they are an .npz file in the published layout, and phi is Inception-v3 or --model; its
features are computed in advance by data_prep/dogfish_features.py, or by this script.
"""

import argparse
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import common
import keras
import numpy as np
import tensorflow as tf
from settings.clean_label_attack import add_flags, completed

import tfbilevel as tb
from data_prep import dogfish_features, hdf5, images
from data_prep.dogfish_features import Pictures

PARTS = dogfish_features.PARTS


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.Parser(description=__doc__)
    add_flags(parser)
    return completed(parser, parser.parse_args(argv))


# Images, features.


def load_files(args: argparse.Namespace) -> tuple[images.Part, images.Part]:
    """The training and the test file, with pixels in [-1, 1]."""
    if args.dataset == "digits":
        whole = images.load_digits()
        cuts = slice(3500), slice(3500, None)
        files = [images.Part(whole.images[cut], whole.labels[cut]) for cut in cuts]
    else:
        files = [
            images.load_file(args.dataset, split, args.data_dir, args.download)
            for split in PARTS
        ]
    train, test = (
        images.Part(part.images.astype(np.float32) / 127.5 - 1, part.labels)
        for part in files
    )
    return train, test


def choose_images(args: argparse.Namespace) -> dict[str, images.Part]:
    """Images of the two classes, relabelled 0 and 1, in a fixed order."""
    parts = {}
    for part, file in zip(PARTS, load_files(args), strict=True):
        size, chosen = getattr(args, f"{part}_size"), []
        for digit in args.classes:
            own = np.flatnonzero(file.labels == digit)[:size]
            if len(own) < size:
                raise ValueError(
                    f"--{part}-size must not exceed the images of a class, got {size} "
                    f"where there are {len(own)} of class {digit}"
                )
            chosen.append(own)
        order = np.random.default_rng(0).permutation(np.concatenate(chosen))
        labels = (file.labels[order] == args.classes[1]).astype(np.int64)
        require_targets(args, part, labels)
        parts[part] = images.Part(file.images[order], labels)
    return parts


def train_feature_model(
    args: argparse.Namespace, file: images.Part, path: pathlib.Path
) -> None:
    """Train a convolutional network on all other classes (ImageNet's features do not
    distinguish dogs and fish much either); save its last hidden layer."""
    others = ~np.isin(file.labels, args.classes)
    pixels, labels = file.images[others], file.labels[others]
    keras.utils.set_random_seed(args.seed)
    inputs = keras.Input(pixels.shape[1:])
    hidden = inputs
    for filters in (32, 64):
        hidden = keras.layers.Conv2D(filters, 3, activation="relu")(hidden)
        hidden = keras.layers.MaxPooling2D()(hidden)
    # As wide as Inception's. More features than training images are needed for a single
    # image to change the head.
    features = keras.layers.Dense(2048, "relu")(keras.layers.Flatten()(hidden))
    network = keras.Model(inputs, keras.layers.Dense(10)(features))
    network.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    shown = common.FitProgress(f"{path.parent}, training of the feature network")
    network.fit(pixels, labels, 128, args.feature_epochs, callbacks=[shown], verbose=0)
    partial = path.with_name("partial.keras")
    keras.Model(inputs, features).save(partial)
    os.replace(partial, path)


def prepare_pictures(
    args: argparse.Namespace,
    out: pathlib.Path,
    chosen: dict[str, images.Part],
    extractor: keras.Model | None,
) -> tuple[dict[str, Pictures], keras.Model]:
    """Images and features of both parts, and the feature network."""
    data, model, features = args.data_file, args.model, args.features_file
    if data is None:
        data, model = out / "images.npz", out / "feature_model.keras"
        if not model.exists():
            train_feature_model(args, load_files(args)[0], model)
        if not data.exists():
            dogfish_features.write_bundle(data, chosen)
    if features is None:
        features = out / "features.h5"
        if not features.exists():
            dogfish_features.prepare(data, features, args.weights, model)
    pictures = dogfish_features.load_pictures(data, features)
    if extractor is None:
        extractor = dogfish_features.build_extractor(args.weights, model)
    extractor.trainable = False
    some = pictures["train"].images[:4], pictures["train"].features[:4]
    dogfish_features.require_same(features, *some, extractor)
    return pictures, extractor


def require_targets(args: argparse.Namespace, part: str, labels: np.ndarray) -> None:
    """Raise unless there are two classes with as many images as the flags require."""
    if set(labels.tolist()) != {0, 1}:
        raise ValueError(
            f"Y_{part} of --data-file must hold the classes 0 and 1. Received: "
            f"{sorted(set(labels.tolist()))}"
        )
    least = int(np.bincount(labels.astype(int)).min())
    if part == "train" and args.poisons > least:
        raise ValueError(
            f"--poisons must be at most {least}, the training images of a class: each "
            f"starts from another one. Received: {args.poisons}"
        )
    if part == "test" and args.start >= len(labels):
        raise ValueError(
            f"--start must be below {len(labels)}, the number of test images. "
            f"Received: {args.start}"
        )


def extractor_of(args: argparse.Namespace) -> keras.Model:
    """The feature network for --data-file; raises errors before anything is written."""
    bundle = dogfish_features.Bundle(args.data_file)
    extractor = dogfish_features.build_extractor(args.weights, args.model)
    for part in PARTS:
        header = bundle.header(f"X_{part}")
        dogfish_features.require_images(header, extractor, args.data_file)
        require_targets(args, part, bundle.array(f"Y_{part}").ravel())
    if args.features_file is not None:
        dogfish_features.load(args.features_file)
        return extractor
    for part in PARTS:
        where = hdf5.slices(0, bundle.header(f"X_{part}").shape[0], 100)
        for some in bundle.pieces(f"X_{part}", where):
            dogfish_features.in_range(some, -1.0, 1.0)
    return extractor


# Heads.


def draw_heads(count: int, width: int, seed: list[int]) -> list[tf.Tensor]:
    """Linear heads side by side: kernels [count, width, 2] and biases [count, 1, 2]."""
    kernels = np.random.default_rng(seed).normal(0, 0.01, (count, width, 2))
    return [tf.constant(kernels, tf.float32), tf.zeros([count, 1, 2])]


def logits_of(heads: list, features: Any) -> tf.Tensor:
    """[count, n, 2]"""
    kernels, biases = heads
    return tf.einsum("nd,sdc->snc", features, kernels) + biases


def mean_loss(heads: list, features: Any, labels: Any) -> tf.Tensor:
    """The mean over the points, summed over the heads, which are independent."""
    logits = logits_of(heads, features)
    count = tf.shape(logits)[0]
    labels = tf.tile(labels[None], [count, 1])
    losses = tb.sparse_cross_entropy(logits, labels)
    return tf.reduce_sum(tf.reduce_mean(losses, axis=1))


def head_trainer(args: argparse.Namespace) -> Callable:
    """A function ((features, labels), initial heads) -> trained heads."""
    optimizer, jit = keras.optimizers.RMSprop(args.train_lr), args.jit == "on"
    return common.trainer(
        lambda heads, batch: mean_loss(heads, *batch), optimizer, args.train_steps, jit
    )


# The attack.


class Attack:
    """Computes poisons; compiled once for all targets.

    Args:
        args: the flags.
        clean: the clean training images and features.
        extractor: phi.
    """

    def __init__(
        self, args: argparse.Namespace, clean: Pictures, extractor: keras.Model
    ):
        self.args, self.clean = args, clean
        self.extractor = extractor
        least, most = float(clean.images.min()), float(clean.images.max())

        def box(u: tf.Tensor) -> tf.Tensor:
            return tf.clip_by_value(u, least, most)

        def collision(u: tf.Tensor, features: tf.Tensor, batch: dict) -> tf.Tensor:
            apart = tf.reduce_sum((features - batch["target"]) ** 2)
            return apart + args.beta * tf.reduce_sum((u - batch["base"]) ** 2)

        def prepare(u: tf.Tensor, batches: tb.Batches) -> tb.Batches:
            features = extractor(u, training=False)
            return batches._replace(
                upper={**batches.upper, "poison": features},
                lower={**batches.lower, "poison": features},
            )

        def upper_loss(u: tf.Tensor, heads: list, batch: dict) -> tf.Tensor:
            wanted = mean_loss(heads, batch["target"], batch["wanted"])
            return wanted + collision(u, batch["poison"], batch)

        def lower_loss(u: tf.Tensor, heads: list, batch: dict) -> tf.Tensor:
            features = tf.concat([batch["features"], batch["poison"]], axis=0)
            labels = tf.concat([batch["labels"], batch["poison_labels"]], axis=0)
            return mean_loss(heads, features, labels)

        self.problem = tb.Problem(
            upper_loss, lower_loss, project_upper=box, prepare=prepare
        )
        self.last: Any = None  # the state after the last target
        self.method = tb.AugmentedLagrangian(
            common.adam(args.lower_lr),
            args.inner_steps,
            weight=args.weight,
            lower_weight=args.lower_weight,
            atol=args.tolerance,
            # The published test compares fourth powers, see data_denoising.py.
            schedule=tb.PenaltySchedule(tolerance_decay=0.9**0.5),
        )
        self.optimizer = common.adam(args.upper_lr)
        # Feature collision has one level: an inner solver moves the poison.
        self._collide = common.trainer(
            lambda u, batch: collision(u, extractor(u, training=False), batch),
            self.optimizer,
            args.outer_steps,
            jit=False,
            project=box,
        )

    def base_of(self, target: np.ndarray, label: int) -> np.ndarray:
        """The numbers of the nearest training images of the other class."""
        others = np.flatnonzero(self.clean.labels != label)
        distances = np.linalg.norm(self.clean.features[others] - target, axis=1)
        order = others[np.argsort(distances, kind="stable")]
        return order[: self.args.poisons]

    def poison(self, target: np.ndarray, label: int, number: int) -> np.ndarray:
        """The poison images for a target, [poisons, height, width, channels]."""
        base = self.base_of(target, label)
        upper = {
            "target": tf.constant(target[None]),
            "wanted": tf.constant([1 - label], tf.int32),
            "base": tf.constant(self.clean.images[base]),
        }
        if self.args.method == "feature-collision":
            return self._collide(upper, upper["base"]).numpy()
        lower = {
            "features": tf.constant(self.clean.features),
            "labels": tf.constant(self.clean.labels),
            "poison_labels": tf.constant(self.clean.labels[base]),
        }
        heads = draw_heads(1, len(target), [self.args.seed, 1, number])
        state = (
            self.method.init(self.problem, upper["base"], heads),
            tb.differentiable(self.optimizer).init(upper["base"]),
        )
        result = tb.minimize(
            self.problem,
            self.method,
            upper["base"],
            heads,
            self.optimizer,
            tb.Batches(upper, lower),
            self.args.outer_steps,
            state=state if self.last is None else self.last.at(state),
        )
        self.last = result.state  # with the compiled loop, which serves all targets
        return result.upper.numpy()


def run_attack(
    args: argparse.Namespace,
    run: common.Run,
    pictures: dict[str, Pictures],
    extractor: keras.Model,
) -> dict:
    """Attack one target after another, and log one row for each."""
    clean, test = pictures["train"], pictures["test"]
    train, attack = head_trainer(args), Attack(args, clean, extractor)
    labels = tf.constant(clean.labels)
    width = clean.features.shape[1]

    def ask(heads: list) -> np.ndarray:
        """Probabilities of the true class of every test image, [heads, n]."""
        likely = tf.nn.softmax(logits_of(heads, tf.constant(test.features))).numpy()
        return likely[:, np.arange(len(test.labels)), test.labels]

    fresh = draw_heads(args.retrain_seeds, width, [args.seed, 0])
    before = ask(train((tf.constant(clean.features), labels), fresh))
    read = np.flatnonzero((before > 0.5).all(axis=0))
    targets = read[read >= args.start][: args.max_targets]
    if not len(targets):
        remedy = "lower --start" if len(read) else "train them longer (--train-steps)"
        raise ValueError(
            "no test image from --start on is read correctly by every head: "
            f"{remedy}, in a new folder. Received: --start {args.start}"
        )
    folder = run.out / "poisons"
    folder.mkdir(exist_ok=True)
    seconds = run.rewind(len(test.labels))  # also drops a row cut short by a kill
    done = {int(row["target"]) for row in run.rows()}
    progress = common.Progress(run.out, len(targets), "targets")
    for number, target in enumerate(targets):
        if int(target) not in done:
            begun = time.perf_counter()
            row = attack_one(args, attack, train, ask, test, int(target), folder)
            seconds += time.perf_counter() - begun
            confidence = float(before[:, target].mean())
            place = {"step": number, "seconds": seconds}
            run.log({**place, "probability_before": confidence, **row})
        progress.update(number + 1)
    return summarise(args, run, before)


def attack_one(
    args: argparse.Namespace,
    attack: Attack,
    train: Callable,
    ask: Callable,
    test: Pictures,
    target: int,
    folder: pathlib.Path,
) -> dict[str, Any]:
    """Compute the poison, retrain heads with it, and evaluate them."""
    clean, label = attack.clean, int(test.labels[target])
    features = test.features[target]
    base = attack.base_of(features, label)
    poison = attack.poison(features, label, target)
    made = attack.extractor(poison, training=False).numpy()
    heads = train(
        (
            tf.constant(np.concatenate([clean.features, made])),
            tf.constant(np.concatenate([clean.labels, clean.labels[base]])),
        ),
        draw_heads(args.retrain_seeds, features.shape[0], [args.seed, 2, target]),
    )
    after = ask(heads)
    flipped = after[:, target] < 0.5
    difference = poison - clean.images[base]
    np.savez_compressed(
        folder / f"target-{target}.npz",
        target=test.images[target],
        base=clean.images[base],
        poison=poison,
    )
    return {
        "target": target,
        "label": label,
        "base": int(base[0]),
        "probability_after": float(after[:, target].mean()),
        "flipped_heads": int(flipped.sum()),
        "success": int(flipped.mean() > 0.5),
        "feature_distance_before": distance(clean.features[base] - features),
        "feature_distance": distance(made - features),
        "distortion": distance(difference),
        "largest_change": float(np.abs(difference).max()),
        "test_accuracy": 100 * float((after > 0.5).mean()),
    }


def distance(differences: np.ndarray) -> float:
    """The Euclidean norm, averaged over the poisons."""
    flat = differences.reshape(len(differences), -1)
    return float(np.linalg.norm(flat, axis=1).mean())


# Results.


def summarise(
    args: argparse.Namespace, run: common.Run, before: np.ndarray
) -> dict[str, Any]:
    success = np.array(run.column("success"))
    names = ("distortion", "feature_distance", "feature_distance_before",
             "test_accuracy", "probability_before", "probability_after")  # fmt: skip
    made: dict[str, Any] = {
        "method": args.method,
        "targets": len(success),
        "poisons": args.poisons,
        "seconds": run.column("seconds")[-1],
        "success_rate": 100 * float(success.mean()),
        "clean_test_accuracy": 100 * float((before > 0.5).mean()),
    }
    for name in names:
        made[name] = float(np.mean(run.column(name)))
    distortion = np.array(run.column("distortion"))
    won = success > 0
    made["distortion_of_successes"] = (
        float(distortion[won].mean()) if won.any() else None
    )
    return made


def draw_curve(run: common.Run, method: str) -> None:
    """Draw the share of targets that are flipped with at most a given distortion."""
    success, distortion = map(np.array, map(run.column, ("success", "distortion")))
    order = np.argsort(distortion)
    # Starts at zero, because a single target would not show as a line.
    share = 100 * np.cumsum([0, *success[order]]) / len(success)
    with common.figure(run.out / "distortion.png", (5.5, 4)) as page:
        axes = page.subplots()
        axes.step([0, *distortion[order]], share, where="post")
        axes.set(
            xlabel="|u - b|, Euclidean", ylabel="percent of all targets", ylim=(0, 100)
        )
        axes.set_title(f"{method}: flipped at this distortion or less")
        axes.grid(alpha=0.3)


def draw_attacks(run: common.Run) -> None:
    """Draw target, base, poison and the change, for up to eight attacks."""
    rows = sorted(run.rows(), key=lambda row: -int(row["success"]))[:8]
    pixels, captions, red = [], [], []
    for row in rows:
        with np.load(run.out / "poisons" / f"target-{row['target']}.npz") as kept:
            base, poison, target = kept["base"][0], kept["poison"][0], kept["target"]
        change = (poison - base) / 2
        four = [target, base, poison, change]
        pixels += [np.clip((image + 1) / 2, 0, 1) for image in four]
        outcome = "flipped" if int(row["success"]) else "not flipped"
        captions += [f"target: {outcome}", "base", "poison", "its change"]
        red += [not int(row["success"]), False, False, False]
    common.draw_images(
        run.out / "attacks.png",
        np.stack(pixels),
        captions,
        "The poison carries the label of its base",
        red,
        columns=8,
    )


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    with common.one_line_errors(__file__):
        chosen, extractor = {}, None
        if args.data_file is None:
            chosen = choose_images(args)
        else:
            extractor = extractor_of(args)
        pictures: dict[str, Pictures] = {}
        if args.features_file is not None:
            # Nothing is computed; errors appear before the folder is created.
            pictures, extractor = prepare_pictures(args, args.out, chosen, extractor)
        run = common.begin(args, common.settings(args))
        summary = run.summary()
        if summary is None:
            if not pictures:
                pictures, extractor = prepare_pictures(args, run.out, chosen, extractor)
            with common.one_line_nonfinite():
                summary = run_attack(args, run, pictures, extractor)
            run.summarise(summary)
    draw_curve(run, args.method)
    draw_attacks(run)
    for name, value in summary.items():
        shown = f"{value:.2f}" if isinstance(value, float) else value
        print(f"{name:28s}{shown}")
    print(run.files())
    return summary


if __name__ == "__main__":
    main()
