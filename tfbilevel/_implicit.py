"""The implicit function theorem."""

import dataclasses
from typing import Any

from tfbilevel import _derivatives as derivatives
from tfbilevel import _structure as structure
from tfbilevel._inner import InnerSolver, require_inner
from tfbilevel._linear_solvers import ConjugateGradient, LinearSolver
from tfbilevel._method import Method, Step
from tfbilevel._problem import Batches, Problem


@dataclasses.dataclass(frozen=True, eq=False)
class Implicit(Method):
    r"""Hypergradient by the implicit function theorem (AID, iMAML, AID-CG, AID-FP).

    At y close to y*(x):

        dF/dx = f_x - g_xy v,      where      g_yy v = f_y

    Cost: the inner solve plus one Hessian-vector product per linear-solver step
    (each about two gradients of g). Memory does not grow with the inner steps.
    Assumes g_yy positive definite at y and y near stationary: the bias is
    proportional to the distance from y to y*(x), which the metric
    `stationarity` (the norm of g_y) watches. Projections of the lower variables are
    taken for inactive at y. Prefer `Unroll` for a handful of inner steps or a lower
    problem that is never solved well.

    The metrics hold `residual` (relative) and `iterations` of the linear solve.

    Args:
        inner: approximates y*(x); the closer, the smaller the bias.
        solver: solves g_yy v = f_y from Hessian-vector products.

    Raises:
        ValueError: if a solver that steps with the inner learning rate meets a
            schedule; give it a `rate`.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.5), steps=40)
        >>> method = tb.Implicit(inner, tb.ConjugateGradient(5))
        >>> x, y = tf.constant(3.0), tf.constant(0.0)
        >>> step = method.step(problem, x, y, tb.Batches(None, None), method.init(
        ...     problem, x, y))
        >>> round(float(step.upper_gradient), 4)
        2.0

    References:
        Pedregosa (2016), Hyperparameter optimization with approximate gradient.
        arXiv:1602.02355. Grazzi et al. (2020), arXiv:2006.16218.
    """

    inner: InnerSolver
    solver: LinearSolver = dataclasses.field(default_factory=ConjugateGradient)

    def __post_init__(self) -> None:
        require_inner(self.inner)
        if not isinstance(self.solver, LinearSolver):
            raise ValueError(
                "`solver` must be a linear solver such as tb.ConjugateGradient(20). "
                f"Received: solver={self.solver!r}"
            )
        steps_with_rate = hasattr(self.solver, "rate")
        if (
            steps_with_rate
            and self.solver.rate is None
            and (self.inner.rule.scheduled or self.inner.learning_rate is not None)
        ):
            raise ValueError(
                "`solver` takes its rate from the inner optimizer, which has no "
                "constant one. Give the solver a rate, such as tb.Neumann(10, "
                f"rate=0.1). Received: solver={self.solver!r}"
            )

    def init(self, problem: Problem, upper: Any, lower: Any) -> Any:
        state = {"inner": self.inner.init(problem, upper, lower)}
        if self.solver.warm:
            state["solution"] = structure.zeros_like(lower)
        return state

    def step(
        self, problem: Problem, upper: Any, lower: Any, batches: Batches, state: Any
    ) -> Step:
        here = problem.prepared(upper, batches)
        lower, inner_state, _ = self.inner.solve(
            here.problem, here.upper, lower, here.batches, state["inner"]
        )
        upper_loss, partial, rhs = here.upper_partials(lower)
        lower_loss, gradient, pullback = derivatives.lower_gradient_pullback(
            here.problem.lower_loss,
            here.upper,
            lower,
            here.batches.lower_at(self.inner.steps),
        )
        rate = None if self.inner.rule.scheduled else self.inner.rule.learning_rate
        solution = self.solver.solve(
            lambda vector: pullback(vector)[1], rhs, state.get("solution"), rate
        )
        mixed, _ = pullback(structure.scale(-1, solution.value))
        after = {"inner": inner_state}
        if self.solver.warm:
            after["solution"] = solution.value
        return Step(
            upper_gradient=here.gradient(partial, mixed),
            lower=lower,
            state=after,
            metrics={
                "upper_loss": upper_loss,
                "lower_loss": lower_loss,
                "stationarity": structure.norm(gradient),
                "residual": solution.residual,
                "iterations": solution.iterations,
            },
        )
