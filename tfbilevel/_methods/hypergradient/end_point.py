"""Where an inner solve ends, for the methods that look at its end alone."""

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
    """What an inner solve led to.

    Attributes:
        here: the problem; its lower loss is the one that the last steps descended.
        point: where the hypergradient is taken.
        after: the last iterate.
        metrics: what there is to say of the end.
    """

    here: Prepared
    point: Iterate
    after: Iterate
    metrics: Metrics


@dataclasses.dataclass(frozen=True, eq=False)
class EndPoint:
    """An inner solve that is not differentiated, and which of its iterates counts.

    Attributes:
        inner: makes the steps.
        end: "final": the last iterate. "pessimistic": the one of largest upper loss.
        aggregate: mixes the upper loss into the steps, and into the lower loss that
            counts at the end, with the weight that the step from there would have.
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
        """All inner steps from where this outer step starts."""
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
            # The optimizer's state is the last iterate's: of this one nothing but the
            # lower variables is wanted.
            point = after._replace(lower=made.worst.lower)
            metrics["truncation"] = steps
        there = aggregated(self.aggregate, here, at=steps)
        return Reached(there, point, after, metrics)

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: dict
    ) -> Callable[[Nest], tf.Tensor]:
        """x -> f at the iterate that counts; which one that is does not change."""
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
