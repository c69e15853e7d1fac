"""Persistent evolution strategies through the windows of a long inner loop."""

import dataclasses
from typing import Any

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._calculus.collectives import several_replicas
from tfbilevel._core.arguments import (
    positive,
    require_choice,
    require_count,
    require_number,
)
from tfbilevel._core.batches import Batches
from tfbilevel._core.inner_solver import (
    InnerSolver,
    Iterate,
    require_fixed_length,
    require_inner,
)
from tfbilevel._core.method import Method, Step
from tfbilevel._core.problem import Problem
from tfbilevel._tasks.mapping import map_sequentially, map_tasks


@dataclasses.dataclass(frozen=True, eq=False)
class PersistentES(Method):
    r"""Unbiased gradients of a long inner loop, a window at a time (PES).

    The inner loop has `horizon` steps, in windows of K = `inner.steps`, one window per
    outer step. Pairs of particles run it with x + e and x - e, where e is other normal
    noise in every window. Each particle goes on from its own y; its noise accumulates:

        y_i^+- <- K inner steps from y_i^+- with x +- e_i,     e_i ~ N(0, scale^2 I)
        s_i <- s_i + e_i
        dF/dx = mean_i  s_i ( f(x + e_i, y_i^+) - f(x - e_i, y_i^-) ) / (2 scale^2)

    After the horizon all particles return to the start and s to 0. For constant x the
    expectation in window w is the gradient of the smoothed loss

        E f(x + e_w, y(x + e_1, ..., x + e_w))

    through all w windows, although only one is run: nothing is truncated. Without the
    sum, e_i in place of s_i, it would be the derivative through one window, whose bias
    is that of `Unroll(inner)` from a warm start. The variance grows with the number of
    windows since the start and with the number of upper variables.

    `end="final"` makes the mean over a horizon's windows the gradient of f(x, y_T),
    T = `horizon`: every window has (f - f of the window before) * (T / K) in place of
    f. `end="mean"`: that of the mean of f over the ends of the windows.

    Cost: (2 `pairs` + 1) K gradients of g in y, and 2 `pairs` + 1 values of f; no
    derivatives in x: f and g may jump there. Memory: 2 `pairs` + 1 copies of y and the
    slots. The last copy runs with x itself, and returns to the start with the others:
    it is the lower variables, at which the metrics have both losses. For few upper
    variables (a schedule of the learning rate, a few coefficients), also where the
    gradient of a long loop explodes. Prefer `ForwardUnroll` if the whole loop can be
    run and differentiated for one outer step: it has no noise.

    x +- e is not projected: f and g must be defined around x. The samples of the losses
    and the batches are the same for all particles. Tasks are refused. One estimate is
    noise for the most part, so `tb.check_hypergradient` finds a large `error`.

    Args:
        inner: makes the steps of one window; `start` must be "cold" or a function.
            Slots, such as momentum, stay with their particle within the horizon.
        horizon: T, number of inner steps after which the loop begins again; a multiple
            of `inner.steps`.
        pairs: number of pairs of particles; the variance is proportional to 1 / pairs.
        scale: standard deviation of e, in units of x.
        end: "final" or "mean".
        seed: of the noise, which depends on it and on the number of the outer step;
            XLA's noise is another one.

    Raises:
        ValueError: for an inner solver with a warm start, a tolerance, a schedule of
            the outer step or a state that is carried beyond the horizon; if an argument
            is out of its range; at the start for a problem over tasks.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.5), steps=5, start="cold")
        >>> method = tb.PersistentES(inner, horizon=20, pairs=4)
        >>> result = tb.minimize(problem, method, tf.constant(3.0), tf.constant(0.0),
        ...     keras.optimizers.SGD(0.02), tb.Batches(None, None), steps=400)
        >>> abs(float(result.upper) - 1.0) < 0.1
        True

    References:
        Vicol, Metz, Sohl-Dickstein (2021), Unbiased gradient estimation in unrolled
        computation graphs with persistent evolution strategies. arXiv:2112.13835.
    """

    inner: InnerSolver
    horizon: int
    pairs: int = 1
    scale: float = 0.1
    end: str = "final"
    seed: int = 0

    def __post_init__(self) -> None:
        require_inner(self.inner)
        require_fixed_length(self.inner, "PersistentES")
        inner = self.inner
        refused = {
            "start": (inner.start == "warm", "'cold' or a function: a horizon's start"),
            "optimizer_state": (inner.optimizer_state == "carry", "'reset'"),
            "learning_rate": (
                inner.learning_rate is not None,
                "None: give the optimizer a Keras schedule, of the inner step",
            ),
        }
        for name, (wrong, rule) in refused.items():
            if wrong:
                raise ValueError(
                    f"`inner.{name}` must be {rule}. Particles go on from window to "
                    "window by themselves, with their slots, and all begin again after "
                    f"the horizon. Received: {name}={getattr(inner, name)!r}"
                )
        require_count(self.horizon, "horizon")
        if self.horizon % inner.steps:
            raise ValueError(
                "`horizon` must be a multiple of `inner.steps`, so that it consists of "
                f"whole windows. Received: horizon={self.horizon}, steps={inner.steps}"
            )
        require_count(self.pairs, "pairs")
        remedy = "It is the standard deviation of the noise, such as 0.1."
        require_number(self.scale, "scale", positive, "above 0", remedy)
        require_choice(self.end, "end", ("final", "mean"))
        require_count(self.seed, "seed", least=0)

    @property
    def windows(self) -> int:
        """The number of windows of a horizon."""
        return self.horizon // self.inner.steps

    @property
    def moves_lower(self) -> bool:
        return True

    @property
    def lower_steps(self) -> int:
        return self.inner.steps

    @property
    def takes_second_derivatives(self) -> bool:
        return False

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        if problem.has_tasks:
            raise ValueError(
                "tb.PersistentES takes no tasks: its particles go on from step to "
                "step, and tasks are new in every step. Use tb.Unroll. "
                "Received: a problem over tasks"
            )
        upper, lower = structure.to_tensors((upper, lower))
        slots = self.inner.fresh(problem, lower).slots
        dtype = tf.nest.flatten(upper)[0].dtype
        return {
            "step": tf.constant(0, tf.int64),
            "inner": self.inner.init(problem, upper, lower),
            "noise": _stacked(upper, self.pairs),
            "difference": tf.zeros([self.pairs], dtype),
            "lower": _stacked(lower, 2 * self.pairs),
            "slots": _stacked(slots, 2 * self.pairs + 1),
        }

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        upper, lower = structure.to_tensors((upper, lower))
        window = tf.math.floormod(state["step"], self.windows)
        begins = tf.equal(window, 0)
        noise = self._noise(upper, state["step"])

        def run(particle: tuple) -> tuple:
            """The window of one particle, with its losses at the end."""
            own, y, slots = particle
            here = problem.prepared(structure.add(upper, own), batches)
            fresh = self.inner.begin(here, y, state["inner"])
            iteration = fresh.optimizer.iteration
            iteration += tf.cast(window * self.inner.steps, iteration.dtype)
            iterate = Iterate(
                structure.where(begins, fresh.lower, y),
                fresh.optimizer._replace(
                    iteration=iteration,
                    slots=structure.where(begins, fresh.optimizer.slots, slots),
                ),
            )
            steps = self.inner.steps
            end, lower_loss = self.inner.run(here, iterate, 0, steps, steps)
            upper_loss = here.upper_loss(end.lower)
            return upper_loss, lower_loss, end.lower, end.optimizer.slots

        # The last one has no noise: y itself.
        particles = (
            _joined(lambda e: [e, -e, tf.zeros_like(e[:1])], noise),
            _joined(lambda y, own: [y, own[None]], state["lower"], lower),
            state["slots"],
        )
        mapped = map_sequentially if self._sequential(lower) else map_tasks
        upper_losses, lower_losses, ends, slots = mapped(run, particles)

        noise = structure.where(begins, noise, structure.add(state["noise"], noise))
        f = tf.cast(upper_losses, state["difference"].dtype)
        difference = (f[: self.pairs] - f[self.pairs : -1]) / 2
        weight = difference
        if self.end == "final":
            carried = tf.where(begins, tf.zeros_like(f[0]), state["difference"])
            weight = self.windows * (difference - carried)
        weight /= self.pairs * self.scale**2
        return Step(
            upper_gradient=tf.nest.map_structure(
                lambda s: tf.tensordot(tf.cast(weight, s.dtype), s, 1), noise
            ),
            lower=tf.nest.map_structure(lambda leaf: leaf[-1], ends),
            state={
                "step": state["step"] + 1,
                "inner": self.inner.carried(
                    Iterate(lower, self.inner.fresh(problem, lower)), state["inner"]
                ),
                "noise": noise,
                "difference": difference,
                "lower": tf.nest.map_structure(lambda leaf: leaf[:-1], ends),
                "slots": slots,
            },
            metrics={
                "upper_loss": upper_losses[-1],
                "lower_loss": lower_losses[-1],
                "window": window,
            },
        )

    def _noise(self, upper: Nest, step: tf.Tensor) -> Any:
        """e of every pair in this window."""
        leaves = tf.nest.flatten(upper)
        key = tf.stack([tf.cast(self.seed, tf.int64), tf.cast(step, tf.int64)])
        shape = [self.pairs, structure.size(upper)]
        normal = tf.random.stateless_normal(shape, key, dtype=leaves[0].dtype)
        parts = tf.split(
            self.scale * normal, [leaf.shape.num_elements() for leaf in leaves], axis=1
        )
        made = [
            tf.cast(tf.reshape(part, [self.pairs, *leaf.shape]), leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
        return tf.nest.pack_sequence_as(upper, made)

    def _sequential(self, lower: Nest) -> bool:
        """Whether particles run one after the other: convolutions with a kernel for
        each particle are slow, and sums over replicas cannot be vectorized."""
        kernels = any(leaf.shape.rank > 3 for leaf in tf.nest.flatten(lower))
        return kernels or several_replicas()


def _stacked(like: Nest, count: int) -> Any:
    """Zeros with a leading axis for the particles."""
    return tf.nest.map_structure(
        lambda leaf: tf.zeros([count, *leaf.shape], leaf.dtype), like
    )


def _joined(parts: Any, *nests: Any) -> Any:
    """Every leaf's parts along the axis of the particles."""
    return tf.nest.map_structure(lambda *leaves: tf.concat(parts(*leaves), 0), *nests)
