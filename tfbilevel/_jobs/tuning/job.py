"""A job: its network, its data for both levels, and the kinds of its outputs."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._jobs.labels import Classes
from tfbilevel._jobs.networks import gives_probabilities, new_network, output_shapes
from tfbilevel._jobs.tuning import streams
from tfbilevel._jobs.tuning.outputs import CROSS_ENTROPIES, Output, name_of, output_of
from tfbilevel._jobs.tuning.streams import Examples


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What is trained on what.

    Attributes:
        network: () -> a new network; the same weights at every call.
        outputs: the kind of each of its outputs.
        shape: the shape of one example.
        deviation: the standard deviation of the training inputs.
        training: (size, seed) -> an endless stream of training batches.
        validation: the same for validation.
        everything: the same for both together.
        counts: numbers of batches in a pass through each of the three, at a size.
        measured: size -> the validation batches of one pass, in order.
    """

    network: Callable[[], keras.Model]
    outputs: list[Output]
    shape: tuple[int, ...]
    deviation: float
    training: Callable[[int, int], tf.data.Dataset]
    validation: Callable[[int, int], tf.data.Dataset]
    everything: Callable[[int, int], tf.data.Dataset]
    counts: Callable[[int], tuple[int, ...]]
    measured: Callable[[int], Any]

    @property
    def classes(self) -> tuple[int | None, ...]:
        return tuple(
            None if one.classes is None else len(one.classes) for one in self.outputs
        )


def of_arrays(
    model: Any, loss: Any, x: Any, y: Any, held: Any, share: float, seed: int
) -> Job:
    """A job on arrays.

    Args:
        model, loss: of the tuner.
        x, y: the examples.
        held: validation examples, (x, y); `None`: a part of x, y.
        share: this part.
        seed: of the weights and the parts.
    """
    x = streams.inputs(x, "x")
    names = _output_names(model, x.shape[1:], seed) if isinstance(y, dict) else []
    labels = streams.labels_of(y, names)
    streams.require_same_length(x, labels, "y")
    known, arguments = [[each] for each in labels], ("y",)
    if held is not None:
        xv, yv = _pair(held)
        xv = streams.inputs(xv, "validation_data[0]")
        if xv.shape[1:] != x.shape[1:]:
            raise ValueError(
                "`validation_data` must hold examples like those of `x`. Received: "
                f"shape {xv.shape[1:]} for {x.shape[1:]}"
            )
        more = streams.labels_of(yv, names)
        streams.require_same_length(xv, more, "validation_data[1]")
        known = [[a, b] for a, b in zip(labels, more, strict=True)]
        arguments = ("y", "validation_data[1]")
    losses = _each(loss, len(labels))
    outputs = [
        output_of(one, each, arguments) for one, each in zip(losses, known, strict=True)
    ]
    outputs = _fitting(model, outputs, x[:8], labels, seed)
    targets = _targets(outputs, labels, "y")
    make = _maker(model, x.shape[1:], outputs, seed)
    x = streams.as_taken(make(), x)
    if held is not None:
        train = Examples(x, targets)
        valid = Examples(
            streams.as_taken(make(), xv), _targets(outputs, more, "validation_data[1]")
        )
        _require_known_classes(outputs, train, valid)
    else:
        first = outputs[0]
        indices = targets[0].argmax(1) if first.classes is not None else None
        rows, others = streams.split(len(x), share, indices, seed)
        train, valid = (
            Examples(x[part], tuple(t[part] for t in targets))
            for part in (rows, others)
        )
    joined = [np.concatenate(parts) for parts in zip(train.y, valid.y, strict=True)]
    both = Examples(np.concatenate([train.x, valid.x]), tuple(joined))
    return Job(
        network=make,
        outputs=outputs,
        shape=x.shape[1:],
        deviation=_deviation(train.x[: streams.SEEN]),
        training=train.batches,
        validation=valid.batches,
        everything=both.batches,
        counts=lambda size: tuple(max(1, len(e) // size) for e in (train, valid, both)),
        measured=valid.in_order,
    )


def of_datasets(model: Any, loss: Any, x: Any, held: Any, seed: int) -> Job:
    """A job on batched datasets of (x, y)."""
    if not isinstance(held, tf.data.Dataset):
        raise ValueError(
            "`validation_data` must be a tf.data.Dataset where `x` is one. Make one, "
            f"or give arrays. Received: validation_data={type(held).__name__}"
        )
    specs: list[Any] = []
    for dataset, argument in ((x, "x"), (held, "validation_data")):
        spec: Any = dataset.element_spec
        pair = isinstance(spec, tuple) and len(spec) == 2
        if not pair or not isinstance(spec[0], tf.TensorSpec) or spec[0].shape.rank < 2:
            raise ValueError(
                f"`{argument}` must be a dataset of batches (inputs, labels). Call "
                f".batch(64) on one of single examples. Received: {spec}"
            )
        specs.append(spec)
    shape = tuple(specs[0][0].shape[1:])
    if None in shape:
        raise ValueError(
            "`x` must have examples of a known shape. Set it by .map(lambda x, y: "
            f"(tf.ensure_shape(x, shape), y)). Received: {specs[0][0]}"
        )
    seen, given = next(iter(x))
    labels = [part.numpy() for part in tf.nest.flatten(given)]
    sizes = output_shapes(new_network(model, shape, None, seed), shape)
    losses = _each(loss, len(labels))
    outputs = [
        _streamed_output(*each) for each in zip(losses, labels, sizes, strict=True)
    ]
    outputs = _fitting(model, outputs, seen.numpy()[:8], labels, seed)
    convert = streams.streamed(outputs)
    train, valid = (d.map(convert) for d in (x, held))
    both = train.concatenate(valid)
    return Job(
        network=_maker(model, shape, outputs, seed),
        outputs=outputs,
        shape=shape,
        deviation=_deviation(seen.numpy()),
        training=lambda size, seed: train.repeat(),
        validation=lambda size, seed: valid.repeat(),
        everything=lambda size, seed: both.shuffle(64, seed).repeat(),
        counts=lambda size: tuple(map(_length, (train, valid, both))),
        measured=lambda size: valid,
    )


def _streamed_output(loss: Any, labels: np.ndarray, size: tuple) -> Output:
    """The kind of an output, from one batch of its labels."""
    whole = labels.dtype.kind in "iub"
    entropy = whole if loss is None else name_of(loss) in CROSS_ENTROPIES
    if entropy and whole and size and size[-1] > 1:
        return Output(None, Classes(np.arange(size[-1]), labels.ndim == 2))
    return output_of(loss, [labels], ("x",))


def _length(dataset: tf.data.Dataset) -> int:
    count = int(dataset.cardinality())
    if count == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "`x` and `validation_data` must be finite datasets: an epoch is one pass. "
            "Leave out .repeat(). Received: an endless dataset"
        )
    return count if count >= 0 else sum(1 for _ in dataset)


def _maker(model: Any, shape: tuple, outputs: list[Output], seed: int) -> Callable:
    first = outputs[0]
    size = None if first.classes is None else len(first.classes)
    return lambda: new_network(model, shape, size, seed)


def _fitting(
    model: Any, outputs: list[Output], x: np.ndarray, labels: list, seed: int
) -> list[Output]:
    """The outputs, after a look at the network whether it has them."""
    network = _maker(model, x.shape[1:], outputs, seed)()
    found = output_shapes(network, x.shape[1:])
    if len(found) != len(outputs):
        raise ValueError(
            f"`model` must have one output for each of the {len(outputs)} arrays of "
            f"`y`. Received: {len(found)} outputs"
        )
    made = tf.nest.flatten(network(tf.cast(x, tf.float32), training=False))
    fitted = []
    for one, shape, label, output in zip(outputs, found, labels, made, strict=True):
        if one.classes is not None:
            wanted: tuple = (len(one.classes),)
            if shape != wanted:
                raise ValueError(
                    f"`model` must have one output per class, {wanted[0]} here. End it "
                    f"with keras.layers.Dense({wanted[0]}), or give `loss` if these "
                    f"are no classes. Received: outputs of shape {shape} per example"
                )
            soft = gives_probabilities(lambda *_, o=output, **__: o, x)
            one = dataclasses.replace(one, probabilities=soft)
        elif math.prod(shape) != math.prod(np.shape(label)[1:]):
            raise ValueError(
                "`model` must have outputs like `y`. Change the units of its last "
                f"layer, or reshape `y`. Received: outputs of shape {shape} for "
                f"labels of shape {np.shape(label)[1:]} per example"
            )
        fitted.append(one)
    return fitted


def _targets(outputs: list[Output], labels: list, argument: str) -> tuple:
    pairs = zip(outputs, labels, strict=True)
    return tuple(one.targets(each, argument) for one, each in pairs)


def _require_known_classes(
    outputs: list[Output], train: Examples, valid: Examples
) -> None:
    for output, one, other in zip(outputs, train.y, valid.y, strict=True):
        if output.classes is not None:
            new = np.flatnonzero((other.sum(axis=0) > 0) & (one.sum(axis=0) == 0))
            if len(new):
                names = ", ".join(map(repr, output.classes.values[new].tolist()[:10]))
                raise ValueError(
                    "`y` must hold every class that `validation_data` holds: the "
                    "network cannot learn the others. Move some of their examples, or "
                    f"leave them out. Received: no training example of {names}"
                )


def _output_names(model: Any, shape: tuple, seed: int) -> list[str]:
    return list(getattr(new_network(model, shape, None, seed), "output_names", []))


def _each(loss: Any, count: int) -> list:
    if isinstance(loss, (list, tuple)):
        if len(loss) != count:
            raise ValueError(
                f"`loss` must have one entry for each of the {count} outputs. "
                f"Received: {len(loss)}"
            )
        return list(loss)
    return [loss] * count


def _pair(held: Any) -> tuple:
    if not isinstance(held, (tuple, list)) or len(held) != 2:
        raise ValueError(
            "`validation_data` must be a pair (x, y). "
            f"Received: validation_data={type(held).__name__}"
        )
    return tuple(held)


def _deviation(x: np.ndarray) -> float:
    return float(np.std(x.astype(np.float32))) or 1.0
