"""Keras optimizers that are applied outside of a strategy's replicas.

Keras sums gradients over replicas only in a replica, and leaves them as they are
outside. But it then asks for the replica's context anyway, which is None there.
"""

from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.swap import Replacement, Swap

_interim = tf.__internal__.distribute.interim
_maybe_merge_call = _interim.maybe_merge_call


def _merge_call(function: Any, strategy: Any, *arguments: Any, **keywords: Any) -> Any:
    if tf.distribute.in_cross_replica_context():
        return function(strategy, *arguments, **keywords)
    return _maybe_merge_call(function, strategy, *arguments, **keywords)


merged_optimizers = Swap([Replacement(_interim, "maybe_merge_call", _merge_call)])
