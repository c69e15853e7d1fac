"""Few-shot learning: from many small tasks, what the next one should start from.

    python experiments/few_shot.py --out runs/few-shot
    python experiments/few_shot.py --dataset omniglot --method iaptt-gm --ways 5 \\
        --shots 1 --seconds 1800 --out runs/omniglot-5w1s

A task has `ways` classes, `shots` support images of each and some query images. Upper
variables: what all tasks share. Lower variables: what each task adapts on its support
images. f is the mean cross-entropy on the query images, g the same on the support
images; losses are averaged over the tasks of a meta-batch.

| method     | x (shared)           | y (per task), start  | hypergradient             |
|------------|----------------------|----------------------|---------------------------|
| maml       | start of all weights | all weights, x       | through all steps         |
| fomaml     | start of all weights | all weights, x       | steps taken for constants |
| meta-sgd   | start and step sizes | all weights, x       | through all steps         |
| imaml      | start of all weights | all weights, x       | implicit, proximal g      |
| anil       | features, head start | head, learned        | through all steps         |
| itd-bio    | features             | head, fixed          | through all steps         |
| fo-itd-bio | features             | head, drawn anew     | steps taken for constants |
| rhg        | features             | head, fixed          | through all steps         |
| t-rhg      | features             | head, fixed          | through the last steps    |
| bda        | features             | head, fixed          | of aggregated steps       |
| iaptt-gm   | features, head start | head, learned        | up to each task's worst f |
| approxgrad | features             | head, drawn anew     | implicit, Adam on A'A v   |
| penalty    | features             | head, drawn anew     | augmented Lagrangian      |

Every method has its paper's settings and network for a data set that the paper used,
and ours elsewhere: Ji, Yang, Liang (2021), arXiv:2010.07962 (maml to fo-itd-bio); Liu,
Liu, Zeng, Zhang (2021), arXiv:2110.00455 (rhg to iaptt-gm); Mehra and Hamm (2021),
arXiv:1911.03432 (approxgrad and penalty); Rajeswaran, Finn, Kakade, Levine (2019),
arXiv:1909.04630 (imaml); Li, Zhou, Chen, Li (2017), arXiv:1707.09835 (meta-sgd).

All networks normalise by the statistics of the set they are given, at test time too:
every accuracy here is transductive. `glyphs`, drawn by a seeded generator, needs no
files. The upper variables of best accuracy on validation classes are the ones that are
tested: `test_accuracy` is a mean over tasks of test classes, `test_accuracy_ci95` half
the width of its 95 percent interval.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import common
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from common import networks

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

DATASETS = (
    "glyphs",
    "omniglot",
    "mini-imagenet",
    "tiered-imagenet",
    "fc100",
    "cifar-fs",
)
CHARACTERS = ("glyphs", "omniglot")
WHOLE = ("maml", "fomaml", "meta-sgd", "imaml")  # all weights are lower variables
FRESH = ("fo-itd-bio", "approxgrad", "penalty")  # heads are drawn anew
LEARNED = ("anil", "iaptt-gm")  # head starts are upper variables
FOLLOWERS = ("rhg", "t-rhg", "bda", "iaptt-gm")  # of the IAPTT-GM paper
METHODS = (
    *WHOLE,
    *("anil", "itd-bio", "fo-itd-bio"),
    *FOLLOWERS,
    *("approxgrad", "penalty"),
)
NETWORKS = (
    "norm-relu-pool",
    "pool-norm-relu",
    "relu-pool-norm",
    "shifted",
    "resnet12",
    "residual",
)
VECTORS = ("resnet12", "residual")  # networks without a feature map to convolve
HEADS = ("linear", "conv", "blocks", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(common.InversionFree):
    """A method's settings on a data set; `None` where it has no such knob.

    `inner_lr` is the rate of the inner steps, `final_lr` what its cosine decay ends at;
    approxgrad and penalty have `lower_lr` instead, of Adam.
    """

    network: str
    filters: int | None = 64
    head: str
    queries: int
    tasks: int
    outer_steps: int
    inner_lr: float | None = None
    final_lr: float | None = None
    start_lr: float | None = None
    last: int | None = None
    alpha: float | None = None
    alpha_decay: float | None = None
    bda_rule: str | None = None
    proximal: float | None = None
    cg_steps: int | None = None
    test_steps: int
    test_lr: float | None = None
    test_tasks: int


def stocbio(
    upper_lr: float, inner_lr: float, steps: int, outer_steps: int, **other: Any
) -> Settings:
    """Meta-learning of the stocBiO paper, and what follows it."""
    return Settings(
        **{
            "network": "norm-relu-pool",
            "head": "linear",
            "queries": 5,
            "tasks": 32,
            "upper_lr": upper_lr,
            "inner_lr": inner_lr,
            "inner_steps": steps,
            "outer_steps": outer_steps,
            "test_steps": steps,
            "test_lr": inner_lr,
            "test_tasks": 600,
            **other,
        }
    )


def imaml(proximal: float, steps: int, outer_steps: int, filters: int) -> Settings:
    """Of hypertorch's example; `outer_steps`, where it has no end: iMAML's paper."""
    return stocbio(
        1e-3,
        0.1,
        steps,
        outer_steps,
        proximal=proximal,
        cg_steps=5,
        tasks=16,
        queries=15,
        test_tasks=1000,
        network="relu-pool-norm",
        filters=filters,
    )


def iaptt(dataset: str, network: str | None, **other: Any) -> Settings:
    """Few-shot learning of the IAPTT-GM paper; head and rates for characters: ours."""
    images: dict[str, Any] = {
        "network": "pool-norm-relu",
        "filters": 32,
        "head": "linear" if network in VECTORS else "conv",
        "inner_lr": 0.01,
        "final_lr": 0.001,
        "test_lr": 0.1,
    }
    characters: dict[str, Any] = {
        "network": "relu-pool-norm",
        "filters": 64,
        "head": "cosine",
        "inner_lr": 0.4,
        "final_lr": 0.04,
        "test_lr": 0.4,
    }
    return Settings(
        **(characters if dataset in CHARACTERS else images),
        queries=15,
        tasks=4,
        upper_lr=1e-3,
        inner_steps=10,
        outer_steps=80_000,
        test_steps=10,
        test_tasks=1000,
        **other,
    )


def inversion_free(
    method: str, dataset: str, ways: int, shots: int, network: str | None
) -> Settings:
    """Few-shot learning of the penalty paper."""
    character, penalty = dataset in CHARACTERS, method == "penalty"
    rate = 1e-2 if character else 1e-3
    filters = 64 if character else 32  # 32: the paper's other network for images
    if character:
        tasks, outer_steps = (15, 10_000) if ways == 20 else (30, 5000)
    else:
        tasks = 4 if network == "shifted" else 2
        outer_steps = 10_001 if method == "approxgrad" and shots == 5 else 20_001
    own: dict[str, Any]
    if penalty:
        own = {
            "weight": 0.01,
            "lower_weight": 0.01,
            "tolerance": 0.01**0.5,
            "multiplier": 1e-4,
        }
    else:
        own = {"solver_lr": rate, "damping": 1e-3}
    return Settings(
        network="shifted" if character else "residual",
        filters=filters,
        head="cosine",
        queries=15,
        tasks=tasks,
        upper_lr=rate,
        lower_lr=rate,
        inner_steps=20,
        outer_steps=outer_steps,
        test_steps=100,
        test_lr=1e-3 if penalty else rate,
        test_tasks=600,
        **own,
    )


def published(
    method: str, dataset: str, ways: int, shots: int = 1, network: str | None = None
) -> Settings:
    """The method's own settings; ours where its paper has none for the data set."""
    if method in ("approxgrad", "penalty"):
        return inversion_free(method, dataset, ways, shots, network)
    if method in FOLLOWERS:
        own: dict[str, Any] = {
            "t-rhg": {"last": 5},
            "bda": {"alpha": 0.4, "alpha_decay": 0.9, "bda_rule": "aggregated"},
            "iaptt-gm": {"start_lr": 1e-3},
        }
        return iaptt(dataset, network, **own.get(method, {}))
    learned = {"test_lr": None} if method == "meta-sgd" else {}  # its rates
    if dataset in CHARACTERS:
        # MAML's own paper; head: ours.
        if method == "imaml":
            return imaml(2.0, 16, 20_000, filters=64)
        if method in WHOLE:
            few = {"inner_lr": 0.4, "steps": 1, "tasks": 32, "test_steps": 3}
            many = {"inner_lr": 0.1, "steps": 5, "tasks": 16}
            own = (many if ways >= 20 else few) | learned
            return stocbio(1e-3, outer_steps=60_000, **own)
        return stocbio(2e-3, 0.4, 5, 10_000, head="cosine", tasks=8)
    small = dataset in ("fc100", "cifar-fs")
    if method == "imaml":
        return imaml(0.5, 10, 60_000, filters=32)
    if method in WHOLE:
        if small:
            return stocbio(1e-3, 0.5, 3, 1200, **learned)
        return stocbio(3e-3, 0.01, 5, 1200, filters=32, **learned)
    if small:
        rate, outer_steps = (0.05, 1000) if method == "anil" else (0.1, 1500)
        return stocbio(1e-3, rate, 20, outer_steps)
    return stocbio(2e-3, 0.05, 10, 3000 if method == "fo-itd-bio" else 2000)


# Flags.


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.Parser(description=__doc__)
    add, above = parser.add_argument, common.positive
    add("--dataset", choices=DATASETS, default="glyphs")
    add(
        "--data-dir",
        type=pathlib.Path,
        help="folder of the data set's files, or of tensorflow-datasets",
    )
    add("--data-file", type=pathlib.Path, help=".npz made by its data_prep command")
    add("--split", choices=omniglot.RULES, help="of omniglot; default: vinyals")
    add(
        "--rotations",
        action=argparse.BooleanOptionalAction,
        help="turned images are classes of their own; default for characters",
    )
    add("--method", choices=METHODS, default="anil")
    add("--ways", type=above(int), default=5)
    add("--shots", type=above(int), default=1)
    add("--queries", type=above(int), help="query images of a class; by method")
    add("--tasks", type=above(int), help="of a meta-batch; by method")
    add("--outer-steps", type=above(int), help="meta-iterations; by method")
    add("--seconds", type=above(float), help="of training, after which to stop")
    add("--network", choices=NETWORKS, help="by method and data set")
    add("--filters", type=above(int), help="of a four-block network")
    add("--head", choices=HEADS, help="by method and data set")
    add("--head-blocks", type=above(int), help="--head blocks: how many; default 1")
    Settings.add_flags(parser, None)
    add("--inner-lr", type=above(float), help="of the inner steps; by method")
    add("--final-lr", type=above(float), help="rhg to iaptt-gm: of the inner steps")
    add("--start-lr", type=above(float), help="iaptt-gm: of the head's start")
    add("--last", type=above(int), help="t-rhg: inner steps to differentiate")
    add("--alpha", type=common.share, help="bda: weight of f at the first step")
    add("--alpha-decay", type=common.share, help="bda: its factor per step")
    add("--bda-rule", choices=("aggregated", "bda-repo"), help="bda: weight of g")
    add("--proximal", type=above(float), help="imaml: weight of |y - x|^2 / 2 in g")
    add("--cg-steps", type=above(int), help="imaml")
    add(
        "--regulariser",
        choices=("none", "distance", "quasi-norm", "quasi-norm-published"),
        default="none",
        help="added to g: to the start, or the sum of |p|^q over all tensors, or the "
        "published script's form of it",
    )
    add("--quasi-norm-power", type=common.share, help="q; default 0.5")
    add("--quasi-norm-epsilon", type=above(float), help="smooths it at 0; default 0.1")
    add("--regularisation", type=above(float), help="its weight; default 0.25")
    add("--test-steps", type=above(int), help="inner steps on a new task; by method")
    add("--test-lr", type=above(float), help="their rate; by method")
    several = common.at_least(int, 2)  # fewer have no interval
    add("--test-tasks", type=several, help="by method")
    add("--validation-tasks", type=several, default=100, help="per evaluation")
    add("--eval-every", type=above(int), default=200, help="meta-iterations")
    add("--trials", type=above(int), default=1, help="runs at successive seeds")
    add("--jit", choices=common.JIT, default="off")
    args = parser.parse_args(argv)
    own = published(args.method, args.dataset, args.ways, args.shots, args.network)
    parser.reject_unused_flags(args, [own], f"--method {args.method}")
    reject_ineffective_flags(parser, args, args.network or own.network)
    args = with_defaults(args, own)
    if args.rotations is None:
        args.rotations = args.dataset in CHARACTERS
    if args.method in WHOLE and args.head not in ("linear", "cosine"):
        parser.error(
            f"--head must be linear or cosine for --method {args.method}, whose lower "
            f"variables are all weights, got {args.head}"
        )
    if args.method in FRESH and args.head not in ("linear", "cosine"):
        parser.error(
            f"--head must be linear or cosine for --method {args.method}, which draws "
            f"it anew, got {args.head}"
        )
    if args.head == "conv" and (args.network in VECTORS or args.dataset in CHARACTERS):
        parser.error(
            "--head conv needs a feature map of at least 2 x 2: images larger than "
            f"characters and a four-block network, got --dataset {args.dataset} "
            f"--network {args.network}"
        )
    if args.regulariser == "distance" and args.method in FRESH:
        parser.error("--regulariser distance needs a head that has one start")
    if args.last is not None and args.last > args.inner_steps:
        parser.error(
            f"--last must not exceed --inner-steps, got {args.last} of "
            f"{args.inner_steps}"
        )
    if args.head_blocks > 3:
        parser.error(f"--head-blocks must be at most 3 of 4, got {args.head_blocks}")
    return args


def reject_ineffective_flags(
    parser: common.Parser, args: argparse.Namespace, network: str
) -> None:
    quasi = args.regulariser.startswith("quasi-norm")
    omniglot_itself = args.dataset == "omniglot" and args.data_file is None
    needs = {
        "data_file": (args.dataset != "glyphs", "a --dataset with files"),
        "data_dir": (
            args.dataset != "glyphs" and args.data_file is None,
            "a --dataset with files, without --data-file",
        ),
        "split": (omniglot_itself, "--dataset omniglot without --data-file"),
        "filters": (network not in VECTORS, "a four-block --network"),
        "head_blocks": (args.head == "blocks", "--head blocks"),
        "regularisation": (args.regulariser != "none", "--regulariser"),
        "quasi_norm_power": (quasi, "--regulariser quasi-norm"),
        "quasi_norm_epsilon": (quasi, "--regulariser quasi-norm"),
    }
    parser.reject_ineffective_flags(args, needs)


def with_defaults(args: argparse.Namespace, own: Settings) -> argparse.Namespace:
    """What was not given: published, or what follows from what was given."""
    made = common.filled(args, own)
    made.head_blocks = args.head_blocks or 1
    if args.dataset == "omniglot" and args.data_file is None:
        made.split = args.split or "vinyals"
    made.regularisation = args.regularisation or 0.25
    if args.regulariser.startswith("quasi-norm"):
        made.quasi_norm_power = args.quasi_norm_power or 0.5
        made.quasi_norm_epsilon = args.quasi_norm_epsilon or 0.1
    if made.last is not None and args.last is None:
        made.last = min(made.last, made.inner_steps)
    if args.method in (*FOLLOWERS, "penalty"):
        return made
    # New tasks are learned as in training, where the papers do so.
    if args.test_steps is None and own.test_steps == own.inner_steps:
        made.test_steps = made.inner_steps
    for name in ("inner_lr", "lower_lr"):
        if args.test_lr is None and own.test_lr and own.test_lr == getattr(own, name):
            made.test_lr = getattr(made, name)
    return made


# Data.


def load_splits(args: argparse.Namespace) -> dict[str, classes.Classes]:
    """Classes for training, validation and testing."""
    name, folder = args.dataset, args.data_dir
    if name == "glyphs":
        splits = glyphs.load()
    elif args.data_file:
        splits = classes.load(args.data_file, name)
    elif name == "omniglot":
        splits = omniglot.load(folder, args.split)
    elif name in ("fc100", "cifar-fs"):
        splits = fc100.load(name.replace("-", "_"), folder)
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
    """Meta-batches of the split without end, from the first one on."""
    counts = (args.ways, args.shots, args.queries, args.tasks)
    return episodes(some, *counts, seed=seed, first=first)


# The bilevel problem.


def build_blocks(args: argparse.Namespace, make: networks.Initializers) -> list:
    if args.network in ("resnet12", "residual"):
        whole = {"resnet12": networks.resnet12, "residual": networks.residual_encoder}
        return whole[args.network](make)
    return {
        "norm-relu-pool": networks.norm_relu_pool_conv4,
        "pool-norm-relu": networks.pool_norm_relu_conv4,
        "relu-pool-norm": networks.relu_pool_norm_conv4,
        "shifted": networks.shifted_conv4,
    }[args.network](args.filters, make)


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
            kind = "glorot" if args.network == "resnet12" else "small"
        elif args.method in WHOLE and args.dataset.endswith("imagenet"):
            kind = "glorot"
        features = width.output_shape[-1]
        end = networks.linear_head(args.ways, features, make, kind)
    return encoder, networks.sequential([*own, end], between, "head")


class Start(keras.layers.Layer):
    """The start of all weights and, for meta-sgd, a step size for every entry."""

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
        """Where the rates stand among all variables."""
        numbers = {id(v): n for n, v in enumerate(self.trainable_variables)}
        return [numbers[id(rate)] for rate in self.rates]


def fresh_heads(args: argparse.Namespace, head: keras.Model, tasks: int) -> Callable:
    """Heads drawn anew at every outer step, for every task its own."""
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
    """Of the inner steps."""
    if args.method in ("approxgrad", "penalty"):
        return common.adam(args.lower_lr)
    if args.method == "meta-sgd":
        return keras.optimizers.SGD(1.0)
    return keras.optimizers.SGD(args.inner_lr)


def learned_rates(args: argparse.Namespace, model: tb.BilevelModel) -> Any:
    """meta-sgd's step sizes; `None` for the others."""
    if args.method != "meta-sgd":
        return None
    places = model.upper.places()
    return lambda upper: [upper.trainable_variables[place] for place in places]


def build_method(
    args: argparse.Namespace, model: tb.BilevelModel, fresh: Callable | None
) -> tb.Method:
    """The method: a few words about the one engine."""
    if args.method == "penalty":
        return tb.AugmentedLagrangian(
            inner_optimizer(args),
            args.inner_steps,
            # The published condition is that of the mean over all tasks, and its square
            # that much smaller than the mean of the tasks' own, which are used here.
            weight=args.weight / args.tasks,
            lower_weight=args.lower_weight,
            tolerance=args.tolerance,
            tolerance_decay=0.9**0.5,  # of the norm; the published test squares it
            multiplier=args.multiplier,
            rate_decay=0.99,
            start=fresh or "warm",
            # The tasks change with every outer step.
            optimizer_state="reset",
            multipliers="reset",
        )
    decay = args.final_lr and tb.CosineDecay(
        args.inner_lr, args.final_lr, args.outer_steps
    )
    inner = tb.InnerSolver(
        inner_optimizer(args),
        args.inner_steps,
        start=fresh or "warm",
        learning_rate=decay or learned_rates(args, model),
    )
    if args.method == "imaml":
        return tb.Implicit(inner, tb.ConjugateGradient(args.cg_steps))
    if args.method == "approxgrad":
        solver = tb.GradientSolver(
            common.adam(args.solver_lr),
            args.inner_steps,
            "residual",
            warm_start=False,
            tolerance=0.0,
            damping=args.damping * args.tasks,  # of the mean over all tasks, too
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
        if together:  # the task's images share their statistics
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
    """Of the lower loss: towards the start, or a quasi-norm that is not convex."""
    if args.regulariser == "none":
        return 0.0
    if args.regulariser == "distance":
        return args.regularisation * squared_distance(network, start)
    terms = []
    for y in map(tf.convert_to_tensor, network.trainable_variables):
        size = tf.reduce_sum(tf.square(y))
        least = args.quasi_norm_epsilon**2 * y.shape.num_elements()
        if args.regulariser == "quasi-norm-published":  # of norms, not of their squares
            above = size > 0  # |0| has no derivative: here 0
            size = tf.where(above, tf.sqrt(tf.where(above, size, 1)), 0)
            least = least**0.5
        terms.append((size + least) ** (args.quasi_norm_power / 2))
    return args.regularisation * tf.add_n(terms)


# Evaluation.


def test_solver(
    args: argparse.Namespace, model: tb.BilevelModel, number: tf.Variable
) -> tb.InnerSolver:
    """The inner solver on new tasks, the meta-batch of this number."""
    inversion_free = args.method in ("approxgrad", "penalty")
    kind = common.adam if inversion_free else keras.optimizers.SGD
    rate = 1.0 if args.method == "meta-sgd" else args.test_lr
    start: Any = "warm"
    if args.method in FRESH:
        fresh = fresh_heads(args, model.lower, args.tasks)

        def drawn(step: tf.Tensor) -> list[tf.Tensor]:
            return fresh(-1 - number)  # training's have numbers from 0 on

        start = drawn
    return tb.InnerSolver(
        kind(rate),
        args.test_steps,
        start=start,
        learning_rate=learned_rates(args, model),
    )


class Judge:
    """Measures the model on tasks of one split, always the same ones."""

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
        """Classes of every task's query images; heads drawn anew for every batch."""
        self.number.assign(number)
        return self._predict(batch).numpy()

    def accuracies(self, name: str | None = None) -> np.ndarray:
        """Percent right of every task's query images; with a name it shows how far
        it is."""
        progress = name and common.Progress(name, self.calls, "meta-batches")
        parts = []
        for number, batch in enumerate(self.data):
            right = self.predicted(number, batch) == batch.upper[1]
            parts.append(100 * np.mean(right, axis=1))
            if progress:
                progress.update(number + 1)
        return np.concatenate(parts)[: self.count]


def interval(accuracies: np.ndarray) -> float:
    """Half the width of the mean's 95 percent interval."""
    return float(1.96 * accuracies.std(ddof=1) / np.sqrt(len(accuracies)))


class Best:
    """Keeps the upper variables of best validation accuracy, past a kill too."""

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
    names = ("method", "dataset", "network", "head", "ways", "shots", "queries", "seed")
    return {name: getattr(args, name) for name in names}


def about_tasks(args: argparse.Namespace) -> str:
    return f"{args.method}, {args.ways}-way {args.shots}-shot {args.dataset}"


def draw_curves(run: common.Run, args: argparse.Namespace) -> None:
    seconds = run.column("seconds")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharex=True)
    accuracy = run.column("validation_accuracy")
    margin = np.array(run.column("validation_accuracy_ci95"))
    common.draw_line(left, seconds, accuracy)
    left.fill_between(seconds, accuracy - margin, accuracy + margin, alpha=0.2)
    left.set(title="accuracy on validation classes", ylabel="percent")
    for name, label in (("upper_loss", "f, query"), ("lower_loss", "g, support")):
        common.draw_line(right, seconds, run.column(name), label=label)
    right.set(title="losses on training tasks", ylabel="loss")
    right.legend()
    for axes in (left, right):
        axes.set_xlabel("seconds of training")
        axes.grid(alpha=0.3)
    figure.suptitle(about_tasks(args))
    figure.tight_layout()
    figure.savefig(run.out / "curves.png", dpi=110)
    plt.close(figure)


def draw_matrix(axes: Any, matrix: np.ndarray, most: int) -> None:
    """Counts from 0 to `most` in shades of blue, the same ones in every picture."""
    axes.imshow(matrix, cmap="Blues", vmin=0, vmax=most)
    size = 9 if len(matrix) <= 10 else 6
    for row, column in np.ndindex(*matrix.shape):
        if count := int(matrix[row, column]):
            color = "white" if count > most / 2 else "black"
            place = {"ha": "center", "va": "center"}
            axes.text(column, row, str(count), color=color, fontsize=size, **place)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(len(matrix)))
    axes.tick_params(labelsize=size)
    axes.set(xlabel="predicted class", ylabel="true class")


def draw_confusion(path: pathlib.Path, args: argparse.Namespace, judge: Judge) -> None:
    """Three test tasks: a support image of each class, and what queries look like."""
    batch = next(iter(judge.data))
    predicted = judge.predicted(0, batch)
    count = min(3, args.tasks)
    figure, grid = plt.subplots(
        2,
        count,
        figsize=(4 * count, 5),
        squeeze=False,
        gridspec_kw={"height_ratios": [1, 3]},
    )
    for task in range(count):
        supports = batch.lower[0][task].numpy()[:: args.shots]
        strip = np.concatenate(list(supports), axis=1)
        grid[0, task].imshow(np.squeeze(strip), cmap="gray", vmin=0, vmax=1)
        grid[0, task].set_axis_off()
        grid[0, task].set_title(f"test task {task + 1}: its classes", fontsize=9)
        matrix = np.zeros((args.ways, args.ways), int)
        np.add.at(matrix, (batch.upper[1][task].numpy(), predicted[task]), 1)
        draw_matrix(grid[1, task], matrix, args.queries)
    figure.suptitle(f"{about_tasks(args)}: query images of each class")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    with common.one_line_errors(__file__):
        splits = load_splits(args)
        for some in splits.values():
            draw(args, some, 0)  # too many ways or shots: said before any work
        run = common.Run(args.out, common.settings(args), args.resume)
    summary = common.trials(args, run, functools.partial(train, splits=splits))
    spread = "test_accuracy_ci95" if args.trials == 1 else "test_accuracy_std"
    print(
        f"{about_tasks(args)}: "
        f"{summary['test_accuracy']:.2f} +- {summary[spread]:.2f} "
        f"percent on {args.test_tasks} test tasks (transductive), "
        f"{summary['outer_steps']:.0f} meta-iterations, {summary['seconds']:.0f} s"
        + (f"; means of {args.trials} runs, +- over them" if args.trials > 1 else "")
    )
    print(f"Files in {run.out}: {', '.join(sorted(p.name for p in run.out.iterdir()))}")
    return summary


if __name__ == "__main__":
    main()
