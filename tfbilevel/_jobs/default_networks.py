"""A network for each kind of data, for those who bring none."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

VOCABULARY = 20_000  # words and pairs of words that a text network tells apart
# A convolution follows as long as the picture has more pixels a side than this.
SMALLEST = 7
FILTERS = (32, 64, 128, 128)


def kind_of(x: Any) -> str:
    """ "text" (strings), "image" ([n, h, w] or [n, h, w, c]) or "tabular"."""
    x = np.asarray(x)
    if x.dtype.kind in "OUST":
        return "text"
    return "image" if x.ndim in (3, 4) else "tabular"


def default_network(
    shape: tuple[int, ...],
    classes: int,
    kind: str,
    *,
    examples: Any = None,
    vocabulary: int = VOCABULARY,
) -> keras.Model:
    """A new classifier that ends with logits.

    | kind | inputs | network |
    |---|---|---|
    | "tabular" | numbers [d] | two hidden layers of 128 units |
    | "image" | [h, w] or [h, w, c], any range | 2 to 4 convolutions, one dense layer |
    | "text" | numbers of words [length], 0 at the end | sum of embeddings, scaled |

    The first two standardise their inputs, if they are given examples: each number of a
    table by itself, all pixels together. Texts become numbers of words by
    `keras.layers.TextVectorization`; `text_layer` makes one.

    Args:
        shape: of one example.
        classes: number of classes.
        kind: "tabular", "image" or "text".
        examples: training data, [n, *shape], for means and variances. `None`: inputs
            are standardised already.
        vocabulary: how many words "text" has, the padding 0 and unknown words included.

    Raises:
        ValueError: for another kind, or a shape that is none of the kind.
    """
    if kind not in MAKERS:
        raise ValueError(
            f"`kind` must be one of {', '.join(map(repr, MAKERS))}. Received: "
            f"kind={kind!r}"
        )
    ranks, make = MAKERS[kind]
    if len(shape) not in ranks:
        raise ValueError(
            f"`shape` must have {' or '.join(map(str, ranks))} dimensions for examples "
            f"of kind {kind!r}. Reshape the examples, or bring a model of your own. "
            f"Received: shape={tuple(shape)}"
        )
    inputs = keras.Input(shape)
    hidden = make(inputs, vocabulary if kind == "text" else examples)
    return keras.Model(inputs, keras.layers.Dense(classes)(hidden))


def text_layer(texts: Any, vocabulary: int = VOCABULARY) -> keras.layers.Layer:
    """Texts to numbers of their words and pairs of words, [n, length].

    The length is that of all but the longest twentieth of the texts, at most 512.

    Args:
        texts: the strings from which the vocabulary is made, [n].
        vocabulary: its size at most.
    """
    texts = np.asarray(texts, object)
    words = np.array([len(str(text).split()) for text in texts.tolist()])
    length = int(np.quantile(2 * words, 0.95, method="higher")) if len(words) else 1
    layer = keras.layers.TextVectorization(
        max_tokens=vocabulary,
        ngrams=2,
        output_sequence_length=min(max(length, 1), 512),
    )
    layer.adapt(texts.astype(str), batch_size=1024)
    return layer


def text_network(texts: Any, classes: int) -> Callable[[], keras.Model]:
    """A function that returns new classifiers of texts as they are, [n] strings."""
    layer = text_layer(texts)

    def make() -> keras.Model:
        inputs = keras.Input((), dtype="string")
        hidden = _text(layer(inputs), layer.vocabulary_size())
        return keras.Model(inputs, keras.layers.Dense(classes)(hidden))

    return make


def _tabular(x: Any, examples: Any) -> Any:
    if examples is not None:
        layer = keras.layers.Normalization()
        layer.adapt(np.asarray(examples, np.float32))
        x = layer(x)
    for _ in range(2):
        x = keras.layers.Dense(128, activation="relu")(x)
    return x


def _image(x: Any, examples: Any) -> Any:
    if len(x.shape) == 3:
        x = keras.layers.Reshape((*x.shape[1:], 1))(x)
    if examples is not None:
        examples = np.asarray(examples)
        mean, variance = examples.mean(dtype=np.float64), examples.var(dtype=np.float64)
        # A Normalization layer with given numbers; `adapt` would copy all images.
        layer = keras.layers.Normalization(
            axis=None, mean=float(mean), variance=float(variance)
        )
        x = layer(x)
    for number, filters in enumerate(FILTERS):
        if number >= 2 and max(x.shape[1:3]) <= SMALLEST:
            break
        x = keras.layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        if min(x.shape[1:3]) >= 2:
            x = keras.layers.MaxPooling2D(2)(x)
    # Large pictures: the mean of what is left of them, not its thousands of numbers.
    if max(x.shape[1:3]) > SMALLEST:
        x = keras.layers.GlobalAveragePooling2D()(x)
    else:
        x = keras.layers.Flatten()(x)
    return keras.layers.Dense(64, activation="relu")(x)


def _text(x: Any, vocabulary: int) -> Any:
    """The sum over the words that are there, over the root of their number.

    The mean of hundreds of embeddings would be small, and so would its gradients: ten
    epochs do not train a network on it. This is as large for long texts as for short
    ones at the start, and 0 for an empty text.
    """
    there = keras.ops.cast(keras.ops.not_equal(x, 0), "float32")
    embedded = keras.layers.Embedding(vocabulary, 64)(x)
    total = keras.ops.sum(embedded * keras.ops.expand_dims(there, -1), axis=1)
    count = keras.ops.sum(there, axis=1, keepdims=True)
    return total / keras.ops.sqrt(keras.ops.maximum(count, 1.0))


# The ranks of the shapes of one example, and how its layers begin.
MAKERS = {"tabular": ((1,), _tabular), "image": ((2, 3), _image), "text": ((1,), _text)}
