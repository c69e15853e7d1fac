"""Rows of tables that a loop carries, and copies of these tables."""

import multiprocessing
import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb
from tfbilevel._workarounds.row_exchange import called_in_loop, exchanged

COUNT, SIZE, TURNS = 200, 5000, 30
BYTES = 4 * COUNT * SIZE
ORDER = np.random.default_rng(0).permutation(np.repeat(np.arange(7), 3))
WIDE, SHORT = np.arange(70.0).reshape(7, 2, 5), np.arange(7.0)


def row(k: Any, like: Any) -> Any:
    return like * 0.5 + k


def wanted() -> tuple:
    """The tables after all exchanges, and the sums of what was read."""
    wide, short, sums = WIDE.copy(), SHORT.copy(), [np.zeros((2, 5)), 0.0]
    for k, number in enumerate(ORDER):
        sums = [sums[0] + wide[number], sums[1] + short[number]]
        wide[number], short[number] = row(k, sums[0]), row(k, sums[1])
    return (wide, short), tuple(sums)


def turn(k: Any, tables: Any, sums: Any) -> tuple:
    # What is written depends on what is read.
    number = tf.gather(tf.constant(ORDER), k)
    read = tf.nest.map_structure(lambda t: tf.gather(t, number), tables)
    now = tf.nest.map_structure(
        lambda s, r: row(tf.cast(k, tf.float64), s + r), sums, read
    )
    former, tables = exchanged(tables, number, now)
    return k + 1, tables, tf.nest.map_structure(tf.add, sums, former)


def branching(k: Any, tables: Any, sums: Any) -> tuple:
    return tf.cond(k >= 0, lambda: turn(k, tables, sums), lambda: (k + 1, tables, sums))


def traced(k: Any, tables: Any, sums: Any) -> tuple:
    """A function that was traced before, as in `tb.minimize`."""
    with called_in_loop():
        made = tf.function(turn, autograph=False).get_concrete_function(k, tables, sums)
    return made(k, tables, sums)


def loop(body: Callable, tables: Any, sums: Any) -> tuple:
    return tf.while_loop(
        lambda k, *_: k < len(ORDER), body, (tf.constant(0), tables, sums)
    )[1:]


@pytest.mark.parametrize(
    ("body", "mode"),
    fast_where(
        lambda body, mode: body is turn and mode == "graph",
        [
            (turn, "eager"),
            *(
                (body, mode)
                for body in (turn, branching, traced)
                for mode in ("graph", "xla")
            ),
        ],
    ),
)
def test_rows_are_exchanged_one_after_the_other(body: Callable, mode: str) -> None:
    run = loop
    if mode != "eager":
        run = tf.function(loop, autograph=False, jit_compile=mode == "xla")
    given = tf.constant(WIDE), tf.constant(SHORT)
    sums = tf.zeros([2, 5], tf.float64), tf.constant(0.0, tf.float64)
    made = run(body, given, sums)
    for got, want in zip(tf.nest.flatten(made), tf.nest.flatten(wanted()), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)
    # The caller's own tables are as they were.
    for got, want in zip(given, (WIDE, SHORT), strict=True):
        np.testing.assert_array_equal(got, want)


def naive(table: Any, number: Any, now: Any) -> tuple:
    changed = tf.tensor_scatter_nd_update(table, number[None, None], now[None])
    return tf.gather(table, number), changed


def large(exchange: Callable, marked: bool, xla: bool) -> Callable:
    """A loop over a large table, which has no other use."""

    def body(k: Any, table: Any, total: Any) -> tuple:
        now = 0.5 * total + tf.cast(k, tf.float32)
        former, table = exchange(table, k % COUNT, now)
        return k + 1, table, total + former

    def inner(k: Any, table: Any, total: Any) -> tuple:
        with called_in_loop():
            made = tf.function(body, autograph=False).get_concrete_function(
                k, table, total
            )
        return made(k, table, total)

    return tf.function(
        lambda table, total: tf.while_loop(
            lambda k, *_: k < TURNS,
            inner if marked else body,
            (tf.constant(0), table, total),
        ),
        autograph=False,
        jit_compile=xla,
    )


def counted(run: Callable) -> float:
    """The largest number of tables that are made in a run at one time."""
    memory = tf.config.experimental
    run()  # compiles
    memory.reset_memory_stats("CPU:0")
    before = memory.get_memory_info("CPU:0")["current"]
    run()
    return (memory.get_memory_info("CPU:0")["peak"] - before) / BYTES


def in_new_process(count: Callable, *given: Any) -> Any:
    """What `count` returns in a process of its own.

    TensorFlow counts the pieces of memory that it hands out. Among what earlier
    tests left, a piece of up to twice the size may be taken for a table.
    """
    try:
        tf.config.experimental.get_memory_info("CPU:0")
    except ValueError:
        pytest.skip("TensorFlow counts tensors on CPUs only with oneDNN")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(count, given)


def tables_of_loops(marked: bool) -> list[float]:
    given = tf.zeros([COUNT, SIZE]), tf.ones([SIZE])
    loops = [large(exchange, marked, xla=False) for exchange in (naive, exchanged)]
    return [counted(lambda run=run: run(*given)) for run in loops]


@pytest.mark.slow
@pytest.mark.parametrize("marked", [False, True])
def test_a_loop_copies_the_table_once(marked: bool) -> None:
    """At its begin; with the operations that come to mind, in every turn."""
    made = in_new_process(tables_of_loops, marked)
    assert made == pytest.approx([2, 1], abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("marked", [False, True])
def test_a_loop_of_xla_copies_the_table_once(marked: bool) -> None:
    given = tf.zeros([COUNT, SIZE]), tf.ones([SIZE])
    copy = re.compile(rf"= f32\[{COUNT},{SIZE}\]\S* copy\(")
    for exchange, copies in ((naive, True), (exchanged, False)):
        run = large(exchange, marked, xla=True)
        text = run.experimental_get_compiler_ir(*given)(stage="optimized_hlo")
        computations = [c for c in text.split("\n\n") if not c.startswith("ENTRY")]
        assert any(map(copy.search, computations)) == copies


def tables_of_saba() -> float:
    sgd = keras.optimizers.SGD(0.1)
    method = tb.SABA(
        sgd, 0.1, lower_batches=COUNT, upper_batches=1, number=lambda batch: batch
    )
    problem = tb.Problem(
        lambda x, y, batch: 0.5 * tf.reduce_mean((y - 1.0) ** 2),
        lambda x, y, batch: 0.5 * tf.reduce_mean((y - x) ** 2),
    )
    given = problem, method, tf.constant(0.0), tf.zeros([SIZE]), sgd

    def batches(k: Any) -> tb.Batches:
        return tb.Batches(0 * k, k % COUNT)

    begun = tb.minimize(*given, batches, TURNS)

    def run() -> None:  # of the same compiled loop
        tb.minimize(*given, batches, TURNS, state=begun.state)

    return counted(run)


@pytest.mark.slow
def test_minimize_copies_the_tables_of_saba_once() -> None:
    # Two tables of y: g_y and g_yy v.
    assert in_new_process(tables_of_saba) == pytest.approx(2, abs=0.2)
