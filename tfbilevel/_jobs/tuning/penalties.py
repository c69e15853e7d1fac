"""Penalties on the weights."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._core.arguments import require_choice
from tfbilevel._jobs.tuning.hyperparameter import Hyperparameter, Setting

PER = ("global", "per-layer", "per-weight")


class L2(Hyperparameter):
    r"""L2 penalties: sum_k v_k sum(w_k^2), in the training loss.

    w_k are the weights with at least two axes (kernels, embeddings): no biases and no
    scales of normalisation layers. This is the penalty of keras.regularizers.L2(v); a
    network's own regularisers are added to it.

    Args:
        per: "per-layer": one v for each layer. "per-weight": one for each tensor of
            weights. "global": one.
        start, range, name: see `tb.hyper.Hyperparameter`; on a log scale.

    Example:
        >>> tb.hyper.L2("per-layer", start=1e-4, range=(1e-8, 1.0)).name
        'l2'
    """

    def __init__(
        self,
        per: str = "per-layer",
        start: float = 1e-4,
        range: tuple[float, float] = (1e-8, 1.0),
        name: str | None = None,
    ):
        super().__init__(start, range, name, "log")
        self.per = per

    def entries(self, setting: Setting) -> Sequence[str] | None:
        require_choice(self.per, "per", PER)
        groups = self._groups(setting.network)
        if not groups:
            raise ValueError(
                f"`search` must not hold {self.name} for this network, which has no "
                "weights with two axes or more. Leave it out. Received: "
                f"{setting.network.name}"
            )
        return None if self.per == "global" else list(groups)

    def penalty(self, value: Any, setting: Setting) -> Any:
        squares = [
            tf.add_n([tf.reduce_sum(tf.square(w.value)) for w in weights])
            for weights in self._groups(setting.network).values()
        ]
        total = tf.stack(squares)
        return tf.reduce_sum(tf.cast(value, total.dtype) * total)

    def _groups(self, network: keras.Model) -> dict[str, list]:
        groups: dict[str, list] = {}
        for variable in network.trainable_variables:
            if len(variable.shape) >= 2:
                layer = variable.path.rsplit("/", 1)[0]
                key = {
                    "global": "all",
                    "per-layer": layer,
                    "per-weight": variable.path,
                }[self.per]
                groups.setdefault(_short(key, network), []).append(variable)
        return groups


def _short(path: str, network: keras.Model) -> str:
    """A path without the network's name, which differs between copies."""
    return path.removeprefix(f"{network.name}/")
