"""The end of an inner solve, for methods that do not differentiate its steps."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tfbilevel._calculus.aliases import Metrics, Nest
from tfbilevel._core.aggregation import Aggregation, aggregated, require_aggregation
from tfbilevel._core.arguments import require_choice
from tfbilevel._core.batches import Batches
from tfbilevel._core.inner_solver import InnerSolver, Iterate, require_inner
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._methods.hypergradient.trajectory import ENDS, Span, search


class Reached(NamedTuple):
    """The result of an inner solve.

    Attributes:
        here: the problem; its lower loss is the one that the last steps minimised.
        point: the iterate at which the hypergradient is computed.
        after: the last iterate.
        metrics: metrics of the end point.
    """

    here: Prepared
    point: Iterate
    after: Iterate
    metrics: Metrics


@dataclasses.dataclass(frozen=True, eq=False)
class EndPoint:
    """An inner solve without derivatives, with the choice of the iterate that counts.

    Attributes:
        inner: makes the steps.
        end: "final": the last iterate. "pessimistic": the one with the largest upper
            loss.
        aggregate: mixes the upper loss into the steps, and into the lower loss at the
            end, with the weight of the next step.
    """

    inner: InnerSolver
    end: str
    aggregate: Aggregation | None

    def __post_init__(self) -> None:
        require_inner(self.inner)
        require_choice(self.end, "end", ENDS)
        require_aggregation(self.aggregate)
        plain = self.end == "final" and self.aggregate is None
        if self.inner.atol is not None and not plain:
            raise ValueError(
                "`inner.atol` must be None with end='pessimistic' or `aggregate`: "
                "which iterate counts, and how the losses are mixed there, depends on "
                "the number of steps. Leave it out. "
                f"Received: atol={self.inner.atol!r}, end={self.end!r}, "
                f"aggregate={self.aggregate!r}"
            )

    def reach(self, here: Prepared, lower: Nest, state: dict) -> Reached:
        """Make all inner steps from the start of this outer step."""
        along = aggregated(self.aggregate, here)
        steps: Any = self.inner.steps
        metrics = {}
        if self.end == "final":
            after, _ = self.inner.settle(along, lower, state)
            point = after
        else:
            begun = self.inner.begin(along, lower, state)
            made = search(Span(self.inner, 0, False, True), along, begun)
            after, steps = made.end, made.worst.steps
            # The optimizer's state is that of the last iterate; of this one only the
            # lower variables are used.
            point = after._replace(lower=made.worst.lower)
            metrics["truncation"] = steps
        there = aggregated(self.aggregate, here, at=steps)
        return Reached(there, point, after, metrics)

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: dict
    ) -> Callable[[Nest], tf.Tensor]:
        """x -> f at the iterate that counts, whose number is held constant."""
        met = self.reach(problem.prepared(upper, batches), lower, state).metrics

        def value(x: Nest) -> tf.Tensor:
            here = problem.prepared(x, batches)
            if self.end == "final":
                return here.upper_loss(self.reach(here, lower, state).after.lower)
            here = aggregated(self.aggregate, here)
            begun = self.inner.begin(here, lower, state)
            steps = self.inner.steps
            end, _ = self.inner.run(here, begun, 0, met["truncation"], steps)
            return here.upper_loss(end.lower)

        return value
