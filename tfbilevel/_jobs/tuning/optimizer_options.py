"""Options of the optimizer that trains the network."""

from typing import Any

from tfbilevel._jobs.tuning.hyperparameter import Hyperparameter, Setting


class OptimizerOption(Hyperparameter):
    """An option of the optimizer, by its name in Keras, such as "beta_1".

    Args:
        option: the name: any option that is a number, see `tb.InnerSolver`.
        start: the first value; `None`: the optimizer's own.
        range: the smallest and the largest value.
        scale: "linear", "log", or "complement": 1 - value on a log scale.
        name: its name in the results; `None`: `option`.

    Example:
        >>> tb.hyper.OptimizerOption("rho", 0.9, (0.5, 0.999), "complement").name
        'rho'
    """

    def __init__(
        self,
        option: str,
        start: float | None,
        range: tuple[float, float],
        scale: str = "linear",
        name: str | None = None,
    ):
        super().__init__(start, range, name or option, scale)
        self.option = option

    def first(self, setting: Setting) -> Any:
        if self.start is not None:
            return self.start
        own = getattr(setting.optimizer, self.option, None)
        if own is None:
            raise ValueError(
                f"`start` of {self.name} must be a number where the optimizer has no "
                f"`{self.option}` of its own. Received: start=None"
            )
        return float(own)

    def options(self, value: Any) -> dict[str, Any]:
        return {self.option: value}


class LearningRate(OptimizerOption):
    """The learning rate. A short horizon makes it too small: see `horizon` of
    `tb.HyperparameterTuner`.

    Args:
        start, range, name: see `tb.hyper.OptimizerOption`; on a log scale.
    """

    def __init__(
        self,
        start: float | None = None,
        range: tuple[float, float] = (1e-5, 1.0),
        name: str | None = None,
    ):
        super().__init__("learning_rate", start, range, "log", name)


class Momentum(OptimizerOption):
    """The momentum of SGD or RMSprop; with other optimizers use `OptimizerOption`.

    Args:
        start, range, name: see `tb.hyper.OptimizerOption`; 1 - v on a log scale.
    """

    def __init__(
        self,
        start: float | None = 0.9,
        range: tuple[float, float] = (0.0, 0.999),
        name: str | None = None,
    ):
        super().__init__("momentum", start, range, "complement", name)


class WeightDecay(OptimizerOption):
    """Decoupled weight decay, as in AdamW: every step multiplies all weights by
    1 - learning_rate * v.

    Args:
        start, range, name: see `tb.hyper.OptimizerOption`; on a log scale.
    """

    def __init__(
        self,
        start: float | None = 1e-3,
        range: tuple[float, float] = (1e-6, 1.0),
        name: str | None = None,
    ):
        super().__init__("weight_decay", start, range, "log", name)
