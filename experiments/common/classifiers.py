"""Classifiers of the denoising experiments, as lists of layers that output logits."""

import keras


def logistic() -> list:
    return [keras.layers.Flatten(), keras.layers.Dense(10)]


def mnist_cnn() -> list:
    """1,389,578 parameters."""
    layers = []
    for filters in (64, 128):
        layers += [
            keras.layers.Conv2D(filters, 5, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Dropout(0.25),
        ]
    return [*layers, keras.layers.Flatten(), *dense(512, 256, rate=0.5)]


def cifar_cnn() -> list:
    """1,172,410 parameters."""
    layers = []
    for filters in (48, 96, 192):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(filters, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Dropout(0.25),
        ]
    return [*layers, keras.layers.Flatten(), *dense(512, 256, rate=0.5)]


def svhn_cnn() -> list:
    """1,340,650 parameters."""
    layers = []
    for filters in (32, 64, 128):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(filters, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Dropout(0.3),
        ]
    return [*layers, keras.layers.Flatten(), *dense(512, rate=0.3)]


def dense(*widths: int, rate: float) -> list:
    hidden = []
    for width in widths:
        hidden += [
            keras.layers.Dense(width, activation="relu"),
            keras.layers.Dropout(rate),
        ]
    return [*hidden, keras.layers.Dense(10)]


NETS = {
    "logistic": logistic,
    "mnist-cnn": mnist_cnn,
    "cifar-cnn": cifar_cnn,
    "svhn-cnn": svhn_cnn,
}
