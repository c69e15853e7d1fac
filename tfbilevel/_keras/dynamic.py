"""The class of a published toolbox (`bohml`), implemented by `Unroll`."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbilevel._check.look import require_second_derivatives
from tfbilevel._core.aggregation import Aggregation
from tfbilevel._core.arguments import (
    require_callable,
    require_count,
    require_number,
    share,
)
from tfbilevel._core.batches import Batches
from tfbilevel._core.inner_solver import InnerSolver
from tfbilevel._core.nonfinite import NonFiniteError, first_nonfinite
from tfbilevel._keras.levels import Levels
from tfbilevel._methods.hypergradient.unroll import Unroll
from tfbilevel._optimizers.update_rule import configuration
from tfbilevel._workarounds.memory_optimizer import without_memory_rewrites


class DynamicState(NamedTuple):
    """The argument of a `tb.Dynamic`'s objectives.

    Attributes:
        data, target: the batch: training data for the lower objective, validation
            data for the upper one.
        upper_model, lower_model: the models, at the current values of the variables.
    """

    data: Any
    target: Any
    upper_model: keras.layers.Layer
    lower_model: keras.layers.Layer


class DynamicResult(NamedTuple):
    """The result of `tb.Dynamic.optimize`.

    Attributes:
        upper_gradients: one per trainable variable of the upper model.
        start_gradients: one per trainable variable of the lower model: the gradient
            in the start of the inner loop; `None` without `init_auxiliary`.
        lower: the lower variables after the whole loop.
        upper_loss: F at the end point; with `acquire_max_loss`, at y_{k*}.
        max_loss_iter: k*, counted from 1; `None` without `acquire_max_loss`.
    """

    upper_gradients: list[tf.Tensor]
    start_gradients: list[tf.Tensor] | None
    lower: list[tf.Tensor]
    upper_loss: tf.Tensor
    max_loss_iter: int | None


class Dynamic:
    r"""The twelve freely combinable dynamics of the published toolbox.

    | | whole loop | `truncate_iters=S` | `acquire_max_loss` |
    |---|---|---|---|
    | alpha = 0 | RAD (RHG, ITD) | T-RAD (T-RHG) | PTT |
    | alpha > 0 | BDA | T-BDA | BDA + PTT |

    Each can be combined with `init_auxiliary`, which makes the start of the inner loop
    a second upper variable: PTT with it is IAPTT-GM. Everything is computed by
    `tb.Unroll`, with its cost and memory. The attributes `method` and `problem` are
    that method and the problem over the variables of both models, for use with
    `tb.check_hypergradient`. In new code prefer `tb.BilevelModel` with `tb.Unroll`,
    which include the loop, the optimizers and checkpoints.

    The derivative through the S skipped steps is approximated, as published: by the
    identity in the start, and by zero in the upper variables. docs/methods/unroll.md
    lists the differences from the published class.

    Args:
        ll_objective: state -> scalar, the lower loss f; `state` is a
            `tb.DynamicState` with training data.
        lower_loop: K, inner steps.
        ul_model: the upper model, built.
        ul_objective: state -> scalar, the upper loss F, with validation data.
        ll_model: the lower model, built.
        acquire_max_loss: end at the iterate of largest F (pessimistic truncation).
        alpha: weight of F in the inner direction, in [0, 1].
        truncate_iters: S, number of first steps that are not differentiated, below
            `lower_loop`.
        ll_opt: the optimizer of the inner steps, any that `tb.differentiable`
            supports; may be given to `optimize` instead unless steps are truncated.
        alpha_decay: factor on alpha from one inner step to the next, in (0, 1].
        init_auxiliary: differentiate in the start of the inner loop too.

    Raises:
        ValueError: for arguments out of range, for `acquire_max_loss` together with
            `truncate_iters`, and for objectives with the published class's four
            arguments.

    Example:
        >>> upper = tb.ExampleWeights(4)
        >>> lower = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> def errors(state):
        ...     predictions = state.lower_model(state.data)[:, 0]
        ...     return tf.square(predictions - state.target)
        >>> dynamic = tb.Dynamic(
        ...     ll_objective=lambda s: s.upper_model.mean(errors(s)),
        ...     lower_loop=5, ul_model=upper,
        ...     ul_objective=lambda s: tf.reduce_mean(errors(s)), ll_model=lower,
        ...     acquire_max_loss=True, init_auxiliary=True,
        ...     ll_opt=keras.optimizers.SGD(0.1))
        >>> data, target = tf.ones([4, 2]), tf.zeros([4])
        >>> result = dynamic.optimize(
        ...     data, target, validate_data=data, validate_target=target)
        >>> len(result.upper_gradients), len(result.start_gradients)
        (1, 2)

    References:
        Liu, Liu, Zeng, Zhang (2021), Towards gradient-based bilevel optimization
        with non-convex followers and beyond. arXiv:2110.00455. Liu et al. (2020),
        arXiv:2006.04045. Shaban et al. (2019), arXiv:1810.10667.
    """

    def __init__(
        self,
        ll_objective: Callable[[DynamicState], tf.Tensor],
        lower_loop: int,
        ul_model: keras.layers.Layer,
        ul_objective: Callable[[DynamicState], tf.Tensor],
        ll_model: keras.layers.Layer,
        acquire_max_loss: bool = False,
        alpha: float = 0,
        truncate_iters: int = 0,
        ll_opt: keras.optimizers.Optimizer | None = None,
        alpha_decay: float = 1.0,
        init_auxiliary: bool = False,
    ):
        require_count(lower_loop, "lower_loop")
        require_count(truncate_iters, "truncate_iters", least=0)
        if truncate_iters >= lower_loop:
            raise ValueError(
                "`truncate_iters` must be below `lower_loop`: at least one step is "
                "differentiated. Lower it. Received: "
                f"truncate_iters={truncate_iters}, lower_loop={lower_loop}"
            )
        if truncate_iters and acquire_max_loss:
            raise ValueError(
                "`truncate_iters` and `acquire_max_loss` exclude each other: one drops "
                "the first steps, the other the last. Choose one. Received: "
                f"truncate_iters={truncate_iters}, acquire_max_loss=True"
            )
        if truncate_iters and ll_opt is None:
            raise ValueError(
                "`ll_opt` must be given with `truncate_iters`: it makes the steps that "
                "are not differentiated. Pass a Keras optimizer. Received: ll_opt=None"
            )
        require_number(alpha, "alpha", lambda v: 0 <= v <= 1, "between 0 and 1")
        _require_of_state(ul_objective, "ul_objective")
        _require_of_state(ll_objective, "ll_objective")
        require_number(alpha_decay, "alpha_decay", share, "above 0 and at most 1")
        self.aggregation = Aggregation(alpha, alpha_decay) if alpha else None
        self.lower_loop, self.truncate_iters = lower_loop, truncate_iters
        self.acquire_max_loss, self.init_auxiliary = acquire_max_loss, init_auxiliary
        self.ul_model, self.ll_model = ul_model, ll_model
        self._levels = Levels(
            ul_model,
            ll_model,
            upper_loss=_stated(ul_objective),
            lower_loss=_stated(ll_objective),
            lower_start="learned" if init_auxiliary else None,
        )
        self.problem = self._levels.problem
        self.method: Unroll | None = None
        self._calls = 0
        if ll_opt is not None:
            self._use(ll_opt)

    def _use(self, optimizer: keras.optimizers.Optimizer) -> None:
        self._optimizer = optimizer
        method = self.method = Unroll(
            InnerSolver(optimizer, self.lower_loop),
            last=self.lower_loop - self.truncate_iters if self.truncate_iters else None,
            end="pessimistic" if self.acquire_max_loss else "final",
            aggregate=self.aggregation,
            skipped="identity",
        )

        def step(x: list, y: list, batches: Batches, state: Any, call: Any) -> Any:
            problem = self._levels.problem_at(call)
            models = (self.ul_model, self.ll_model)
            require_second_derivatives(self.problem, method, x, y, batches, models)
            return problem.step(method, x, y, batches, state)

        self._step = tf.function(step, autograph=False)

    def optimize(
        self,
        train_data: Any,
        train_target: Any,
        auxiliary_model: keras.layers.Layer | None = None,
        auxiliary_opt: keras.optimizers.Optimizer | None = None,
        validate_data: Any = None,
        validate_target: Any = None,
        *,
        ul_opt: keras.optimizers.Optimizer | None = None,
        init_opt: keras.optimizers.Optimizer | None = None,
    ) -> DynamicResult:
        """Run the inner loop and differentiate through it.

        The lower model keeps its variables (the inner loop works on tensors). The
        variables of `auxiliary_model` are set to the end of the loop. Statistics and
        dropout seeds are updated by one evaluation of the lower objective there.

        Args:
            train_data, train_target: for the lower objective.
            auxiliary_model: a second model built like the lower one, which receives the
                result; `None`: the result is only in the returned `lower`.
            auxiliary_opt: the inner optimizer if the constructor had none; in later
                calls an optimizer of the same class and settings.
            validate_data, validate_target: for the upper objective.
            ul_opt: applies the gradients to the upper model; `None`: the caller does.
            init_opt: applies the start's gradients to the lower model.

        Returns:
            A `DynamicResult`: losses, gradients and the lower variables reached.

        Raises:
            ValueError: without an inner optimizer, with two, or without validation
                data if the inner loop needs them.
            tb.NonFiniteError: if a loss, gradient or variable is not finite; no
                model is changed then.
        """
        if self.method is None and auxiliary_opt is None:
            raise ValueError(
                "`auxiliary_opt` must be given where `ll_opt` was not: the inner steps "
                "need an optimizer. Received: auxiliary_opt=None"
            )
        if auxiliary_opt is not None and self.method is None:
            self._use(auxiliary_opt)
        if auxiliary_opt is not None and not _alike(auxiliary_opt, self._optimizer):
            raise ValueError(
                "`auxiliary_opt` must not differ from the optimizer chosen before: "
                "all inner steps use the same one. Leave it out. "
                f"Received: auxiliary_opt={auxiliary_opt!r}"
            )
        needs = self.acquire_max_loss or self.aggregation is not None
        if needs and validate_data is None:
            raise ValueError(
                "`validate_data` must be given with `acquire_max_loss` or `alpha`: the "
                "inner loop evaluates the upper objective. Received: "
                "validate_data=None"
            )
        if init_opt is not None and not self.init_auxiliary:
            raise ValueError(
                "`init_opt` has no effect without init_auxiliary=True. Leave it out. "
                f"Received: init_opt={init_opt!r}"
            )
        if auxiliary_model is not None:
            shapes = [
                [tuple(v.shape) for v in model.trainable_variables]
                for model in (auxiliary_model, self.ll_model)
            ]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    "`auxiliary_model` must be built like the lower model, whose "
                    "variables it receives. Build it by the same function. Received: "
                    f"trainable variables of shapes {shapes[0]} for {shapes[1]}"
                )
        upper = [tf.convert_to_tensor(v) for v in self.ul_model.trainable_variables]
        lower = [tf.convert_to_tensor(v) for v in self.ll_model.trainable_variables]
        batches = Batches(
            upper=_tensors((validate_data, validate_target)),
            lower=_tensors((train_data, train_target)),
        )
        with without_memory_rewrites():
            step = self._step(
                [*upper, *lower] if self.init_auxiliary else upper,
                lower,
                batches,
                self.method.init(self.problem, upper, lower),
                tf.constant(self._calls),
            )
        code = int(first_nonfinite(step))
        if code >= 0:
            raise NonFiniteError(code, self._calls)
        self._calls += 1
        self._levels.advance(batches, self._calls, self.lower_loop, step.lower)
        gradients = step.upper_gradient
        result = DynamicResult(
            upper_gradients=gradients[: len(upper)],
            start_gradients=gradients[len(upper) :] if self.init_auxiliary else None,
            lower=step.lower,
            upper_loss=step.metrics["upper_loss"],
            max_loss_iter=(
                int(step.metrics["truncation"]) if self.acquire_max_loss else None
            ),
        )
        if auxiliary_model is not None:
            for variable, value in zip(
                auxiliary_model.trainable_variables, result.lower, strict=True
            ):
                variable.assign(value)
        if ul_opt is not None:
            ul_opt.apply(result.upper_gradients, self.ul_model.trainable_variables)
        if init_opt is not None:
            init_opt.apply(result.start_gradients, self.ll_model.trainable_variables)
        return result


def _require_of_state(objective: Any, name: str) -> None:
    """Raise unless the objective can be called with a state alone."""
    require_callable(objective, name)
    try:
        signature = inspect.signature(objective)
    except (TypeError, ValueError):  # some built-in functions have no signature
        return
    try:
        signature.bind(None)
    except TypeError:
        raise ValueError(
            f"`{name}` must take one argument, a tb.DynamicState. Wrap one of the "
            "published four: lambda s: objective(s.data, s.target, s.upper_model, "
            f"s.lower_model). Received: {name}{signature}"
        ) from None


def _alike(one: keras.optimizers.Optimizer, other: keras.optimizers.Optimizer) -> bool:
    """Whether two optimizers make the same steps: same class, equal settings."""
    if one is other:
        return True
    settings = [{**configuration(made), "name": ""} for made in (one, other)]
    return type(one) is type(other) and settings[0] == settings[1]


def _stated(objective: Callable[[DynamicState], tf.Tensor]) -> Callable:
    def loss(upper: Any, lower: Any, batch: tuple) -> tf.Tensor:
        data, target = batch
        return objective(DynamicState(data, target, upper, lower))

    return loss


def _tensors(batch: tuple) -> tuple:
    return tf.nest.map_structure(
        lambda leaf: None if leaf is None else tf.convert_to_tensor(leaf), batch
    )
