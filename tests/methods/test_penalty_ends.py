"""Where BVFSM and GAFFA end: known solutions; what is reported, and what is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from small_models import full_batch, make
from suites import fast_where
from test_recursions import FULL, LARGEST
from test_recursions_penalty import (
    INNER,
    NOTHING,
    constraints,
    of_batch,
)
from test_stochastic import COUPLINGS, HESSIANS, PROBLEM, SGD, X, Y

import tfbilevel as tb
from tfbilevel._keras.replicas.strategies import require_together


def float64(*values: Any) -> list[tf.Tensor]:
    return [tf.constant(value, tf.float64) for value in values]


# The projection of x on {y: <A, y> <= B}. f is 0.5 |y - T|^2 + 0.25 |x - P|^2 with P
# outside and T on the border: x goes to P along A, and to the mean of T and P across.
A, B = np.array([1.0, 2.0]), 0.5
ACROSS = np.array([2.0, -1.0]) / np.sqrt(5)
P = B * A / (A @ A) + 1.2 * A / np.sqrt(5) + 0.9 * ACROSS
T = B * A / (A @ A) - 0.6 * ACROSS
HALF_SPACE = tb.Problem(
    lambda x, y, batch: (
        0.5 * tf.reduce_sum((y - T) ** 2) + 0.25 * tf.reduce_sum((x - P) ** 2)
    ),
    lambda x, y, batch: 0.5 * tf.reduce_sum((y - x) ** 2),
)


@pytest.mark.slow
def test_a_projection_on_a_half_space() -> None:
    """x, y, and the multiplier of the only constraint, whose error is O(w)."""
    across = (-0.6 + 0.5 * 0.9) / 1.5 * ACROSS
    x_wanted = B * A / (A @ A) + 1.2 * A / np.sqrt(5) + across
    y_wanted = B * A / (A @ A) + across
    z_wanted = 1.2 / np.sqrt(5)  # y - x + z A = 0
    errors = []
    for w in (0.08, 0.02):
        method = tb.GAFFA(
            SGD(0.1), lambda x, y: tf.reduce_sum(A * y) - B, upper_weight=w
        )
        found = tb.minimize(
            HALF_SPACE,
            method,
            *float64([0.0, 0.0], [0.0, 0.0]),
            SGD(0.4),
            NOTHING,
            5000,
        )
        z = found.state[0]["multiplier"]
        error = found.upper - x_wanted, found.lower - y_wanted, [z - z_wanted]
        errors.append(np.abs(np.concatenate(error)).max())
        assert found.metrics["violation"] < 1e-3
        assert 0 < found.metrics["gap"] < w**2  # 0 where y solves the lower problem
    assert errors[1] < 0.02 and 3.5 < errors[0] / errors[1] < 4.5


@pytest.mark.slow
def test_a_box_whose_bound_is_learned() -> None:
    """y* = clip(C, -1, x) for each entry: values in a nest, of several shapes."""
    c = np.array([3.0, -2.0, 0.3])
    target = np.array([2.0, 1.0, 0.0])
    problem = tb.Problem(
        lambda x, y, batch: 0.5 * tf.reduce_sum((y["v"] - target) ** 2) + 0.5 * x**2,
        lambda x, y, batch: 0.5 * tf.reduce_sum((y["v"] - c) ** 2),
    )
    method = tb.GAFFA(
        SGD(0.1),
        lambda x, y: {"above": y["v"] - x, "below": [-1.0 - y["v"][:, None]]},
        upper_weight=0.01,
    )
    found = tb.minimize(
        problem,
        method,
        *float64(0.0),
        {"v": tf.zeros([3], tf.float64)},
        SGD(0.4),
        NOTHING,
        steps=4000,
    )
    # Only the first bound moves y, so x minimises (x - 2)^2 / 2 + x^2 / 2.
    np.testing.assert_allclose(found.upper, 1.0, atol=0.02)
    np.testing.assert_allclose(found.lower["v"], [1.0, -1.0, 0.3], atol=0.02)


@pytest.mark.slow
def test_the_best_of_many_lower_solutions() -> None:
    """min (x - 2)^2 + |y - 4|^2 over the minima of sin(x + y_i - 2), from (0, 0).

    y_i = 2 + c - x with c = 3 pi / 2, the minimum nearest to 4, and then
    x = (2 c - 2) / 3. The next local solution is at x = -1.7.
    """
    problem = tb.Problem(
        lambda x, y, batch: (x - 2.0) ** 2 + tf.reduce_sum((y - 4.0) ** 2),
        lambda x, y, batch: tf.reduce_sum(tf.sin(x + y - 2.0)),
    )
    method = tb.BVFSM(
        tb.InnerSolver(SGD(0.1), 20),
        SGD(0.01),
        20,
        relaxation=tb.Geometric(1.0, 0.995),
        # Wider than the range of g at first, so that y is free to go to its valley.
        slack=tb.Geometric(5.0, 0.99),
    )
    found = tb.minimize(
        problem, method, *float64(0.0, [0.0, 0.0]), SGD(0.02), NOTHING, steps=500
    )
    c = 1.5 * np.pi
    x = (2 * c - 2) / 3
    assert abs(found.upper - x) < 0.1
    np.testing.assert_allclose(found.lower, 2 + c - x, atol=0.1)
    assert found.metrics["infeasible"] == 0


def stepped(slack: float, steps: int, y: Any, penalty: str = "log") -> tb.Step:
    method = tb.BVFSM(
        tb.InnerSolver(SGD(0.5), 30),
        SGD(1e-4),
        steps,
        penalty=penalty,
        relaxation=0.1,
        slack=slack,
        auxiliary_ridge=0.0,
    )
    x, y = float64(X, y)
    return method.step(PROBLEM, x, y, FULL, method.init(PROBLEM, x, y))


@pytest.mark.parametrize("penalty", fast_where("log".__eq__, ["log", "inverse"]))
def test_a_start_outside_of_the_barrier_is_reported(penalty: str) -> None:
    """g(y) - g(z) = 4 |.|^2-like far away: halfway to z quarters it, until inside."""
    hessian, coupling = (np.mean(np.asarray(a)[:3], 0) for a in (HESSIANS, COUPLINGS))
    z = np.linalg.solve(hessian, coupling @ X)
    away = np.array([1.0, -2.0, 0.5])
    gap = 0.5 * away @ hessian @ away
    # Outside at the points 0 and 1 of 6, then inside.
    made = stepped(gap / 10, 5, z + away, penalty)
    assert float(made.metrics["infeasible"]) == pytest.approx(2 / 6)
    assert float(made.metrics["diverged"]) == 0
    np.testing.assert_allclose(made.lower, z + away / 4, atol=0.05)
    # Inside from the start.
    made = stepped(2 * gap, 5, z + away, penalty)
    assert float(made.metrics["infeasible"]) == 0
    # Outside at the end too: z takes its place, and the barrier's slope is that at z.
    made = stepped(gap / 1e6, 2, z + away, penalty)
    assert float(made.metrics["infeasible"]) == 1
    assert float(made.metrics["diverged"]) == 1
    np.testing.assert_allclose(made.lower, z, atol=1e-4)
    slope = 0.1 / (gap / 1e6) ** (2 if penalty == "inverse" else 1)
    np.testing.assert_allclose(made.metrics["weight"], slope, rtol=1e-3)


GROWING = {
    "F3SA": lambda rate: tb.F3SA(SGD(rate), 100.0, auxiliary_optimizer=SGD(0.1)),
    "GAFFA": lambda rate: tb.GAFFA(
        SGD(rate),
        lambda x, y: y[:2] - x,
        auxiliary_optimizer=SGD(0.1),
        multiplier_optimizer=SGD(0.1),
        upper_weight=0.01,
    ),
    "BVFSM": lambda rate: tb.BVFSM(
        tb.InnerSolver(SGD(0.1), 2), SGD(rate), 3, penalty="quadratic", slack=1e60
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GROWING)
def test_divergence_is_reported(name: str, recwarn: Any) -> None:
    x, y = float64(X, 0.1 * Y)

    def follow(rate: float) -> None:
        tb.minimize(PROBLEM, GROWING[name](rate), x, y, SGD(1e-6), FULL, steps=6)

    follow(0.2 / LARGEST)
    assert not [w for w in recwarn if w.category is tb.DivergenceWarning]
    with pytest.warns(tb.DivergenceWarning, match=f"{name} diverged at outer step"):
        follow(8 / LARGEST)


@pytest.mark.slow
def test_a_barrier_that_stays_left_is_reported() -> None:
    method = tb.BVFSM(INNER, SGD(1e-3), 1, relaxation=0.1, slack=1e-9)
    with pytest.warns(tb.DivergenceWarning, match="outside of a barrier"):
        tb.minimize(PROBLEM, method, *float64(X, Y), SGD(0.1), FULL, steps=3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tb.F3SA(SGD(0.1), -1.0), "`weight` must not be negative"),
        (lambda: tb.F3SA(SGD(0.1), 1.0, 1.0), "`momentum` must be from 0 to below 1"),
        (lambda: tb.F3SA(SGD(0.1), 1.0, -0.1), "`momentum` must be from 0 to below 1"),
        (
            lambda: tb.F3SA(SGD(0.1), 1.0, auxiliary_optimizer=3),
            "`auxiliary_optimizer` must be a Keras optimizer",
        ),
        (lambda: tb.BVFSM(INNER, SGD(0.1), 0), "`steps` must be"),
        (lambda: tb.BVFSM(None, SGD(0.1), 1), "`inner` must be a tb.InnerSolver"),
        (
            lambda: tb.BVFSM(INNER, SGD(0.1), 1, penalty="cubic"),
            "`penalty` must be one",
        ),
        (lambda: tb.BVFSM(INNER, SGD(0.1), 1, slack=0.0), "`slack` must be above 0"),
        (
            lambda: tb.BVFSM(INNER, SGD(0.1), 1, penalty="quadratic", slack=-1.0),
            "`slack` must not be negative",
        ),
        (
            lambda: tb.BVFSM(INNER, SGD(0.1), 1, relaxation=0.0),
            "`relaxation` must be above 0",
        ),
        (
            lambda: tb.BVFSM(INNER, SGD(0.1), 1, lower_ridge=-0.1),
            "`lower_ridge` must not be negative",
        ),
        (lambda: tb.GAFFA(SGD(0.1), None), "`constraints` must be callable"),
        (lambda: tb.GAFFA(SGD(0.1), constraints, smoothing=0.0), "`smoothing` must be"),
        (
            lambda: tb.GAFFA(SGD(0.1), constraints, multiplier_smoothing=-1.0),
            "`multiplier_smoothing` must be",
        ),
        (
            lambda: tb.GAFFA(SGD(0.1), constraints, largest_multiplier=0),
            "`largest_multiplier` must be",
        ),
        (
            lambda: tb.GAFFA(SGD(0.1), constraints, initial_multiplier=200.0),
            "`initial_multiplier` must be",
        ),
        (
            lambda: tb.GAFFA(SGD(0.1), constraints, initial_multiplier=-np.ones(3)),
            "`initial_multiplier` must be from 0",
        ),
        (
            lambda: tb.GAFFA(SGD(0.1), constraints, initial_multiplier=None),
            "`initial_multiplier` must be a number, or",
        ),
        (
            lambda: tb.GAFFA(SGD(0.1), constraints, upper_weight=-1.0),
            "`upper_weight` must not be negative",
        ),
    ],
)
def test_ranges(build: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message + r"(.|\n)*Received: "):
        build()


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (of_batch, {}, "`initial_multiplier` must be a nest"),
        (lambda x, y: y > 0, {}, "`constraints` must be floating"),
        (lambda x, y: None, {}, "`constraints` must return h"),
        (lambda x, y: [], {}, "`constraints` must have at least one value"),
        (
            constraints,
            {"initial_multiplier": np.zeros(3)},
            "`initial_multiplier` must be a number, or like",
        ),
        (
            of_batch,
            {"initial_multiplier": np.zeros(3)},
            "`constraints` must return values like the multipliers",
        ),
    ],
)
def test_constraints_that_do_not_fit(
    function: Callable, options: dict, message: str
) -> None:
    method, (x, y) = tb.GAFFA(SGD(0.1), function, **options), float64(X, Y)
    with pytest.raises(ValueError, match=message + r"(.|\n)*Received: "):
        method.step(PROBLEM, x, y, FULL, method.init(PROBLEM, x, y))


# One constraint to an example of the lower batch, of which there are ten in fours.
BOUNDS = np.linspace(1, 2, 10)
IN_FOURS = tf.data.Dataset.from_tensor_slices(BOUNDS).batch(4)
ONCE = tf.data.Dataset.from_tensors(0.0)
BOUNDED = tb.Problem(
    lambda x, y, batch: (x - 1.0) ** 2 + (y - 2.0) ** 2,
    lambda x, y, batch: 0.5 * tf.reduce_mean(batch * (y - 3.0) ** 2),
)


def of_examples(initial: Any) -> tb.GAFFA:
    def bounds(x: Any, y: Any, batch: Any) -> Any:
        return batch * (y - x)

    return tb.GAFFA(SGD(0.1), bounds, initial_multiplier=initial)


def bounded_end(batches: Any, steps: int) -> float:
    method, (x, y) = of_examples(np.full([4], 0.2)), float64(0.0, 0.0)
    found = tb.minimize(BOUNDED, method, x, y, SGD(0.1), batches, steps)
    assert found.state[0]["multiplier"].shape == [4]
    return float(found.upper)


def test_batches_of_several_sizes_are_refused_before_the_first_step() -> None:
    """And not when the smaller one comes, in the words of some operation."""
    message = r"`constraints` must return values of static shapes(.|\n)*"
    message += r"drop_remainder=True(.|\n)*Received: shape \(None,\)"
    with pytest.raises(ValueError, match=message):
        bounded_end(tb.pair(ONCE, IN_FOURS), 1)
    method, (x, y) = of_examples(np.zeros(4)), float64(0.0, 0.0)
    batches = tb.Batches(tf.constant(0.0), tf.constant(BOUNDS[:3]))
    message = r"for every lower batch \(all(.|\n)*drop_remainder=True(.|\n)*"
    message += r"Received: constraints of shape \(3,\)(.|\n)* where shape \(4,\)"
    with pytest.raises(ValueError, match=message):
        method.step(BOUNDED, x, y, batches, method.init(BOUNDED, x, y))


@pytest.mark.slow
def test_what_is_said_of_batches_of_several_sizes_helps() -> None:
    """Stacked batches are filled up from the next pass; or the remainder is dropped."""
    rows = np.resize(BOUNDS, [2, 2, 4])  # ten, and again from the start
    wanted = bounded_end(lambda k: tb.StackedBatches(0.0, tf.gather(rows, k)), 2)
    np.testing.assert_allclose(
        bounded_end(tb.pair(ONCE, IN_FOURS, lower_batches=2), 2), wanted, rtol=1e-12
    )
    dropped = tf.data.Dataset.from_tensor_slices(BOUNDS).batch(4, drop_remainder=True)
    rows = BOUNDS[:8].reshape(2, 4)
    wanted = bounded_end(lambda k: tb.Batches(0.0, tf.gather(rows, k % 2)), 3)
    np.testing.assert_allclose(
        bounded_end(tb.pair(ONCE, dropped.repeat()), 3), wanted, rtol=1e-12
    )


def test_numbers_in_a_nest_of_multipliers_are_not_rounded() -> None:
    """0.1 in float32 is 1.5e-9 more."""
    method = tb.GAFFA(
        SGD(0.1),
        lambda x, y: (y[0] - x[0], y[1:] - x[0]),
        initial_multiplier=(0.1, np.full([2], 0.3)),
    )
    first, others = method.init(PROBLEM, *float64(X, Y))["multiplier"]
    assert float(first) == 0.1 and others.numpy().tolist() == [0.3, 0.3]


def test_tasks_are_refused() -> None:
    method = tb.GAFFA(SGD(0.1), constraints)
    with pytest.raises(ValueError, match="tb.GAFFA takes no tasks(.|\n)*Received: "):
        method.init(tb.over_tasks(PROBLEM), *float64(X, Y[None]))


def test_constraints_of_the_batch_are_refused_on_several_replicas() -> None:
    require_together(tb.GAFFA(SGD(0.1), constraints), PROBLEM)
    method = tb.GAFFA(SGD(0.1), of_batch, initial_multiplier=np.zeros(2))
    with pytest.raises(ValueError, match="on several replicas(.|\n)*Received: "):
        require_together(method, PROBLEM)


def bounded(upper: Any, lower: Any) -> Any:
    """Functions of models, not of lists of tensors."""
    kernel = lower.trainable_variables[0]
    return tf.reduce_sum(kernel**2) - tf.reduce_mean(upper(None))


@pytest.mark.slow
def test_models_are_trained_saved_and_resumed(tmp_path: Any) -> None:
    def fresh() -> tb.BilevelModel:
        return make(method=tb.GAFFA(SGD(0.1), bounded, upper_weight=0.1))

    def run(model: tb.BilevelModel) -> list[np.ndarray]:
        model.fit(full_batch().repeat(3), verbose=0)
        return [v.numpy() for v in model.variables]

    through, resumed = fresh(), fresh()
    run(through)
    through.save_weights(tmp_path / "half.weights.h5")
    resumed.load_weights(tmp_path / "half.weights.h5")
    for a, b in zip(run(resumed), run(through), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_constraints_of_models_are_held() -> None:
    """The squared norm of a kernel falls to the mean weight, 1/2, and not below."""
    method = tb.GAFFA(SGD(0.1), bounded, upper_weight=0.01)
    model = make(method=method)
    model.compile(method, SGD(1e-6), jit_compile=False)
    before = float(bounded(model.upper, model.lower))
    model.fit(full_batch().repeat(200), verbose=0)
    assert -0.05 < float(bounded(model.upper, model.lower)) < 0.01 < before


@pytest.mark.slow
def test_constraints_of_prepared_batches() -> None:
    """`prepare` makes the batch that constraints read, and is differentiated."""
    prepared = tb.Problem(
        PROBLEM.upper_loss,
        PROBLEM.lower_loss,
        prepare=lambda x, batches: batches._replace(
            lower=(batches.lower[0], (1 + x[0]) * batches.lower[1])
        ),
    )
    method = tb.GAFFA(SGD(0.2), of_batch, initial_multiplier=np.full([2], 0.2))
    x, y = float64(X, Y)
    report = tb.check_hypergradient(prepared, method, x, y, FULL, probes=2)
    assert report.error < 1e-7
    plain = tb.check_hypergradient(PROBLEM, method, x, y, FULL, probes=2)
    assert np.abs(np.subtract(plain.claimed, report.claimed)).max() > 1e-2
