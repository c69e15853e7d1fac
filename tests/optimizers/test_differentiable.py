"""`tb.differentiable` against Keras' own trajectories and central differences."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import optimizers
from problems import flat, unflat
from suites import fast_where

import tfbilevel as tb

SCHEDULE = optimizers.schedules.ExponentialDecay(0.05, decay_steps=10, decay_rate=0.8)

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: optimizers.SGD(0.05),
    "sgd momentum": lambda: optimizers.SGD(0.02, momentum=0.9),
    "sgd nesterov": lambda: optimizers.SGD(0.02, momentum=0.9, nesterov=True),
    "sgd weight decay": lambda: optimizers.SGD(0.05, momentum=0.5, weight_decay=0.02),
    "sgd schedule": lambda: optimizers.SGD(SCHEDULE, momentum=0.5),
    "adam": lambda: optimizers.Adam(0.05, beta_1=0.8, beta_2=0.95, epsilon=1e-3),
    "adam amsgrad": lambda: optimizers.Adam(0.05, beta_2=0.9, amsgrad=True),
    "adam weight decay": lambda: optimizers.Adam(0.05, weight_decay=0.03),
    "adam schedule": lambda: optimizers.Adam(SCHEDULE),
    "adamw": lambda: optimizers.AdamW(0.05, weight_decay=0.1),
    "adamw amsgrad": lambda: optimizers.AdamW(0.05, amsgrad=True),
    "rmsprop": lambda: optimizers.RMSprop(0.02),
    "rmsprop centered": lambda: optimizers.RMSprop(
        0.01, centered=True, momentum=0.5, rho=0.8
    ),
    "adagrad": lambda: optimizers.Adagrad(0.1, initial_accumulator_value=0.2),
    "adadelta": lambda: optimizers.Adadelta(1.0, rho=0.9, epsilon=1e-4),
    "adamax": lambda: optimizers.Adamax(0.05),
    "lion": lambda: optimizers.Lion(0.01, weight_decay=0.01),
    "ftrl": lambda: optimizers.Ftrl(0.1, l1_regularization_strength=0.01),
    "ftrl shrinkage": lambda: optimizers.Ftrl(
        0.1,
        learning_rate_power=-0.4,
        l2_regularization_strength=0.02,
        l2_shrinkage_regularization_strength=0.03,
        beta=0.1,
    ),
}

# Of a formula that another one has too.
VARIANTS = {"sgd weight decay", "adam weight decay", "adam schedule", "adamw amsgrad"}

START = {"a": np.array([0.7, -1.1, 0.4]), "b": [np.array([[0.9, -0.3]])]}


def tensors(nest: Any, dtype: str) -> Any:
    return tf.nest.map_structure(lambda leaf: tf.constant(leaf, dtype), nest)


def gradients(y: Any) -> Any:
    """Of sum(sin(2 a) + a^4 / 4) + sum(b^4 / 4 - b^2) + a_0 b_0 b_1 / 2."""
    a, b = y["a"], y["b"][0]
    mixed = tf.stack(
        [0.5 * b[0, 0] * b[0, 1], tf.zeros_like(a[1]), tf.zeros_like(a[1])]
    )
    swapped = 0.5 * a[0] * tf.reverse(b, [1])
    return {"a": 2 * tf.cos(2 * a) + a**3 + mixed, "b": [b**3 - 2 * b + swapped]}


def run(rule: tb.UpdateRule, y: Any, steps: int, state: Any = None) -> tuple:
    state = rule.init(y) if state is None else state
    for _ in range(steps):
        y, state = rule.update(gradients(y), state, y)
    return y, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trajectory_is_that_of_keras(name: str) -> None:
    """Float32 steps of a nonconvex problem in two variables."""
    steps = 25
    stateful = OPTIMIZERS[name]()
    variables = [keras.Variable(v, dtype="float32") for v in tf.nest.flatten(START)]
    rule = tb.differentiable(OPTIMIZERS[name]())
    y = tensors(START, "float32")
    state = rule.init(y)
    update = tf.function(
        lambda y, state: rule.update(gradients(y), state, y), autograph=False
    )
    for _ in range(steps):
        now = tf.nest.pack_sequence_as(START, [v.value + 0.0 for v in variables])
        stateful.apply(tf.nest.flatten(gradients(now)), variables)
        y, state = update(y, state)
    for got, want in zip(tf.nest.flatten(y), variables, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-6, atol=1e-7)
    assert int(state.iteration) == steps
    moved = np.abs(flat(y) - flat(START))
    assert moved.max() > 0.05


@pytest.mark.parametrize(
    "name", fast_where(lambda name: name not in VARIANTS, OPTIMIZERS)
)
def test_derivatives_are_central_differences(name: str) -> None:
    """In variables, slots and rate, through three updates.

    Away from the start, where slots are zero and roots have no derivative.
    """
    rule = tb.differentiable(OPTIMIZERS[name]())
    y, state = run(rule, tensors(START, "float64"), 5)
    rated = not rule.scheduled
    point = {"y": y, "slots": state.slots, "rate": [state.learning_rate] * rated}
    generator = np.random.default_rng(0)
    weights = generator.normal(size=flat(point["y"]).size)

    def objective(point: Any) -> tf.Tensor:
        rate = point["rate"][0] if rated else ()
        begin = tb.OptimizerState(state.iteration, rate, point["slots"])
        end, after = run(rule, point["y"], 3, begin)
        leaves = [tf.reshape(leaf, [-1]) for leaf in tf.nest.flatten(end)]
        slots = [tf.reduce_sum(tf.sin(slot)) for slot in after.slots]
        total = tf.reduce_sum(tf.sin(tf.concat(leaves, 0)) * weights)
        return total + 0.1 * tf.add_n(slots) if slots else total

    with tf.GradientTape() as tape:
        tape.watch(point)
        value = objective(point)
    claimed = flat(
        tape.gradient(value, point, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    )
    centre = flat(point)
    compiled = tf.function(objective, autograph=False)

    def at(vector: np.ndarray) -> float:
        return float(compiled(tensors(unflat(vector, point), "float64")))

    differences = []
    for index, unit in enumerate(np.eye(len(centre))):
        # Fourth order; a step in proportion, because some slots are tiny.
        h = 1e-4 * max(abs(centre[index]), 1e-3) * unit
        near, far = (
            at(centre + h) - at(centre - h),
            at(centre + 2 * h) - at(centre - 2 * h),
        )
        differences.append((8 * near - far) / (12 * h[index]))
    scale = np.abs(claimed).max()
    np.testing.assert_allclose(claimed, differences, rtol=1e-6, atol=1e-8 * scale)
    if rated:
        # tf.nest sorts keys: the rate comes first.
        assert abs(claimed[0]) > 1e-4


# One of each formula of an update.
FORMULAS = {
    "sgd nesterov",
    "adam amsgrad",
    "adamw",
    "rmsprop centered",
    "adadelta",
    "ftrl shrinkage",
}


@pytest.mark.parametrize("name", fast_where({"sgd", "adam"}.__contains__, OPTIMIZERS))
def test_eager_graph_and_xla_agree(name: str) -> None:
    rule = tb.differentiable(OPTIMIZERS[name]())
    y = tensors(START, "float64")

    def steps(y: Any) -> tuple:
        return run(rule, y, 3)

    eager = steps(y)
    for jit_compile in (False, True):
        compiled = tf.function(steps, autograph=False, jit_compile=jit_compile)(y)
        tf.nest.assert_same_structure(compiled, eager)
        np.testing.assert_allclose(flat(compiled), flat(eager), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_handed_in_is_not_changed(name: str) -> None:
    optimizer = OPTIMIZERS[name]()
    config = optimizer.get_config()
    rule = tb.differentiable(optimizer)
    run(rule, tensors(START, "float64"), 1)
    run(rule, tensors(START, "float32"), 1)
    assert rule.optimizer is optimizer
    assert not optimizer.built
    assert int(optimizer.iterations.numpy()) == 0
    assert str(optimizer.get_config()) == str(config)
    assert len(optimizer.variables) == (1 if rule.scheduled else 2)


def test_an_optimizer_in_use_elsewhere_goes_on_undisturbed() -> None:
    optimizer = optimizers.Adam(0.1)
    variable = keras.Variable([1.0, 2.0])
    optimizer.apply([tf.constant([1.0, -1.0])], [variable])
    before = [v.numpy() for v in [*optimizer.variables, variable]]
    rule = tb.differentiable(optimizer)
    y, state = run(rule, tensors(START, "float32"), 3)
    assert int(state.iteration) == 3  # from zero, not from where it was
    for a, b in zip([*optimizer.variables, variable], before, strict=True):
        np.testing.assert_array_equal(a.numpy(), b)


def test_update_does_not_depend_on_calls_before() -> None:
    """A pure function: the same arguments, the same results."""
    rule = tb.differentiable(optimizers.Adam(0.1))
    y = tensors(START, "float64")
    state = rule.init(y)
    first = rule.update(gradients(y), state, y)
    run(rule, y, 3)
    np.testing.assert_array_equal(
        flat(rule.update(gradients(y), state, y)), flat(first)
    )


def test_a_function_that_meets_new_shapes_is_traced_once() -> None:
    rule = tb.differentiable(keras.optimizers.Adam(0.1))

    @tf.function
    def step(y: tf.Tensor) -> tf.Tensor:
        return rule.update(2.0 * y, rule.init(y), y)[0]

    np.testing.assert_allclose(step(tf.ones([3])), 0.9, rtol=1e-5)
    assert step.experimental_get_tracing_count() == 1


def test_rate_of_the_state_is_the_one_used() -> None:
    """And float64 variables move by the rate as it was written, 0.1."""
    rule = tb.differentiable(optimizers.SGD(0.1))
    y = tf.constant([1.0, 2.0], tf.float64)
    state = rule.init(y)
    assert len(state.slots) == 0
    moved, after = rule.update(tf.ones_like(y), state, y)
    np.testing.assert_allclose(y - moved, 0.1, rtol=1e-15)
    other = state._replace(learning_rate=tf.constant(0.3, tf.float64))
    moved, after = rule.update(tf.ones_like(y), other, y)
    np.testing.assert_allclose(y - moved, 0.3, rtol=1e-15)
    assert float(after.learning_rate) == 0.3


def test_schedule_is_read_at_the_iteration() -> None:
    """0.5 for two steps, then 0.25; the state has no rate."""
    schedule = optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.25])
    rule = tb.differentiable(optimizers.SGD(schedule))
    y = tf.constant(0.0)
    state, ends = rule.init(y), []
    assert state.learning_rate == ()
    for _ in range(4):
        y, state = rule.update(tf.constant(-1.0), state, y)
        ends.append(float(y))
    assert ends == [0.5, 1.0, 1.25, 1.5]


class Harmonic(optimizers.schedules.LearningRateSchedule):
    """1 / (step + 1), which Keras could not write to a file."""

    def __call__(self, step: Any) -> Any:
        return 1.0 / (tf.cast(step, tf.float32) + 1.0)


def test_a_schedule_that_cannot_be_serialised() -> None:
    """1, 1/2, 1/3, with a momentum of 1/2: the steps are 1, 1, 5/6."""
    optimizer = optimizers.SGD(Harmonic(), momentum=0.5)
    rule = tb.differentiable(optimizer)
    y = tf.constant(0.0, tf.float64)
    state, ends = rule.init(y), []
    for _ in range(3):
        y, state = rule.update(tf.constant(-1.0, tf.float64), state, y)
        ends.append(float(y))
    np.testing.assert_allclose(ends, [1.0, 2.0, 2.0 + 5 / 6], rtol=1e-7)
    assert isinstance(optimizer._learning_rate, Harmonic)


def test_a_variable_without_entries() -> None:
    rule = tb.differentiable(optimizers.SGD(0.5, momentum=0.9))
    y = [tf.constant([1.0]), tf.zeros([0])]
    moved, _ = rule.update([tf.ones_like(leaf) for leaf in y], rule.init(y), y)
    assert moved[0].numpy().tolist() == [0.5] and moved[1].shape == (0,)


def test_dtypes_mix() -> None:
    rule = tb.differentiable(optimizers.Adam(0.1))
    y = [tf.constant([1.0, 2.0]), tf.constant(3.0, tf.float64)]
    moved, state = rule.update([tf.ones_like(leaf) for leaf in y], rule.init(y), y)
    assert [leaf.dtype for leaf in moved] == [tf.float32, tf.float64]
    # The first step of Adam is rate * sign(gradient).
    np.testing.assert_allclose(moved[0], [0.9, 1.9], rtol=2e-6)
    np.testing.assert_allclose(moved[1], 2.9, rtol=2e-6)
    assert state.learning_rate.dtype == tf.float64


@pytest.mark.parametrize("beta_2", [0.999, 0.99999])
def test_adam_at_a_zero_gradient_is_smooth(beta_2: float) -> None:
    """d(new y)/d(gradient) is finite, and the weight does not move."""
    for dtype in ("float32", "float64"):
        rule = tb.differentiable(optimizers.Adam(0.1, beta_2=beta_2))
        y = tf.constant([1.0, 2.0], dtype)
        gradient = tf.constant([0.0, 0.5], dtype)

        # XLA: TensorFlow's own kernel takes 0 / 0 for 0 in the derivative of a root.
        @tf.function(autograph=False, jit_compile=True)
        def derive(gradient: tf.Tensor, y: tf.Tensor, rule: Any = rule) -> tuple:
            with tf.GradientTape() as tape:
                tape.watch(gradient)
                moved, _ = rule.update(gradient, rule.init(y), y)
                total = tf.reduce_sum(moved)
            return moved, tape.gradient(total, gradient)

        moved, derivative = derive(gradient, y)
        assert np.isfinite(derivative).all()
        assert abs(float(moved[0]) - 1.0) < 1e-9
        np.testing.assert_allclose(moved[1], 1.9, rtol=1e-4 if beta_2 > 0.999 else 1e-6)


class _OwnSGD(keras.optimizers.SGD):
    pass


def _excluded() -> Any:
    optimizer = optimizers.AdamW(0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "nadam": (lambda: optimizers.Nadam(0.1), "Nadam"),
    "muon": (lambda: optimizers.Muon(0.1), "Muon"),
    "lamb": (lambda: optimizers.Lamb(0.1), "Lamb"),
    "adafactor": (lambda: optimizers.Adafactor(0.1), "Adafactor"),
    "loss scale": (
        lambda: optimizers.LossScaleOptimizer(optimizers.SGD(0.1)),
        "LossScaleOptimizer",
    ),
    "subclass": (lambda: _OwnSGD(0.1), "_OwnSGD"),
    "ema": (lambda: optimizers.SGD(0.1, use_ema=True), "use_ema"),
    "clipnorm": (lambda: optimizers.SGD(0.1, clipnorm=1.0), "clipnorm"),
    "global clipnorm": (
        lambda: optimizers.SGD(0.1, global_clipnorm=1.0),
        "global_clipnorm",
    ),
    "clipvalue": (lambda: optimizers.Adam(0.1, clipvalue=1.0), "clipvalue"),
    "accumulation": (
        lambda: optimizers.SGD(0.1, gradient_accumulation_steps=2),
        "gradient_accumulation_steps",
    ),
    "loss scale factor": (
        lambda: optimizers.SGD(0.1, loss_scale_factor=8.0),
        "loss_scale_factor",
    ),
    "callable rate": (lambda: optimizers.SGD(lambda: 0.1), "learning_rate"),
    "excluded weight decay": (_excluded, "exclude_from_weight_decay"),
    "a number": (lambda: 0.1, "optimizer"),
    "a name of none": (lambda: "adamm", "optimizer"),
    "a class": (lambda: optimizers.SGD, "optimizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, word = REFUSED[name]
    with pytest.raises(ValueError, match="Received: ") as caught:
        tb.differentiable(make())
    assert word in str(caught.value)


def test_variables_need_static_shapes() -> None:
    rule = tb.differentiable(optimizers.SGD(0.1))

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.float32)])
    def update(y: tf.Tensor) -> tf.Tensor:
        return rule.update(y, rule.init(y), y)[0]

    with pytest.raises(ValueError, match="static shapes"):
        update(tf.ones([3]))
