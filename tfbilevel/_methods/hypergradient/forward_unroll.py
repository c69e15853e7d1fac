"""Forward-mode differentiation through the inner loop."""

import dataclasses
from typing import Any

import tensorflow as tf

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._calculus.loops import serial_loop
from tfbilevel._core.batches import Batches
from tfbilevel._core.inner_solver import (
    InnerSolver,
    Iterate,
    require_fixed_length,
    require_inner,
)
from tfbilevel._core.method import Method, Step
from tfbilevel._core.problem import Problem


@dataclasses.dataclass(frozen=True, eq=False)
class ForwardUnroll(Method):
    r"""Hypergradient by forward mode through the inner steps (forward-HG).

        Z_0 = d start / dx,      Z_{t+1} = Phi_y Z_t + Phi_x,   dF/dx = f_x + Z_T' f_y

    This is the number that `Unroll` computes, exact for every T, with memory that does
    not grow with T: one tangent of y (and of the optimizer's slots) for each of the n
    entries of x. A step costs about n Hessian-vector products. For few upper variables
    (one learning rate, a handful of coefficients) and long loops. Prefer `Unroll` for
    more than about ten; with `prepare`, all entries that it returns count too.

    Args:
        inner: the inner solver whose steps are differentiated.

    Raises:
        ValueError: if `inner` is not a `tb.InnerSolver`.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> method = tb.ForwardUnroll(tb.InnerSolver(keras.optimizers.SGD(0.5), 1))
        >>> x, y = tf.constant(2.0), tf.constant(2.0)
        >>> step = method.step(problem, x, y, tb.Batches(None, None), method.init(
        ...     problem, x, y))
        >>> float(step.lower), float(step.upper_gradient)
        (2.0, 0.5)

    References:
        Franceschi, Donini, Frasconi, Pontil (2017), Forward and reverse
        gradient-based hyperparameter optimization. arXiv:1703.01785.
    """

    inner: InnerSolver

    def __post_init__(self) -> None:
        require_inner(self.inner)
        require_fixed_length(self.inner, "ForwardUnroll")

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        return self.inner.init(problem, upper, lower)

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        basis = _basis(structure.to_tensors(here.upper))
        connected: set[int] = set()

        def note(reached: Any) -> None:
            connected.update(i for i, hit in enumerate(tf.nest.flatten(reached)) if hit)

        def start(c: Nest) -> tuple[Any, Iterate]:
            iterate = self.inner.begin(here.at(c), lower, state)
            return (iterate.lower, iterate.optimizer.slots), iterate

        _, iterate, push, reached = derivatives.jvp(start, here.upper)
        note(reached[0])
        tangents = tf.map_fn(
            lambda c: push((c,)),
            basis,
            fn_output_signature=_specs((iterate.lower, iterate.optimizer.slots)),
        )

        def body(t: tf.Tensor, now: Iterate, value: Any, tangents: Any) -> tuple:
            del value

            def inner_map(c: Nest, y: Nest, slots: list) -> tuple[Any, Any]:
                optimizer = now.optimizer._replace(slots=slots)
                point = Iterate(y, optimizer)
                end, value = self.inner.advance(here.at(c), point, t)
                return (end.lower, end.optimizer.slots), (end, value)

            _, (end, value), push, reached = derivatives.jvp(
                inner_map, here.upper, now.lower, now.optimizer.slots
            )
            note(reached[0])
            tangents = tf.map_fn(
                lambda pair: push((pair[0], *pair[1])),
                (basis, tangents),
                fn_output_signature=_specs((end.lower, end.optimizer.slots)),
            )
            return t + 1, end, tf.cast(value, dtype), tangents

        dtype = tf.nest.flatten(iterate.lower)[0].dtype
        _, end, lower_loss, (tangent, _) = serial_loop(
            lambda *_: True,
            body,
            (tf.constant(0), iterate, tf.zeros([], dtype), tangents),
            self.inner.steps,
        )
        upper_loss, partial, adjoint = here.upper_partials(end.lower)
        along = tf.map_fn(
            lambda row: structure.dot(adjoint, row),
            tangent,
            fn_output_signature=tf.nest.flatten(adjoint)[0].dtype,
        )
        flat = tf.nest.flatten(structure.from_vector(along, here.upper))
        response = tf.nest.pack_sequence_as(
            here.upper,
            [leaf if i in connected else None for i, leaf in enumerate(flat)],
        )
        return Step(
            upper_gradient=here.gradient(partial, response),
            lower=end.lower,
            state=self.inner.carried(end, state),
            metrics={
                "upper_loss": upper_loss,
                "lower_loss": lower_loss,
            },
        )


def _basis(like: Nest) -> Any:
    """All unit vectors of the nest, stacked on a leading axis."""
    unit = tf.eye(structure.size(like), dtype=tf.nest.flatten(like)[0].dtype)
    return tf.map_fn(
        lambda row: structure.from_vector(row, like),
        unit,
        fn_output_signature=_specs(like),
    )


def _specs(like: Nest) -> Any:
    return tf.nest.map_structure(
        lambda leaf: tf.TensorSpec(leaf.shape, leaf.dtype), like
    )
