"""Synthetic characters: a few-shot data set that needs no files.

A class is a few strokes, each a quadratic curve, sampled by a seeded generator. Its
images are the same strokes with jittered points, slightly rotated and scaled, like
drawings by different people.
"""

import numpy as np

from data_prep.classes import Classes, require_apart

COUNTS = {"train": 160, "validation": 40, "test": 60}


def load(
    images_per_class: int = 20, side: int = 28, seed: int = 0
) -> dict[str, Classes]:
    """The three splits, uint8 [n, side, side, 1], determined by the arguments.

    Raises:
        ValueError: if an argument is not positive.
    """
    if images_per_class < 1 or side < 8:
        raise ValueError(
            "there must be an image of each class and 8 pixels a side, got "
            f"{images_per_class} and {side}"
        )
    splits, first = {}, 0
    for split, count in COUNTS.items():
        numbers = range(first, first + count)
        images = [draw_class(n, images_per_class, side, seed) for n in numbers]
        starts = np.arange(count + 1, dtype=np.int64) * images_per_class
        names = tuple(f"glyph {number}" for number in numbers)
        splits[split] = Classes(np.concatenate(images), starts, names)
        first += count
    return require_apart(splits)


def draw_class(number: int, count: int, side: int, seed: int) -> np.ndarray:
    """All images of one class."""
    generator = np.random.default_rng([seed, number])
    strokes = generator.uniform(0.15, 0.85, (generator.integers(2, 5), 3, 2))
    return np.stack([draw(jittered(strokes, generator), side) for _ in range(count)])


def jittered(strokes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The strokes as another person might draw them."""
    points = strokes + generator.normal(0, 0.025, strokes.shape)
    angle, scale = generator.normal(0, 0.12), generator.normal(1, 0.06)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (points - 0.5) @ (scale * turn) + 0.5 + generator.normal(0, 0.02, 2)


def draw(strokes: np.ndarray, side: int) -> np.ndarray:
    """Bright lines on a dark ground, 2 of 28 pixels wide: [side, side, 1]."""
    t = np.linspace(0, 1, 40)[:, None]
    weights = np.concatenate([(1 - t) ** 2, 2 * t * (1 - t), t**2], axis=1)
    points = (weights @ strokes).reshape(-1, 2)
    centres = (np.arange(side) + 0.5) / side
    grid = np.stack(np.meshgrid(centres, centres, indexing="ij"), axis=-1)
    # |g - p|^2 = |g|^2 - 2 g p + |p|^2: ten times as fast as computing differences.
    nearest = ((points**2).sum(axis=1) - 2 * grid @ points.T).min(axis=-1)
    squares = np.maximum((grid**2).sum(axis=-1) + nearest, 0)
    ink = np.clip(1.5 - np.sqrt(squares) * 28, 0, 1)
    return np.round(255 * ink).astype(np.uint8)[:, :, None]
