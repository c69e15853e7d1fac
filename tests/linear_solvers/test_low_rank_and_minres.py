"""MINRES and Nystrom, on matrices whose solution NumPy knows."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from suites import fast_where
from test_linear_solvers import product_with, residual, solve, spd

import tfbilevel as tb

QUICK = settings(max_examples=15, deadline=None)


def indefinite(seed: int, spectrum: Any) -> np.ndarray:
    generator = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(generator.normal(size=(len(spectrum), len(spectrum))))
    return basis @ np.diag(spectrum) @ basis.T


SPECTRUM = [-9.0, -2.0, -0.5, 0.7, 1.0, 3.0, 5.0, 8.0]
B = np.random.default_rng(0).normal(size=8)


@QUICK
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 5))
def test_minres_minimises_the_residual_over_the_krylov_space(seed, steps) -> None:
    """v_k = argmin |b - A v| over span(b, Ab, ..., A^{k-1} b), by least squares."""
    matrix = indefinite(seed, SPECTRUM)
    krylov = np.stack([np.linalg.matrix_power(matrix, j) @ B for j in range(steps)], 1)
    basis, _ = np.linalg.qr(krylov)
    want = basis @ np.linalg.lstsq(matrix @ basis, B, rcond=None)[0]
    found = solve(tb.MINRES(steps, rtol=0.0), matrix, B)
    np.testing.assert_allclose(found.value, want, rtol=1e-6, atol=1e-9)
    assert float(found.residual) == pytest.approx(
        residual(matrix, B, found.value), rel=1e-6
    )
    assert int(found.iterations) == steps


def test_minres_solves_an_indefinite_system_where_cg_gives_up() -> None:
    matrix = indefinite(1, SPECTRUM)
    found = solve(tb.MINRES(20, rtol=1e-10), matrix, B)
    np.testing.assert_allclose(found.value, np.linalg.solve(matrix, B), rtol=1e-7)
    assert int(found.iterations) <= 9 and not bool(found.diverged)
    cg = solve(tb.ConjugateGradient(20, rtol=1e-10), matrix, B)
    assert residual(matrix, B, cg.value) > 1e-2


def test_minres_stays_where_nothing_is_left() -> None:
    """Three eigenvalues: exact after three steps; twenty make it no worse."""
    matrix = indefinite(2, [-2.0, -2.0, 1.0, 1.0, 1.0, 4.0, 4.0, 4.0])
    want = np.linalg.solve(matrix, B)
    for steps in (3, 20):
        found = solve(tb.MINRES(steps, rtol=0.0), matrix, B)
        np.testing.assert_allclose(found.value, want, rtol=1e-9)
    singular = indefinite(2, [0.0, 0.0, 1.0, 1.0, 1.0, 4.0, 4.0, 4.0])
    found = solve(tb.MINRES(20, rtol=0.0), singular, B)
    least = np.linalg.lstsq(singular, B, rcond=None)[0]
    np.testing.assert_allclose(
        singular @ found.value.numpy(), singular @ least, rtol=1e-7
    )


def test_minres_of_nothing_warm_and_damped() -> None:
    matrix = indefinite(3, SPECTRUM)
    assert not np.any(solve(tb.MINRES(4), matrix, np.zeros(8)).value)
    want = np.linalg.solve(matrix + 0.3 * np.eye(8), B)
    damped = solve(tb.MINRES(20, damping=0.3, rtol=1e-10), matrix, B)
    np.testing.assert_allclose(damped.value, want, rtol=1e-7)
    solver = tb.MINRES(3, warm_start=True, rtol=1e-9)
    errors, state = [], None
    for _ in range(9):
        found = solve(solver, matrix, B, state)
        state = found.state.numpy()
        errors.append(residual(matrix, B, found.value))
    assert all(b <= a * (1 + 1e-9) for a, b in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    "solver",
    fast_where(
        lambda solver: isinstance(solver, tb.Nystrom),
        [tb.MINRES(12, rtol=1e-10), tb.Nystrom(8, damping=0.5)],
    ),
    ids=["minres", "nystrom"],
)
def test_blocks_are_solved_each_by_itself(solver: tb.LinearSolver) -> None:
    """Two blocks in one nest, one of them with other eigenvalues."""
    matrices = np.stack([spd(1, 8, 5.0), spd(2, 8, 9.0)])
    rhs = {"a": tf.constant(np.stack([B, -2 * B]))}

    def product(v: Any) -> Any:
        return {"a": tf.linalg.matvec(tf.constant(matrices), v["a"])}

    system = tb.LinearSystem(product, leading=1)
    found = tf.function(lambda b: solver.solve(system, b), jit_compile=True)(rhs)
    for block, b in enumerate([B, -2 * B]):
        matrix = matrices[block] + solver.damping * np.eye(8)
        want = np.linalg.solve(matrix, b)
        np.testing.assert_allclose(found.value["a"][block], want, rtol=1e-7)
    assert found.residual.shape == [2] and float(tf.reduce_max(found.residual)) < 1e-7


# Nystrom.


@pytest.mark.parametrize("rank", [3, 5])
def test_a_matrix_of_this_rank_or_less_is_inverted_exactly(rank: int) -> None:
    matrix = indefinite(4, [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 20.0, 300.0])
    found = solve(tb.Nystrom(rank, damping=0.1), matrix, B)
    want = np.linalg.solve(matrix + 0.1 * np.eye(8), B)
    np.testing.assert_allclose(found.value, want, rtol=1e-6)
    assert float(found.residual) < 1e-6 and int(found.iterations) == rank


def test_the_approximation_is_that_of_its_random_vectors() -> None:
    """C (W'C)^{-1} C' written out, at the outer step 7."""
    matrix, rank, damping = spd(5, 8, 50.0), 3, 0.2
    w = tf.random.stateless_normal([8, rank], [4, 7], dtype=tf.float64).numpy()
    image = matrix @ w
    low = image @ np.linalg.solve(w.T @ image, image.T)
    want = np.linalg.solve(low + damping * np.eye(8), B)
    system = tb.LinearSystem(product_with(matrix), outer_step=tf.constant(7))
    solver = tb.Nystrom(rank, seed=4, damping=damping)
    found = solver.solve(system, tf.constant(B))
    np.testing.assert_allclose(found.value, want, rtol=1e-8)
    left = B - (matrix + damping * np.eye(8)) @ want
    relative = np.linalg.norm(left) / np.linalg.norm(B)
    assert float(found.residual) == pytest.approx(relative, rel=1e-8)
    other = solver.solve(system._replace(outer_step=tf.constant(8)), tf.constant(B))
    assert np.abs(other.value - found.value).max() > 1e-3


def test_ranges() -> None:
    for options, message in (
        ({"rank": 0}, "`rank` must be"),
        ({"seed": -1}, "`seed` must be"),
        ({"damping": 0.0}, "`damping` must be positive"),
        ({"damping": -1.0}, "`damping` must be"),
    ):
        with pytest.raises(ValueError, match=message + r"(.|\n)*Received: "):
            tb.Nystrom(**options)
    with pytest.raises(ValueError, match="`max_steps` must be"):
        tb.MINRES(0)
