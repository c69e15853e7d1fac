"""The implicit function theorem."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.aggregation import Aggregation
from tfbilevel._core.arguments import require_choice
from tfbilevel._core.batches import Batches
from tfbilevel._core.inner_solver import InnerSolver
from tfbilevel._core.method import Method, Step
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._linear_solvers import ConjugateGradient, LinearSolver, LinearSystem
from tfbilevel._methods.hypergradient.end_point import EndPoint


@dataclasses.dataclass(frozen=True, eq=False)
class Implicit(Method):
    r"""Hypergradient by the implicit function theorem (AID, iMAML, AID-CG, AID-FP).

    At a y close to y*(x):

        dF/dx = f_x - g_xy v,      where      g_yy v = f_y

    Cost: the inner solve plus one Hessian-vector product per linear-solver step
    (each about two gradients of g). Memory does not grow with the inner steps.
    Assumes g_yy positive definite at y and y nearly stationary: the bias is
    proportional to the distance from y to y*(x), which the metric `stationarity` (the
    norm of g_y) indicates. Projections of the lower variables are assumed to be
    inactive at y. Prefer `Unroll` for a handful of inner steps or a lower problem that
    is never solved well.

    `through="optimizer"` differentiates the fixed point of the inner optimizer's own
    step instead, including its slots (momentum, moments): with s = (y, slots) and
    s = Phi(x, s),

        dF/dx = f_x + Phi_x' v,    where    (I - Phi_s') v = (f_y, 0)

    The hypergradient at the solution is the same. The linear iteration then contracts
    if the inner optimizer does, and `FixedPoint` and `Neumann` need no rate. The system
    is not symmetric: `ConjugateGradient` is rejected except for plain gradient steps.

    `end="pessimistic"` evaluates all of this at the iterate with the largest f instead
    of the last one. `aggregate` mixes f into the inner steps; the mixture at the end
    then replaces g in the system, with the weight of the next step. The lower variables
    after the step are always y_T.

    The metrics hold `residual` (relative) and `iterations` of the linear solve, and
    `diverged`: 1 if the solver's steps led away from the solution (for conjugate
    gradients: met a curvature that is not positive), for which `fit` and `tb.minimize`
    also issue a warning.

    Args:
        inner: approximates y*(x); the closer, the smaller the bias.
        solver: solves g_yy v = f_y with Hessian-vector products.
        through: "gradient": a plain gradient step, for any inner optimizer.
            "optimizer": the inner optimizer's own step.
        end: "final" or "pessimistic" (PTT), as in `tb.Unroll`.
        aggregate: a `tb.Aggregation` (BDA), or `None`.

    Raises:
        ValueError: if a solver that uses the inner learning rate is combined with a
            schedule (give it a `rate`), for an unknown `through`, for conjugate
            gradients through an optimizer other than plain SGD or a projection, or for
            a pessimistic end with `through="optimizer"` or an inner tolerance.

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
    through: str = "gradient"
    end: str = "final"
    aggregate: Aggregation | None = None

    def __post_init__(self) -> None:
        _ = self._end_point  # raises for invalid arguments
        require_choice(self.through, "through", ("gradient", "optimizer"))
        if not isinstance(self.solver, LinearSolver):
            raise ValueError(
                "`solver` must be a linear solver such as tb.ConjugateGradient(20). "
                f"Received: solver={self.solver!r}"
            )
        if self.through == "optimizer":
            if self.end == "pessimistic":
                raise ValueError(
                    "`through` must be 'gradient' with end='pessimistic': the fixed "
                    "point of the optimizer's step is where its steps end. Received: "
                    "through='optimizer', end='pessimistic'"
                )
            if self.solver.needs_symmetric and not _is_plain(self.inner):
                raise _unsymmetric(self.solver)
            if self.solver.needs_point:
                raise ValueError(
                    "`solver` must not have a preconditioner with through='optimizer', "
                    "whose vectors hold the optimizer's slots too. Leave it out, or "
                    f"take through='gradient'. Received: solver={self.solver!r}"
                )
        elif self.solver.needs_rate and not self.inner.has_constant_rate:
            raise ValueError(
                "`solver` takes its rate from the inner optimizer, which has no "
                "constant one. Give the solver a rate, such as tb.Neumann(10, "
                f"rate=0.1). Received: solver={self.solver!r}"
            )

    @property
    def _end_point(self) -> EndPoint:
        """The inner solve, with the choice of its end point."""
        return EndPoint(self.inner, self.end, self.aggregate)

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        if (
            self.through == "optimizer"
            and self.solver.needs_symmetric
            and problem.project_lower is not None
        ):
            raise _unsymmetric(self.solver)
        if self.through == "optimizer" and self.inner.accelerated and problem.has_tasks:
            raise ValueError(
                "`inner` must not be accelerated with through='optimizer' over tasks: "
                "its step sizes are one sequence for all of them. Use "
                "SGD(nesterov=True) or through='gradient'. "
                f"Received: inner={self.inner!r}"
            )
        inner = self.inner.init(problem, upper, lower)
        like = structure.to_tensors(lower)
        if self.through == "optimizer":
            like = (like, self.inner.fresh(problem, like).slots)
        begin = self.solver.init_blocks if problem.has_tasks else self.solver.init
        state = {"inner": inner, "solver": begin(like)}
        if self.solver.scheduled:
            state["step"] = tf.constant(0, tf.int64)
        return state

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here, iterate, end, metrics = self._end_point.reach(
            problem.prepared(upper, batches), lower, state["inner"]
        )
        if self.through == "gradient":
            fixed_projection(here.problem, here.upper, iterate.lower, "Implicit")
        upper_loss, partial, adjoint = here.upper_partials(iterate.lower)
        equation = (
            self._gradient_equation
            if self.through == "gradient"
            else self._optimizer_equation
        )(here, iterate, adjoint)
        system = equation.system.with_inner_product(here.problem.inner_product)
        system = system._replace(
            point=(here.problem._own_upper(here.upper), iterate.lower),
            outer_step=state.get("step", 0),
        )
        solution = self.solver.solve(system, equation.rhs, state["solver"])
        # Solvers ignore nonfinite values, and would return their start.
        fine = tf.math.is_finite(system.norm(equation.rhs))
        fine &= tf.math.is_finite(solution.residual)
        kept = structure.scale(tf.where(fine, 1.0, np.nan), solution.value)
        response = equation.response(kept)
        after = {
            "inner": self.inner.carried(end, state["inner"]),
            "solver": solution.state,
        }
        if "step" in state:
            after["step"] = state["step"] + 1
        residual = solution.residual
        return Step(
            upper_gradient=here.gradient(partial, response),
            lower=end.lower,
            state=after,
            metrics={
                "upper_loss": upper_loss,
                "lower_loss": equation.lower_loss,
                "stationarity": here.norm(equation.gradient),
                "residual": residual,
                "iterations": solution.iterations,
                "diverged": tf.cast(solution.diverged, residual.dtype),
                **metrics,
            },
        )

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        return self._end_point.objective(problem, upper, lower, batches, state["inner"])

    def _gradient_equation(
        self, here: Prepared, iterate: Any, rhs: Nest
    ) -> "_Equation":
        lower_loss, gradient, pullback = here.lower_gradient_pullback(
            iterate.lower, self.inner.steps
        )
        rate = None if self.inner.rule.scheduled else self.inner.rule.learning_rate
        return _Equation(
            LinearSystem(lambda vector: pullback(vector, mixed=False)[1], rate=rate),
            rhs,
            lambda value: pullback(structure.scale(-1, value), curvature=False)[0],
            lower_loss,
            gradient,
        )

    def _optimizer_equation(
        self, here: Prepared, iterate: Any, adjoint: Nest
    ) -> "_Equation":
        point = (iterate.lower, iterate.optimizer.slots)
        draw = self.inner.steps

        def inner_map(c: Nest, state: State) -> tuple[Any, None]:
            lower, slots = state
            optimizer = iterate.optimizer._replace(slots=slots)
            start = iterate._replace(lower=lower, optimizer=optimizer)
            end, _ = self.inner.advance(here.at(c), start, draw)
            return (end.lower, end.optimizer.slots), None

        _, _, pullback = derivatives.vjp(inner_map, here.upper, point)

        def product(vector: Nest) -> Any:
            turned = derivatives.fill_zeros(pullback(vector)[1], point)
            return structure.subtract(vector, turned)

        def transposed(vector: Nest) -> Any:
            return structure.subtract(vector, push((vector,)))

        push: Any = None
        if self.solver.transposes:
            push = derivatives.jvp(lambda s: inner_map(here.upper, s), point)[2]
        lower_loss, gradient = self.inner.gradient(here, iterate, draw)
        return _Equation(
            LinearSystem(product, push and transposed, rate=1.0),
            (adjoint, structure.zeros_like(iterate.optimizer.slots)),
            lambda value: pullback(value)[0],
            lower_loss,
            gradient,
        )


class _Equation(NamedTuple):
    """The linear system of an implicit gradient, and the use of its solution.

    Attributes:
        system, rhs: A and b.
        response: v -> the gradient of f through y, `None` where not connected.
        lower_loss, gradient: g and g_y.
    """

    system: LinearSystem
    rhs: Nest
    response: Callable[[Nest], Nest]
    lower_loss: tf.Tensor
    gradient: Nest


def _is_plain(inner: InnerSolver) -> bool:
    """Whether the inner steps are gradient steps with one rate for all entries."""
    optimizer = inner.rule.optimizer
    return (
        isinstance(optimizer, keras.optimizers.SGD)
        and not optimizer.momentum
        and not inner.accelerated
        and inner.learned_rate is None
        and inner.hyperparameters is None
    )


def _unsymmetric(solver: LinearSolver) -> ValueError:
    return ValueError(
        "`solver` must not need a symmetric system with through='optimizer': only "
        "plain gradient steps of a constant or scheduled rate, without "
        "`project_lower`, have one. Use tb.NormalConjugateGradient, tb.FixedPoint or "
        "tb.Direct. "
        f"Received: solver={solver!r}"
    )
