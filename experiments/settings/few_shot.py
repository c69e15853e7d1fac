"""Few-shot learning: the published settings of every method, and their flags."""

import argparse
import dataclasses
import pathlib
from typing import Any

from common.flags import JIT, Parser, at_least, filled, share
from common.inversion_free import InversionFree

from data_prep import omniglot
from data_prep.command_line import positive

DATASETS = (
    "glyphs",
    "omniglot",
    "mini-imagenet",
    "tiered-imagenet",
    "fc100",
    "cifar-fs",
)
CHARACTERS = ("glyphs", "omniglot")
DOWNLOADED = ("omniglot", "fc100", "cifar-fs")  # by tensorflow-datasets
WHOLE = ("maml", "fomaml", "meta-sgd", "imaml")  # all weights are lower variables
FRESH = ("fo-itd-bio", "approxgrad", "penalty")  # a new head at every outer step
LEARNED = ("anil", "iaptt-gm")  # head starts are upper variables
FOLLOWERS = ("rhg", "t-rhg", "bda", "iaptt-gm")  # methods of the IAPTT-GM paper
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
class Settings(InversionFree):
    """A method's settings on a data set; `None` where it has no such setting.

    `inner_lr` is the rate of the inner steps, `final_lr` the end of its cosine decay.
    approxgrad and penalty have Adam's `lower_lr` instead.
    """

    net: str
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
    solver_steps: int | None = None
    test_steps: int
    test_lr: float | None = None
    test_tasks: int


def stocbio(
    upper_lr: float, inner_lr: float, steps: int, outer_steps: int, **other: Any
) -> Settings:
    """Meta-learning settings of the stocBiO paper and of methods based on them."""
    return Settings(
        **{
            "net": "norm-relu-pool",
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
    """Settings of hypertorch's example; `outer_steps`, which it lacks, from iMAML's
    paper."""
    return stocbio(
        1e-3,
        0.1,
        steps,
        outer_steps,
        proximal=proximal,
        solver_steps=5,
        tasks=16,
        queries=15,
        test_tasks=1000,
        net="relu-pool-norm",
        filters=filters,
    )


def iaptt(dataset: str, network: str | None, **other: Any) -> Settings:
    """Settings of the IAPTT-GM paper; head and rates for characters are our choice."""
    images: dict[str, Any] = {
        "net": "pool-norm-relu",
        "filters": 32,
        "head": "linear" if network in VECTORS else "conv",
        "inner_lr": 0.01,
        "final_lr": 0.001,
        "test_lr": 0.1,
    }
    characters: dict[str, Any] = {
        "net": "relu-pool-norm",
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
    """Settings of the penalty paper."""
    character, penalty = dataset in CHARACTERS, method == "penalty"
    rate = 1e-2 if character else 1e-3
    filters = 64 if character else 32  # 32: the paper's network for images
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
        net="shifted" if character else "residual",
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
    """The method's published settings; our choice for data sets without any."""
    if method in ("approxgrad", "penalty"):
        return inversion_free(method, dataset, ways, shots, network)
    if method in FOLLOWERS:
        own: dict[str, Any] = {
            "t-rhg": {"last": 5},
            "bda": {"alpha": 0.4, "alpha_decay": 0.9, "bda_rule": "aggregated"},
            "iaptt-gm": {"start_lr": 1e-3},
        }
        return iaptt(dataset, network, **own.get(method, {}))
    learned = {"test_lr": None} if method == "meta-sgd" else {}  # rates are learned
    if dataset in CHARACTERS:
        # From MAML's paper, with our choice of head.
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


def add_flags(parser: Parser) -> None:
    add, above = parser.add_argument, positive
    add("--dataset", choices=DATASETS, default="glyphs")
    parser.add_data_flags("folder of the data set's files, or of tensorflow-datasets")
    add("--data-file", type=pathlib.Path, help=".npz made by its data_prep command")
    add("--split", choices=omniglot.RULES, help="of omniglot; default: vinyals")
    add(
        "--rotations",
        action=argparse.BooleanOptionalAction,
        help="rotated images form separate classes; default for characters",
    )
    add("--method", choices=METHODS, default="anil")
    add("--ways", type=above(int), default=5)
    add("--shots", type=above(int), default=1)
    add("--queries", type=above(int), help="query images per class; by method")
    add("--tasks", type=above(int), help="tasks per meta-batch; by method")
    add("--outer-steps", type=above(int), help="meta-iterations; by method")
    add("--seconds", type=above(float), help="stop after this training time")
    add("--net", "--network", choices=NETWORKS, help="by method and data set")
    add("--filters", type=above(int), help="for a four-block network")
    add("--head", choices=HEADS, help="by method and data set")
    add("--head-blocks", type=above(int), help="number of --head blocks; default 1")
    Settings.add_flags(parser, None)
    add("--inner-lr", type=above(float), help="rate of the inner steps; by method")
    add("--final-lr", type=above(float), help="rhg to iaptt-gm: final inner rate")
    add("--start-lr", type=above(float), help="iaptt-gm: rate of the head's start")
    add("--last", type=above(int), help="t-rhg: inner steps to differentiate")
    add("--alpha", type=share, help="bda: weight of f at the first step")
    add("--alpha-decay", type=share, help="bda: factor on alpha per inner step")
    add("--bda-rule", choices=("aggregated", "bda-repo"), help="bda: weight of g")
    add("--proximal", type=above(float), help="imaml: weight of |y - x|^2 / 2 in g")
    add("--solver-steps", "--cg-steps", type=above(int), help="imaml: Hessian products")
    add(
        "--regulariser",
        choices=("none", "distance", "quasi-norm", "quasi-norm-published"),
        default="none",
        help="term added to g: the distance to the start, or the sum of |p|^q over all "
        "tensors, or the published script's version of that",
    )
    add("--quasi-norm-power", type=share, help="q; default 0.5")
    add("--quasi-norm-epsilon", type=above(float), help="smooths it at 0; default 0.1")
    add("--regularisation", type=above(float), help="weight of the term; default 0.25")
    add("--test-steps", type=above(int), help="inner steps on a new task; by method")
    add("--test-lr", type=above(float), help="rate on a new task; by method")
    several = at_least(int, 2)  # one task gives no confidence interval
    add("--test-tasks", type=several, help="number of test tasks; by method")
    add("--validation-tasks", type=several, default=100, help="per evaluation")
    add("--eval-every", type=above(int), default=200, help="meta-iterations")
    add("--trials", type=above(int), default=1, help="runs at successive seeds")
    add("--jit", choices=JIT, default="off")


def completed(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    """The flags, with published settings for those not given; checks for errors."""
    own = published(args.method, args.dataset, args.ways, args.shots, args.net)
    parser.reject_unused_flags(args, [own], f"--method {args.method}")
    reject_ineffective(parser, args, args.net or own.net)
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
            f"--head must be linear or cosine for --method {args.method}, which makes "
            f"a new one at every outer step, got {args.head}"
        )
    if args.head == "conv" and (args.net in VECTORS or args.dataset in CHARACTERS):
        parser.error(
            "--head conv needs a feature map of at least 2 x 2: images larger than "
            f"characters and a four-block network, got --dataset {args.dataset} "
            f"--net {args.net}"
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


def reject_ineffective(parser: Parser, args: argparse.Namespace, network: str) -> None:
    quasi = args.regulariser.startswith("quasi-norm")
    omniglot_itself = args.dataset == "omniglot" and args.data_file is None
    needs = {
        "data_file": (args.dataset != "glyphs", "a --dataset with files"),
        "data_dir": (
            args.dataset != "glyphs" and args.data_file is None,
            "a --dataset with files, without --data-file",
        ),
        "download": (
            args.dataset in DOWNLOADED and args.data_file is None,
            f"--dataset {', '.join(DOWNLOADED)}, without --data-file",
        ),
        "split": (omniglot_itself, "--dataset omniglot without --data-file"),
        "filters": (network not in VECTORS, "a four-block --net"),
        "head_blocks": (args.head == "blocks", "--head blocks"),
        "regularisation": (args.regulariser != "none", "--regulariser"),
        "quasi_norm_power": (quasi, "--regulariser quasi-norm"),
        "quasi_norm_epsilon": (quasi, "--regulariser quasi-norm"),
    }
    parser.reject_ineffective_flags(args, needs)


def with_defaults(args: argparse.Namespace, own: Settings) -> argparse.Namespace:
    """The flags, with published settings for those not given, or values derived from
    the flags that were given."""
    made = filled(args, own)
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
    # New tasks are learned as in training, if the papers do so.
    if args.test_steps is None and own.test_steps == own.inner_steps:
        made.test_steps = made.inner_steps
    for name in ("inner_lr", "lower_lr"):
        if args.test_lr is None and own.test_lr and own.test_lr == getattr(own, name):
            made.test_lr = getattr(made, name)
    return made
