"""The public names, their documentation, and where tapes are opened."""

import dataclasses
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import keras
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

NAMES = {
    "Aggregation",
    "AugmentedLagrangian",
    "BAMM",
    "BSA",
    "Backup",
    "Batches",
    "BilevelModel",
    "ConjugateGradient",
    "Constant",
    "CosineDecay",
    "Direct",
    "DivergenceWarning",
    "Dynamic",
    "DynamicResult",
    "DynamicState",
    "ExampleWeights",
    "FeaturePenalties",
    "FewShotLearner",
    "FewShotScore",
    "FiniteDifference",
    "FixedPoint",
    "ForwardUnroll",
    "Functional",
    "Geometric",
    "GradientNorm",
    "GradientSolver",
    "HyperparameterTuner",
    "HypergradientReport",
    "Implicit",
    "InnerSolver",
    "InversePower",
    "IterativeSolver",
    "LabelCleaner",
    "LabelCorrection",
    "LazyAdam",
    "LinearRamp",
    "LinearSolution",
    "LinearSolver",
    "LinearSystem",
    "LossWeights",
    "MemoryEstimate",
    "Method",
    "MissingSecondDerivativeError",
    "MINRES",
    "Neumann",
    "Nystrom",
    "Identity",
    "NonFiniteError",
    "NormalConjugateGradient",
    "OptimizerState",
    "PenaltySchedule",
    "Point",
    "Prepared",
    "Problem",
    "PersistentES",
    "RankOne",
    "Result",
    "Schedule",
    "SecondDerivativesReport",
    "StackedBatches",
    "Step",
    "SOBA",
    "SABA",
    "SRBA",
    "VRBO",
    "FSLA",
    "AmIGO",
    "MRBO",
    "SUSTAIN",
    "F2SA",
    "F3SA",
    "BVFSM",
    "GAFFA",
    "BOME",
    "MEHA",
    "StocBiO",
    "TTSA",
    "TransitionMatrix",
    "UnconnectedGradientError",
    "Unroll",
    "UpdateRule",
    "ValueGap",
    "check_hypergradient",
    "check_second_derivatives",
    "differentiable",
    "functional",
    "index_batches",
    "memory_estimate",
    "microbatched",
    "minimize",
    "over_tasks",
    "pair",
    "soft_cross_entropy",
    "sparse_cross_entropy",
}
HYPER = {
    "Brightness",
    "ClassWeights",
    "Contrast",
    "Dropout",
    "Hyperparameter",
    "InputScale",
    "L2",
    "LabelSmoothing",
    "LearningRate",
    "LossWeights",
    "Mixup",
    "Momentum",
    "Noise",
    "OptimizerOption",
    "Setting",
    "Shift",
    "WeightDecay",
}
PACKAGE = pathlib.Path(tb.__file__).parent


def test_public_names() -> None:
    """A new name is one line here; a lost one is an incompatible change."""
    public = {
        name
        for name, value in vars(tb).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == NAMES
    assert {name for name in vars(tb.hyper) if not name.startswith("_")} == HYPER
    assert all(inspect.getdoc(getattr(tb.hyper, name)) for name in HYPER)


@pytest.mark.parametrize("name", ["compat", "hyper", "schedules"])
def test_public_lists_are_modules_of_the_package(name: str) -> None:
    """Also those whose file is in a room."""
    assert importlib.import_module(f"tfbilevel.{name}") is getattr(tb, name)
    imported: dict[str, object] = {}
    exec(f"from tfbilevel import {name} as first\n", imported)
    exec(f"import tfbilevel.{name} as second\n", imported)
    exec(f"from tfbilevel.{name} import *\n", imported)
    assert imported["first"] is imported["second"] is getattr(tb, name)
    member = {"compat": "Dynamic", "hyper": "L2", "schedules": "LinearRamp"}[name]
    assert imported[member] is getattr(getattr(tb, name), member)


def test_version() -> None:
    assert [part.isdigit() for part in tb.__version__.split(".")[:2]] == [True, True]


def test_every_public_name_is_documented() -> None:
    for name in sorted(NAMES):
        text = inspect.getdoc(getattr(tb, name))
        assert text and text.splitlines()[0].rstrip()[-1] in ".:;", name
        # A generated docstring is the signature.
        assert not text.startswith(f"{name}("), name


def explained(text: str) -> list[str]:
    """The names under "Args:" and "Attributes:"."""
    sections = re.findall(
        r"^(?:Args|Attributes):\n((?:    .*\n?|\n)*)", text, re.MULTILINE
    )
    rows = re.findall(r"^    (\**\w[\w, *]*):", "".join(sections), re.MULTILINE)
    return [name.strip().lstrip("*") for row in rows for name in row.split(",")]


def test_a_docstring_explains_every_argument_once() -> None:
    """Of what a user makes or calls; nobody makes errors and warnings."""
    found = [getattr(tb, name) for name in sorted(NAMES)]
    found += [getattr(tb.hyper, name) for name in sorted(HYPER)]
    for one in found:
        if inspect.isclass(one) and issubclass(one, Exception):
            continue
        names = explained(inspect.getdoc(one))
        assert len(names) == len(set(names)), one
        taken = {n for n in inspect.signature(one).parameters if n.strip("_")}
        assert taken <= set(names), (one, taken - set(names))
        invented = {name for name in set(names) - taken if not hasattr(one, name)}
        # Attributes that `fit` sets, as scikit-learn has them.
        assert not {name for name in invented if not name.endswith("_")}, one


EXAMPLES = [
    info.name
    for info in pkgutil.walk_packages([str(PACKAGE)], "tfbilevel.")
    if ">>> " in inspect.getsource(importlib.import_module(info.name))
]


def test_enough_modules_have_examples() -> None:
    assert len(EXAMPLES) >= 30


LONG = {
    "tfbilevel._jobs.cleaning.label_cleaner",
    "tfbilevel._keras.backup",
    "tfbilevel._keras.model",
}


@pytest.mark.parametrize("module", fast_where(lambda name: name not in LONG, EXAMPLES))
def test_doctests(module: str) -> None:
    loaded = importlib.import_module(module)
    failed, _ = doctest.testmod(
        loaded,
        extraglobs={"tf": tf, "keras": keras, "tb": tb},
        optionflags=doctest.NORMALIZE_WHITESPACE,
    )
    assert failed == 0


# Interfaces and values need none; a user calls everything else.
WITHOUT_EXAMPLE = {
    "Batches",
    "DivergenceWarning",
    "DynamicResult",
    "DynamicState",
    "FewShotScore",
    "Functional",
    "HypergradientReport",
    "LinearSolution",
    "LinearSolver",
    "MemoryEstimate",
    "Method",
    "MissingSecondDerivativeError",
    "NonFiniteError",
    "OptimizerState",
    "PenaltySchedule",
    "Point",
    "Result",
    "Schedule",
    "SecondDerivativesReport",
    "StackedBatches",
    "Step",
    "UnconnectedGradientError",
    "UpdateRule",
}


def test_what_a_user_calls_has_an_example() -> None:
    called = sorted(NAMES - WITHOUT_EXAMPLE)
    assert not [n for n in called if ">>> " not in (getattr(tb, n).__doc__ or "")]


def test_methods_are_frozen_and_compare_by_identity() -> None:
    found = [getattr(tb, name) for name in sorted(NAMES)]
    bases = (tb.Method, tb.LinearSolver, tb.Schedule, tb.InnerSolver, tb.Problem)
    kinds = [one for one in found if inspect.isclass(one) and issubclass(one, bases)]
    kinds = [one for one in kinds if not inspect.isabstract(one)]
    assert len(kinds) > 20
    for kind in kinds:
        assert kind.__dataclass_params__.frozen and not kind.__dataclass_params__.eq
    inner = tb.InnerSolver(keras.optimizers.SGD(0.1), 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        inner.steps = 4  # type: ignore[misc]


def test_another_backend_of_keras_is_refused(monkeypatch) -> None:
    module = importlib.import_module("tfbilevel._workarounds.backend")
    importlib.reload(module)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ImportError, match="needs Keras on TensorFlow.*'jax'"):
        importlib.reload(module)


def test_only_one_file_opens_a_tape() -> None:
    sources = {
        path.relative_to(PACKAGE).as_posix(): path.read_text()
        for path in PACKAGE.rglob("*.py")
    }
    assert [n for n, text in sources.items() if "GradientTape(" in text] == [
        "_calculus/derivatives.py"
    ]
    # In a graph that is thrown away, to see what the derivatives are made of.
    assert [n for n, text in sources.items() if "tf.gradients(" in text] == [
        "_check/look.py"
    ]
