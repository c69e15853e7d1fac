"""tfbilevel's methods for `stochastic.py`, several outer steps to a compiled call.

One oracle call is one gradient of f or of g on a batch, in x, in y or in both at one
point. A product with g_yy, with g_xy or with both, of one vector at one point, counts
as two. A value that the method needs counts as one; values that only metrics need are
not computed, and not counted.
What a method counts is written beside it. "At two points" doubles what follows.
"""

import argparse
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import stochastic_protocol as protocol
import tensorflow as tf
import tensorflow_losses
from stochastic_protocol import BATCH, RAMP, TERMS, Setting

import tfbilevel as tb


@keras.saving.register_keras_serializable("tfbilevel-benchmarks")
class Decay(keras.optimizers.schedules.LearningRateSchedule):
    """rate * (k + 1)^(-power), k = step // every."""

    def __init__(self, rate: float, power: float, every: int = 1):
        self.rate, self.power, self.every = rate, power, every

    def __call__(self, step: Any) -> Any:
        count = tf.cast(step // self.every + 1, tf.float32)
        return self.rate * tf.pow(count, -self.power)


STEPS = 5  # of y in VRBO
PERIOD = 10  # outer steps of VRBO from one full batch to the next


def sgd(rate: float, power: float = 0.0, every: int = 1) -> keras.optimizers.Optimizer:
    """SGD whose rate decays once in so many of its steps."""
    return keras.optimizers.SGD(Decay(rate, power, every) if power else rate)


def inner(rate: float, power: float, steps: int) -> tb.InnerSolver:
    """Steps whose rate decays over the outer steps."""
    schedule = Decay(rate, power) if power else None
    return tb.InnerSolver(sgd(rate), steps, learning_rate=schedule)


def ramp() -> tb.LinearRamp:
    return tb.LinearRamp(*RAMP)


def scale(power: float) -> tb.Schedule | float:
    return tb.InversePower(1.0, power) if power else 1.0


class Sizes(NamedTuple):
    """The number of fixed batches of each level."""

    upper: int
    lower: int


class Entry(NamedTuple):
    """A method: how it is built from a rate r, a power p and the sizes s; its calls in
    one outer step, a number or a function of the sizes; and its batches
    (`protocol.Method`)."""

    build: Callable[[float, float, Sizes], tb.Method]
    calls: float | Callable[[Sizes], float]
    kind: str = "random"


ENTRIES: dict[str, Entry] = {
    # g_y, and (g_yy v, g_xy v); f_x and f_y.
    "SOBA": Entry(lambda r, p, s: tb.SOBA(sgd(r, p), Decay(r, p)), 4),
    # As SOBA; the tables take no calls.
    "SABA": Entry(
        lambda r, p, s: tb.SABA(
            sgd(r, p), Decay(r, p), lower_batches=s.lower, upper_batches=s.upper
        ),
        4,
        "fixed",
    ),
    # At two points: g_y, (g_yy v, g_xy v); f. Every s.lower steps all batches at one.
    "SRBA": Entry(
        lambda r, p, s: tb.SRBA(sgd(r, p), Decay(r, p), upper_parts=s.upper),
        lambda s: 8 * (s.lower - 1) / s.lower + 3 + s.upper / s.lower,
        "blocks",
    ),
    # g_y, g_yy v; at two points: f, g_xy v.
    "FSLA": Entry(lambda r, p, s: tb.FSLA(sgd(r, p), Decay(r, p), 0.9), 9),
    # T of g_y, T of g_yy v, one of g_xy v; f.
    "AmIGO": Entry(
        lambda r, p, s: tb.AmIGO(inner(r, p, TERMS), TERMS, Decay(r, p)),
        3 * TERMS + 3,
    ),
    # At two points: g_y, T of g_yy v, one of g_xy v; f.
    "MRBO": Entry(
        lambda r, p, s: tb.MRBO(sgd(r), TERMS, r, scale=scale(p)), 4 * TERMS + 8
    ),
    # MRBO's at each of STEPS + 1 points; every PERIOD steps all batches at one point.
    "VRBO": Entry(
        lambda r, p, s: tb.VRBO(
            sgd(r, p, STEPS), TERMS, r, STEPS, PERIOD, upper_parts=s.upper
        ),
        lambda s: (
            (STEPS + 1) * (4 * TERMS + 8)
            + ((2 * TERMS + 3) * s.lower + s.upper) / PERIOD
        ),
        "blocks",
    ),
    # At two points: g_y, (T - 1) / 2 of g_yy v on average, one of g_xy v; f.
    "SUSTAIN": Entry(
        lambda r, p, s: tb.SUSTAIN(sgd(r), TERMS, r, scale=scale(p)), 2 * TERMS + 6
    ),
    # T of g_y, T of g_yy v, one of g_xy v; f.
    "StocBiO": Entry(
        lambda r, p, s: tb.StocBiO(inner(r, p, TERMS), TERMS, r), 3 * TERMS + 3
    ),
    # T of g_y, (T - 1) / 2 of g_yy v on average, one of g_xy v; f.
    "BSA": Entry(lambda r, p, s: tb.BSA(inner(r, p, TERMS), TERMS, r), 2 * TERMS + 2),
    # g_y, (T - 1) / 2 of g_yy v on average, one of g_xy v; f.
    "TTSA": Entry(
        lambda r, p, s: tb.TTSA(sgd(r), TERMS, r, upper_power=p, lower_power=p),
        TERMS + 3,
    ),
    # As SOBA.
    "BAMM": Entry(lambda r, p, s: tb.BAMM(sgd(r), 1.0, p), 4),
    # g_y at z, g_x at z, (g_x, g_y) at y; f.
    "ValueGap": Entry(
        lambda r, p, s: tb.ValueGap(inner(r, p, 1), sgd(r, p), ramp()), 4
    ),
    # T of g_y at z, T at y, g_x at both; T of f_y, and f_x.
    "F2SA": Entry(
        lambda r, p, s: tb.F2SA(inner(r, p, TERMS), sgd(r, p, TERMS), ramp()),
        3 * TERMS + 3,
    ),
    # At two points: g_y at z and at y, g_x at both after that; f_y, and f_x after that.
    "F3SA": Entry(lambda r, p, s: tb.F3SA(sgd(r, p), ramp()), 12),
    # T of g_y at z, (g_x, g_y) at y, g_x at z; f.
    "BOME": Entry(lambda r, p, s: tb.BOME(inner(r, p, TERMS), sgd(r, p)), TERMS + 3),
    # T of g_y at z, T at y, with as many values of g at z; g_x at both, and a value; T
    # of f_y, and f_x. The curvature grows like 1 / sigma, and so y's rate falls.
    "BVFSM": Entry(
        lambda r, p, s: tb.BVFSM(inner(r, p, TERMS), sgd(r, 0.5, TERMS), TERMS),
        4 * TERMS + 4,
    ),
    # g_y at z and at y, g_x at both after that; f_y, and f_x after that.
    "MEHA": Entry(lambda r, p, s: tb.MEHA(sgd(r, p)), 6),
    # T of g_y, at most T + 1 of g_yy v, one of g_xy v; f; all on all batches.
    "Implicit, full batch": Entry(
        lambda r, p, s: tb.Implicit(
            inner(r, 0.0, TERMS), tb.ConjugateGradient(TERMS, warm_start=True)
        ),
        lambda s: (3 * TERMS + 4) * s.lower + s.upper,
        "full",
    ),
}


def squares(x: tf.Tensor, y: tf.Tensor, batch: tuple) -> tf.Tensor:
    d, e, *_ = batch  # a fixed batch also has its number
    residual = tf.linalg.matvec(d, y) - e
    return 0.5 * tf.reduce_mean(residual**2) + 0.05 * tf.reduce_sum(x**2)


def difference(x: tf.Tensor, y: tf.Tensor, batch: tuple) -> tf.Tensor:
    a, b, *_ = batch
    residual = tf.linalg.matvec(a, y) - tf.linalg.matvec(b, x)
    return 0.5 * tf.reduce_mean(residual**2)


def log_loss(x: tf.Tensor, y: tf.Tensor, batch: tuple) -> tf.Tensor:
    rows, labels, *_ = batch
    return tf.reduce_mean(tf.nn.softplus(-labels * tf.linalg.matvec(rows, y)))


def penalised(x: tf.Tensor, y: tf.Tensor, batch: tuple) -> tf.Tensor:
    return log_loss(x, y, batch) + 0.5 * tf.reduce_sum(tf.exp(x) * y**2)


def clean(x: tf.Tensor, y: list, batch: tuple) -> tf.Tensor:
    return tensorflow_losses.upper_loss(x, y, batch[:2])


def weighted(x: tf.Tensor, y: list, batch: tuple) -> tf.Tensor:
    square = sum(tf.reduce_sum(leaf**2) for leaf in y)
    penalty = 0.5 * protocol.PARTS["c"].PENALTY
    return tensorflow_losses.minibatch_loss(x, y, batch[:3]) + penalty * square


PROBLEMS = {
    "a": tb.Problem(squares, difference),
    "b": tb.Problem(log_loss, penalised),
    "c": tb.Problem(clean, weighted),
}


def sizes_of(problem: Any) -> Sizes:
    return Sizes(
        *(len(each[0]) // BATCH for each in problem.examples(problem.cases[0]))
    )


class Carried(NamedTuple):
    examples: tuple[tuple, ...]  # those of the upper and of the lower loss
    now: tuple  # the outer step, x, y and the method's state


class Compiled:
    """A method on a problem, compiled by XLA for one setting."""

    def __init__(self, part: str, problem: Any, entry: Entry, setting: Setting):
        self.kind, self.problem, self.of = entry.kind, problem, PROBLEMS[part]
        self.sizes = sizes_of(problem)
        self.rate = setting.rate / problem.largest
        self.upper_rate, self.power = self.rate * setting.ratio, setting.power
        self.method = entry.build(self.rate, setting.power, self.sizes)
        self.draws = getattr(self.method, "draws", 1)
        self.order = 1 + self.method.takes_second_derivatives
        self.together = 2 if entry.kind == "full" else problem.together
        self.tensors: dict[int, tf.Tensor] = {}
        carried = self.begin(problem.cases[0])
        sizes = self.sizes.upper * BATCH, self.sizes.lower * BATCH
        numbers = protocol.batches(self.kind, self.draws, self.together, sizes, 0)
        given = self.ready(next(numbers))
        function = tf.function(self._several, autograph=False, jit_compile=True)
        # A call of this takes a quarter of the time: its arguments are not looked at.
        self.function = function.get_concrete_function(
            carried.examples, given, *carried.now
        )
        self.several(carried, given)  # compiles
        self.bytes = self._bytes(carried, given)

    def begin(self, case: str, seed: int = 0) -> Carried:
        x, y = tf.nest.map_structure(tf.constant, self.problem.start())
        state = self.method.init(self.of, x, y)
        examples = tf.nest.map_structure(self._tensor, self.problem.examples(case))
        if self.kind == "blocks":
            examples = tuple(_mixed(level, seed) for level in examples)
        if self.kind in ("blocks", "fixed"):
            examples = tf.nest.map_structure(_blocks, examples)
        return Carried(examples, (tf.constant(0, tf.int64), x, y, state))

    def _tensor(self, array: np.ndarray) -> tf.Tensor:
        """Cases share the arrays that they have in common."""
        if id(array) not in self.tensors:
            dtype = tf.float32 if array.dtype.kind == "f" else tf.int32
            self.tensors[id(array)] = tf.constant(array, dtype)
        return self.tensors[id(array)]

    def ready(self, batches: tuple[np.ndarray, ...]) -> Any:
        return tuple(map(tf.constant, batches))

    def several(self, carried: Carried, batches: Any) -> Carried:
        examples, now = carried
        return Carried(examples, self.function(examples, batches, *now))

    def x(self, carried: Carried) -> np.ndarray:
        return carried.now[1].numpy()

    def y(self, carried: Carried) -> Any:
        return tf.nest.map_structure(lambda leaf: leaf.numpy(), carried.now[2])

    def step_bytes(self) -> int | None:
        return self.bytes

    def _bytes(self, carried: Carried, given: Any) -> int | None:
        """What one call needs beside the examples: TensorFlow's count of what it adds,
        and the variables it is given."""
        try:
            gc.collect()
            tf.config.experimental.reset_memory_stats("CPU:0")
            before = tf.config.experimental.get_memory_info("CPU:0")["current"]
            self.several(carried, given)
            peak = tf.config.experimental.get_memory_info("CPU:0")["peak"]
        except ValueError:
            return None
        leaves = tf.nest.flatten(carried.now)
        given_bytes = (leaf.shape.num_elements() * leaf.dtype.size for leaf in leaves)
        return peak - before + sum(given_bytes)

    def _several(
        self, examples: tuple, batches: tuple, k: tf.Tensor, x: Any, y: Any, state: Any
    ) -> tuple:
        start = k

        def body(k: tf.Tensor, x: Any, y: Any, state: Any) -> tuple:
            at = tf.cast(k - start, tf.int32)
            # A slice at `at` would be compiled again for every first k.
            rows = (tf.gather(each, at) for each in batches)
            chosen = self._batches(examples, *rows)
            made = self.of.step(self.method, x, y, chosen, state)
            # Methods that scale the upper step decay it themselves.
            power = self.power if isinstance(made.upper_scale, tuple) else 0.0
            rate = self.upper_rate * tf.pow(tf.cast(k + 1, tf.float32), -power)
            moved = x - rate * made.upper_gradient
            return k + 1, made.scaled(x, moved), made.lower, made.state

        return tf.while_loop(
            lambda k, *_: k < start + self.together,
            body,
            (k, x, y, state),
            maximum_iterations=self.together,
        )

    def _batches(self, examples: tuple, upper: tf.Tensor, lower: tf.Tensor) -> Any:
        """The batches of one outer step from their numbers."""
        if self.kind == "full":
            return tb.Batches(*examples)
        if self.kind == "blocks":
            # The upper batch is one, of all blocks.
            whole = tuple(tf.reshape(b, [-1, *b.shape[2:]]) for b in examples[0])
            return tb.StackedBatches(whole, examples[1])
        if self.kind == "random":
            return tb.StackedBatches(
                tuple(tf.gather(each, upper) for each in examples[0]),
                tuple(tf.gather(each, lower) for each in examples[1]),
            )
        blocks = (
            (*(tf.gather(each, number) for each in level), number)
            for level, number in zip(examples, (upper, lower), strict=True)
        )
        return tb.Batches(*blocks)


def _blocks(examples: tf.Tensor) -> tf.Tensor:
    """[n // BATCH, BATCH, ...], without the last few."""
    whole = examples[: len(examples) // BATCH * BATCH]
    return tf.reshape(whole, [-1, BATCH, *whole.shape[1:]])


def _mixed(level: tuple, seed: int) -> tuple:
    """The examples in a random order."""
    order = np.random.default_rng(seed).permutation(level[0].shape[0])
    return tuple(tf.gather(each, order) for each in level)


def build(arguments: argparse.Namespace, problem: Any) -> Callable[[Setting], Compiled]:
    tensorflow_losses.use_threads(1)
    entry = ENTRIES[arguments.method]
    return lambda setting: Compiled(arguments.part, problem, entry, setting)


if __name__ == "__main__":
    protocol.serve(build)
