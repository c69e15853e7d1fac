"""`tb.memory_estimate` against counts on paper, and against TensorFlow's own count."""

import dataclasses
import re
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

SGD = keras.optimizers.SGD
LISTS = "stored iterates and tapes"
SIZE = 1000
VECTOR = tf.TensorSpec([SIZE], tf.float64)
BYTES = 8 * SIZE
NO_DATA = tb.Batches(None, None)
# Its gradient is not linear in y, so a reverse sweep reads every iterate.
QUARTIC = tb.Problem(
    upper_loss=lambda x, y, batch: tf.reduce_sum(y**2),
    lower_loss=lambda x, y, batch: tf.reduce_sum((y - x) ** 4),
)


def inner(steps: int = 50, optimizer: Any = None) -> tb.InnerSolver:
    return tb.InnerSolver(optimizer or SGD(0.01), steps)


def unroll(steps: int = 50, optimizer: Any = None, **options: Any) -> tb.Unroll:
    return tb.Unroll(inner(steps, optimizer), **options)


@pytest.mark.parametrize(
    ("method", "copies"),
    [
        (unroll(), 50),
        (unroll(last=9), 9),
        # Segments of 8 steps: 7 ends, and the 8 iterates of one segment.
        (unroll(memory="checkpoint"), 7 + 8),
        # y, and Adam's two moments.
        (unroll(optimizer=keras.optimizers.Adam(0.1)), 3 * 50),
        # The derivative of a momentum does not depend on it, so it is not stored.
        (unroll(optimizer=SGD(0.1, momentum=0.9)), 50),
        (tb.Implicit(inner(), tb.ConjugateGradient(5)), 0),
    ],
    ids=["replay", "last", "checkpoint", "adam", "momentum", "implicit"],
)
def test_stored_iterates_on_paper(method: tb.Method, copies: int) -> None:
    estimate = tb.memory_estimate(QUARTIC, method, VECTOR, VECTOR, NO_DATA)
    assert estimate.rows[LISTS] == copies * BYTES
    assert estimate.host == 0 and not estimate.notes
    assert estimate.peak == sum(estimate.rows.values())


def test_iterates_on_the_host_are_not_on_the_device() -> None:
    method = unroll(memory="host")
    estimate = tb.memory_estimate(QUARTIC, method, VECTOR, VECTOR, NO_DATA)
    assert (estimate.rows[LISTS], estimate.host) == (0, 50 * BYTES)
    replay = tb.memory_estimate(QUARTIC, unroll(), VECTOR, VECTOR, NO_DATA)
    saved = replay.peak - estimate.peak  # and a tenth for the allocator's rounding
    assert saved == pytest.approx(1.1 * 50 * BYTES, rel=0.01)
    assert re.search(r"^host +390\.6$", str(estimate), re.MULTILINE)  # of 1,024 bytes


def test_what_is_given_on_paper() -> None:
    """x, y, the batches, the optimizers' slots, and what the losses close over."""
    variable, constant = tf.Variable(tf.zeros([77])), tf.zeros([33, 2])

    def lower_loss(x: Any, y: Any, batch: Any) -> tf.Tensor:
        closed = tf.reduce_sum(variable) + tf.reduce_sum(constant)
        return tf.reduce_sum((y["w"] * batch - x[0]) ** 4) * closed * x[1]

    problem = tb.Problem(lambda x, y, batch: tf.reduce_sum(y["w"] ** 2), lower_loss)
    estimate = tb.memory_estimate(
        problem,
        unroll(4, keras.optimizers.Adam(0.1)),
        [np.zeros([3], "float32"), np.float32(2.0)],
        {"w": keras.Variable(np.zeros([5, 3], "float32"))},
        tb.StackedBatches(None, tf.TensorSpec([4, 5, 3])),
        upper_optimizer=SGD(0.1, momentum=0.9),
    )
    rows = estimate.rows
    assert rows["upper variables"] == 4 * (3 + 1)
    assert rows["lower variables"] == 4 * 5 * 3
    assert rows["upper optimizer"] == 4 * (3 + 1)
    assert rows["batches"] == 4 * 4 * 5 * 3
    assert rows["read by the losses"] == 4 * (77 + 33 * 2)
    assert estimate.to_dict()["peak"] == estimate.peak
    carried = tb.memory_estimate(
        QUARTIC, tb.ValueGap(inner(), SGD(0.1), 1.0), VECTOR, VECTOR, NO_DATA
    )
    # The second copy z; besides it, numbers.
    assert BYTES <= carried.rows["state of the method"] <= BYTES + 50


@pytest.mark.parametrize("parts", [1, 8])
def test_activations_on_paper(parts: int) -> None:
    """sum tanh(A W)^2: beside tanh(A W) there are 2 tanh(A W) and the cotangent, and a
    fourth if two operations run at once. A loop over parts holds one part's."""
    rows, hidden = 400, 500
    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_sum(y**2),
        lambda x, y, batch: tf.reduce_sum(tf.tanh(batch @ y) ** 2) * x,
    )
    estimate = tb.memory_estimate(
        tb.microbatched(problem, lower=parts),
        unroll(2),
        tf.TensorSpec([]),
        tf.TensorSpec([3, hidden]),
        tb.Batches(None, tf.TensorSpec([rows, 3])),
    )
    activations = 4 * rows * hidden / parts
    assert 3 * activations <= estimate.lower_gradient <= 4.2 * activations
    assert estimate.rows["losses, gradients, vectors"] > 4 * activations


def test_nothing_is_computed() -> None:
    """A batch of 10^9 images, without memory for it."""
    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_sum(y**2),
        lambda x, y, batch: tf.reduce_mean((batch @ y) ** 4) * x,
    )
    images = tf.TensorSpec([10**9, 784])
    variables = tf.TensorSpec([]), tf.TensorSpec([784, 10])
    estimate = tb.memory_estimate(
        problem, unroll(2), *variables, tb.Batches(None, images)
    )
    assert estimate.rows["batches"] == 4 * 10**9 * 784
    assert "GiB" in str(estimate).splitlines()[0]
    # A title and two rules; no row for the host, where nothing is.
    assert len(str(estimate).splitlines()) == len(estimate.to_dict()) - 1 + 3


@dataclasses.dataclass(frozen=True, eq=False)
class Keeper(tb.Method):
    """A method of one's own, which carries its last lower variables."""

    copies: int

    def init(self, problem: Any, upper: Any, lower: Any) -> Any:
        return [tf.zeros_like(lower)] * self.copies

    def step(self, problem, upper, lower, batches, state):
        here = problem.prepared(upper, batches)
        _, gradient = here.lower_gradient(lower)
        return tb.Step(gradient, lower - gradient, [*state[1:], lower], {})


def test_a_method_of_ones_own_and_tasks() -> None:
    estimate = tb.memory_estimate(QUARTIC, Keeper(6), VECTOR, VECTOR, NO_DATA)
    assert estimate.rows["state of the method"] == 6 * BYTES
    over = tb.over_tasks(
        tb.Problem(
            lambda x, y, batch: tf.reduce_sum(y * batch),
            lambda x, y, batch: tf.reduce_sum((y - x * batch) ** 4),
        )
    )
    tasks = tf.TensorSpec([7, SIZE], tf.float64)
    batches = tb.Batches(tasks, tasks)
    estimate = tb.memory_estimate(over, unroll(9), VECTOR, tasks, batches)
    assert estimate.rows[LISTS] == 7 * 9 * BYTES


def test_unknown_sizes_are_said() -> None:
    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_sum(y**2),
        lambda x, y, batch: tf.reduce_sum(tf.boolean_mask(y - x, y > 0) ** 4),
    )
    estimate = tb.memory_estimate(problem, unroll(2), VECTOR, VECTOR, NO_DATA)
    (note,) = estimate.notes
    assert note.startswith("Results of unknown size") and "Where" in note
    assert str(estimate).endswith(note)


@pytest.mark.parametrize(
    ("batches", "path"),
    [
        (tb.Batches(None, (tf.TensorSpec([None, 3]),)), r"batches.lower\[0\] = .*None"),
        (tb.Batches(tf.sparse.from_dense([[1.0]]), None), "batches.upper = Sparse"),
        (tb.Batches(tf.ragged.constant([[1.0]]), None), "batches.upper = Ragged"),
    ],
    ids=["unknown", "sparse", "ragged"],
)
def test_sizes_must_be_known(batches: tb.Batches, path: str) -> None:
    with pytest.raises(ValueError, match=f"must have known sizes.*Received: {path}"):
        tb.memory_estimate(QUARTIC, unroll(), VECTOR, VECTOR, batches)


def test_other_arguments_are_checked() -> None:
    whole = tf.TensorSpec([3], tf.int32)
    for wrong, message in (
        ((QUARTIC, unroll(), VECTOR, whole, NO_DATA), "`lower` must be a nest of"),
        ((QUARTIC, unroll(), [], VECTOR, NO_DATA), "`upper` must hold at least one"),
        ((QUARTIC, unroll(), VECTOR, VECTOR, None), "`batches` must be tb.Batches"),
        ((QUARTIC, SGD(), VECTOR, VECTOR, NO_DATA), "`method` must be a tb.Method"),
        ((None, unroll(), VECTOR, VECTOR, NO_DATA), "`problem` must be a tb.Problem"),
    ):
        with pytest.raises(ValueError, match=message):
            tb.memory_estimate(*wrong)


@pytest.mark.parametrize(
    "name", fast_where("replay".__eq__, ["replay", "tape", "implicit", "value-gap"])
)
def test_against_tensorflows_own_count(name: str) -> None:
    """In a small step; docs/memory.md has large ones."""
    memory = tf.config.experimental
    try:
        memory.get_memory_info("CPU:0")
    except ValueError:
        pytest.skip("TensorFlow counts tensors on CPUs only with oneDNN")
    method = {
        "replay": unroll(12, memory="replay"),
        "tape": unroll(12, memory="tape"),
        "implicit": tb.Implicit(inner(12), tb.ConjugateGradient(4, rtol=0.0)),
        "value-gap": tb.ValueGap(inner(12), SGD(0.1), weight=0.1),
    }[name]
    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_mean((batch @ y[0] @ y[1]) ** 2),
        lambda x, y, batch: tf.reduce_mean(
            x * tf.reduce_sum(tf.tanh(tf.tanh(batch @ y[0]) @ y[1]) ** 2, 1)
        ),
    )
    images = tf.random.stateless_uniform([2000, 300], (0, 1))
    x, y = tf.ones([2000]), [tf.fill([300, 400], 0.01), tf.fill([400, 300], 0.01)]
    batches = tb.Batches(images, images)
    state = method.init(problem, x, y)
    estimate = tb.memory_estimate(problem, method, x, y, batches)
    given = ("upper variables", "lower variables", "batches", "state of the method")
    given = sum(estimate.rows[name] for name in given) - 4 * 2000 * 300  # images: once
    step = tf.function(
        lambda x, y, batches, state: problem.step(method, x, y, batches, state)[:3],
        autograph=False,
    )
    memory.reset_memory_stats("CPU:0")
    before = memory.get_memory_info("CPU:0")["current"]
    step(x, y, batches, state)[0].numpy()
    peak = memory.get_memory_info("CPU:0")["peak"] - before + given
    assert 0.7 < peak / estimate.peak < 1.3, (peak, estimate.peak)
