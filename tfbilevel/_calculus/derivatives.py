"""Derivatives: the only file that opens a gradient tape.

A pullback returns `None` for a leaf that the function does not reach. Callers
decide what that means: zero for the partial derivative of the upper loss in the
upper variables, and `require_connected`'s error everywhere else.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.collectives import several_replicas
from tfbilevel._calculus.lost_derivatives import MissingSecondDerivativeError, lost
from tfbilevel._workarounds import right_derivatives

Pullback = Callable[[Any], Any]
Products = Callable[..., tuple[Any, Any]]  # those of `lower_gradient_pullback`


def vjp(function: Callable, *primals: Any) -> tuple[Any, Any, Pullback]:
    """A function's value and its vector-Jacobian product.

    Args:
        function: primals -> (value, auxiliary); the auxiliary part is returned
            unchanged and not differentiated.
        *primals: nests of tensors.

    Returns:
        The value, the auxiliary part and the pullback, which maps a cotangent
        shaped like the value to one cotangent per primal, `None` at leaves that are
        not connected. It can be called several times, inside `tf.while_loop` too.
    """
    primals = structure.distinct(primals)
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(tf.nest.flatten(primals))
        with right_derivatives():
            value, auxiliary = function(*primals)

    def pullback(cotangent: Any) -> Any:
        with _differentiating():
            return tape.gradient(
                tf.nest.flatten(value),
                primals,
                output_gradients=tf.nest.flatten(cotangent),
            )

    return value, auxiliary, pullback


def jvp(function: Callable, *primals: Any) -> tuple[Any, Any, Pullback, list]:
    """A function's value and its Jacobian-vector product.

    It is the transpose of the vector-Jacobian product, which is linear in its
    cotangent. It takes two reverse sweeps, which work in every graph, unlike
    TensorFlow's forward mode.

    Args:
        function: primals -> (value, auxiliary), as for `vjp`.
        *primals: nests of tensors.

    Returns:
        The value, the auxiliary part, the pushforward (it maps a tuple of tangents
        shaped like the primals to a tangent shaped like the value), and for each
        primal whether the value depends on its leaves.
    """
    primals = structure.distinct(primals)
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as outer:
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as inner:
            inner.watch(tf.nest.flatten(primals))
            with right_derivatives():
                value, auxiliary = function(*primals)
        seeds = [tf.zeros_like(leaf) for leaf in tf.nest.flatten(value)]
        outer.watch(seeds)
        with _differentiating():
            entries = inner.gradient(
                tf.nest.flatten(value), tf.nest.flatten(primals), output_gradients=seeds
            )
        # The gradient of a gather is IndexedSlices, which have no derivative as such.
        cotangents = [
            None if entry is None else tf.convert_to_tensor(entry) for entry in entries
        ]
    connected = [entry is not None for entry in cotangents]

    def pushforward(tangents: Any) -> Any:
        flat = tf.nest.flatten(tangents)
        pairs = [
            pair for pair in zip(cotangents, flat, strict=True) if pair[0] is not None
        ]
        made = [None] * len(seeds)
        if pairs:
            targets, along = zip(*pairs, strict=True)
            with _differentiating():
                made = outer.gradient(
                    list(targets), seeds, output_gradients=list(along)
                )
        return fill_zeros(tf.nest.pack_sequence_as(value, made), value)

    return value, auxiliary, pushforward, tf.nest.pack_sequence_as(primals, connected)


def value_and_partials(function: Callable, *primals: Any) -> tuple[tf.Tensor, Any]:
    """A scalar function's value and its partial derivative in every primal.

    Leaves that are not connected are `None`.
    """
    primals = structure.distinct(primals)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(tf.nest.flatten(primals))
        with right_derivatives():
            value = require_scalar(function(*primals))
    with right_derivatives():
        return value, tape.gradient(value, primals)


def lower_gradient(
    lower_loss: Callable, upper: Any, lower: Any, batch: Any
) -> tuple[tf.Tensor, Any]:
    """g(x, y) and g_y(x, y); every lower leaf must be connected."""
    value, (gradient,) = value_and_partials(
        lambda y: lower_loss(upper, y, batch), lower
    )
    return value, require_connected(gradient, lower, "lower", "the lower loss")


def lower_gradient_pullback(
    lower_loss: Callable, upper: Any, lower: Any, batch: Any
) -> tuple[tf.Tensor, Any, Products]:
    """g, g_y and the map v -> (g_xy v, g_yy v), which takes one reverse sweep.

    Where only one of the products is used, call the map with `mixed=False` or
    `curvature=False`, and the other need not be computed: a graph drops what nobody
    reads, but not a sum over replicas. So each product has a sweep of its own there.

    Entries of g_xy v are `None` where the lower gradient does not depend on that
    upper leaf. Where the lower gradient is constant (a lower loss linear in a leaf),
    g_yy v is zero, which is its true value.
    """

    upper, lower = structure.distinct((upper, lower))
    with contextlib.ExitStack() as tapes:
        watched = ((upper, lower),)
        if several_replicas():
            watched = ((upper, ()), ((), lower))
        outer = []
        for leaves in watched:
            tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
            outer.append(tapes.enter_context(tape))
            tape.watch(tf.nest.flatten(leaves))
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch(tf.nest.flatten(lower))
            with right_derivatives():
                value = require_scalar(lower_loss(upper, lower, batch))
        with right_derivatives():
            entries = inner.gradient(value, lower)
        gradient = require_connected(entries, lower, "lower", "the lower loss")

    def swept(tape: tf.GradientTape, sources: Any, vector: Any) -> Any:
        with _differentiating():
            return tape.gradient(
                tf.nest.flatten(gradient),
                sources,
                output_gradients=tf.nest.flatten(vector),
            )

    def pullback(
        vector: Any, *, mixed: bool = True, curvature: bool = True
    ) -> tuple[Any, Any]:
        if len(outer) == 1:
            of_upper, of_lower = swept(outer[0], (upper, lower), vector)
            return of_upper, fill_zeros(of_lower, lower)
        of_upper = swept(outer[0], upper, vector) if mixed else None
        if not curvature:
            return of_upper, None
        return of_upper, fill_zeros(swept(outer[1], lower, vector), lower)

    return value, gradient, pullback


@contextlib.contextmanager
def _differentiating() -> Iterator[None]:
    """Turns TensorFlow's error in a second reverse sweep into one that names the
    operation without a derivative."""
    try:
        with right_derivatives():
            yield
    except (LookupError, NotImplementedError) as error:
        message = str(error)
        known = re.search(
            r"no entry for: (\w+)|op type: (\w+)|(recompute_grad)", message
        )
        name = next(filter(None, known.groups())) if known else type(error).__name__
        operation = lost(name, "", "missing", message.splitlines()[-1])
        raise MissingSecondDerivativeError([operation]) from error


def require_scalar(loss: Any) -> tf.Tensor:
    """The loss as a tensor, or an error unless it is a floating-point scalar."""
    if loss is None:
        raise ValueError(
            "A loss must return a floating-point scalar. Add the missing `return`. "
            "Received: None"
        )
    value = tf.convert_to_tensor(loss)
    if value.shape.rank != 0 or not value.dtype.is_floating:
        raise ValueError(
            "A loss must be a floating-point scalar; a gradient of anything else "
            "would be of its sum without saying so. Reduce it with tf.reduce_mean or "
            f"tf.reduce_sum. Received: a loss of shape {value.shape} and dtype "
            f"{value.dtype.name}"
        )
    return value


def fill_zeros(gradient: Any, primal: Any) -> Any:
    """The gradient with zeros where it is not connected."""
    return tf.nest.pack_sequence_as(
        primal,
        [
            tf.zeros_like(leaf) if entry is None else tf.convert_to_tensor(entry)
            for entry, leaf in zip(
                tf.nest.flatten(gradient), tf.nest.flatten(primal), strict=True
            )
        ],
    )


def add_partials(*gradients: Any) -> Any:
    """The sum of partial derivatives, with `None` (not connected) counted as zero.

    The sum is `None` only where every term is.
    """

    def total(*entries: Any) -> Any:
        present = [tf.convert_to_tensor(e) for e in entries if e is not None]
        return tf.add_n(present) if present else None

    flat = [total(*e) for e in zip(*map(tf.nest.flatten, gradients), strict=True)]
    return tf.nest.pack_sequence_as(gradients[0], flat)


def scale_partial(factor: Any, gradient: Any) -> Any:
    """factor * gradient, in which `None` stays `None`."""
    return tf.nest.map_structure(
        lambda g: None if g is None else structure.coefficient(factor, g) * g, gradient
    )


class UnconnectedGradientError(ValueError):
    """A variable that a loss must depend on does not reach it."""

    def __init__(self, level: str, index: int, name: str, source: str):
        self.level, self.index, self.source = level, index, source
        self.name = name
        super().__init__(
            f"{source} does not depend on the {level} variable {name}, so its "
            f"gradient is not connected. Every {level} variable must enter it "
            "through differentiable TensorFlow operations: use the variable, or "
            f"leave it out of the {level} variables. Received: no gradient for {name}"
        )


def require_connected(gradient: Any, primal: Any, level: str, source: str) -> Any:
    """The gradient, or an error naming the first leaf that is not connected.

    Args:
        gradient: partial derivatives, `None` where not connected.
        primal: the variables, for structure and names.
        level: "upper" or "lower".
        source: what was differentiated, as a noun phrase for the message.
    """
    names = structure.paths(primal, level)
    for index, entry in enumerate(tf.nest.flatten(gradient)):
        if entry is None:
            capitalised = source[0].upper() + source[1:]
            raise UnconnectedGradientError(level, index, names[index], capitalised)
    return tf.nest.pack_sequence_as(
        primal, [tf.convert_to_tensor(entry) for entry in tf.nest.flatten(gradient)]
    )
