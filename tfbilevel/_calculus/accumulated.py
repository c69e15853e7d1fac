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


def accumulated(
    term: Callable, parts: Parts, arguments: list[list], like: list[list]
) -> list[list]:
    """The sum of `term(arguments, number)` over all parts, for every tensor of a term.

    Its derivative is the sum of the terms' derivatives, which is again such a sum, and
    so on for every order. So TensorFlow never differentiates the loop, and nothing that
    a term computes is kept: the next derivative computes it again.

    Args:
        term: (groups of tensors, number) -> groups of tensors, `None` where a tensor
            does not depend on the arguments. It must only depend on arguments and
            number, and on constants.
        parts: the terms.
        arguments: floating-point tensors, in groups.
        like: groups of tensors of the shapes and dtypes of a term. Results of one group
            are differentiated together. A group that nothing uses is not computed, in
            a compiled graph.

    Returns:
        The sums, `None` where every term is.
    """
    connected: set[int] = set()
    # No tape may see the loop: its derivative would be built, and everything kept for
    # it, though the one below is used.
    hidden = [[tf.stop_gradient(leaf) for leaf in group] for group in arguments]
    sums = _sums(term, parts, hidden, like, connected)

    def group_of_sums(place: int) -> list:
        def derived(both: list[list], number: Any) -> list[list]:
            *primals, cotangents = both
            present: list[int] = []

            def made(*groups: list) -> tuple[list, None]:
                values = term(list(groups), number)[place]
                present.extend(i for i, v in enumerate(values) if v is not None)
                return [values[i] for i in present], None

            _, _, pullback = vjp(made, *primals)
            through = pullback([cotangents[i] for i in present])
            # The gradient of a gather is IndexedSlices, which have no derivative.
            return [
                [None if v is None else tf.convert_to_tensor(v) for v in group]
                for group in through
            ]

        @tf.custom_gradient
        def at(*given: tf.Tensor) -> tuple[list, Callable]:
            # The sums are given too: TensorFlow searches what leads from the arguments
            # to the results. Of the arguments these are copies, which a loop around
            # this one would store for every step.
            values = list(given[: len(sums[place])])

            def pull(*cotangents: tf.Tensor, variables: Any = ()) -> Any:
                both = [*arguments, list(cotangents)]
                made = _flat(accumulated(derived, parts, both, arguments))
                made = [*[None] * len(values), *made]
                return (made, [None] * len(variables)) if variables else made

            return values, pull

        made: Any = at(*sums[place], *_flat(arguments)) if sums[place] else []
        return made

    numbers = iter(range(len(_flat(like))))
    return [
        [value if next(numbers) in connected else None for value in group]
        for group in map(group_of_sums, range(len(like)))
    ]


def _sums(
    term: Callable, parts: Parts, arguments: list, like: list, connected: set[int]
) -> list[list]:
    def added(sums: list, number: Any) -> list:
        made = _flat(term(arguments, number))
        connected.update(i for i, v in enumerate(made) if v is not None)
        return [
            total if value is None else total + tf.ensure_shape(value, total.shape)
            for total, value in zip(sums, made, strict=True)
        ]

    _, sums = serial_loop(
        lambda number, _: number < parts.count,
        lambda number, sums: (number + 1, added(sums, number)),
        (tf.constant(0), [tf.zeros_like(leaf) for leaf in _flat(like)]),
        parts.most,
    )
    remaining = iter(added(sums, None) if parts.rest else sums)
    return [[next(remaining) for _ in group] for group in like]


def _flat(groups: list[list]) -> list:
    return [leaf for group in groups for leaf in group]
