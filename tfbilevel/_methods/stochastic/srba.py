"""The single loop with recursive estimates, exact again after every period."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Metrics, Nest, State
from tfbilevel._core.arguments import positive, require_count, require_number
from tfbilevel._core.batches import Batches
from tfbilevel._core.method import Step
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._methods.stochastic.directions import followed, of_lower, spoiled
from tfbilevel._methods.stochastic.followed_solution import FollowedSolution
from tfbilevel._methods.stochastic.slices import Slices, summed


@dataclasses.dataclass(frozen=True, eq=False)
class SRBA(FollowedSolution):
    r"""`SOBA` with recursive estimates of its three directions (SRBA).

        every `period` steps:   D_k = d(u_k), the mean over all slices
        in the other steps:     D_k = d_i(u_k) - d_i(u_{k-1}) + D_{k-1}

        y_{k+1} = y_k - update( D_y ),   x_{k+1} = x_k - update( D_x )
        v_{k+1} = P( v_k - rho_k D_v )

    with u = (x, y, v) and d = (g_y, g_yy v - f_y, f_x - g_xy v), those of `SOBA`. i is
    a random lower slice, together with a random part of the upper batch; both points
    of a step see the same. So the noise of a step is that of a difference, which falls
    with the steps' length: with constant rates the iterates end in a solution, as with
    `SABA`, but without tables. P projects v on a ball (`radius`).

    The slices are those of a stacked lower batch, `tb.pair(..., lower_batches=n)`: an
    ordinary step needs one, and the n together are the large batch. With

        tb.StackedBatches(upper=(x_val, y_val), lower=(x_blocks, y_blocks))

    as `batches` of `tb.minimize`, where the blocks [n, size, ...] are all data, the
    large batch is the full one, as in the paper, and a step only reads what it needs.
    A dataset delivers all n slices in every step; for large n let it deliver indices
    (`tb.index_batches`), which the losses look up.

    Cost: twice `SOBA` in ordinary steps, n times (and `upper_parts` gradients of f)
    every `period` steps. Only what the step needs is computed: the kind of step sets
    the number of iterations of a loop, because replicas that exchange sums cannot
    branch, and to compute both kinds and choose would cost n times in every step.
    Memory: two vectors like x, five like y. Assumes g
    strongly convex in y, and rho below 2 / (largest eigenvalue of g_yy on any batch).
    A large batch that is not much larger than a slice makes things worse: its noise
    stays for a whole period. Prefer `SOBA` then, or if a rough solution is enough.

    The metrics are those of `SOBA`, from the estimates.

    Args:
        lower_optimizer: a Keras optimizer for y that `tb.differentiable` supports; SGD
            in the paper.
        rate: rho, positive: a number or a schedule of the outer step.
        period: the number of steps from one large batch to the next, at least 1.
            `None`: as many as there are lower slices; 1: only large batches.
        upper_parts: m, into how many equal parts the upper batch is cut: part p has
            every m-th of its examples, from number p. Every tensor of the batch with
            an axis has the examples along the first. 1: every step takes the whole
            upper batch.
        radius: v stays in the ball of this radius, positive; over tasks, that of each
            task. `None`: no projection, as in the authors' experiments. In the paper it
            is (bound of |f_y|) / (smallest eigenvalue of g_yy), which no |v| exceeds at
            a solution of the lower problem; the proof needs it.
        seed: of the random slices, an integer.

    Raises:
        ValueError: for an unsupported optimizer or an argument out of its range; in
            `step` for an upper batch that cannot be cut into equal parts.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2 + 0.5 * x**2,
        ...     lower_loss=lambda x, y, batch: 0.5 * batch * (y - x) ** 2,
        ... )
        >>> all_data = tb.StackedBatches(None, tf.constant([0.5, 1.0, 1.5]))
        >>> method = tb.SRBA(keras.optimizers.SGD(0.3), rate=0.3)
        >>> result = tb.minimize(problem, method, tf.constant(3.0), tf.constant(0.0),
        ...     keras.optimizers.SGD(0.1), all_data, steps=300)
        >>> round(float(result.upper), 3), round(float(result.lower), 3)
        (0.5, 0.5)

    References:
        Dagréou, Moreau, Vaiter, Ablin (2024), A lower bound and a near-optimal
        algorithm for bilevel empirical risk minimization. arXiv:2302.08766.
    """

    _: dataclasses.KW_ONLY
    period: int | None = None
    upper_parts: int = 1
    radius: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.period is not None:
            require_count(self.period, "period")
        require_count(self.upper_parts, "upper_parts")
        if self.radius is not None:
            require_number(self.radius, "radius", positive, "above 0, or None")
        require_count(self.seed, "seed", least=0)

    @property
    def draws(self) -> int:
        """The number of lower batches that an ordinary step uses; more make the large
        batch."""
        return 1

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        begun = super().init(problem, upper, lower)
        point = structure.copied((upper, lower, begun["solution"]))
        return {**begun, "before": point, "directions": structure.zeros_like(point)}

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        slices = Slices(problem, batches, self.upper_parts)
        step, solution = state["step"], state["solution"]
        period = slices.lower if self.period is None else self.period
        large = tf.equal(step % tf.cast(period, step.dtype), 0)
        point = structure.to_tensors((upper, lower, solution))
        made = _estimates(
            slices,
            large,
            slices.chosen(self.seed, step),
            point,
            state["before"],
            state["directions"],
        )
        along_x, along_y, along_v = made.directions
        norm = problem.inner_product.norm
        metrics, largest = followed(
            norm,
            made.losses,
            lower=along_y,
            solution=along_v,
            slope=norm(made.adjoint),
            largest=state["largest"],
        )
        moved, optimizer = self.rule.update(along_y, state["optimizer"], point[1])
        after = structure.add_scaled(solution, -self.rates(step), along_v)
        if self.radius is not None:
            size = norm(after)
            inside = structure.ratio(structure.scalar(self.radius, size.dtype), size)
            after = structure.scale(tf.where(size > self.radius, inside, 1), after)
        return Step(
            upper_gradient=spoiled(along_x, along_v),
            lower=fixed_projection(problem, upper, moved, "SRBA"),
            state={
                "step": step + 1,
                "optimizer": optimizer,
                "solution": after,
                "largest": largest,
                "before": point,
                "directions": made.directions,
            },
            metrics=metrics,
        )

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        del upper
        slices = Slices(problem, batches, self.upper_parts)
        kind = tf.nest.flatten(structure.to_tensors(lower))[0].dtype

        def value(x: Nest) -> tf.Tensor:
            """The mean over all slices of f - <v, g_y>."""

            def product(t: tf.Tensor) -> tf.Tensor:
                here = slices.prepared(x, t, 0)
                _, gradient = here.lower_gradient(lower, 0)
                return here.mean(structure.dot(state["solution"], gradient))

            def loss(t: tf.Tensor) -> tf.Tensor:
                return tf.cast(slices.prepared(x, 0, t).upper_loss(lower), kind)

            zero = tf.zeros([], kind)
            f = summed(zero, slices.upper, loss) / slices.upper
            pairing = summed(zero, slices.lower, product)
            return f - pairing / tf.cast(slices.lower, kind)

        return value


class _Estimates(NamedTuple):
    """The directions of x, y and v; f_y and the losses at this step's point."""

    directions: tuple
    adjoint: Nest
    losses: Metrics


def _estimates(
    slices: Slices,
    large: tf.Tensor,
    chosen: tuple[tf.Tensor, tf.Tensor],
    point: tuple,
    before: tuple,
    directions: tuple,
) -> _Estimates:
    """The means over all slices at `point`; or the directions before, and the change
    from the point before to this one on the chosen slice.

    Both are a sum over slices at one of the two points, with weights.

    Args:
        slices: of this outer step.
        large: whether all slices are taken, a bool scalar.
        chosen: the numbers of the lower slice and the upper part otherwise.
        point: (x, y, v).
        before: that of the step before.
        directions: the estimates of the step before.
    """
    kind = tf.nest.flatten(point[1])[0].dtype

    def at(t: tf.Tensor, count: Any, one: tf.Tensor) -> tuple:
        """The point and the slice of term t, the weight of its directions, and that of
        what is of this step's point."""
        here = large | (t == 0)
        share = 1 / tf.cast(count, tf.float64)
        sign = tf.where(here, tf.ones_like(share), -1)
        weight = tf.where(large, share, sign)
        seen = structure.where(here, point, before)
        return seen, tf.where(large, t, one), weight, tf.where(here, weight, 0)

    def lower_term(t: tf.Tensor) -> tuple:
        (x, y, v), number, weight, of_point = at(t, slices.lower, chosen[0])
        made = of_lower(slices.prepared(x, number, 0), y, v)
        along = (structure.scale(-1, made.mixed), made.gradient, made.curved)
        loss = tf.cast(made.loss, kind)
        return structure.scale(weight, along), structure.scale(of_point, loss)

    def upper_term(t: tf.Tensor) -> tuple:
        (x, y, _), number, weight, of_point = at(t, slices.upper, chosen[1])
        here = slices.prepared(x, 0, number)
        value, partial, adjoint = here.upper_partials(y)
        along = (here.gradient(partial), structure.scale(-1, adjoint))
        seen = (tf.cast(value, kind), adjoint)
        return structure.scale(weight, along), structure.scale(of_point, seen)

    def terms(count: Any) -> tf.Tensor:
        return tf.where(large, count, 2)

    zero = tf.zeros([], kind)
    begun = structure.where(large, structure.zeros_like(directions), directions)
    (along_x, along_y, along_v), lower_loss = summed(
        (begun, zero), terms(slices.lower), lower_term
    )
    (along_x, along_v), (upper_loss, adjoint) = summed(
        ((along_x, along_v), (zero, structure.zeros_like(point[1]))),
        terms(slices.upper),
        upper_term,
    )
    losses = {"upper_loss": upper_loss, "lower_loss": lower_loss}
    return _Estimates((along_x, along_y, along_v), adjoint, losses)
