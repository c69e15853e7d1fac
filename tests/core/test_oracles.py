"""The oracles themselves: hand-written derivatives against central differences."""

import numpy as np
import pytest
from problems import ORACLES, Oracle, cast, flat, unflat
from references import descend, implicit, unroll


def difference(function, point, h=1e-5):
    """Central differences of a scalar function of a vector."""
    return np.array(
        [
            (function(point + h * e) - function(point - h * e)) / (2 * h)
            for e in np.eye(len(point))
        ]
    )


def losses(oracle: Oracle):
    data = cast(oracle.data, "float64")

    def value(loss, batch):
        return lambda x, y: float(
            loss(
                cast(unflat(x, oracle.x), "float64"),
                cast(unflat(y, oracle.y), "float64"),
                batch,
            )
        )

    return (
        value(oracle.problem.upper_loss, data.upper),
        value(oracle.problem.lower_loss, data.lower),
    )


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda o: o.name)
def test_hand_written_derivatives_are_those_of_the_losses(oracle):
    f, g = losses(oracle)
    x, y = flat(oracle.x), flat(oracle.y)
    close = {"rtol": 1e-7, "atol": 1e-8}
    v = np.linspace(-1, 1, len(y)) + 0.3
    np.testing.assert_allclose(
        oracle.f_x(x, y), difference(lambda x: f(x, y), x), **close
    )
    np.testing.assert_allclose(
        oracle.f_y(x, y), difference(lambda y: f(x, y), y), **close
    )
    np.testing.assert_allclose(
        oracle.g_x(x, y), difference(lambda x: g(x, y), x), **close
    )
    np.testing.assert_allclose(
        oracle.g_y(x, y), difference(lambda y: g(x, y), y), **close
    )
    np.testing.assert_allclose(
        oracle.g_xy(x, y, v), difference(lambda x: oracle.g_y(x, y) @ v, x), **close
    )
    np.testing.assert_allclose(
        oracle.hessian(x) @ v, difference(lambda y: oracle.g_y(x, y) @ v, y), **close
    )


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda o: o.name)
def test_hypergradient_is_the_derivative_at_the_solution(oracle):
    f, _ = losses(oracle)
    x = flat(oracle.x)
    np.testing.assert_allclose(oracle.g_y(x, oracle.solution(x)), 0.0, atol=1e-12)
    np.testing.assert_allclose(
        oracle.hypergradient(x),
        difference(lambda x: f(x, oracle.solution(x)), x),
        rtol=1e-7,
    )


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda o: o.name)
def test_the_references_agree_where_they_must(oracle):
    """A long unroll is the implicit gradient; a short one is its own derivative."""
    f, _ = losses(oracle)
    x, y = flat(oracle.x), flat(oracle.y)

    def end(x, steps):
        return descend(oracle, x, y, oracle.rate, steps)[-1]

    long = descend(oracle, x, y, oracle.rate, 60)
    np.testing.assert_allclose(
        unroll(oracle, x, long, oracle.rate), oracle.hypergradient(x), rtol=1e-10
    )
    np.testing.assert_allclose(
        implicit(oracle, x, long[-1]), oracle.hypergradient(x), rtol=1e-10
    )
    short = descend(oracle, x, y, oracle.rate, 3)
    np.testing.assert_allclose(
        unroll(oracle, x, short, oracle.rate),
        difference(lambda x: f(x, end(x, 3)), x),
        rtol=1e-7,
    )


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda o: o.name)
def test_gradient_descent_contracts_quickly(oracle):
    """So that few inner steps are "converged" in the other files."""
    spectrum = np.linalg.eigvalsh(oracle.hessian(flat(oracle.x)))
    assert np.abs(1 - oracle.rate * spectrum).max() < 0.45
