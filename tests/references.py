"""Slow, obvious NumPy: what the library computes, written a second time.

Everything works on flat vectors and on an `Oracle`'s hand-written derivatives.
"""

import numpy as np
from problems import Oracle, Vector


def descend(oracle: Oracle, x: Vector, y: Vector, rate: float, steps: int) -> list:
    """Gradient descent on g(x, .): the iterates y_0, ..., y_T."""
    iterates = [y]
    for _ in range(steps):
        iterates.append(iterates[-1] - rate * oracle.g_y(x, iterates[-1]))
    return iterates


def unroll(
    oracle: Oracle, x: Vector, iterates: list, rate: float, last: int | None = None
) -> Vector:
    """The reverse recursion over the last steps of gradient descent.

        a <- f_y(y_T);   t = T-1, ..., T-K:  G += Phi_x(y_t)' a,  a <- Phi_y(y_t)' a

    with Phi(x, y) = y - rate g_y(x, y).
    """
    steps = len(iterates) - 1
    last = steps if last is None else last
    adjoint = oracle.f_y(x, iterates[-1])
    total = oracle.f_x(x, iterates[-1])
    for t in reversed(range(steps - last, steps)):
        total = total - rate * oracle.g_xy(x, iterates[t], adjoint)
        adjoint = adjoint - rate * oracle.hessian(x) @ adjoint
    return total


def pessimistic(oracle: Oracle, x: Vector, iterates: list, f) -> int:
    """k*: the first of the iterates 1, ..., T with the largest upper loss."""
    losses = [f(x, y) for y in iterates[1:]]
    return 1 + losses.index(max(losses))


def mixture_path(
    oracle: Oracle, x: Vector, y: Vector, rate: float, weights: list
) -> list:
    """BDA: the iterates of steps along (1 - a_t) g_y + a_t f_y."""
    iterates = [y]
    for a in weights:
        y = iterates[-1]
        direction = (1 - a) * oracle.g_y(x, y) + a * oracle.f_y(x, y)
        iterates.append(y - rate * direction)
    return iterates


def mixture_products(
    oracle: Oracle, x: Vector, y: Vector, v: Vector, a: float
) -> tuple[Vector, Vector]:
    """phi_xy v and phi_yy v of phi = (1 - a) g + a f.

    The upper Hessian f_yy is constant in every oracle; it and f_xy are taken from
    differences of the hand-written f_y and f_x, exact for quadratic f.
    """
    f_xy = oracle.f_x(x, y + v) - oracle.f_x(x, y)
    f_yy = oracle.f_y(x, y + v) - oracle.f_y(x, y)
    mixed = (1 - a) * oracle.g_xy(x, y, v) + a * f_xy
    return mixed, (1 - a) * oracle.hessian(x) @ v + a * f_yy


def mixture(
    oracle: Oracle,
    x: Vector,
    y: Vector,
    rate: float,
    weights: list,
    last: int | None = None,
) -> tuple:
    """BDA's reverse recursion over the last steps, and the last iterate."""
    iterates = mixture_path(oracle, x, y, rate, weights)
    adjoint, total = oracle.f_y(x, iterates[-1]), oracle.f_x(x, iterates[-1])
    steps = list(zip(iterates, weights, strict=False))[-(last or len(weights)) :]
    for y, a in reversed(steps):
        mixed, curved = mixture_products(oracle, x, y, adjoint, a)
        total, adjoint = total - rate * mixed, adjoint - rate * curved
    return total, iterates[-1]


def implicit_mixture(oracle: Oracle, x: Vector, y: Vector, a: float) -> Vector:
    """f_x - phi_xy v with phi_yy v = f_y, all at y."""
    columns = [mixture_products(oracle, x, y, e, a)[1] for e in np.eye(len(y))]
    v = np.linalg.solve(np.stack(columns, axis=1), oracle.f_y(x, y))
    return oracle.f_x(x, y) - mixture_products(oracle, x, y, v, a)[0]


def series(oracle: Oracle, x: Vector, y: Vector, rate: float, terms: int) -> Vector:
    """f_x - g_xy v with v = rate * sum_{j < terms} (I - rate H)^j f_y."""
    term, v = oracle.f_y(x, y), np.zeros_like(y)
    for _ in range(terms):
        v = v + rate * term
        term = term - rate * oracle.hessian(x) @ term
    return oracle.f_x(x, y) - oracle.g_xy(x, y, v)


def rank_one(oracle: Oracle, x: Vector, y: Vector) -> Vector:
    g, f = oracle.g_y(x, y), oracle.f_y(x, y)
    return oracle.f_x(x, y) - (g @ f) / (g @ g) * oracle.g_x(x, y)


def nesterov(oracle: Oracle, x: Vector, y: Vector, rate: float, steps: int) -> list:
    """The t-sequence: iterates y_0, ..., y_T (not the points ahead of them)."""
    iterates, ahead, t = [y], y, 1.0
    for _ in range(steps):
        iterates.append(ahead - rate * oracle.g_y(x, ahead))
        after = (1 + np.sqrt(1 + 4 * t * t)) / 2
        ahead = iterates[-1] + (t - 1) / after * (iterates[-1] - iterates[-2])
        t = after
    return iterates


def implicit(oracle: Oracle, x: Vector, y: Vector) -> Vector:
    """f_x - g_xy v with g_yy v = f_y, all at y (solved or not)."""
    v = np.linalg.solve(oracle.hessian(x), oracle.f_y(x, y))
    return oracle.f_x(x, y) - oracle.g_xy(x, y, v)


def value_gap(
    oracle: Oracle, x: Vector, y: Vector, z: Vector | None, weight: float
) -> tuple[Vector, Vector]:
    """Both directions of one V-PBGD step; z is None where v does not depend on x."""
    scale = min(1 / (weight + 1e-8), 1)
    gap = oracle.g_x(x, y) - (0 if z is None else oracle.g_x(x, z))
    d_x = scale * (oracle.f_x(x, y) + weight * gap)
    d_y = scale * (oracle.f_y(x, y) + weight * oracle.g_y(x, y))
    return d_x, d_y


def gradient_norm(
    oracle: Oracle, x: Vector, y: Vector, weight: float
) -> tuple[Vector, Vector]:
    """Both directions of one G-PBGD step."""
    scale = min(1 / (weight + 1e-8), 1)
    r = oracle.g_y(x, y)
    d_x = scale * (oracle.f_x(x, y) + weight * oracle.g_xy(x, y, r))
    d_y = scale * (oracle.f_y(x, y) + weight * oracle.hessian(x) @ r)
    return d_x, d_y


def augmented_lagrangian(
    oracle: Oracle,
    x: Vector,
    y: Vector,
    *,
    rate: float,
    steps: int,
    rho: float,
    lam: float,
    nu: float,
) -> tuple[Vector, Vector]:
    """The upper direction of one step of the method of multipliers, and y after it."""

    def multiplied(y: Vector) -> Vector:
        return nu + rho * oracle.g_y(x, y)

    for _ in range(steps):
        curved = oracle.hessian(x) @ multiplied(y)
        y = y - rate * (oracle.f_y(x, y) + curved + lam * oracle.g_y(x, y))
    return oracle.f_x(x, y) + oracle.g_xy(x, y, multiplied(y)), y


def sgd(gradient, y: Vector, rate: float, steps: int) -> Vector:
    for _ in range(steps):
        y = y - rate * gradient(y)
    return y


def momentum(
    gradient, y: Vector, rate: float, steps: int, mu: float, nesterov: bool = False
) -> Vector:
    """Keras' form: the rate multiplies the gradient inside the velocity."""
    velocity = np.zeros_like(y)
    for _ in range(steps):
        g = gradient(y)
        velocity = mu * velocity - rate * g
        y = y + (mu * velocity - rate * g if nesterov else velocity)
    return y


def adam(
    gradient,
    y: Vector,
    rate: float,
    steps: int,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
) -> Vector:
    m, v = np.zeros_like(y), np.zeros_like(y)
    for t in range(1, steps + 1):
        g = gradient(y)
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g * g
        corrected = rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
        y = y - corrected * m / (np.sqrt(v) + epsilon)
    return y
