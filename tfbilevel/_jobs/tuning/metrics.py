"""Metrics of a network on examples."""

from typing import Any

import numpy as np
import tensorflow as tf

from tfbilevel._jobs.tuning.job import Job
from tfbilevel._jobs.tuning.losses import Losses

MEASURED = 1000  # examples in a batch that is only evaluated


def validation_metrics(losses: Losses, values: dict, job: Job) -> dict[str, float]:
    """The metrics of all validation examples."""
    made, targets = [], []
    for x, y in job.measured(MEASURED):
        made.append([np.asarray(o) for o in losses.predicted(values, x)])
        targets.append([part.numpy() for part in tf.nest.flatten(y)])
    joined = [
        [np.concatenate(p) for p in zip(*e, strict=True)] for e in (targets, made)
    ]
    return metrics(losses.outputs, *joined)


def metrics(outputs: Any, targets: list, made: list) -> dict[str, float]:
    """The loss, and the accuracy or R^2 of each output."""
    each = list(zip(outputs, targets, made, strict=True))
    result = {"loss": sum(float(np.mean(o.losses(t, m))) for o, t, m in each)}
    for number, (one, target, output) in enumerate(each):
        name = one.metric if number == 0 else f"{one.metric}_{number}"
        result[name] = one.score(target, output)
    return result


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
