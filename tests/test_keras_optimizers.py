"""What `tb.differentiable` stands on in Keras is where it was, with the same bodies.

A release of Keras that moves it fails here, with one message, before the trajectories
of `test_differentiable.py` differ.
"""

import ast
import hashlib
import inspect
import textwrap

import keras
import pytest
from keras import optimizers

from tfbilevel._optimizers import update_rule

# The first eight hexadecimal digits of the SHA-256 of each body, the same in Keras 3.10
# to 3.15. AdamW has Adam's.
UPDATE_STEPS = {
    "SGD": "5de90ead",
    "Adam": "a6760d36",
    "AdamW": "a6760d36",
    "RMSprop": "9fddfb6f",
    "Adagrad": "be2a0ed2",
    "Adadelta": "089baee4",
    "Adamax": "57514f99",
    "Lion": "a8a9486d",
    "Ftrl": "506a0c00",
}
# What the base class does around them.
BASE_METHODS = {
    "assign": "5fb89e6b",
    "assign_add": "ac0c1503",
    "assign_sub": "0d109553",
    "_var_key": "8ec5585f",
    "_use_weight_decay": "b311e845",
    "_apply_weight_decay": "15002101",
    "_clip_gradients": "5656249e",
    "_filter_empty_gradients": "51a250ed",
    "_backend_update_step": "ef62c8a4",
    "_backend_apply_gradients": "7d4f11eb",
}
ATTRIBUTES = (
    "_learning_rate",
    "_variables",
    "variables",
    "iterations",
    "weight_decay",
    "use_ema",
    "gradient_accumulation_steps",
    "loss_scale_factor",
    "clipnorm",
    "global_clipnorm",
    "clipvalue",
    "build",
    "get_config",
    "from_config",
)


def base_class() -> type | None:
    """The optimizer without TensorFlow's assignments."""
    found = (c for c in optimizers.Optimizer.__mro__ if c.__name__ == "BaseOptimizer")
    return next(found, None)


def fingerprint(function: object) -> str:
    """Of a body without its docstring, comments and layout."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    body = tree.body[0]
    assert isinstance(body, ast.FunctionDef)
    if ast.get_docstring(body):
        del body.body[0]
    return hashlib.sha256(ast.unparse(body).encode()).hexdigest()[:8]


def compared(owner: type, name: str, known: str) -> list[str]:
    if not hasattr(owner, name):
        return [f"`{name}` is gone"]
    now = fingerprint(getattr(owner, name))
    return [] if now == known else [f"`{name}` has another body (now {now})"]


def moved(kind: type) -> list[str]:
    """What of an optimizer is no longer as `update_rule.py` expects it."""
    found = compared(kind, "update_step", UPDATE_STEPS[kind.__name__])
    optimizer = kind(learning_rate=0.5)
    found += [
        f"`{name}` is gone" for name in ATTRIBUTES if not hasattr(optimizer, name)
    ]
    if issubclass(kind, optimizers.Adam) and not hasattr(optimizer, "beta_2"):
        found.append("`beta_2` is gone")
    if found:
        return found
    if not isinstance(optimizer._learning_rate, keras.Variable):
        found.append("`_learning_rate` is no keras.Variable")
    names = [variable.name for variable in optimizer._variables]
    if names != ["iteration", "learning_rate"]:
        found.append(f"`_variables` starts with {names}, not iteration, learning_rate")
    return found


def moved_base() -> list[str]:
    base = base_class()
    if base is None:
        return ["no class of this name is a base of keras.optimizers.Optimizer"]
    found = [
        f"`{name}` is gone"
        for name in update_rule._PURE_METHODS
        if not hasattr(base, name)
    ]
    for name, known in BASE_METHODS.items():
        found += compared(base, name, known)
    return list(dict.fromkeys(found))


def require_unmoved(optimizer: str, found: list[str]) -> None:
    if found:
        release = ".".join(keras.__version__.split(".")[:2])
        pytest.fail(
            f"Keras {keras.__version__} moved what `tb.differentiable` stands on. "
            f"{optimizer}: {'; '.join(found)}. Run tests/test_differentiable.py. If it "
            "passes and the new body reads and writes nothing else, put its hash into "
            f"{__file__}; otherwise adapt tfbilevel/_optimizers/update_rule.py, or set "
            f'"keras<{release}" in pyproject.toml.',
            pytrace=False,
        )


@pytest.mark.parametrize("kind", update_rule.SUPPORTED, ids=lambda k: k.__name__)
def test_optimizer_is_as_expected(kind: type) -> None:
    require_unmoved(kind.__name__, moved(kind))


def test_base_class_is_as_expected() -> None:
    require_unmoved("BaseOptimizer", moved_base())


def test_what_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases of Keras that there are not yet."""

    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, 2 * learning_rate * gradient)

    monkeypatch.setattr(optimizers.SGD, "update_step", update_step)
    monkeypatch.delattr(base_class(), "_use_weight_decay")
    monkeypatch.delattr(base_class(), "add_variable_from_reference")
    assert moved(optimizers.Adam) == []
    assert moved_base() == [
        "`add_variable_from_reference` is gone",
        "`_use_weight_decay` is gone",
    ]
    with pytest.raises(pytest.fail.Exception) as caught:
        require_unmoved("SGD", moved(optimizers.SGD))
    line = str(caught.value)
    assert keras.__version__ in line and "SGD: `update_step` has another body" in line
    assert "update_rule.py" in line and "pyproject.toml" in line
