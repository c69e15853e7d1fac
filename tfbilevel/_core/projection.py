"""Projections of lower variables, which may depend on the upper ones."""

from typing import Any

import tensorflow as tf

from tfbilevel._calculus import derivatives
from tfbilevel._calculus.aliases import Nest
from tfbilevel._core.problem import Problem


def fixed_projection(problem: Problem, upper: Nest, lower: Nest, method: str) -> Any:
    """`problem.projected_lower`, for methods that do not differentiate it.

    Raises:
        ValueError: if the projection depends on the upper variables, because that part
            of the derivative would be lost.
    """
    if problem.project_lower is None:
        return lower

    def project(c: Nest) -> tuple[Any, None]:
        return problem.projected_lower(c, lower), None

    projected, _, pullback = derivatives.vjp(project, upper)
    reached = pullback(tf.nest.map_structure(tf.ones_like, projected))[0]
    if any(entry is not None for entry in tf.nest.flatten(reached)):
        raise ValueError(
            "`project_lower` must not depend on the upper variables with "
            f"tb.{method}, which does not differentiate projections. Use tb.Unroll, "
            "tb.ForwardUnroll, or tb.Implicit(through='optimizer') with a solver such "
            "as tb.NormalConjugateGradient; or apply tf.stop_gradient to what should "
            "be constant. Received: a projection that reads upper variables"
        )
    return projected
