"""Bilevel problems whose solution and hypergradient are known in closed form.

Every lower loss is quadratic in y for fixed x,

    g(x, y) = 1/2 y' H(x) y - q(x)' y + r(x),

so NumPy and the derivatives of H, q, r and f, written by hand, give everything:
no number here comes from TensorFlow's differentiation. Vectors are flat, in the
order of `tf.nest.flatten`.

Sizes: upper 3, lower 5, training batch 7, validation batch 8. No two are equal, so
that a wrong axis cannot hide.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

import tfbilevel as tb

Vector = np.ndarray
Matrix = np.ndarray


def flat(nest: Any) -> Vector:
    """All entries of a nest in one float64 vector."""
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in tf.nest.flatten(nest)]
    return np.concatenate(leaves)


def unflat(vector: Vector, like: Any) -> Any:
    """The nest `like` filled with the entries of `vector`."""
    leaves, at = [], 0
    for leaf in tf.nest.flatten(like):
        size = np.size(leaf)
        leaves.append(np.reshape(vector[at : at + size], np.shape(leaf)))
        at += size
    assert at == len(vector)
    return tf.nest.pack_sequence_as(like, leaves)


def cast(nest: Any, dtype: str) -> Any:
    """The nest as tensors of one dtype."""
    return tf.nest.map_structure(
        lambda leaf: None if leaf is None else tf.constant(np.asarray(leaf), dtype),
        nest,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Oracle:
    """A problem, a point and the exact derivatives there.

    Attributes:
        name: for test ids.
        problem: the losses in TensorFlow.
        x, y, data: nests of arrays: the upper and lower variables and the batches.
        hessian, linear: H(x) and q(x).
        hessian_x: x -> [H_{x_1}, H_{x_2}, ...].
        linear_x: x -> the Jacobian of q, [lower, upper].
        rest_x: x -> gradient of r.
        f_x, f_y: (x, y) -> partial derivatives of the upper loss.
        rate: of gradient descent on the lower loss, near 2 / (largest + smallest
            eigenvalue of H).
    """

    name: str
    problem: tb.Problem
    x: Any
    y: Any
    data: tb.Batches
    hessian: Callable[[Vector], Matrix]
    linear: Callable[[Vector], Vector]
    hessian_x: Callable[[Vector], list[Matrix]]
    linear_x: Callable[[Vector], Matrix]
    rest_x: Callable[[Vector], Vector]
    f_x: Callable[[Vector, Vector], Vector]
    f_y: Callable[[Vector, Vector], Vector]
    rate: float

    def at(self, dtype: str) -> tuple[Any, Any, tb.Batches]:
        """x, y and the batches as tensors."""
        return cast(self.x, dtype), cast(self.y, dtype), cast(self.data, dtype)

    def g_y(self, x: Vector, y: Vector) -> Vector:
        return self.hessian(x) @ y - self.linear(x)

    def g_x(self, x: Vector, y: Vector) -> Vector:
        curved = [0.5 * y @ h @ y for h in self.hessian_x(x)]
        return np.array(curved) - self.linear_x(x).T @ y + self.rest_x(x)

    def g_xy(self, x: Vector, y: Vector, v: Vector) -> Vector:
        """The derivative of <g_y, v> in x, v held constant."""
        curved = [y @ h @ v for h in self.hessian_x(x)]
        return np.array(curved) - self.linear_x(x).T @ v

    def solution(self, x: Vector) -> Vector:
        """y*(x)."""
        return np.linalg.solve(self.hessian(x), self.linear(x))

    def hypergradient(self, x: Vector) -> Vector:
        """d f(x, y*(x)) / dx."""
        y = self.solution(x)
        v = np.linalg.solve(self.hessian(x), self.f_y(x, y))
        return self.f_x(x, y) - self.g_xy(x, y, v)


def _symmetric(generator: np.random.Generator, eigenvalues: Vector) -> Matrix:
    size = len(eigenvalues)
    basis, _ = np.linalg.qr(generator.normal(size=(size, size)))
    return basis @ np.diag(eigenvalues) @ basis.T


def _design(generator: np.random.Generator, rows: int, columns: int) -> Matrix:
    """A matrix with singular values in [1, 1.3] times sqrt(rows)."""
    basis, _ = np.linalg.qr(generator.normal(size=(rows, columns)))
    return np.sqrt(rows) * basis * np.linspace(1.0, 1.3, columns)


def quadratic() -> Oracle:
    """g = y'Ay/2 - y'(Cx + c), A with eigenvalues 1 to 2; f with direct x terms."""
    generator = np.random.default_rng(1)
    a = _symmetric(generator, np.linspace(1.0, 2.0, 5))
    coupling, c = generator.normal(size=(5, 3)), generator.normal(size=5)
    direct, target = generator.normal(size=(3, 5)), generator.normal(size=5)

    def upper_loss(x: Any, y: Any, batch: Any) -> Any:
        target, direct = batch
        return (
            0.5 * tf.reduce_sum((y - target) ** 2)
            + tf.reduce_sum(x * tf.linalg.matvec(direct, y))
            + tf.reduce_sum(x * x)
        )

    def lower_loss(x: Any, y: Any, batch: Any) -> Any:
        a, coupling, c = batch
        linear = tf.linalg.matvec(coupling, x) + c
        return 0.5 * tf.reduce_sum(y * tf.linalg.matvec(a, y)) - tf.reduce_sum(
            linear * y
        )

    return Oracle(
        name="quadratic",
        problem=tb.Problem(upper_loss, lower_loss),
        x=generator.normal(size=3),
        y=generator.normal(size=5),
        data=tb.Batches(upper=(target, direct), lower=(a, coupling, c)),
        hessian=lambda x: a,
        linear=lambda x: coupling @ x + c,
        hessian_x=lambda x: [np.zeros((5, 5))] * 3,
        linear_x=lambda x: coupling,
        rest_x=lambda x: np.zeros(3),
        f_x=lambda x, y: direct @ y + 2 * x,
        f_y=lambda x, y: y - target + direct.T @ x,
        rate=0.66,
    )


def ridge() -> Oracle:
    """Ridge regression, coefficient exp(x) per coordinate; f does not contain x.

    Five coordinates share three coefficients, x[0, 1, 2, 0, 1].
    """
    generator = np.random.default_rng(2)
    group = np.array([0, 1, 2, 0, 1])
    train, answers = _design(generator, 7, 5), generator.normal(size=7)
    check, wanted = _design(generator, 8, 5), generator.normal(size=8)

    def upper_loss(x: Any, y: Any, batch: Any) -> Any:
        del x
        inputs, wanted = batch
        return 0.5 * tf.reduce_mean((tf.linalg.matvec(inputs, y) - wanted) ** 2)

    def lower_loss(x: Any, y: Any, batch: Any) -> Any:
        inputs, answers = batch
        fit = 0.5 * tf.reduce_mean((tf.linalg.matvec(inputs, y) - answers) ** 2)
        return fit + 0.5 * tf.reduce_sum(tf.gather(tf.exp(x), group) * y * y)

    return Oracle(
        name="ridge",
        problem=tb.Problem(upper_loss, lower_loss),
        x=np.array([-1.0, -0.5, -0.2]),
        y=generator.normal(size=5),
        data=tb.Batches(upper=(check, wanted), lower=(train, answers)),
        hessian=lambda x: train.T @ train / 7 + np.diag(np.exp(x)[group]),
        linear=lambda x: train.T @ answers / 7,
        hessian_x=lambda x: [np.diag(np.exp(x[i]) * (group == i)) for i in range(3)],
        linear_x=lambda x: np.zeros((5, 3)),
        # x enters g only through the penalty, which vanishes at y = 0.
        rest_x=lambda x: np.zeros(3),
        f_x=lambda x, y: np.zeros(3),
        f_y=lambda x, y: check.T @ (check @ y - wanted) / 8,
        rate=0.5,
    )


def scalar() -> Oracle:
    """g = exp(x) y^2 / 2 - x^2 y with x and y of rank 0: y* = x^2 exp(-x)."""

    def upper_loss(x: Any, y: Any, batch: Any) -> Any:
        return 0.5 * (y - batch) ** 2 + 0.1 * x**3

    def lower_loss(x: Any, y: Any, batch: Any) -> Any:
        del batch
        return 0.5 * tf.exp(x) * y**2 - x**2 * y + tf.sin(x)

    return Oracle(
        name="scalar",
        problem=tb.Problem(upper_loss, lower_loss),
        x=np.array(0.4),
        y=np.array(-1.3),
        data=tb.Batches(upper=np.array(0.9), lower=None),
        hessian=lambda x: np.exp(x)[:, None],
        linear=lambda x: x**2,
        hessian_x=lambda x: [np.exp(x)[:, None]],
        linear_x=lambda x: 2 * x[:, None],
        rest_x=lambda x: np.cos(x),
        f_x=lambda x, y: 0.3 * x**2,
        f_y=lambda x, y: y - 0.9,
        rate=0.5,
    )


def nested() -> Oracle:
    """Dicts, lists and tuples of tensors of ranks 0, 1 and 2 on both levels.

    x = {"damp": d [], "factors": [v [2], (u [3],)]}
    y = ({"head": M [2, 3], "level": s []}, [a [5]])
    g = e^d |y|^2 / 2 + |Wa - t|^2 / 14 + |M - v u'|^2 / 2 + (s + 0.2 sum(a) - d)^2 / 2
    """
    generator = np.random.default_rng(3)
    inputs, answers = _design(generator, 7, 5), generator.normal(size=7)
    wanted = generator.normal(size=5)

    def upper_loss(x: Any, y: Any, batch: Any) -> Any:
        named, (a,) = y
        head, level = named["head"], named["level"]
        return (
            0.5 * tf.reduce_sum((a - batch) ** 2)
            + 0.5 * tf.reduce_sum((head - 1.0) ** 2)
            + 0.5 * (level - x["damp"]) ** 2
            + 0.5 * tf.reduce_sum(x["factors"][0] ** 2)
        )

    def lower_loss(x: Any, y: Any, batch: Any) -> Any:
        inputs, answers = batch
        named, (a,) = y
        head, level = named["head"], named["level"]
        v, (u,) = x["factors"]
        size = tf.reduce_sum(head**2) + level**2 + tf.reduce_sum(a**2)
        fit = tf.reduce_mean((tf.linalg.matvec(inputs, a) - answers) ** 2)
        outer = tf.reduce_sum((head - v[:, None] * u[None, :]) ** 2)
        tie = (level + 0.2 * tf.reduce_sum(a) - x["damp"]) ** 2
        return 0.5 * (tf.exp(x["damp"]) * size + fit + outer + tie)

    # Flat order: x = (d, v_1, v_2, u_1, u_2, u_3); y = (M row by row, s, a).
    def hessian(x: Vector) -> Matrix:
        h = np.exp(x[0]) * np.eye(12)
        h[:6, :6] += np.eye(6)
        h[7:, 7:] += inputs.T @ inputs / 7
        tie = np.array([0.0] * 6 + [1.0] + [0.2] * 5)
        return h + np.outer(tie, tie)

    def linear(x: Vector) -> Vector:
        d, v, u = x[0], x[1:3], x[3:]
        shared = inputs.T @ answers / 7 + 0.2 * d
        return np.concatenate([np.outer(v, u).ravel(), [d], shared])

    def linear_x(x: Vector) -> Matrix:
        v, u = x[1:3], x[3:]
        jacobian = np.zeros((12, 6))
        jacobian[6, 0] = 1.0
        jacobian[7:, 0] = 0.2
        for row in range(2):
            for column in range(3):
                jacobian[3 * row + column, 1 + row] = u[column]
                jacobian[3 * row + column, 3 + column] = v[row]
        return jacobian

    def rest_x(x: Vector) -> Vector:
        # r = (|v|^2 |u|^2 + d^2) / 2 + a constant
        d, v, u = x[0], x[1:3], x[3:]
        return np.concatenate([[d], v * (u @ u), u * (v @ v)])

    def f_x(x: Vector, y: Vector) -> Vector:
        return np.concatenate([[x[0] - y[6]], x[1:3], np.zeros(3)])

    def f_y(x: Vector, y: Vector) -> Vector:
        return np.concatenate([y[:6] - 1.0, [y[6] - x[0]], y[7:] - wanted])

    return Oracle(
        name="nested",
        problem=tb.Problem(upper_loss, lower_loss),
        x={
            "damp": np.array(0.3),
            "factors": [generator.normal(size=2), (generator.normal(size=3),)],
        },
        y=(
            {"head": generator.normal(size=(2, 3)), "level": np.array(0.5)},
            [generator.normal(size=5)],
        ),
        data=tb.Batches(upper=wanted, lower=(inputs, answers)),
        hessian=hessian,
        linear=linear,
        hessian_x=lambda x: [np.exp(x[0]) * np.eye(12)] + [np.zeros((12, 12))] * 5,
        linear_x=linear_x,
        rest_x=rest_x,
        f_x=f_x,
        f_y=f_y,
        rate=0.38,
    )


ORACLES = [quadratic(), ridge(), scalar(), nested()]
