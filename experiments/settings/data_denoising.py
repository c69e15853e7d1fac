"""Importance learning: the data sets' experiments and the methods' settings."""

import dataclasses
from typing import Any, NamedTuple

from common.inversion_free import InversionFree

METHODS = ("penalty", "approxgrad")
BASELINES = ("oracle", "val-only", "train+val")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(InversionFree):
    """A method's settings on a data set; `None` where it has no such setting."""

    epochs: int | None = None


def penalty(epochs: int, multiplier: float, lower_lr: float = 1e-4) -> Settings:
    return Settings(
        epochs=epochs,
        inner_steps=20,
        upper_lr=3.0,
        lower_lr=lower_lr,
        weight=0.01,
        lower_weight=0.01,
        tolerance=0.1,
        multiplier=multiplier,
    )


def approxgrad(
    epochs: int, lower_lr: float, solver_lr: float, steps: int = 20
) -> Settings:
    return Settings(
        epochs=epochs,
        inner_steps=steps,
        upper_lr=1.0,
        lower_lr=lower_lr,
        solver_lr=solver_lr,
        damping=1e-3,
        halve_every=20,
    )


PUBLISHED = {
    ("penalty", "mnist-small"): penalty(100, 1e-4),
    ("penalty", "mnist"): penalty(101, 1e-6),
    ("penalty", "cifar10"): penalty(200, 1e-4),
    ("penalty", "svhn"): penalty(101, 0.0, 1e-5),
    ("penalty", "digits"): penalty(100, 1e-4),
    ("approxgrad", "mnist-small"): approxgrad(100, 1e-6, 1e-5),
    ("approxgrad", "mnist"): approxgrad(100, 1e-6, 1e-5),
    ("approxgrad", "cifar10"): approxgrad(201, 1e-5, 1e-4, steps=1),
    ("approxgrad", "svhn"): approxgrad(101, 1e-6, 1e-5),
    ("approxgrad", "digits"): approxgrad(100, 1e-6, 1e-5),
}


def in_an_hour(settings: Settings, epochs: int) -> Settings:
    """One inner step at a larger rate, more weight of the training data, a smaller
    upper rate: chosen on 12,000 images of MNIST, half of them with a wrong label."""
    chosen: dict[str, Any] = {"epochs": epochs, "upper_lr": 0.3, "lower_lr": 1e-3}
    if settings.solver_lr is None:
        chosen |= {"inner_steps": 1, "lower_weight": 1.0}
    else:
        chosen |= {"inner_steps": 2, "solver_lr": 1e-3}
    return dataclasses.replace(settings, **chosen)


# Epochs that take 200 to 550 teraflop of convolutions and dense layers: at most an hour
# of two slow processor cores. On MNIST the network learns wrong labels by heart after
# five. The smaller data sets take minutes as they are.
HOUR = {
    ("penalty", "mnist"): 5,
    ("penalty", "cifar10"): 4,
    ("penalty", "svhn"): 3,
    ("approxgrad", "mnist"): 5,
    ("approxgrad", "cifar10"): 3,
    ("approxgrad", "svhn"): 2,
}
PRESETS = {
    "published": PUBLISHED,
    "hour": {
        chosen: in_an_hour(PUBLISHED[chosen], epochs) for chosen, epochs in HOUR.items()
    },
}
BASELINE_EPOCHS = {"published": 100, "hour": 10}


class Dataset(NamedTuple):
    """The parts of a data set's experiment that do not depend on the method.

    Attributes:
        net: one of NETS.
        noise: share of wrong training labels.
        sizes: numbers of training and validation examples.
        pretrain_epochs: epochs on validation data.
        low, high: initial importances where the network disagrees and agrees.
        retrain_threshold: least importance of examples used for retraining; `None`:
            no retraining.
        augment: whether images are transformed.
    """

    net: str
    noise: float
    sizes: tuple[int, int]
    pretrain_epochs: int
    low: float
    high: float
    retrain_threshold: float | None = None
    augment: bool = False


DATASETS = {
    "digits": Dataset("logistic", 0.5, (2000, 1000), 100, 0.4, 0.6, 0.9),
    "mnist-small": Dataset("logistic", 0.5, (5000, 5000), 100, 0.4, 0.6, 0.9),
    "mnist": Dataset("mnist-cnn", 0.25, (59_000, 1000), 100, 0.4, 0.6),
    "cifar10": Dataset(
        "cifar-cnn", 0.25, (40_000, 10_000), 101, 0.2, 0.8, augment=True
    ),
    "svhn": Dataset("svhn-cnn", 0.5, (72_257, 1000), 200, 0.2, 0.8),
}
# Nothing is published for FashionMNIST. Its files are like those of MNIST.
DATASETS["fashion_mnist"] = DATASETS["mnist"]
for preset in PRESETS.values():
    preset.update({(m, "fashion_mnist"): preset[m, "mnist"] for m in METHODS})


def dataset_of(name: str, preset: str) -> Dataset:
    """The data set's part of a preset.

    101 epochs on 10,000 images of CIFAR10 take half an hour. In a few epochs a network
    does not learn to classify transformed images: on FashionMNIST one with 86 percent
    had 72 after the first.
    """
    chosen = DATASETS[name]
    if preset == "hour" and chosen.augment:
        return chosen._replace(pretrain_epochs=20, augment=False)
    return chosen
