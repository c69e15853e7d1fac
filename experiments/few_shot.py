"""Few-shot learning: many small tasks teach a good starting point for new ones.

    python experiments/few_shot.py --out runs/few-shot
    python experiments/few_shot.py --dataset omniglot --method iaptt-gm --ways 5 \\
        --shots 1 --seconds 1800 --out runs/omniglot-5w1s

A task has `ways` classes, with `shots` support images each and some query images. The
upper variables are shared by all tasks; each task adapts the lower variables on its
support images. f is the mean cross-entropy on the query images, g that on the support
images; losses are averaged over the tasks of a meta-batch.

| method     | x (shared)           | y (per task), start  | hypergradient             |
|------------|----------------------|----------------------|---------------------------|
| maml       | start of all weights | all weights, x       | through all steps         |
| fomaml     | start of all weights | all weights, x       | steps taken as constant   |
| meta-sgd   | start and step sizes | all weights, x       | through all steps         |
| imaml      | start of all weights | all weights, x       | implicit, proximal g      |
| anil       | features, head start | head, learned        | through all steps         |
| itd-bio    | features             | head, fixed          | through all steps         |
| fo-itd-bio | features             | head, new every step | steps taken as constant   |
| rhg        | features             | head, fixed          | through all steps         |
| t-rhg      | features             | head, fixed          | through the last steps    |
| bda        | features             | head, fixed          | through aggregated steps  |
| iaptt-gm   | features, head start | head, learned        | to each task's largest f  |
| approxgrad | features             | head, new every step | implicit, Adam on A'A v   |
| penalty    | features             | head, new every step | augmented Lagrangian      |

Every method has the settings and network of its paper for the data sets used there, and
our choice for others: Ji, Yang, Liang (2021), arXiv:2010.07962 (maml to fo-itd-bio);
Liu, Liu, Zeng, Zhang (2021), arXiv:2110.00455 (rhg to iaptt-gm); Mehra and Hamm (2021),
arXiv:1911.03432 (approxgrad and penalty); Rajeswaran, Finn, Kakade, Levine (2019),
arXiv:1909.04630 (imaml); Li, Zhou, Chen, Li (2017), arXiv:1707.09835 (meta-sgd).

All networks normalise by the statistics of their input, also at test time, so every
accuracy here is transductive. `glyphs` is generated from a seed and needs no files. The
upper variables with the best accuracy on validation classes are tested:
`test_accuracy` is a mean over tasks of test classes, `test_accuracy_ci95` half the
width of its 95 percent interval.
"""

import argparse
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import common
import keras
import numpy as np
import tensorflow as tf
from common import networks
from settings.few_shot import (
    FOLLOWERS,
    FRESH,
    LEARNED,
    WHOLE,
    add_flags,
    completed,
)

import tfbilevel as tb
from data_prep import (
    classes,
    fc100,
    glyphs,
    mini_imagenet,
    omniglot,
    tiered_imagenet,
)
from data_prep.episodes import episodes


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.Parser(description=__doc__)
    add_flags(parser)
    return completed(parser, parser.parse_args(argv))


# Data.


def load_splits(args: argparse.Namespace) -> dict[str, classes.Classes]:
    """Classes for training, validation and testing."""
    name, folder = args.dataset, args.data_dir
    if name == "glyphs":
        splits = glyphs.load()
    elif args.data_file:
        splits = classes.load(args.data_file, name)
    elif name == "omniglot":
        splits = omniglot.load(folder, args.split, args.download)
    elif name in ("fc100", "cifar-fs"):
        splits = fc100.load(name.replace("-", "_"), folder, args.download)
    else:
        if folder is None:
            raise ValueError(
                f"--dataset {name} needs --data-dir, its files' folder, or --data-file"
            )
        module = mini_imagenet if name == "mini-imagenet" else tiered_imagenet
        splits = module.load(folder)
    if args.rotations:
        splits = {split: classes.with_rotations(some) for split, some in splits.items()}
    return splits


def draw(
    args: argparse.Namespace, some: classes.Classes, seed: int, first: int = 0
) -> tf.data.Dataset:
    """Endless meta-batches of the split, starting with number `first`."""
    counts = (args.ways, args.shots, args.queries, args.tasks)
    return episodes(some, *counts, seed=seed, first=first)


# The bilevel problem.


def build_blocks(args: argparse.Namespace, make: networks.Initializers) -> list:
    if args.net in ("resnet12", "residual"):
        whole = {"resnet12": networks.resnet12, "residual": networks.residual_encoder}
        return whole[args.net](make)
    return {
        "norm-relu-pool": networks.norm_relu_pool_conv4,
        "pool-norm-relu": networks.pool_norm_relu_conv4,
        "relu-pool-norm": networks.relu_pool_norm_conv4,
        "shifted": networks.shifted_conv4,
    }[args.net](args.filters, make)


def build_networks(
    args: argparse.Namespace, shape: tuple[int, ...]
) -> tuple[keras.Model, keras.Model]:
    """The shared features and the head that each task adapts."""
    make = networks.Initializers(args.seed)
    blocks = build_blocks(args, make)
    moved = args.head_blocks if args.head == "blocks" else 0
    last: networks.Block = []
    if args.head != "conv" and not moved:
        last = [keras.layers.Flatten()]
    encoder = networks.sequential(
        [*blocks[: len(blocks) - moved], last], shape, "features"
    )
    between = tuple(encoder.output_shape[1:])
    own: list[networks.Block] = blocks[len(blocks) - moved :] if moved else []
    if args.head == "conv":
        own = [networks.softplus_block(args.filters or 32, make)]
    if args.head == "cosine":
        end: networks.Block = [networks.CosineHead(args.ways, seed=args.seed)]
    else:
        width = networks.sequential([*own, [keras.layers.Flatten()]], between, "width")
        kind = "uniform"
        if args.method == "imaml":
            kind = "zero"
        elif args.method in FOLLOWERS:
            kind = "glorot" if args.net == "resnet12" else "small"
        elif args.method in WHOLE and args.dataset.endswith("imagenet"):
            kind = "glorot"
        features = width.output_shape[-1]
        end = networks.linear_head(args.ways, features, make, kind)
    return encoder, networks.sequential([*own, end], between, "head")


class Start(keras.layers.Layer):
    """The start of all weights and, for meta-sgd, a step size per entry."""

    def __init__(self, network: keras.Model, rate: float | None):
        super().__init__(name="start")
        self.network = network
        self.rates = [] if rate is None else [
            self.add_weight(
                name=f"rate_{number}",
                shape=variable.shape,
                initializer=keras.initializers.Constant(rate),
            )
            for number, variable in enumerate(network.trainable_variables)
        ]  # fmt: skip
        self.built = True

    def places(self) -> list[int]:
        """The positions of the rates among all variables."""
        numbers = {id(v): n for n, v in enumerate(self.trainable_variables)}
        return [numbers[id(rate)] for rate in self.rates]


def fresh_heads(args: argparse.Namespace, head: keras.Model, tasks: int) -> Callable:
    """Separate new heads for every task at every outer step."""
    kernel, dtype = head.trainable_variables[0].shape, head.trainable_variables[0].dtype
    edge = kernel[0] ** -0.5

    def start(step: tf.Tensor) -> list[tf.Tensor]:
        key = tf.stack([tf.constant(args.seed, tf.int64), tf.cast(step, tf.int64)])
        keys = tf.random.experimental.stateless_split(key, 2)
        if args.head == "cosine":
            drawn = tf.random.stateless_normal(
                [tasks, *kernel], keys[0], stddev=0.01, dtype=dtype
            )
            return [drawn, tf.fill([tasks, args.ways], tf.constant(1e-3, dtype))]
        shapes = [tasks, *kernel], [tasks, args.ways]
        return [
            tf.random.stateless_uniform(shape, key, -edge, edge, dtype)
            for shape, key in zip(shapes, tf.unstack(keys), strict=True)
        ]

    return start


def inner_optimizer(args: argparse.Namespace) -> keras.optimizers.Optimizer:
    """The optimizer of the inner steps."""
    if args.method in ("approxgrad", "penalty"):
        return common.adam(args.lower_lr)
    if args.method == "meta-sgd":
        return keras.optimizers.SGD(1.0)
    return keras.optimizers.SGD(args.inner_lr)


def learned_rates(args: argparse.Namespace, model: tb.BilevelModel) -> Any:
    """meta-sgd's step sizes; `None` for other methods."""
    if args.method != "meta-sgd":
        return None
    places = model.upper.places()
    return lambda upper: [upper.trainable_variables[place] for place in places]


def build_method(
    args: argparse.Namespace, model: tb.BilevelModel, fresh: Callable | None
) -> tb.Method:
    """The method, built from the library's classes."""
    if args.method == "penalty":
        return tb.AugmentedLagrangian(
            inner_optimizer(args),
            args.inner_steps,
            # The published condition uses the mean over all tasks, whose square is
            # smaller by this factor than the mean of the tasks' squares, used here.
            weight=args.weight / args.tasks,
            lower_weight=args.lower_weight,
            atol=args.tolerance,
            initial_multiplier=args.multiplier,
            schedule=tb.PenaltySchedule(
                # For the norm; the published test squares it.
                tolerance_decay=0.9**0.5,
                rate_decay=0.99,
            ),
            start=fresh or "warm",
            # Every outer step has different tasks.
            optimizer_state="reset",
            multiplier_state="reset",
        )
    decay = args.final_lr and tb.CosineDecay(
        args.inner_lr, args.final_lr, args.outer_steps
    )
    inner = tb.InnerSolver(
        inner_optimizer(args),
        args.inner_steps,
        start=fresh or "warm",
        learning_rate=decay or None,
        learned_rate=None if decay else learned_rates(args, model),
    )
    if args.method == "imaml":
        return tb.Implicit(inner, tb.ConjugateGradient(args.solver_steps))
    if args.method == "approxgrad":
        solver = tb.GradientSolver(
            common.adam(args.solver_lr),
            args.inner_steps,
            "residual",
            warm_start=False,
            rtol=0.0,
            damping=args.damping * args.tasks,  # likewise for the mean over all tasks
        )
        return tb.Implicit(inner, solver)
    if args.method in ("fomaml", "fo-itd-bio"):
        return tb.Unroll(inner, first_order=True)
    if args.method == "t-rhg":
        return tb.Unroll(inner, last=args.last)
    if args.method == "bda":
        constant = args.bda_rule == "bda-repo"
        rule = tb.Aggregation(args.alpha, args.alpha_decay, constant_lower=constant)
        return tb.Unroll(inner, aggregate=rule)
    if args.method == "iaptt-gm":
        return tb.Unroll(inner, end="pessimistic")
    return tb.Unroll(inner)


def build_model(args: argparse.Namespace, shape: tuple[int, ...]) -> tb.BilevelModel:
    encoder, head = build_networks(args, shape)
    if args.method not in WHOLE:
        return build_head_model(args, encoder, head)
    lower = keras.Sequential([keras.Input(shape), encoder, head])
    start = keras.Sequential([keras.Input(shape), *build_networks(args, shape)])
    start.set_weights(lower.get_weights())
    rate = args.inner_lr if args.method == "meta-sgd" else None

    def loss(upper: Start, lower: keras.Model, batch: tuple) -> tf.Tensor:
        return mean_loss(lower, batch)

    def lower_loss(upper: Start, lower: keras.Model, batch: tuple) -> tf.Tensor:
        begun = upper.network.trainable_variables
        value = mean_loss(lower, batch) + regulariser(args, lower, begun)
        if args.proximal is not None:
            value += 0.5 * args.proximal * squared_distance(lower, begun)
        return value

    model = tb.BilevelModel(
        Start(start, rate),
        lower,
        loss,
        lower_loss,
        lower_start=lambda upper: upper.network.trainable_variables,
        tasks=args.tasks,
    )
    compile_model(args, model, None)
    return model


def build_head_model(
    args: argparse.Namespace, encoder: keras.Model, head: keras.Model
) -> tb.BilevelModel:
    together = args.method in ("anil", "itd-bio", "fo-itd-bio")

    def prepare(encoder: keras.Model, batches: tb.Batches) -> tb.Batches:
        (queries, answers), (supports, labels) = batches
        if together:  # a task's images share their normalisation statistics
            count = queries.shape[0]
            both = encoder(tf.concat([queries, supports], axis=0))
            features = both[:count], both[count:]
        else:
            features = encoder(queries), encoder(supports)
        return tb.Batches(upper=(features[0], answers), lower=(features[1], labels))

    def lower_loss(upper: Any, lower: keras.Model, batch: tuple) -> tf.Tensor:
        return mean_loss(lower, batch) + regulariser(args, lower, fixed)

    fixed = [tf.constant(v) for v in head.get_weights()]
    model = tb.BilevelModel(
        encoder,
        head,
        lambda upper, lower, batch: mean_loss(lower, batch),
        lower_loss,
        lower_start="learned" if args.method in LEARNED else None,
        prepare=prepare,
        tasks=args.tasks,
    )
    if args.method in LEARNED:
        fixed = model.start.trainable_variables
    fresh = fresh_heads(args, head, args.tasks) if args.method in FRESH else None
    compile_model(args, model, fresh)
    return model


def compile_model(
    args: argparse.Namespace, model: tb.BilevelModel, fresh: Callable | None
) -> None:
    model.compile(
        build_method(args, model, fresh),
        common.adam(args.upper_lr),
        start_optimizer=args.start_lr and common.adam(args.start_lr),
        jit_compile=common.JIT[args.jit],
    )


def mean_loss(network: keras.Model, batch: tuple) -> tf.Tensor:
    images, labels = batch
    return tf.reduce_mean(tb.sparse_cross_entropy(network(images), labels))


def squared_distance(network: keras.Model, start: list) -> tf.Tensor:
    pairs = zip(network.trainable_variables, start, strict=True)
    return tf.add_n([tf.reduce_sum(tf.square(y - z)) for y, z in pairs])


def regulariser(args: argparse.Namespace, network: keras.Model, start: list) -> Any:
    """The lower loss's regulariser: distance to the start or nonconvex quasi-norm."""
    if args.regulariser == "none":
        return 0.0
    if args.regulariser == "distance":
        return args.regularisation * squared_distance(network, start)
    terms = []
    for y in map(tf.convert_to_tensor, network.trainable_variables):
        size = tf.reduce_sum(tf.square(y))
        least = args.quasi_norm_epsilon**2 * y.shape.num_elements()
        if args.regulariser == "quasi-norm-published":  # of norms instead of squares
            above = size > 0  # |0| has no derivative; 0 is used
            size = tf.where(above, tf.sqrt(tf.where(above, size, 1)), 0)
            least = least**0.5
        terms.append((size + least) ** (args.quasi_norm_power / 2))
    return args.regularisation * tf.add_n(terms)


# Evaluation.


def test_solver(
    args: argparse.Namespace, model: tb.BilevelModel, number: tf.Variable
) -> tb.InnerSolver:
    """The inner solver for new tasks in the meta-batch with this number."""
    inversion_free = args.method in ("approxgrad", "penalty")
    kind = common.adam if inversion_free else keras.optimizers.SGD
    rate = 1.0 if args.method == "meta-sgd" else args.test_lr
    start: Any = "warm"
    if args.method in FRESH:
        fresh = fresh_heads(args, model.lower, args.tasks)

        def drawn(step: tf.Tensor) -> list[tf.Tensor]:
            return fresh(-1 - number)  # training uses numbers from 0

        start = drawn
    return tb.InnerSolver(
        kind(rate),
        args.test_steps,
        start=start,
        learned_rate=learned_rates(args, model),
    )


class Judge:
    """Evaluates the model on a fixed set of tasks of one split."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: tb.BilevelModel,
        some: classes.Classes,
        count: int,
        seed: int,
    ):
        self.count, self.calls = count, -(-count // args.tasks)
        self.data = draw(args, some, seed).take(self.calls)
        self.number = tf.Variable(0, trainable=False, dtype=tf.int64)
        solver = test_solver(args, model, self.number)

        def predictions(upper: Any, lower: keras.Model, batch: tb.Batches) -> Any:
            return tf.argmax(lower(batch.upper[0]), axis=-1, output_type=tf.int32)

        self._predict = tf.function(
            lambda batches: model.adapt(batches, solver, predictions), autograph=False
        )

    def predicted(self, number: int, batch: tb.Batches) -> np.ndarray:
        """Predicted classes of all query images; fresh heads differ by batch number."""
        self.number.assign(number)
        return self._predict(batch).numpy()

    def accuracies(self, name: str | None = None) -> np.ndarray:
        """The accuracy on every task's query images in percent; with a name, it shows
        the progress."""
        progress = name and common.Progress(name, self.calls, "meta-batches")
        parts = []
        for number, batch in enumerate(self.data):
            right = self.predicted(number, batch) == batch.upper[1]
            parts.append(100 * np.mean(right, axis=1))
            if progress:
                progress.update(number + 1)
        return np.concatenate(parts)[: self.count]


def interval(accuracies: np.ndarray) -> float:
    """Half the width of the mean's 95 percent confidence interval."""
    return float(1.96 * accuracies.std(ddof=1) / np.sqrt(len(accuracies)))


class Best:
    """Saves the upper variables with the best validation accuracy, for resuming too."""

    def __init__(self, run: common.Run, model: tb.BilevelModel):
        self.run, self.model = run, model
        self.path = run.out / "best.weights.h5"

    def offer(self, accuracy: float) -> None:
        rows = self.run.rows()
        before = [float(row["validation_accuracy"]) for row in rows]
        if not self.path.exists() or accuracy > max(before, default=-1.0):
            partial = self.run.out / "partial.weights.h5"
            self.model.save_weights(partial)
            os.replace(partial, self.path)


# One run.


def train(args: argparse.Namespace, run: common.Run, splits: dict) -> dict:
    keras.utils.set_random_seed(args.seed)
    model = build_model(args, splits["train"].images.shape[1:])
    judge = Judge(args, model, splits["validation"], args.validation_tasks, 1)
    best = Best(run, model)

    def evaluate() -> dict[str, float]:
        accuracies = judge.accuracies()
        accuracy = float(accuracies.mean())
        best.offer(accuracy)
        return {
            "validation_accuracy": accuracy,
            "validation_accuracy_ci95": interval(accuracies),
        }

    common.train(
        model,
        lambda first: draw(args, splits["train"], 1000 + args.seed, first),
        run,
        evaluate,
        every=args.eval_every,
        epoch=args.eval_every,
        steps=args.outer_steps,
        seconds=args.seconds,
    )
    made = model.outer_step
    parameters = {
        "upper_parameters": int(sum(np.prod(v.shape) for v in model.upper_variables)),
        "lower_parameters": int(
            sum(np.prod(v.shape) for v in model.lower.trainable_variables)
        ),
    }
    test = Judge(args, model, splits["test"], args.test_tasks, 2)
    last = test.accuracies(f"{run.out}, testing the last x")
    model.load_weights(str(best.path))
    accuracies = test.accuracies(f"{run.out}, testing the best x")
    draw_curves(run, args)
    draw_confusion(run.out / "confusion.png", args, test)
    rows = run.rows()
    return {
        **about(args),
        **parameters,
        "outer_steps": made,
        "best_validation_step": model.outer_step,
        "best_validation_accuracy": max(run.column("validation_accuracy")),
        "seconds": float(rows[-1]["seconds"]),
        "seconds_per_outer_step": float(rows[-1]["seconds"]) / max(made, 1),
        "test_tasks": args.test_tasks,
        "test_accuracy": float(accuracies.mean()),
        "test_accuracy_ci95": interval(accuracies),
        "last_test_accuracy": float(last.mean()),
        "batch_statistics": "of each set of images: transductive",
    }


def about(args: argparse.Namespace) -> dict:
    names = ("method", "dataset", "net", "head", "ways", "shots", "queries", "seed")
    return {name: getattr(args, name) for name in names}


def about_tasks(args: argparse.Namespace) -> str:
    return f"{args.method}, {args.ways}-way {args.shots}-shot {args.dataset}"


def draw_curves(run: common.Run, args: argparse.Namespace) -> None:
    accuracy, losses = (
        {"": "validation_accuracy"},
        {
            "f, query": "upper_loss",
            "g, support": "lower_loss",
        },
    )
    margin = "validation_accuracy_ci95"
    panels = [
        common.Panel(accuracy, "accuracy on validation classes", "percent", margin),
        common.Panel(losses, "losses on training tasks", "loss"),
    ]
    common.plot_columns(run, panels, about_tasks(args))


def draw_confusion(path: pathlib.Path, args: argparse.Namespace, judge: Judge) -> None:
    """Draw three test tasks: a support image per class, and a confusion matrix."""
    batch = next(iter(judge.data))
    predicted = judge.predicted(0, batch)
    count = min(3, args.tasks)
    with common.figure(path, (4 * count, 5)) as page:
        ratios = {"height_ratios": [1, 3]}
        grid = page.subplots(2, count, squeeze=False, gridspec_kw=ratios)
        for task in range(count):
            supports = batch.lower[0][task].numpy()[:: args.shots]
            strip = np.concatenate(list(supports), axis=1)
            grid[0, task].imshow(np.squeeze(strip), cmap="gray", vmin=0, vmax=1)
            grid[0, task].set_axis_off()
            grid[0, task].set_title(f"test task {task + 1}: its classes", fontsize=9)
            matrix = np.zeros((args.ways, args.ways), int)
            np.add.at(matrix, (batch.upper[1][task].numpy(), predicted[task]), 1)
            common.draw_matrix(grid[1, task], matrix, args.queries)
        page.suptitle(f"{about_tasks(args)}: query images of each class")


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    with common.one_line_errors(__file__):
        splits = load_splits(args)
        for some in splits.values():
            draw(args, some, 0)  # too many ways or shots raise an error before any work
        run = common.begin(args, common.settings(args))
    summary = common.trials(args, run, functools.partial(train, splits=splits))
    spread = "test_accuracy_ci95" if args.trials == 1 else "test_accuracy_std"
    print(
        f"{about_tasks(args)}: "
        f"{summary['test_accuracy']:.2f} +- {summary[spread]:.2f} "
        f"percent on {args.test_tasks} test tasks (transductive), "
        f"{summary['outer_steps']:.0f} meta-iterations, {summary['seconds']:.0f} s"
        + (f"; means of {args.trials} runs, +- over them" if args.trials > 1 else "")
    )
    print(run.files())
    return summary


if __name__ == "__main__":
    main()
