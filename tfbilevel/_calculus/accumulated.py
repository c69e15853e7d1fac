"""Sums over parts of the data that hold one term in memory, in derivatives too."""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tfbilevel._calculus.derivatives import vjp
from tfbilevel._calculus.loops import serial_loop


class Parts(NamedTuple):
    """The terms of a sum.

    Attributes:
        count: how many terms are alike, of the numbers 0, 1, ...; one loop makes them.
        most: an integer that `count` does not exceed.
        rest: whether there is another term, of the number `None`, after them.
    """

    count: Any
    most: int
    rest: bool


def accumulated(term: Callable, parts: Parts, arguments: list, like: list) -> list:
    """The sum of `term(arguments, number)` over all parts, for every tensor of a term.

    Its derivative is the sum of the terms' derivatives, which is again such a sum, and
    so on for every order. So TensorFlow never differentiates the loop, and nothing that
    a term computes is kept: the next derivative computes it again.

    Args:
        term: (list of tensors, number) -> list of tensors, `None` where a tensor does
            not depend on the arguments. It must only depend on arguments and number,
            and on constants.
        parts: the terms.
        arguments: floating-point tensors.
        like: tensors of the shapes and dtypes of a term.

    Returns:
        The sums, `None` where every term is.
    """
    connected: set[int] = set()

    def derived(both: list, number: Any) -> list:
        primals, cotangents = both[: len(arguments)], both[len(arguments) :]
        present: list[int] = []

        def made(*primals: tf.Tensor) -> tuple[list, None]:
            values = term(list(primals), number)
            present.extend(i for i, v in enumerate(values) if v is not None)
            return [values[i] for i in present], None

        _, _, pullback = vjp(made, *primals)
        through = pullback([cotangents[i] for i in present])
        # The gradient of a gather is IndexedSlices, which have no derivative as such.
        return [None if v is None else tf.convert_to_tensor(v) for v in through]

    @tf.custom_gradient
    def at(*_: tf.Tensor) -> tuple[list, Callable]:
        # Not the arguments that TensorFlow passes: they are copies, which a loop around
        # this one would store for every step. No tape may see the loop: its derivative
        # would be built too, and everything kept for it.
        hidden = [tf.stop_gradient(argument) for argument in arguments]
        sums = _sums(term, parts, hidden, like, connected)

        def pull(*cotangents: tf.Tensor, variables: Any = ()) -> Any:
            both = [*arguments, *cotangents]
            made = accumulated(derived, parts, both, arguments)
            return (made, [None] * len(variables)) if variables else made

        return sums, pull

    made = at(*arguments)
    return [made[i] if i in connected else None for i in range(len(like))]


def _sums(
    term: Callable, parts: Parts, arguments: list, like: list, connected: set[int]
) -> list:
    def added(sums: list, number: Any) -> list:
        made = term(arguments, number)
        connected.update(i for i, v in enumerate(made) if v is not None)
        return [
            total if value is None else total + tf.ensure_shape(value, total.shape)
            for total, value in zip(sums, made, strict=True)
        ]

    _, sums = serial_loop(
        lambda number, _: number < parts.count,
        lambda number, sums: (number + 1, added(sums, number)),
        (tf.constant(0), [tf.zeros_like(leaf) for leaf in like]),
        parts.most,
    )
    return added(sums, None) if parts.rest else sums
