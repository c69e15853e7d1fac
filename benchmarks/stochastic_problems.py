"""The three problems of `stochastic.py` as NumPy arrays, with what is measured on them.

Only NumPy is imported here: the JAX contestants have an environment of their own.
"""

import math
import pathlib
from typing import Any, NamedTuple, Protocol

import numpy as np

BATCH = 64


class Grid(NamedTuple):
    """The settings that are tried: all combinations.

    Attributes:
        rates: lower rates, times 1 / (largest eigenvalue of the lower Hessian).
        ratios: of the upper to the lower rate.
        powers: p; the rates decay like (k + 1)^(-p) over the outer steps k.
    """

    rates: tuple[float, ...]
    ratios: tuple[float, ...]
    powers: tuple[float, ...] = (0.0, 0.4)


class Problem(Protocol):
    """A bilevel problem over examples.

    Attributes:
        largest: a bound of the largest eigenvalue of the lower Hessian at the start.
        cases: the names of variants that differ only in their lower examples.
        measures: the names of what is measured.
        every_look: whether a measurement costs nothing beside `together` outer steps.
        together: the number of outer steps between two looks, in one compiled call.
    """

    largest: float
    cases: tuple[str, ...]
    measures: tuple[str, ...]
    every_look: bool
    together: int

    def examples(self, case: str) -> tuple[tuple, tuple]:
        """Arrays with one entry per example: those of the upper loss, those of the
        lower loss."""
        ...

    def start(self) -> tuple[np.ndarray, Any]:
        """x and y (an array, or a list of them)."""
        ...

    def measured(self, x: np.ndarray, y: Any) -> tuple[float, ...]:
        """What `measures` names; less is better. A setting is chosen by the first."""
        ...


class Quadratic:
    """Part (a): two linear regressions, whose value function is known.

    g(x, y) = mean_i (a_i y - b_i x)^2 / 2
    f(x, y) = mean_j (d_j y - e_j)^2 / 2 + |x|^2 / 20
    """

    # In whole blocks, or methods with fixed batches would have another problem.
    SIZE, EXAMPLES = 100, 157 * BATCH
    GRID = Grid((0.1, 0.3, 1.0), (0.01, 0.1, 1.0))
    measures = ("h(x) - min h",)
    cases, every_look, together = ("",), True, 200

    def __init__(self, a: np.ndarray, b: np.ndarray, d: np.ndarray, e: np.ndarray):
        self.upper, self.lower = (d, e), (a, b)
        size, n, m = a.shape[1], len(a), len(d)
        self.largest = float(np.linalg.eigvalsh(a.T @ a / n)[-1])
        # y*(x) = R x.
        z = d @ np.linalg.solve(a.T @ a, a.T @ b)
        self.hessian = z.T @ z / m + 0.1 * np.eye(size)
        self.best = np.linalg.solve(self.hessian, z.T @ e / m)

    @classmethod
    def made(cls, condition: float, seed: int = 0) -> dict[str, np.ndarray]:
        """Its arrays, for a condition number of the lower Hessian."""
        generator, size, n = np.random.default_rng(seed), cls.SIZE, cls.EXAMPLES
        roots = np.sqrt(np.geomspace(1 / condition, 1.0, size))
        basis, _ = np.linalg.qr(generator.normal(size=(size, size)))
        a = generator.normal(size=(n, size)) * roots @ basis.T
        # y*(x) follows x through a map of moderate size, and every example has noise.
        through = generator.normal(size=(size, size)) / math.sqrt(size)
        b = a @ through + generator.normal(size=(n, size)) / size
        d = generator.normal(size=(n, size)) / math.sqrt(size)
        e = d @ (through @ generator.normal(size=size))
        e += 0.1 * generator.normal(size=n)
        return {"a": a, "b": b, "d": d, "e": e}

    def examples(self, case: str) -> tuple[tuple, tuple]:
        return self.upper, self.lower

    def start(self) -> tuple[np.ndarray, np.ndarray]:
        zeros = np.zeros(len(self.best), np.float32)
        return zeros, zeros

    def measured(self, x: np.ndarray, y: Any) -> tuple[float, ...]:
        """h(x) - min h, which is exactly the quadratic of the distance."""
        away = x.astype(np.float64) - self.best
        return (float(0.5 * away @ self.hessian @ away),)


# The sizes of the 14 attributes of a9a, each of which has one of its values in a row.
ATTRIBUTES = (5, 8, 5, 16, 5, 7, 14, 6, 5, 2, 2, 2, 5, 41)


class Logistic:
    """Part (b): logistic regression with one penalty per feature.

    g(x, y) = mean log loss of the training rows + sum_j exp(x_j) y_j^2 / 2
    f(y)    = mean log loss of the validation rows

    32,561 rows of 123 binary features, as a9a has them: one value of each of 14
    attributes. Every second attribute tells nothing of the label. Labels are random
    with the log odds of a planted model. Half of the rows are for training, a quarter
    for validation, a quarter for the test.
    """

    ROWS = 32_561
    START = -2.0  # of x: the penalties exp(-2)
    GRID = Grid((0.3, 1.0, 3.0), (1.0, 10.0, 100.0))
    measures = ("h(x)", "test error")
    cases, every_look, together = ("",), False, 100

    def __init__(self, features: np.ndarray, labels: np.ndarray, least: Any = None):
        """`least`: what `found` has found before."""
        self.least = least
        # In whole blocks, as in (a).
        n, m = (len(labels) * k // 4 // BATCH * BATCH for k in (2, 3))
        self.train, self.held, self.test = (
            (features[rows].astype(np.float32), labels[rows].astype(np.float32))
            for rows in (slice(n), slice(n, m), slice(m, None))
        )
        rows = self.train[0]
        curvature = float(np.linalg.eigvalsh(rows.T @ rows / (4 * n))[-1])
        self.largest = curvature + math.exp(self.START)
        self.lower = np.zeros(rows.shape[1])  # y*(x) of the last x

    @classmethod
    def made(cls, rows: int = ROWS, seed: int = 0) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(seed)
        columns, weights, first = [], [], 0
        for number, size in enumerate(ATTRIBUTES):
            # Few values are frequent and most are rare.
            shares = generator.permutation(1 / (1 + np.arange(size)) ** 1.2)
            columns.append(
                first + generator.choice(size, rows, p=shares / shares.sum())
            )
            weights.append(generator.normal(size=size) * (number % 2))
            first += size
        features = np.zeros((rows, first), np.uint8)
        np.put_along_axis(features, np.stack(columns, axis=1), 1, axis=1)
        odds = features @ np.concatenate(weights)
        labels = generator.uniform(size=rows) < 1 / (1 + np.exp(np.mean(odds) - odds))
        labels = 2 * labels.astype(np.int8) - 1
        least = cls(features, labels).found()
        return {"features": features, "labels": labels, "least": np.array(least)}

    def examples(self, case: str) -> tuple[tuple, tuple]:
        return self.held, self.train

    def start(self) -> tuple[np.ndarray, np.ndarray]:
        size = len(self.lower)
        return np.full(size, self.START, np.float32), np.zeros(size, np.float32)

    def measured(self, x: np.ndarray, y: Any) -> tuple[float, ...]:
        """h(x), with y*(x) by Newton's method, and the test error there in percent."""
        x = np.clip(x.astype(np.float64), -30, 30)
        self.lower = self.solution(x, self.lower)
        rows, labels = self.test
        wrong = float(np.mean(labels * (rows @ self.lower) <= 0))
        return self.loss(self.held, self.lower), 100 * wrong

    def solution(self, x: np.ndarray, y: np.ndarray, most: int = 50) -> np.ndarray:
        """y*(x), from a first guess."""
        rows, labels = self.train
        penalties = np.exp(x)
        for _ in range(most):
            slope = self._slope(rows, labels, y)
            gradient = rows.T @ slope / len(rows) + penalties * y
            if np.linalg.norm(gradient) < 1e-9:
                break
            # In float32, which is fast and bends the direction by 1e-6 of it.
            p = np.abs(slope)
            curved = rows.T @ (rows * (p * (1 - p))[:, None].astype(np.float32))
            hessian = curved / len(rows) + np.diag(penalties)
            y = self._descended(y, np.linalg.solve(hessian, gradient), penalties)
        return y

    def gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """h and h_x, by the implicit function theorem."""
        self.lower = y = self.solution(x, self.lower)
        (rows, labels), (held, held_labels) = self.train, self.held
        p = np.abs(self._slope(rows, labels, y))
        curved = rows.T @ (rows * (p * (1 - p))[:, None].astype(np.float32))
        hessian = curved / len(rows) + np.diag(np.exp(x))
        of_y = held.T @ self._slope(held, held_labels, y) / len(held)
        v = np.linalg.solve(hessian, of_y)
        return self.loss(self.held, y), -np.exp(x) * y * v

    def found(self) -> float:
        """The least h that a quasi-Newton method finds from the start."""
        from scipy.optimize import minimize

        x, _ = self.start()
        options = {"maxiter": 100, "ftol": 1e-12, "gtol": 1e-8}
        bounds = [(-30.0, 30.0)] * len(x)
        found = minimize(
            self.gradient, x, jac=True, method="L-BFGS-B", bounds=bounds,
            options=options,
        )  # fmt: skip
        return float(found.fun)

    @staticmethod
    def loss(part: tuple, y: np.ndarray) -> float:
        rows, labels = part
        return float(np.mean(np.logaddexp(0, -labels * (rows @ y))))

    @staticmethod
    def _slope(rows: np.ndarray, labels: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The derivative of each row's loss in its log odds."""
        return -labels / (1 + np.exp(np.clip(labels * (rows @ y), -500, 500)))

    def _descended(
        self, y: np.ndarray, direction: np.ndarray, penalties: np.ndarray
    ) -> np.ndarray:
        """A Newton step, shortened until the lower loss falls."""

        def lower(y: np.ndarray) -> float:
            return self.loss(self.train, y) + 0.5 * float(penalties @ (y * y))

        before, length = lower(y), 1.0
        while length > 1e-4 and not lower(y - length * direction) <= before + 1e-12:
            length /= 2
        return y - length * direction


class Cleaning:
    """Part (c): data cleaning of MNIST by example weights, with a linear softmax.

    g(x, y) = mean_i sigmoid(x_i) loss_i(y) + |y|^2 / 2000
    f(y)    = mean loss of 5,000 clean images

    20,000 training images; a share of their labels (the case, in percent) is sampled
    again from all classes. Settings are chosen by the error on 5,000 more clean images,
    and the error on the 10,000 test images is reported, in percent.
    """

    PENALTY = 1e-3
    SIZES = (20_000, 5_000, 5_000)
    GRID = Grid((0.3, 1.0), (1e3, 1e4, 1e5))
    CASES = ("50", "70", "90")
    measures = ("error on more clean images", "test error")
    every_look, together = False, 25

    def __init__(self, **arrays: np.ndarray):
        self.parts = {
            name: (_flat(arrays[f"{name}_images"]), arrays[f"{name}_labels"])
            for name in ("train", "held", "chosen", "test")
        }
        self.noisy = {
            case: arrays[f"noisy_{case}"]
            for case in self.CASES
            if f"noisy_{case}" in arrays
        }
        self.cases = tuple(self.noisy)
        images = self.parts["train"][0]
        self.indices = np.arange(len(images), dtype=np.int32)
        # The Hessian of a softmax is at most 1/2; a weight is 1/2 at the start.
        moments = images.T @ images / len(images)
        largest = float(np.linalg.eigvalsh(moments)[-1]) + 1  # and the bias
        self.largest = 0.25 * largest + self.PENALTY

    @classmethod
    def made(
        cls, sizes: tuple[int, ...] = SIZES, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """Its arrays, from the prepared MNIST of tensorflow-datasets."""
        from data_prep import images, label_noise

        generator = np.random.default_rng(seed)
        found = images.load_training_file("mnist"), images.load_file("mnist", "test")
        order = generator.permutation(len(found[0].labels))
        arrays, first = {}, 0
        for name, size in zip(("train", "held", "chosen"), sizes, strict=True):
            rows = order[first : first + size]
            arrays[f"{name}_images"] = found[0].images[rows]
            arrays[f"{name}_labels"] = found[0].labels[rows].astype(np.int32)
            first += size
        arrays["test_images"] = found[1].images
        arrays["test_labels"] = found[1].labels.astype(np.int32)
        for case in cls.CASES:
            arrays[f"noisy_{case}"], _ = label_noise.pollute(
                arrays["train_labels"], int(case) / 100, generator
            )
        return arrays

    def examples(self, case: str) -> tuple[tuple, tuple]:
        images, _ = self.parts["train"]
        return self.parts["held"], (images, self.noisy[case], self.indices)

    def start(self) -> tuple[np.ndarray, list[np.ndarray]]:
        size = self.parts["train"][0].shape[1]
        y = [np.zeros([size, 10], np.float32), np.zeros([10], np.float32)]
        return np.zeros(len(self.indices), np.float32), y

    def measured(self, x: np.ndarray, y: Any) -> tuple[float, ...]:
        return tuple(self._error(name, y) for name in ("chosen", "test"))

    def _error(self, name: str, y: list[np.ndarray]) -> float:
        images, labels = self.parts[name]
        found = np.argmax(images @ y[0] + y[1], axis=1)
        return 100 * float(np.mean(found != labels))


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255


PARTS: dict[str, Any] = {"a": Quadratic, "b": Logistic, "c": Cleaning}


def load(part: str, path: pathlib.Path) -> Any:
    """The problem of a part from the file of its arrays."""
    with np.load(path) as arrays:
        return PARTS[part](**arrays)
