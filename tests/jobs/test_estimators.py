"""What the three estimators have in common: copies, and the caller's random numbers."""

import copy
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb

# Each estimator is fitted once, so one process runs all.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("estimators")]

generator = np.random.default_rng(0)
Y = np.arange(60) % 4
X = (generator.normal(size=(4, 3))[Y] + 0.3 * generator.normal(size=(60, 3))).astype(
    "float32"
)
NAMES = np.array(["ape", "bee", "cow", "dog"])
SUPPORT, QUERIES = (X[:8], NAMES[Y[:8]]), X[8:]


class Case(NamedTuple):
    """An estimator with its data.

    Attributes:
        estimator: not fitted.
        data: what `fit` takes.
        asked: what `predict` takes.
    """

    estimator: Any
    data: dict[str, Any]
    asked: tuple


def network() -> keras.Model:
    """With weights, dropout and batch normalisation to remember."""
    layers = keras.layers
    body = [layers.Dense(6, "relu"), layers.BatchNormalization(), layers.Dropout(0.1)]
    return keras.Sequential([keras.Input((3,)), *body, layers.Dense(4)])


CASES = {
    "cleaner": Case(
        tb.LabelCleaner(network(), batch_size=20, learn=False),
        {"x": X, "y": NAMES[Y], "trusted": (X, NAMES[Y]), "epochs": 1},
        (X,),
    ),
    "tuner": Case(
        tb.HyperparameterTuner(
            network(), [tb.hyper.L2("global"), tb.hyper.Dropout()], inner_steps=1
        ),
        {"x": X, "y": NAMES[Y], "epochs": 1, "batch_size": 24},
        (X,),
    ),
    "learner": Case(
        tb.FewShotLearner(network(), tasks=1, inner_steps=1, optimizer="sgd"),
        {"x": X, "y": Y, "ways": 3, "epochs": 1, "steps_per_epoch": 1},
        (*SUPPORT, QUERIES),
    ),
}


def sampled() -> list[float]:
    """One number of everything that samples without a seed of its own."""
    return [
        random.random(),
        np.random.random(),
        float(keras.random.uniform([])),
        float(tf.random.uniform([])),
    ]


@pytest.fixture(scope="module")
def fitted() -> dict[str, tuple[Any, list[float]]]:
    """Each estimator, and what was sampled after its `fit` and `predict`."""
    found = {}
    for name, case in CASES.items():
        keras.utils.set_random_seed(5)
        sampled()
        estimator = case.estimator.fit(**case.data, verbose=0)
        estimator.predict(*case.asked)
        found[name] = estimator, sampled()
    return found


def numbers(estimator: Any, asked: tuple) -> np.ndarray:
    """Predictions that differ if a weight differs."""
    if isinstance(estimator, tb.FewShotLearner):
        return np.asarray(estimator.adapt(*asked[:2])(asked[2]))
    return estimator.predict_proba(*asked)


@pytest.mark.parametrize("name", CASES)
def test_fit_and_predict_leave_the_callers_random_numbers_alone(
    fitted: dict, name: str
) -> None:
    keras.utils.set_random_seed(5)
    sampled()
    assert fitted[name][1] == sampled()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))]
)
def test_copies_predict_the_same(fitted: dict, name: str, copied: Callable) -> None:
    estimator, asked = fitted[name][0], CASES[name].asked
    expected = numbers(estimator, asked)
    made = copied(estimator)
    np.testing.assert_array_equal(made.predict(*asked), estimator.predict(*asked))
    np.testing.assert_allclose(numbers(made, asked), expected, rtol=1e-5, atol=1e-6)
    assert made.history_ == estimator.history_
    # A copy is one of its own.
    for variable in made.model_.trainable_variables:
        variable.assign(tf.zeros_like(variable))
    np.testing.assert_array_equal(numbers(estimator, asked), expected)


def test_an_estimator_that_is_not_fitted_is_copied(fitted: dict) -> None:
    for case in CASES.values():
        new = type(case.estimator)(**case.estimator.get_params())
        for made in copy.deepcopy(new), pickle.loads(pickle.dumps(new)):
            assert not hasattr(made, "model_")
            assert made.seed == new.seed


FOUR = np.arange(40) % 4
ROWS = generator.normal(size=(40, 3)).astype("float32")
NAN = np.where(np.arange(40)[:, None] == 7, np.nan, ROWS)
SECOND = {"cleaner": "trusted", "tuner": "validation_data"}


def with_outputs(count: int) -> Callable:
    return lambda *_: keras.Sequential([keras.Input((3,)), keras.layers.Dense(count)])


BAD = {
    "lengths": ({"y": FOUR[:30]}, "`x` and `y`|`y` must have one entry"),
    "one class": ({"y": 0 * FOUR}, "`y` must hold (at least two|every) class"),
    "NaN": ({"x": NAN}, "`x` must not hold NaN or infinity.*the first is (row )?7"),
    "NaN label": ({"y": np.where(FOUR == 3, np.nan, FOUR)}, "`y` must not hold NaN"),
    "no label": ({"y": np.where(FOUR == 3, None, "a")}, "text in every row"),
    "fractions": ({"y": FOUR + 0.5}, "`y` must be classes"),
    "nothing": ({"x": ROWS[:0], "y": FOUR[:0]}, "`x` must"),
    "outputs": ({"model": with_outputs(7)}, "must have one output per class"),
    "inputs": (
        {"x": ROWS[:, :2], "second": (ROWS[:, :2], FOUR)},
        "must take examples of shape .2,.*incompatible",
    ),
    "no model": ({"model": 3}, "must be a Keras model, or a function"),
    "second NaN": ({"second": (NAN, FOUR)}, r"\[0\]` must not hold NaN"),
    "second lengths": ({"second": (ROWS, FOUR[:30])}, r"\[1\]`"),
    "second kind": ({"second": (ROWS, FOUR.astype(str))}, "labels of one kind"),
    "second shape": ({"second": (ROWS[:, :2], FOUR)}, "must hold examples like those"),
    "second alone": ({"second": ROWS}, r"must be (a pair )?\(x, y\)"),
    "second lacks": ({"second": (ROWS, FOUR % 2)}, "no trusted example of 2, 3"),
    "first lacks": ({"y": FOUR % 3}, "no training example of 3"),
}
# A class may be missing on one side only; a learner's validation classes are others.
NOT = {("tuner", "second lacks"), ("cleaner", "first lacks")} | {
    ("learner", name) for name in BAD if name.startswith(("second", "first"))
}


@pytest.mark.parametrize(
    "name, bad", [(n, b) for n in CASES for b in BAD if (n, b) not in NOT]
)
def test_bad_input_is_one_line_before_training(
    monkeypatch: pytest.MonkeyPatch, name: str, bad: str
) -> None:
    for model in keras.Model, tb.BilevelModel:
        monkeypatch.setattr(model, "fit", lambda *_, **__: pytest.fail("trained"))
    change, message = BAD[bad]
    data = {"x": ROWS, "y": FOUR, "second": (ROWS, FOUR), "model": with_outputs(4)}
    data |= change
    model = data.pop("model")
    second = data.pop("second")
    if name in SECOND:
        data[SECOND[name]] = second
    kinds = {
        "cleaner": lambda: tb.LabelCleaner(model),
        "tuner": lambda: tb.HyperparameterTuner(model, [tb.hyper.L2("global")]),
        "learner": lambda: tb.FewShotLearner(model),
    }
    ways = {"ways": 4} if name == "learner" else {}
    with pytest.raises(ValueError, match=message) as found:
        kinds[name]().fit(**data, **ways, verbose=0)
    assert "\n" not in str(found.value) and "Received: " in str(found.value)


LOADS = """
import json, pathlib, pickle, sys
import joblib, numpy as np
import tfbilevel as tb  # as every program that uses the estimators

found = {}
for path in sorted(pathlib.Path().glob("*.saved")):
    load = joblib.load if "joblib" in path.name else pickle.load
    estimator, asked = load(path.open("rb"))
    if isinstance(estimator, tb.FewShotLearner):
        made = np.asarray(estimator.adapt(*asked[:2])(asked[2]))
    else:
        made = estimator.predict_proba(*asked)
    found[path.name] = [made.tolist(), estimator.predict(*asked).tolist()]
json.dump(found, sys.stdout)
"""


def test_a_new_process_loads_them(fitted: dict, tmp_path: pathlib.Path) -> None:
    joblib = pytest.importorskip("joblib")
    for name, (estimator, _) in fitted.items():
        saved = estimator, CASES[name].asked
        (tmp_path / f"{name}.pickle.saved").write_bytes(pickle.dumps(saved))
        joblib.dump(saved, tmp_path / f"{name}.joblib.saved")
    done = subprocess.run(
        [sys.executable, "-c", LOADS],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 6
    for file, (made, predicted) in found.items():
        name = file.split(".")[0]
        estimator, asked = fitted[name][0], CASES[name].asked
        np.testing.assert_allclose(
            made, numbers(estimator, asked), rtol=1e-5, atol=1e-6
        )
        assert predicted == estimator.predict(*asked).tolist()
