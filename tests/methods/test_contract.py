"""What every method promises, on every oracle problem, in one body.

The methods, with the numbers expected of them, are those of tests/method_table.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from method_table import METHODS, Row
from problems import ORACLES, Oracle, Vector, flat
from suites import fast_where

import tfbilevel as tb

# float64: the inner solve leaves 0.45^28 = 2e-10 times at most 28, relative.
# float32: its rounding, times the few dozen operations behind each number.
TOLERANCE = {"float64": 2e-8, "float32": 2e-5}
MODES_AGREE = {"float64": 1e-12, "float32": 5e-6}


def assert_close(got: Any, want: Vector, tolerance: float) -> None:
    got = flat(got)
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-3)
    assert error < tolerance, f"relative error {error:.2e}: {got} is not {want}"


# Rows which keep their steps in another memory than a row of the same numbers.
MEMORIES = ("-checkpoint", "-tape", "-host", "-checkpoint-last", "-tape-last")


def whole(row: Row, oracle: Oracle) -> bool:
    """Whether it has every mode: one oracle per method."""
    return oracle.name == ("scalar" if "scalar" in row.oracles else row.oracles[0])


# Methods and linear solvers, each once: what other rows add to them (another memory,
# end or aggregation) knows nothing of dtypes.
FLOAT32 = {
    "unroll-replay",
    "unroll-first-order",
    "unroll-pessimistic",
    "forward-unroll",
    "finite-difference",
    "rank-one",
    "implicit-cg",
    "implicit-neumann",
    "implicit-fixed-point",
    "implicit-normal-cg",
    "implicit-direct",
    "implicit-gradient-solver",
    "implicit-optimizer-map",
    "stocbio",
    "bsa",
    "ttsa",
    "bamm",
    "soba",
    "f2sa",
    "bome",
    "value-gap",
    "value-gap-constant",
    "gradient-norm",
    "augmented-lagrangian",
}
# One method of each kind.
KINDS = {
    "unroll-replay",
    "forward-unroll",
    "implicit-cg",
    "value-gap",
    "gradient-norm",
    "augmented-lagrangian",
    "bamm",
    "ttsa",
    "stocbio",
}
MODES = ("eager", "graph", "xla")


# Their recursions over several steps are tested by themselves, in graphs.
BY_STEPS = {
    "srba",
    "fsla",
    "amigo",
    "mrbo",
    "vrbo",
    "sustain",
    "meha",
    "f3sa",
    "bvfsm",
    "gaffa",
    "implicit-minres",
    "implicit-identity",
    "persistent-es",
}


# Loops of both kinds of steps, which take long to trace.
LONG_PROGRAMS = {"srba", "vrbo"}
# Nested structures of these are slow too: their recursions are quick, in graphs.
SLOW_GRAPHS = {
    *LONG_PROGRAMS,
    "f3sa",
    "bvfsm",
    "gaffa",
    "persistent-es",
    "implicit-identity",
}


def in_every_mode(row: Row, oracle: Oracle, dtype: str) -> bool:
    return whole(row, oracle) and (dtype == "float64" or row.name in FLOAT32)


def cases(chosen: Callable[[Row, Oracle, str], bool]) -> list[Any]:
    return [
        pytest.param(row, oracle, dtype, id=f"{row.name}-{oracle.name}-{dtype}")
        for row in METHODS
        for oracle in ORACLES
        for dtype in ("float64", "float32")
        if oracle.name in row.oracles and chosen(row, oracle, dtype)
    ]


@pytest.mark.parametrize(
    ("row", "oracle", "dtype"),
    fast_where(
        lambda row, oracle, dtype: row.name not in BY_STEPS, cases(in_every_mode)
    ),
)
def test_contract(row: Row, oracle: Oracle, dtype: str) -> None:
    contract(row, oracle, dtype, MODES)


# Of the other methods' ridge and quadratic, XLA's programs alone.
@pytest.mark.parametrize(
    ("row", "oracle", "dtype"),
    fast_where(
        lambda row, oracle, dtype: row.name not in SLOW_GRAPHS,
        cases(
            lambda row, oracle, dtype: (
                not whole(row, oracle)
                and dtype == "float64"
                and (oracle.name == "nested" or row.name in KINDS)
                and not row.name.endswith(MEMORIES)
            )
        ),
    ),
)
def test_contract_of_graphs(row: Row, oracle: Oracle, dtype: str) -> None:
    """What structures, ranks and sizes can break, without the other programs."""
    contract(row, oracle, dtype, ("graph",))


# What these carry through their loops is what a row of KINDS carries, or fewer leaves.
CARRY_THE_SAME = {
    "unroll-replay-last",
    "unroll-converged",
    "implicit-neumann",
    "implicit-fixed-point",
    "implicit-gradient-solver",
    "bsa",
    "value-gap-constant",
    "f3sa",
    "bvfsm",
    "gaffa",
}


def of_xla(row: Row, oracle: Oracle, dtype: str) -> bool:
    """What XLA compiles besides `in_every_mode`, which has one oracle of every method
    in float64, and in float32 of every method and linear solver.

    - float64: nested structures, of every method that carries others.
    - float64: the ridge, whose derivatives have slices and whose f does not depend on
      x, of the methods that have it in no graph.
    - float64: another rank where a method is not for nested structures.
    - float32: of the other rows, one oracle.

    A row's dtype and its structures are never looked at together, nor do the losses
    come into what a method does with either.
    """
    if in_every_mode(row, oracle, dtype) or row.name.endswith(MEMORIES):
        return False
    if dtype == "float32":
        return whole(row, oracle) and row.name not in FLOAT32
    if oracle.name == "ridge":
        return row.name not in KINDS
    rest = "quadratic" if "nested" not in row.oracles else "nested"
    return oracle.name == rest and row.name not in CARRY_THE_SAME


@pytest.mark.slow
@pytest.mark.parametrize(("row", "oracle", "dtype"), cases(of_xla))
def test_contract_of_xla(row: Row, oracle: Oracle, dtype: str) -> None:
    """The mode that goes through the most programs."""
    contract(row, oracle, dtype, ("xla",))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "oracle", "dtype"),
    cases(
        lambda row, oracle, dtype: (
            dtype == "float64"
            and oracle.name == "nested"
            and row.name.endswith(MEMORIES)
            and not row.name.endswith("-host")
        )
    ),
)
def test_contract_of_memories(row: Row, oracle: Oracle, dtype: str) -> None:
    """Nested structures; XLA has them in another oracle."""
    contract(row, oracle, dtype, ("graph",))


def contract(row: Row, oracle: Oracle, dtype: str, modes: Sequence[str]) -> None:
    upper, lower, batches = oracle.at(dtype)
    method = row.build(oracle)
    state = method.init(oracle.problem, upper, lower)
    inputs = (upper, lower, batches, state)
    before = [np.array(leaf) for leaf in tf.nest.flatten(inputs) if leaf is not None]

    def step(x: Any, y: Any, data: tb.Batches, carried: Any) -> tb.Step:
        return method.step(oracle.problem, x, y, data, carried)

    graph = tf.function(step, autograph=False)
    # Around the traced step: tracing it again would take longer than the rest.
    xla = tf.function(
        lambda *arguments: graph(*arguments), autograph=False, jit_compile=True
    )
    programs = {"eager": step, "graph": graph, "xla": xla}
    if method.keeps_on_host:  # refused by XLA: tests/methods/test_unroll.py
        modes = [mode for mode in modes if mode != "xla"]
    results = [programs[mode](*inputs) for mode in modes]

    # 1. An independent number, in every mode.
    gradient, after = row.expected(oracle, flat(oracle.x), flat(oracle.y))
    tolerance = (row.tolerance or TOLERANCE)[dtype]
    for result in results:
        assert_close(result.upper_gradient, gradient, tolerance)
        assert_close(result.lower, after, TOLERANCE[dtype])

    # 2. Eager = graph = XLA, state and metrics too.
    first = results[0]
    for result in results[1:]:
        tf.nest.assert_same_structure(result, first)
        # How small a residual is, and when it is small enough, is rounding.
        loose = {"residual", "stationarity", "iterations", "gap"}
        ours = result._replace(
            metrics={k: v for k, v in result.metrics.items() if k not in loose}
        )
        theirs = first._replace(
            metrics={k: v for k, v in first.metrics.items() if k not in loose}
        )
        for a, b in zip(tf.nest.flatten(ours), tf.nest.flatten(theirs), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert_close(a, flat(b), (row.tolerance or MODES_AGREE)[dtype])

    # 3. One trace over many calls, with other values and the state handed on.
    for compiled in (programs[mode] for mode in modes if mode != "eager"):
        moved = tf.nest.map_structure(lambda leaf: leaf * 0.9, upper)
        second = compiled(moved, first.lower, batches, first.state)
        compiled(upper, second.lower, batches, second.state)
        assert compiled.experimental_get_tracing_count() == 1

    # 4. Inputs untouched.
    now = [np.array(leaf) for leaf in tf.nest.flatten(inputs) if leaf is not None]
    for a, b in zip(now, before, strict=True):
        np.testing.assert_array_equal(a, b)

    # 5. Structures, shapes and dtypes of the variables they belong to.
    for made, like in ((first.upper_gradient, upper), (first.lower, lower)):
        tf.nest.assert_same_structure(made, like)
        for a, b in zip(tf.nest.flatten(made), tf.nest.flatten(like), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
    tf.nest.assert_same_structure(first.state, state)
    for name, metric in first.metrics.items():
        assert metric.shape.rank == 0, name


# Every oracle once: XLA where ranks or slices could trouble it.
@pytest.mark.parametrize(
    ("oracle", "xla"),
    fast_where(
        lambda oracle, xla: oracle.name == "nested",
        [(oracle, oracle.name in ("ridge", "scalar")) for oracle in ORACLES],
    ),
    ids=lambda value: getattr(value, "name", "xla" if value else "graph"),
)
def test_the_map_of_adam(oracle: Oracle, xla: bool) -> None:
    """Compiled only: eager, so many steps of Adam would take minutes."""
    upper, lower, batches = oracle.at("float64")
    solver = tb.InnerSolver(keras.optimizers.Adam(0.02, beta_2=0.9999), 3000)
    method = tb.Implicit(solver, tb.Direct(), through="optimizer")
    state = method.init(oracle.problem, upper, lower)
    compiled = tf.function(
        lambda x: method.step(oracle.problem, x, lower, batches, state).upper_gradient,
        autograph=False,
        jit_compile=xla,
    )
    assert_close(compiled(upper), oracle.hypergradient(flat(oracle.x)), 1e-6)


def one_of_each_class() -> list[Row]:
    """A class's `step` converts the inputs, whatever the options."""
    found = {type(row.build(ORACLES[0])): row for row in reversed(METHODS)}
    return [row for row in METHODS if row in found.values() or row.name in KINDS]


# Where inputs are converted.
@pytest.mark.parametrize(
    "row",
    fast_where(lambda row: row.name in KINDS, one_of_each_class()),
    ids=lambda row: row.name,
)
def test_arrays_and_variables_are_as_good_as_tensors(row):
    method = row.build(ORACLES[0])
    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_sum((y - 1.0) ** 2 + x * x),
        lambda x, y, batch: 0.5 * tf.reduce_sum((y - x) ** 2),
    )
    values = np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 0.5])

    def gradient(convert):
        x, y = (convert(value) for value in values)
        state = method.init(problem, x, y)
        step = method.step(problem, x, y, tb.Batches(None, None), state)
        return step.upper_gradient.numpy()

    expected = gradient(tf.constant)
    for kind in (np.asarray, tf.Variable, keras.Variable):
        np.testing.assert_allclose(gradient(kind), expected, rtol=1e-6)
