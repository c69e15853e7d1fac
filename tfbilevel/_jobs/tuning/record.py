"""The hyperparameters over training: a callback, a table, a picture."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tfbilevel._jobs.tuning.values import Values


class Recorder(keras.callbacks.Callback):
    """Records the hyperparameters and measures the validation data at each epoch's end.

    Args:
        values: the hyperparameters.
        measure: () -> {metric: number}; entered in the logs as "val_" + metric.
    """

    def __init__(self, values: Values, measure: Callable[[], dict[str, float]]):
        super().__init__()
        self._values, self._measure = values, measure
        self.positions: list[dict[str, np.ndarray]] = [values.positions()]
        self.numbers: list[dict[str, np.ndarray]] = [values.numbers()]

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.positions.append(self._values.positions())
        self.numbers.append(self._values.numbers())
        if logs is not None:  # the callbacks after this one see them too
            logs.update({f"val_{k}": v for k, v in self._measure().items()})


def columns(
    numbers: list[dict[str, np.ndarray]], entries: dict[str, Any]
) -> dict[str, np.ndarray]:
    """One column for each number, with the epochs 0 (the start), 1, ...

    Args:
        numbers: name -> value, for each epoch.
        entries: name -> names of its numbers; `None`: it is one number.
    """
    made = {"epoch": np.arange(len(numbers))}
    for name, names in entries.items():
        history = np.array([each[name] for each in numbers])
        if names is None:
            made[name] = history
        else:
            for k, entry in enumerate(names):
                made[f"{name}[{entry}]"] = history[:, k]
    return made


def table(made: dict[str, np.ndarray]) -> Any:
    """A pandas table; without pandas, the columns unchanged."""
    try:
        import pandas
    except ImportError:
        return made
    return pandas.DataFrame(made)


def picture(made: dict[str, np.ndarray], scales: dict[str, str]) -> Any:
    """A figure with one row of axes for each hyperparameter.

    Args:
        made: the columns.
        scales: name -> "linear", "log" or "complement".
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`plot` needs matplotlib. Install it: pip install matplotlib"
        ) from error
    across = min(3, len(scales))
    down = -(-len(scales) // across)
    figure = Figure(figsize=(4.2 * across, 3.0 * down), layout="constrained")
    for place, (name, scale) in enumerate(scales.items(), start=1):
        axes = figure.add_subplot(down, across, place)
        own = [k for k in made if k == name or k.startswith(f"{name}[")]
        for column in own:
            label = column.removeprefix(name).strip("[]")
            axes.plot(made["epoch"], made[column], label=label)
        axes.set_title(name)
        axes.set_xlabel("epoch")
        if scale == "log":
            axes.set_yscale("log")
        if 1 < len(own) <= 10:
            axes.legend(fontsize="x-small")
    return figure
