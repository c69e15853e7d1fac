"""What methods with a lower optimizer of their own do with it from step to step."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb

RATE, MOMENTUM = 0.1, 0.5
NO_DATA = tb.Batches(None, None)


def rule() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(RATE, momentum=MOMENTUM)


def linear(**options) -> tb.Problem:
    """f_y = g_y = 1 everywhere, with zeros for what must be connected."""
    return tb.Problem(
        upper_loss=lambda x, y, batch: y + x**2,
        lower_loss=lambda x, y, batch: y + 0.0 * (x * y + y**2),
        **options,
    )


def penalty(**options) -> tb.Method:
    """One step of y in each of x; no schedule update."""
    return tb.AugmentedLagrangian(rule(), 1, atol=1e-9, **options)


# A method, and what the direction of y is in f_y = g_y = 1.
METHODS = {
    "ttsa": (tb.TTSA(rule(), 1, 0.4, lower_power=0.0, upper_power=0.0), 1.0),
    "bamm": (tb.BAMM(rule()), 1.0),
    "gradient-norm": (tb.GradientNorm(rule(), 0.5), 1.0),
    "value-gap": (tb.ValueGap(None, rule(), 0.5), 1.5),
    "augmented-lagrangian": (penalty(lower_weight=0.6), 1.6),
}


def positions(method: tb.Method, problem: tb.Problem, steps: int = 4) -> np.ndarray:
    zero = tf.constant(0.0, tf.float64)
    result = tb.minimize(
        problem,
        method,
        zero,
        zero,
        keras.optimizers.SGD(1e-9),
        NO_DATA,
        steps=steps,
        trace=lambda point: point.lower,
    )
    return result.trace.numpy()


@pytest.mark.parametrize("name", METHODS)
def test_slots_go_on_from_one_outer_step_to_the_next(name: str) -> None:
    method, direction = METHODS[name]
    y, velocity, expected = 0.0, 0.0, []
    for _ in range(4):
        velocity = MOMENTUM * velocity - RATE * direction
        y += velocity
        expected.append(y)
    np.testing.assert_allclose(positions(method, linear()), expected, rtol=1e-7)


def test_slots_that_are_reset_for_new_tasks_do_not() -> None:
    found = positions(penalty(lower_weight=0.6, optimizer_state="reset"), linear())
    np.testing.assert_allclose(found, -0.16 * np.arange(1, 5), rtol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_every_position_is_projected(name: str) -> None:
    method, direction = METHODS[name]
    bound = -1.5 * RATE * direction  # between the first and the second
    problem = linear(project_lower=lambda y: tf.maximum(y, bound))
    found = positions(method, problem, steps=3)
    np.testing.assert_allclose(found, [-RATE * direction, bound, bound], rtol=1e-7)


@pytest.mark.parametrize("multipliers", ["carry", "reset"])
def test_multipliers_are_those_of_the_tasks(multipliers: str) -> None:
    """The schedule is updated at every step: nu + rho g_y, rho 1 and then 1.1, or nu
    as it began."""
    method = tb.AugmentedLagrangian(
        rule(), 1, atol=1e6, initial_multiplier=0.3, multiplier_state=multipliers
    )
    problem, zero = linear(), tf.constant(0.0, tf.float64)
    state, found = method.init(problem, zero, zero), []
    for _ in range(2):
        state = method.step(problem, zero, zero, NO_DATA, state).state
        found.append(float(state["multiplier"]))
    expected = [1.3, 2.4] if multipliers == "carry" else [0.3, 0.3]
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_x_is_scaled_before_it_is_projected() -> None:
    """TTSA: a whole step, then (k + 1)^-0.6 of one; the projection doubles what is
    left, so that the order shows."""
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: x + 0.0 * y,
        lower_loss=lambda x, y, batch: y + 0.0 * (x * y + y**2),
        project_upper=lambda x: tf.where(x < -0.05, 2.0 * x, x),
    )
    zero = tf.constant(0.0, tf.float64)
    result = tb.minimize(
        problem,
        tb.TTSA(rule(), 1, 0.4),
        zero,
        zero,
        keras.optimizers.SGD(0.1),
        NO_DATA,
        steps=3,
        trace=lambda point: point.upper,
    )
    x, expected = 0.0, []
    for k in range(3):
        x = 2.0 * (x - 0.1 * (k + 1) ** -0.6)
        expected.append(x)
    np.testing.assert_allclose(result.trace, expected, rtol=1e-7)
