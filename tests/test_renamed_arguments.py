"""Keywords of the release before: they work, warn, and are refused beside the new."""

import dataclasses
import warnings
from typing import Any

import keras
import pytest
import tensorflow as tf

import tfbilevel as tb

SGD = keras.optimizers.SGD(0.1)
INNER = tb.InnerSolver(SGD, 3)

# class -> its other arguments, and former keyword, keyword, a value of it.
RENAMED = [
    (tb.InnerSolver, (SGD, 3), "tolerance", "atol", 0.25),
    (tb.InnerSolver, (SGD, 3), "learning_rate", "learned_rate", tf.exp),
    (tb.ConjugateGradient, (), "tolerance", "rtol", 0.25),
    (tb.NormalConjugateGradient, (), "tolerance", "rtol", 0.25),
    (tb.FixedPoint, (), "tolerance", "rtol", 0.25),
    (tb.Neumann, (), "tolerance", "rtol", 0.25),
    (tb.GradientSolver, (SGD,), "tolerance", "rtol", 0.25),
    (tb.AugmentedLagrangian, (SGD, 3), "tolerance", "atol", 0.25),
    (tb.AugmentedLagrangian, (SGD, 3), "multiplier", "initial_multiplier", 0.25),
    (tb.AugmentedLagrangian, (SGD, 3), "starts", "independent_starts", 4),
    (tb.AugmentedLagrangian, (SGD, 3), "multipliers", "multiplier_state", "reset"),
    (tb.StocBiO, (INNER,), "max_steps", "terms", 5),
]
NAMES = [f"{row[0].__name__}-{row[2]}" for row in RENAMED]


@pytest.mark.parametrize("cls, others, former, name, value", RENAMED, ids=NAMES)
def test_a_former_keyword_is_the_keyword(
    cls: Any, others: tuple, former: str, name: str, value: Any
) -> None:
    with pytest.warns(DeprecationWarning, match=f"`{former}` of tb.*`{name}`") as said:
        made = cls(*others, **{former: value})
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        today = cls(*others, **{name: value})
        again = dataclasses.replace(made, **{name: value})
    for field in dataclasses.fields(cls):
        assert getattr(made, field.name) == getattr(today, field.name), field.name
    assert getattr(made, name) == getattr(again, name) == value
    if former in {field.name for field in dataclasses.fields(cls)}:
        return  # the name of something else today
    with pytest.warns(DeprecationWarning, match=f"`{former}` of tb.*`{name}`"):
        assert getattr(today, former) == value


@pytest.mark.parametrize("cls, others, former, name, value", RENAMED, ids=NAMES)
def test_a_keyword_and_its_former_name_exclude_each_other(
    cls: Any, others: tuple, former: str, name: str, value: Any
) -> None:
    said = f"`{former}` of tb.*is `{name}` now.*not be given twice.*Received: {name}="
    with pytest.raises(ValueError, match=said):
        cls(*others, **{former: value, name: value})


def test_a_former_keyword_beside_the_argument_by_position() -> None:
    options = ("warm", None, "reset", False, 0.25)
    assert tb.InnerSolver(SGD, 3, *options).atol == 0.25
    with pytest.raises(ValueError, match="not be given twice"):
        tb.InnerSolver(SGD, 3, *options, tolerance=0.25)
    with pytest.raises(TypeError, match="'tolerances'"):
        tb.InnerSolver(SGD, 3, tolerances=0.25)


def test_the_former_name_of_a_scaled_step() -> None:
    step = tb.Step((), (), (), {}, upper_scale=tf.constant(0.5))
    one, two = tf.constant(1.0), tf.constant(2.0)
    with pytest.warns(DeprecationWarning, match="`damped` of tb.Step is `scaled`"):
        assert float(step.damped(one, two)) == float(step.scaled(one, two)) == 1.5


FACTORS = {"growth": 1.5, "decay": 0.25, "tolerance_decay": 0.5, "rate_decay": 0.75}


@pytest.mark.parametrize("count", [1, 4])
def test_former_factors_are_gathered(count: int) -> None:
    factors = dict(list(FACTORS.items())[:count])
    with pytest.warns(DeprecationWarning, match="`schedule`, a tb.PenaltySchedule"):
        made = tb.AugmentedLagrangian(SGD, 3, **factors)
    assert made.schedule == tb.PenaltySchedule(**factors)
    for name, value in factors.items():
        with pytest.warns(DeprecationWarning, match=f"`schedule.{name}`"):
            assert getattr(made, name) == value
    with pytest.raises(ValueError, match="must not be given twice"):
        tb.AugmentedLagrangian(SGD, 3, schedule=tb.PenaltySchedule(), **factors)


def test_former_arguments_by_position() -> None:
    """weight, ..., nu, four factors, smoothing, start, starts and two choices."""
    values = (0.5, 2.0, 3.0, 4.0, *FACTORS.values(), 0.25, "cold", 6, "reset", "reset")
    with pytest.warns(DeprecationWarning):
        made = tb.AugmentedLagrangian(SGD, 3, *values)
    today = tb.AugmentedLagrangian(
        SGD,
        3,
        weight=0.5,
        lower_weight=2.0,
        atol=3.0,
        initial_multiplier=4.0,
        smoothing=0.25,
        start="cold",
        independent_starts=6,
        optimizer_state="reset",
        multiplier_state="reset",
        schedule=tb.PenaltySchedule(**FACTORS),
    )
    for field in dataclasses.fields(made):
        assert getattr(made, field.name) == getattr(today, field.name), field.name
    with pytest.raises(TypeError):
        tb.AugmentedLagrangian(SGD, 3, *values, 1.0)


def test_a_former_learned_rate_by_position() -> None:
    with pytest.warns(DeprecationWarning, match="`learning_rate`.* is `learned_rate`"):
        made = tb.InnerSolver(SGD, 3, "warm", tf.exp)
    assert made.learning_rate is None and made.learned_rate is tf.exp
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decay = tb.CosineDecay(0.1, 0.01, 5)
        assert tb.InnerSolver(SGD, 3, "warm", decay).learning_rate is decay
