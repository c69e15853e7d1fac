"""The clean-label attack: its flags, and the published settings as their defaults."""

import argparse
import pathlib

from common.flags import Parser, at_least

from data_prep.command_line import positive

METHODS = ("penalty", "feature-collision")
DATASETS = ("digits", "mnist", "fashion_mnist")
# Defaults of flags that only apply to some runs.
PENALTY = {"inner_steps": 10, "lower_lr": 1e-3}
PENALTY |= {"weight": 1.0, "lower_weight": 1.0, "tolerance": 1.0}
OWN_IMAGES = {
    "dataset": "digits",
    "data_dir": None,
    "download": None,
    "classes": (4, 9),
    "train_size": None,
    "test_size": None,
    "feature_epochs": 5,
}


def add_flags(parser: Parser) -> None:
    add, above = parser.add_argument, positive
    add(
        "--data-file",
        "--data",
        type=pathlib.Path,
        help=".npz with X_train, Y_train, X_test, Y_test",
    )
    add(
        "--features-file",
        "--features",
        type=pathlib.Path,
        help="features of --data-file, precomputed",
    )
    add("--weights", help="Inception-v3's weights: imagenet (default), FILE, none")
    add("--model", type=pathlib.Path, help="another feature model, saved by Keras")
    add("--dataset", choices=DATASETS, help="without --data-file; default: digits")
    parser.add_data_flags("tensorflow-datasets folder, or of IDX files")
    add("--classes", type=int, nargs=2, help="two classes of --dataset; default: 4 9")
    add("--train-size", type=above(int), help="per class; default 900 (digits 300)")
    add("--test-size", type=above(int), help="per class; default 300 (digits 100)")
    add("--feature-epochs", type=above(int), help="for the small network; default 5")
    add("--method", choices=METHODS, default="penalty")
    add("--poisons", type=above(int), default=1, help="per target")
    add("--max-targets", type=above(int), help="default: all that are classified right")
    add(
        "--start",
        type=at_least(int, 0),
        default=0,
        help="first test image to consider",
    )
    add("--outer-steps", type=above(int), default=201)
    add("--inner-steps", type=above(int), help="penalty: T; default 10")
    add("--upper-lr", type=above(float), default=0.01, help="rate of the poison")
    add("--lower-lr", type=above(float), help="penalty: default 0.001")
    add("--weight", type=above(float), help="penalty: rho at the start; default 1")
    add(
        "--lower-weight",
        type=at_least(float, 0),
        help="penalty: lambda at the start; default 1",
    )
    add("--tolerance", type=above(float), help="penalty: epsilon; default 1")
    add(
        "--beta",
        type=at_least(float, 0),
        default=0.01,
        help="weight of the distance to the base",
    )
    add(
        "--train-steps",
        "--head-steps",
        type=above(int),
        default=2001,
        help="for training a head",
    )
    add("--train-lr", "--head-lr", type=above(float), default=1e-3)
    add("--retrain-seeds", type=above(int), default=3, help="heads that vote")
    add("--jit", choices=("on", "off"), default="on", help="XLA for training heads")


def completed(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    """The flags, with defaults for those not given; checks for errors."""
    bundle, penalty = args.data_file is not None, args.method == "penalty"
    files = not bundle and args.dataset not in (None, "digits")
    needs = {
        **dict.fromkeys(("features_file", "model", "weights"), (bundle, "--data-file")),
        **dict.fromkeys(OWN_IMAGES, (not bundle, "no --data-file")),
        **dict.fromkeys(PENALTY, (penalty, "--method penalty")),
        **dict.fromkeys(
            ("data_dir", "download"), (files, "--dataset mnist or fashion_mnist")
        ),
    }
    parser.reject_ineffective_flags(args, needs)
    if args.weights is not None and args.model is not None:
        parser.error("--weights and --model choose different networks: give only one")
    for name, value in (PENALTY | OWN_IMAGES | {"weights": "imagenet"}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if len(set(args.classes)) != 2 or not all(0 <= c <= 9 for c in args.classes):
        parser.error(f"--classes must be two of 0, ..., 9, got {args.classes}")
    digits = args.dataset == "digits"
    for name, large, small in (("train_size", 900, 300), ("test_size", 300, 100)):
        if getattr(args, name) is None:
            setattr(args, name, small if digits else large)
    return args
