"""What would be computed wrongly is refused instead, by name."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import (
    EXAMPLES,
    FEATURES,
    full_batch,
    lower_loss,
    make,
    mean_square,
    network,
    quadratic,
    simplex,
    unroll,
    upper_loss,
    value_gap,
)

import tfbilevel as tb

SGD = keras.optimizers.SGD


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: SGD(0.1, loss_scale_factor=1024.0),
        lambda: keras.optimizers.LossScaleOptimizer(SGD(0.1)),
    ],
)
def test_loss_scaling_is_refused(optimizer: Any) -> None:
    with pytest.raises(ValueError, match="`upper_optimizer` must not scale losses"):
        make().compile(unroll(), optimizer())


@pytest.mark.parametrize("which", ["upper_optimizer", "start_optimizer"])
def test_averages_with_a_learned_start_are_refused(which: str) -> None:
    model = tb.BilevelModel(
        tb.ExampleWeights(EXAMPLES),
        network(),
        upper_loss,
        lower_loss,
        lower_start="learned",
    )
    optimizers = {"upper_optimizer": SGD(0.1), "start_optimizer": SGD(0.1)}
    optimizers[which] = SGD(0.1, use_ema=True)
    with pytest.raises(ValueError, match=f"`{which}` must not average weights"):
        model.compile(unroll(), **optimizers)


def test_averages_that_would_leave_the_set_are_refused() -> None:
    averaging = SGD(0.1, use_ema=True)
    model = tb.BilevelModel(
        tb.ExampleWeights(EXAMPLES),
        network(),
        upper_loss,
        lower_loss,
        project_upper=simplex,
    )
    with pytest.raises(ValueError, match="use_ema.* with `project_upper`"):
        model.compile(unroll(), averaging)
    held = keras.layers.Dense(1, kernel_constraint="non_neg")
    held.build((None, FEATURES))
    constrained = tb.BilevelModel(held, network(), upper_loss, lower_loss)
    with pytest.raises(ValueError, match="use_ema.* with constraints of upper"):
        constrained.compile(unroll(), averaging)
    free = make()
    scaled = tb.AugmentedLagrangian(
        SGD(0.1), 2, weight=1.0, schedule=tb.PenaltySchedule(rate_decay=0.5)
    )
    free.compile(scaled, SGD(0.1, use_ema=True), jit_compile=False)
    with pytest.raises(ValueError, match="use_ema.* scales the upper step"):
        free.fit(full_batch(), verbose=0)
    assert free.outer_step == 0


def test_a_network_at_both_levels_is_refused() -> None:
    """The lower step would overwrite what the upper optimizer has moved."""
    shared = network()

    def loss(upper: Any, lower: keras.Model, batch: tuple) -> tf.Tensor:
        return mean_square(lower, batch)

    with pytest.raises(ValueError, match="must not share trainable variables.*last"):
        tb.BilevelModel(shared, shared, loss, loss)


@pytest.mark.parametrize(
    "method",
    [
        value_gap,
        lambda: tb.GradientNorm(SGD(0.1), 1.0),
        lambda: tb.TTSA(SGD(0.1), 1, 0.1),
        lambda: tb.BAMM(SGD(0.1)),
        lambda: tb.SOBA(SGD(0.1)),
        lambda: tb.SRBA(SGD(0.1)),
        lambda: tb.FSLA(SGD(0.1)),
        lambda: tb.MRBO(SGD(0.1)),
        lambda: tb.VRBO(SGD(0.1)),
        lambda: tb.F2SA(tb.InnerSolver(SGD(0.1), 1), SGD(0.1), 1.0),
        lambda: tb.BOME(tb.InnerSolver(SGD(0.1), 1), SGD(0.1)),
        lambda: tb.MEHA(SGD(0.1)),
        lambda: tb.F3SA(SGD(0.1), 1.0),
        lambda: tb.BVFSM(tb.InnerSolver(SGD(0.1), 1), SGD(0.1), 1),
        lambda: tb.GAFFA(SGD(0.1), lambda upper, lower: lower.weights[0]),
        lambda: tb.PersistentES(tb.InnerSolver(SGD(0.1), 1, start="cold"), 2),
    ],
)
def test_methods_that_move_y_are_refused_where_y_is_not_kept(method: Any) -> None:
    model = tb.BilevelModel(network(), network(seed=2), upper_loss, upper_loss, tasks=2)
    with pytest.raises(ValueError, match="`method` must solve every task from its"):
        model.compile(method(), SGD(0.1))


def test_constraints_of_lower_variables_are_refused() -> None:
    held = keras.layers.Dense(4, kernel_constraint="non_neg")
    with pytest.raises(ValueError, match="constraints on .*kernel"):
        make(held)


@pytest.mark.parametrize("name", ["class_weight", "sample_weight"])
def test_weights_of_examples_belong_to_the_losses(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` has no effect in fit"):
        make().fit(full_batch(), **{name: {0: 1.0}})


def test_a_dataset_that_turns_out_to_be_empty() -> None:
    model = make()
    model.compile(unroll(), SGD(0.1))  # "auto" looks at the first element
    with pytest.raises(ValueError, match="`x` must not be empty"):
        model.fit(full_batch().filter(lambda batches: tf.constant(False)), verbose=0)


def test_conjugate_gradients_are_refused_for_unsymmetric_maps() -> None:
    solver = tb.ConjugateGradient(5)
    rates = tb.InnerSolver(SGD(1.0), 3, learned_rate=lambda x: tf.nn.sigmoid(x))
    with pytest.raises(ValueError, match="symmetric system"):
        tb.Implicit(rates, solver, through="optimizer")
    plain = tb.Implicit(tb.InnerSolver(SGD(0.5), 3), solver, through="optimizer")
    x = y = tf.zeros([2])
    plain.init(quadratic(), x, y)
    with pytest.raises(ValueError, match="symmetric system"):
        plain.init(quadratic(project_lower=tf.nn.relu), x, y)
    helped = tb.ConjugateGradient(5, preconditioner=lambda x, y, v: v)
    with pytest.raises(ValueError, match="must not have a preconditioner"):
        tb.Implicit(tb.InnerSolver(SGD(0.5), 3), helped, through="optimizer")


def test_an_accelerated_map_over_tasks_is_refused() -> None:
    inner = tb.InnerSolver(SGD(0.5), 3, accelerated=True)
    method = tb.Implicit(inner, tb.FixedPoint(3), through="optimizer")
    x, y = tf.constant(0.0), tf.zeros([2])
    method.init(quadratic(), x, y)
    with pytest.raises(ValueError, match="must not be accelerated"):
        method.init(tb.over_tasks(quadratic()), x, y)


def weighed(prepared: bool, mapping: str) -> tb.Problem:
    """Four tasks whose batch is a number each."""

    def prepare(x: Any, batches: tb.Batches) -> tb.Batches:
        return tb.Batches(*((1.0 + 0.0 * x) * part for part in batches))

    return tb.over_tasks(
        tb.Problem(
            lambda x, y, batch: 0.5 * (y - batch) ** 2,
            lambda x, y, batch: 0.5 * (y - x * batch) ** 2,
            prepare=prepare if prepared else None,
        ),
        mapping,
    )


def compiled(
    problem: tb.Problem, upper: int | None, lower: int | None, xla: bool = False
) -> Any:
    """The upper gradient of batches of so many tasks, `None` if known only later."""
    method = unroll()
    x, y = tf.constant(0.0), tf.zeros([4])
    specs = (tf.TensorSpec([count], tf.float32) for count in (upper, lower))

    @tf.function(input_signature=[tb.Batches(*specs)], jit_compile=xla, autograph=False)
    def gradient(batches: tb.Batches) -> tf.Tensor:
        state = method.init(problem, x, y)
        return problem.step(method, x, y, batches, state).upper_gradient

    return gradient


WAYS = [(p, m) for p in (False, True) for m in ("vectorized", "sequential")]
SIZES = [(1, 1), (2, 2), (1, 4), (4, 1), (6, 6)]


@pytest.mark.parametrize(("prepared", "mapping"), WAYS)
@pytest.mark.parametrize(("upper", "lower"), SIZES)
def test_batches_of_other_tasks_are_an_error(
    upper: int, lower: int, prepared: bool, mapping: str
) -> None:
    """They were taken for the mean over all tasks, repeated, or left out."""
    gradient = compiled(weighed(prepared, mapping), upper, lower)
    with pytest.raises(ValueError, match="must carry the same tasks"):
        gradient(tb.Batches(tf.ones([upper]), tf.ones([lower])))


@pytest.mark.parametrize("xla", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("prepared", "mapping"), WAYS)
def test_batches_of_unknown_sizes_are_refused_in_the_step(
    prepared: bool, mapping: str, xla: bool
) -> None:
    """And those of the right size are not. XLA leaves assertions out."""
    gradient = compiled(weighed(prepared, mapping), None, None, xla)
    whole = gradient(tb.Batches(tf.ones([4]), tf.ones([4])))
    assert float(whole) == pytest.approx(-(1 - 0.8**3))  # y_3 = 0, dy_3/dx = 1 - 0.8^3
    for upper, lower in SIZES:
        with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
            gradient(tb.Batches(tf.ones([upper]), tf.ones([lower])))


@pytest.mark.parametrize("rates", [[0.1, 0.05], np.full(3, 0.1), tf.fill([3], 0.1)])
def test_a_vector_of_rates_one_per_inner_step_gets_one_line(rates) -> None:
    with pytest.raises(ValueError, match="one rate per inner step.*PiecewiseConstant"):
        tb.InnerSolver(keras.optimizers.SGD(0.1), 3, learning_rate=rates)


@pytest.mark.parametrize("function", [lambda x: None, lambda x, t: None])
def test_a_learned_rate_without_return_is_refused(function: Any) -> None:
    """It is not the optimizer's own rate."""
    method = tb.Unroll(tb.InnerSolver(SGD(0.1), 3, learned_rate=function))
    x, problem = tf.ones([2]), quadratic()
    with pytest.raises(ValueError, match="`learned_rate` must return(.|\n)*Received: "):
        method.step(problem, x, x, tb.Batches(None, None), method.init(problem, x, x))


def test_learned_rates_one_per_inner_step_get_one_line() -> None:
    inner = tb.InnerSolver(keras.optimizers.SGD(0.1), 3, learned_rate=lambda x: x)
    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_sum(y["a"] ** 2),
        lambda x, y, batch: tf.reduce_sum(y["a"] ** 2),
    )
    x, y, method = tf.fill([3], 0.1), {"a": tf.ones([4])}, tb.Unroll(inner)
    with pytest.raises(ValueError, match=r"per inner step is a function of .*\(x, t\)"):
        problem.step(method, x, y, tb.Batches(None, None), {})
