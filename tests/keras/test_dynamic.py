"""tb.Dynamic: what it returns, what it leaves alone, and what it refuses.

Its twelve gradients are in test_two_layer_network.py.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import Oracle, flat, nested, scalar
from suites import fast_where

import tfbilevel as tb

SGD = keras.optimizers.SGD
DATA = tf.constant([[1.0, 0.5], [0.3, -1.0], [0.2, 0.4]])
TARGET = tf.constant([1.0, -0.5, 0.2])


def errors(state):
    return tf.square(state.lower_model(state.data)[:, 0] - state.target)


def make(**options) -> tb.Dynamic:
    lower = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    lower.set_weights([np.full((2, 1), 0.3, "float32"), np.zeros(1, "float32")])
    options = {"lower_loop": 4, "ll_opt": SGD(0.2)} | options
    return tb.Dynamic(
        ll_objective=lambda s: tf.reduce_mean(s.upper_model(None) * errors(s)),
        ul_model=tb.ExampleWeights(3),
        ul_objective=lambda s: tf.reduce_mean(errors(s)),
        ll_model=lower,
        **options,
    )


def optimize(dynamic, **keywords):
    keywords = {"validate_data": 2 * DATA, "validate_target": TARGET} | keywords
    return dynamic.optimize(DATA, TARGET, **keywords)


def test_positional_arguments_are_those_of_the_published_class() -> None:
    """optimize(train data, train target, auxiliary model, auxiliary optimizer, ...)"""
    own = make()
    copy = keras.models.clone_model(own.ll_model)
    given = make(ll_opt=None)
    result = given.optimize(DATA, TARGET, copy, SGD(0.2), 2 * DATA, TARGET)
    want = optimize(own)
    np.testing.assert_array_equal(result.upper_gradients[0], want.upper_gradients[0])
    for variable, value in zip(copy.trainable_variables, want.lower, strict=True):
        np.testing.assert_array_equal(variable, value)
    assert result.max_loss_iter is None and result.start_gradients is None


def test_optimizers_move_the_real_variables() -> None:
    """The published auxiliary step moves a copy: the start never changes there."""
    dynamic = make(init_auxiliary=True, acquire_max_loss=True)
    start = [v.numpy() for v in dynamic.ll_model.trainable_variables]
    logits = dynamic.ul_model.trainable_variables[0].numpy()
    result = optimize(dynamic, ul_opt=SGD(0.5), init_opt=SGD(0.1))
    assert result.max_loss_iter in range(1, 5)
    for variable, before, gradient in zip(
        dynamic.ll_model.trainable_variables, start, result.start_gradients, strict=True
    ):
        assert np.abs(gradient).max() > 1e-3
        np.testing.assert_allclose(variable, before - 0.1 * gradient, rtol=1e-6)
    np.testing.assert_allclose(
        dynamic.ul_model.trainable_variables[0],
        logits - 0.5 * result.upper_gradients[0].numpy(),
        rtol=1e-6,
    )


def test_skipped_steps_leave_no_trace_in_the_upper_gradient() -> None:
    """T-RAD equals RAD over the last steps, begun where the skipped ones end."""
    truncated = make(truncate_iters=3)
    result = optimize(truncated)
    late = make(lower_loop=1)
    reached = optimize(make(lower_loop=3)).lower
    for variable, value in zip(late.ll_model.trainable_variables, reached, strict=True):
        variable.assign(value)
    want = optimize(late)
    np.testing.assert_allclose(
        result.upper_gradients[0], want.upper_gradients[0], rtol=1e-5
    )


def test_second_calls_do_not_trace_again() -> None:
    """With another optimizer like the first, too, as published scripts call it."""
    want = optimize(make()).upper_gradients[0]
    for dynamic in (make(), make(ll_opt=None)):
        for _ in range(3):
            made = optimize(dynamic, auxiliary_opt=SGD(0.2)).upper_gradients[0]
        np.testing.assert_array_equal(made, want)
        assert dynamic._step.experimental_get_tracing_count() == 1


def test_no_validation_data_where_the_inner_loop_needs_none() -> None:
    """F without data: the size of the lower variables."""
    dense = keras.layers.Dense(1, use_bias=False)
    lower = keras.Sequential([keras.Input((2,)), dense])
    dynamic = tb.Dynamic(
        lambda s: tf.reduce_mean(s.upper_model(None) * errors(s)),
        3,
        tb.ExampleWeights(3),
        lambda s: tf.reduce_sum(s.lower_model.trainable_variables[0].value ** 2),
        lower,
        ll_opt=SGD(0.1),
    )
    result = dynamic.optimize(DATA, TARGET)
    want = float(tf.reduce_sum(result.lower[0] ** 2))
    assert float(result.upper_loss) == pytest.approx(want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncate_iters": 2, "acquire_max_loss": True}, "exclude each other"),
        ({"truncate_iters": 4}, "`truncate_iters` must be below `lower_loop`"),
        ({"truncate_iters": -1}, "`truncate_iters` must be an integer"),
        ({"truncate_iters": 2, "ll_opt": None}, "`ll_opt` must be given"),
        ({"alpha": -0.1}, "`alpha` must be a finite number, between 0 and 1"),
        ({"alpha": 1.1}, "`alpha` must be a finite number, between 0 and 1"),
        ({"alpha": "0.4"}, "`alpha` must be a finite number, between 0 and 1"),
        (
            {"alpha": 0.5, "alpha_decay": 0.0},
            "`alpha_decay` must be a finite number, above 0",
        ),
        ({"lower_loop": 0}, "`lower_loop` must be an integer"),
    ],
)
def test_invalid_combinations(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("name", ["ll_objective", "ul_objective"])
def test_objectives_of_four_arguments_get_one_line(name) -> None:
    def published(data, target, ul_model, ll_model):
        return tf.reduce_mean((ll_model(data)[:, 0] - target) ** 2)

    lower = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    ours = {n: lambda s: tf.reduce_mean(errors(s)) for n in OBJECTIVES}
    models = {"ul_model": tb.ExampleWeights(3), "ll_model": lower}
    with pytest.raises(ValueError, match=f"`{name}` must take one argument.*published"):
        tb.Dynamic(lower_loop=2, **models, **(ours | {name: published}))


OBJECTIVES = ("ll_objective", "ul_objective")


def test_an_auxiliary_model_of_another_shape_is_refused_untouched() -> None:
    other = keras.Sequential([keras.Input((7,)), keras.layers.Dense(2)])
    before = other.get_weights()
    with pytest.raises(ValueError, match="`auxiliary_model` must be built like"):
        optimize(make(), auxiliary_model=other)
    for value, was in zip(other.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, was)


def test_a_nan_is_an_error_and_moves_nothing() -> None:
    dynamic = make()
    before = dynamic.ul_model.get_weights()
    optimize(dynamic, ul_opt=SGD(0.0))
    rule = "upper loss .* outer step 1.*guard the loss. Received"
    with pytest.raises(tb.NonFiniteError, match=rule):
        optimize(dynamic, validate_data=DATA * float("nan"), ul_opt=SGD(0.1))
    np.testing.assert_array_equal(dynamic.ul_model.get_weights(), before)


def test_invalid_calls() -> None:
    for options in ({"alpha": 0.5}, {"acquire_max_loss": True}):
        with pytest.raises(ValueError, match="`validate_data` must be given"):
            make(**options).optimize(DATA, TARGET)
    with pytest.raises(ValueError, match="`auxiliary_opt` must be given"):
        make(ll_opt=None).optimize(DATA, TARGET)
    for other in (SGD(0.3), SGD(0.2, momentum=0.9), keras.optimizers.Adam(0.2)):
        with pytest.raises(ValueError, match="must not differ"):
            optimize(make(), auxiliary_opt=other)
    with pytest.raises(ValueError, match="without init_auxiliary=True"):
        optimize(make(), init_opt=SGD(0.2))


# The twelve on the oracle problems: tests/problems.py has their losses.

TWELVE = [
    pytest.param(options, learned, id=f"{name}{'-ia' * learned}")
    for name, options in {
        "rad": {},
        "t-rad": {"last": 3, "skipped": "identity"},
        "ptt": {"end": "pessimistic"},
        "bda": {"aggregate": tb.Aggregation(0.4, 0.7)},
        "t-bda": {
            "aggregate": tb.Aggregation(0.4, 0.7),
            "last": 3,
            "skipped": "identity",
        },
        "bda-ptt": {"aggregate": tb.Aggregation(0.4, 0.7), "end": "pessimistic"},
    }.items()
    for learned in (False, True)
]


WHOLE = ("t-bda-ia", "bda-ptt-ia")


def with_learned_start(problem: tb.Problem) -> tb.Problem:
    """The same losses; the upper variables are (x, where the inner loop starts)."""
    return tb.Problem(
        lambda u, y, batch: problem.upper_loss(u[0], y, batch),
        lambda u, y, batch: problem.lower_loss(u[0], y, batch),
        lower_start=lambda u: u[1],
    )


def on(oracle: Oracle, options: dict, learned: bool) -> tuple:
    """One of the twelve: problem, method, and what the problem is evaluated at."""
    upper, lower, batches = oracle.at("float64")
    problem = oracle.problem
    if learned:
        problem, upper = with_learned_start(problem), (upper, lower)
    method = tb.Unroll(tb.InnerSolver(SGD(oracle.rate / 2), 5), **options)
    return problem, method, (upper, lower, batches)


@pytest.mark.parametrize(
    ("options", "learned", "oracle"),
    fast_where(
        lambda options, learned, oracle: oracle.name == "scalar",
        [
            pytest.param(*case.values, oracle, id=f"{case.id}-{oracle.name}")
            for case in TWELVE
            # Nested: the two that between them have every part of all.
            for oracle in (scalar(), *([nested()] if case.id in WHOLE else []))
        ],
    ),
)
def test_the_twelve_on_the_oracles(options, learned, oracle) -> None:
    problem, method, inputs = on(oracle, options, learned)
    report = tb.check_hypergradient(problem, method, *inputs, probes=2)
    assert report.error < 1e-6 and report.noise < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "learned"),
    [case for case in TWELVE if case.id in WHOLE],
)
def test_the_twelve_in_every_mode(options, learned) -> None:
    """On the largest problem."""
    problem, method, inputs = on(nested(), options, learned)
    state = method.init(problem, *inputs[:2])
    eager = method.step(problem, *inputs, state)
    graph = tf.function(lambda *a: method.step(problem, *a), autograph=False)
    xla = tf.function(lambda *a: graph(*a), autograph=False, jit_compile=True)
    for compiled in (graph, xla):
        other = compiled(*inputs, state)
        np.testing.assert_allclose(
            flat(other.upper_gradient), flat(eager.upper_gradient), rtol=1e-9
        )


def test_statistics_and_masks_move_on() -> None:
    """Seeds once per call, statistics at each of its lower steps, at the end's y."""
    normalise = keras.layers.BatchNormalization(momentum=0.5)
    drop = keras.layers.Dropout(0.5)
    lower = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(2), normalise, drop]
    )
    dynamic = tb.Dynamic(
        ll_objective=lambda s: tf.reduce_mean(
            s.upper_model(None)
            * tf.reduce_sum(s.lower_model(s.data, training=True) ** 2, axis=1)
        ),
        ul_model=tb.ExampleWeights(3),
        ul_objective=lambda s: tf.reduce_mean(s.lower_model(s.data) ** 2),
        ll_model=lower,
        lower_loop=2,
        ll_opt=SGD(0.2),
    )
    seed = drop.seed_generator.state
    before = np.array(seed)
    result = optimize(dynamic)
    assert not np.array_equal(before, np.array(seed))
    outputs = DATA.numpy() @ result.lower[0].numpy() + result.lower[1].numpy()
    np.testing.assert_allclose(
        normalise.moving_mean, 0.75 * outputs.mean(0), rtol=1e-5, atol=1e-6
    )
