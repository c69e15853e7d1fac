"""Descent on the upper loss with a dynamic barrier for the value gap."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.arguments import positive, require_choice, require_number
from tfbilevel._core.batches import Batches
from tfbilevel._core.inner_solver import InnerSolver, require_inner
from tfbilevel._core.method import Step
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._methods.moves_lower import MovesLower
from tfbilevel._methods.penalty.divergence import grown
from tfbilevel._methods.penalty.value_gap import require_warm, solved_copy


class _Partials(NamedTuple):
    """Derivatives of f and of q = g(x, y) - g(x, z), z constant.

    Those in x are in the problem's own x, summed over tasks.
    """

    losses: tuple[tf.Tensor, tf.Tensor, tf.Tensor]  # f, g at y, g at z
    f_x: Any
    f_y: Any
    q_x: Any
    q_y: Any


@dataclasses.dataclass(frozen=True, eq=False)
class BOME(MovesLower):
    r"""First-order descent whose penalty weight is computed at every step (BOME).

        q(x, y) = g(x, y) - g(x, z),          z = T inner steps from y, held constant
        lambda  = max( phi - <grad f, grad q>, 0 ) / |grad q|^2
        d_x = f_x + lambda q_x,               d_y = f_y + lambda q_y

    with phi = eta |grad q|^2 or eta q, and inner products over x and y together. The
    step is the closest one to a step along grad f that decreases q by at least phi: a
    dynamic barrier. No weight has to be chosen or increased; eta sets how fast the gap
    closes compared with the progress in f.

    Cost: the inner steps, one upper and two lower gradients; no second derivatives.
    Memory: one copy of y. Assumes that x and y make steps of comparable size, SGD of
    one rate in the paper: another optimizer changes what the barrier promises. Prefer
    `ValueGap` or `F2SA` if a weight is known, `Implicit` or `Unroll` where the exact
    hypergradient matters.

    The metrics hold `gap` (q), `weight` (lambda) and `diverged`: 1 if the direction of
    y is ten times as long as the first of all.

    Args:
        inner: the solver of z; its `start` must be "warm". T = 10 in the paper.
        lower_optimizer: a Keras optimizer for y.
        barrier: eta, positive; 0.5 in the paper.
        control: phi. "gradient": eta |grad q|^2. "gap": eta q.

    Raises:
        ValueError: for an unsupported optimizer or choice, a barrier that is not
            positive, or an `inner` that does not start "warm".

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2 + 0.5 * x**2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.5), steps=10)
        >>> method = tb.BOME(inner, keras.optimizers.SGD(0.05))
        >>> result = tb.minimize(problem, method, tf.constant(3.0), tf.constant(0.0),
        ...     keras.optimizers.SGD(0.05), tb.Batches(None, None), steps=500)
        >>> round(float(result.upper), 1), round(float(result.lower), 1)
        (0.5, 0.5)

    References:
        Liu, Ye, Wright, Stone, Liu (2022), BOME! Bilevel optimization made easy: a
        simple first-order approach. arXiv:2209.08709.
    """

    inner: InnerSolver
    lower_optimizer: keras.optimizers.Optimizer
    barrier: float = 0.5
    control: str = "gradient"

    def __post_init__(self) -> None:
        _ = self.rule  # raises if the optimizer is not supported
        require_inner(self.inner)
        require_warm(self.inner)
        require_number(self.barrier, "barrier", positive, "above 0 (eta)")
        require_choice(self.control, "control", ("gradient", "gap"))

    @property
    def draws(self) -> int:
        """The number of lower batches that one step uses."""
        return self.inner.steps + 1

    @property
    def takes_second_derivatives(self) -> bool:
        return False

    @property
    def couples_tasks(self) -> bool:
        # One weight for all tasks: x is in every constraint.
        return True

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        lengths = problem.inner_product.norm(structure.to_tensors(lower))
        return {
            "step": tf.constant(0, tf.int64),
            "optimizer": self.rule.init(lower),
            "inner": self.inner.init(problem, upper, lower),
            "first": tf.zeros_like(lengths),
        }

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        lower = structure.to_tensors(lower)
        auxiliary, inner_state = solved_copy(self.inner, here, state, lower)
        made = self._partials(here, lower, auxiliary)
        upper_loss, lower_loss, reached = made.losses
        weight = self._weight(made)
        along = structure.add_scaled(made.f_y, weight, made.q_y)
        length = here.norm(along)
        metrics, first = grown((length, length), state)
        moved, optimizer = self.rule.update(along, state["optimizer"], lower)
        return Step(
            upper_gradient=tf.nest.map_structure(
                here.mean, structure.add_scaled(made.f_x, weight, made.q_x)
            ),
            lower=fixed_projection(problem, upper, moved, "BOME"),
            state={
                "step": state["step"] + 1,
                "optimizer": optimizer,
                "inner": inner_state,
                "first": first,
            },
            metrics={
                "upper_loss": here.mean(upper_loss),
                "lower_loss": here.mean(lower_loss),
                "gap": here.mean(lower_loss - reached),
                "weight": weight,
                **metrics,
            },
        )

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        at = problem.prepared(upper, batches)
        auxiliary, _ = solved_copy(self.inner, at, state, structure.to_tensors(lower))
        weight = self._weight(self._partials(at, lower, auxiliary))
        draw = self.inner.steps

        def value(x: Nest) -> tf.Tensor:
            here = problem.prepared(x, batches)
            gap = here.lower_loss(lower, draw) - here.lower_loss(auxiliary, draw)
            f = here.upper_loss(lower)
            return tf.cast(f, weight.dtype) + weight * tf.cast(gap, weight.dtype)

        return value

    def _partials(self, here: Prepared, lower: Nest, auxiliary: Nest) -> _Partials:
        batch = here.batches.lower_at(self.inner.steps)
        f, (f_c, f_y) = derivatives.value_and_partials(
            lambda c, y: here.problem.upper_loss(c, y, here.batches.upper),
            here.upper,
            lower,
        )
        g, (g_c, q_y) = derivatives.value_and_partials(
            lambda c, y: here.problem.lower_loss(c, y, batch), here.upper, lower
        )
        reached, (z_c,) = derivatives.value_and_partials(
            lambda c: here.problem.lower_loss(c, auxiliary, batch), here.upper
        )
        response = derivatives.add_partials(g_c, derivatives.scale_partial(-1, z_c))
        zeros = structure.zeros_like(here.upper)
        return _Partials(
            losses=(f, g, reached),
            f_x=here.total(f_c, zeros),
            f_y=derivatives.fill_zeros(f_y, lower),
            q_x=here.total(zeros, response),
            q_y=derivatives.require_connected(q_y, lower, "lower", "the lower loss"),
        )

    def _weight(self, made: _Partials) -> tf.Tensor:
        """lambda."""
        of_f, of_q = (made.f_x, made.f_y), (made.q_x, made.q_y)
        square, product = structure.dot(of_q, of_q), structure.dot(of_f, of_q)
        if self.control == "gradient":
            phi = self.barrier * square
        else:
            _, lower_loss, reached = made.losses
            gap = tf.cast(lower_loss - reached, square.dtype)
            phi = self.barrier * tf.maximum(gap, 0)
        return structure.ratio(tf.maximum(phi - product, 0), square)
