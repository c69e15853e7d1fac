"""The hypergradients in float64 NumPy, derived by hand, without autodiff.

The names of directional derivatives of a network start with `d_`. `direction` is a list
of arrays shaped like the variables.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import protocol


def hypergradient(method: str, instance: protocol.Instance) -> np.ndarray:
    """The upper gradient of the first step."""
    exact = {name: _widened(field) for name, field in instance._asdict().items()}
    return {
        "v-pbgd": _value_gap,
        "g-pbgd": _gradient_norm,
        "rhg": _unroll,
        "aid-cg": lambda instance: _implicit(instance, _conjugate_gradient),
        "aid-fp": lambda instance: _implicit(instance, _fixed_point),
        "stocbio": _stochastic,
    }[method](instance._replace(**exact))


def _widened(field: Any) -> Any:
    """The field with floating-point arrays in float64."""
    if isinstance(field, list):
        return [_widened(leaf) for leaf in field]
    if isinstance(field, np.ndarray) and field.dtype == np.float32:
        return field.astype("float64")
    return field


def _value_gap(instance: protocol.Instance) -> np.ndarray:
    weights = _sigmoid(instance.upper)
    train = (instance.train, instance.train_labels)
    _, gradient = _losses_and_gradient(instance.auxiliary, *train, weights)
    auxiliary = _descend(instance.auxiliary, protocol.AUXILIARY_RATE, gradient)
    at_auxiliary, _ = _losses_and_gradient(auxiliary, *train, weights)
    at_lower, _ = _losses_and_gradient(instance.lower, *train, weights)
    gamma = protocol.WEIGHT["v-pbgd"]
    slope = weights * (1.0 - weights) / len(weights)
    return protocol.scale(gamma) * gamma * slope * (at_lower - at_auxiliary)


def _gradient_norm(instance: protocol.Instance) -> np.ndarray:
    weights = _sigmoid(instance.upper)
    train = (instance.train, instance.train_labels)
    _, gradient = _losses_and_gradient(instance.lower, *train, weights)
    gamma = protocol.WEIGHT["g-pbgd"]
    mixed, _ = _second_order(instance.lower, *train, weights, gradient)
    return protocol.scale(gamma) * gamma * mixed


def _unroll(instance: protocol.Instance) -> np.ndarray:
    weights = _sigmoid(instance.upper)
    train = (instance.train, instance.train_labels)
    iterates = [instance.lower]
    for _ in range(instance.inner_steps):
        _, gradient = _losses_and_gradient(iterates[-1], *train, weights)
        iterates.append(_descend(iterates[-1], protocol.INNER_RATE, gradient))
    ones = np.ones(len(instance.validation))
    _, adjoint = _losses_and_gradient(
        iterates[-1], instance.validation, instance.validation_labels, ones
    )
    total = np.zeros_like(weights)
    for y in reversed(iterates[:-1]):
        mixed, curvature = _second_order(y, *train, weights, adjoint)
        total -= protocol.INNER_RATE * mixed
        adjoint = _descend(adjoint, protocol.INNER_RATE, curvature)
    return total


def _implicit(instance: protocol.Instance, solve: Callable) -> np.ndarray:
    """-g_xy v, with g_yy v = f_y solved approximately, after one inner step."""
    weights = _sigmoid(instance.upper)
    train = (instance.train, instance.train_labels)
    _, gradient = _losses_and_gradient(instance.lower, *train, weights)
    y = _descend(instance.lower, protocol.INNER_RATE, gradient)
    ones = np.ones(len(instance.validation))
    _, adjoint = _losses_and_gradient(
        y, instance.validation, instance.validation_labels, ones
    )
    v = solve(lambda u: _second_order(y, *train, weights, u)[1], adjoint)
    mixed, _ = _second_order(y, *train, weights, v)
    return -mixed


def _conjugate_gradient(product: Callable[[list], list], rhs: list) -> list:
    v = [np.zeros_like(leaf) for leaf in rhs]
    residual = direction = rhs
    for _ in range(protocol.SOLVER_STEPS):
        curved = product(direction)
        square = _dot(residual, residual)
        length = square / _dot(direction, curved)
        v = _descend(v, -length, direction)
        residual = _descend(residual, length, curved)
        ratio = _dot(residual, residual) / square
        direction = _descend(residual, -ratio, direction)
    return v


def _fixed_point(product: Callable[[list], list], rhs: list) -> list:
    """v <- (I - rate g_yy) v + f_y from zero; rate * v converges to the solution."""
    v = [np.zeros_like(leaf) for leaf in rhs]
    for _ in range(protocol.SOLVER_STEPS):
        v = _descend(v, protocol.INNER_RATE, product(v))
        v = _descend(v, -1.0, rhs)
    return [protocol.INNER_RATE * leaf for leaf in v]


def _stochastic(instance: protocol.Instance) -> np.ndarray:
    weights = _sigmoid(instance.upper)
    (images, labels), stacked = protocol.make_batches("stocbio", instance)
    batches = [
        (train, train_labels, weights[indices])
        for train, train_labels, indices in zip(*stacked, strict=True)
    ]
    steps = protocol.STOCHASTIC_STEPS
    y = instance.lower
    for batch in batches[:steps]:
        _, gradient = _losses_and_gradient(y, *batch)
        y = _descend(y, protocol.INNER_RATE, gradient)
    _, term = _losses_and_gradient(y, images, labels, np.ones(len(images)))
    total = term
    for batch in batches[steps:-1]:
        _, curvature = _second_order(y, *batch, term)
        term = _descend(term, protocol.SERIES_RATE, curvature)
        total = _descend(total, -1.0, term)
    mixed, _ = _second_order(y, *batches[-1], total)
    gradient = np.zeros_like(weights)
    gradient[instance.draws[-1]] = -protocol.SERIES_RATE * mixed
    return gradient


def _losses_and_gradient(
    variables: list, images: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, list]:
    """Each example's loss l_i, and the gradient of mean(weights * l)."""
    layers, logits = _forward(variables, images)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1))
    losses = log_sum - shifted[np.arange(len(labels)), labels]
    delta = _residual(logits, labels) * (weights / len(labels))[:, None]
    gradient: list = []
    for index in reversed(range(len(layers))):
        kernel = variables[2 * index]
        gradient = [layers[index].T @ delta, delta.sum(axis=0), *gradient]
        if index:
            delta = (delta @ kernel.T) * layers[index] * (1.0 - layers[index])
    return losses, gradient


def _second_order(
    variables: list,
    images: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    direction: list,
) -> tuple[np.ndarray, list]:
    """g_xy v and g_yy v of g = mean(sigmoid(x) * l), for v = direction."""
    layers, logits = _forward(variables, images)
    d_layers = [np.zeros_like(images)]
    for index in range(len(layers)):
        kernel, d_kernel = variables[2 * index], direction[2 * index]
        d_logits = layers[index] @ d_kernel + direction[2 * index + 1]
        if index:
            d_logits += d_layers[index] @ kernel
        if index + 1 < len(layers):
            hidden = layers[index + 1]
            d_layers.append(d_logits * hidden * (1.0 - hidden))
    residual = _residual(logits, labels)
    slope = weights * (1.0 - weights) / len(labels)
    mixed = slope * (residual * d_logits).sum(axis=1)

    probabilities = _softmax(logits)
    inner = (probabilities * d_logits).sum(axis=1, keepdims=True)
    share = (weights / len(labels))[:, None]
    delta = residual * share
    d_delta = probabilities * (d_logits - inner) * share
    curvature: list = []
    for index in reversed(range(len(layers))):
        kernel, d_kernel = variables[2 * index], direction[2 * index]
        hidden, d_hidden = layers[index], d_layers[index]
        curvature = [
            hidden.T @ d_delta + d_hidden.T @ delta,
            d_delta.sum(axis=0),
            *curvature,
        ]
        if index:
            slope = hidden * (1.0 - hidden)
            d_slope = d_hidden * (1.0 - 2.0 * hidden)
            back, d_back = delta @ kernel.T, d_delta @ kernel.T + delta @ d_kernel.T
            delta, d_delta = back * slope, d_back * slope + back * d_slope
    return mixed, curvature


def _forward(variables: list, images: np.ndarray) -> tuple[list, np.ndarray]:
    """Each layer's input, and the logits."""
    layers = [images]
    for kernel, bias in zip(variables[:-2:2], variables[1:-2:2], strict=True):
        layers.append(_sigmoid(layers[-1] @ kernel + bias))
    return layers, layers[-1] @ variables[-2] + variables[-1]


def _residual(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    residual = _softmax(logits)
    residual[np.arange(len(labels)), labels] -= 1.0
    return residual


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _sigmoid(a: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-a))


def _descend(variables: list, rate: float, gradient: list) -> list:
    return [v - rate * g for v, g in zip(variables, gradient, strict=True)]


def _dot(a: list, b: list) -> float:
    return sum(float(np.vdot(u, v)) for u, v in zip(a, b, strict=True))
