"""All of Keras's layers, activations, losses and regularisers in a lower loss.

    python tests/sweep_second_derivatives.py --out docs/second_derivatives.md

Each stands between a variable and the lower loss, in float64, and its products g_yy v
and g_xy v are compared with central differences of the gradient (in a graph), and with
the products computed eagerly. The verdicts:

- right: they agree.
- refused: `tb.check_second_derivatives` names an operation, and so would `fit`.
- constant: the gradient of its output does not reach the variable; an error says so.
- not smooth: differences of the loss itself miss its first derivative (a staircase).
- not applicable: there is nothing to differentiate.
- WRONG: must not occur.

Run alone it prints the table; `--out` writes it, below the line "<!-- table -->" of a
page that has one. `--only` takes the beginning of a name, `--kind` a kind.
"""

import argparse
import inspect
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import tfbilevel as tb  # noqa: E402
from tfbilevel._calculus import (
    derivatives,  # noqa: E402
    structure,  # noqa: E402
)
from tfbilevel._check import second_derivatives  # noqa: E402

VECTOR, SEQUENCE, IMAGE, VOLUME = (2, 4), (2, 5, 3), (2, 6, 6, 3), (2, 4, 4, 4, 2)
OTHER_BACKEND = "of another framework or a saved model"
BASE = "a base class"
INTEGERS = "integers or text in, nothing trained"
TOOL = "not a part of a network"
IMAGES_ONLY = "the labels of images: nothing trained"
EXAMPLES = 2
UNFIT = (ValueError, TypeError, LookupError, tf.errors.OpError)
# A difference of the eager and the graph's products beyond it is not rounding.
EQUAL = 1e-9


class Case(NamedTuple):
    """One thing in a lower loss.

    Attributes:
        kind: "layer", "activation", "loss", "regulariser" or "image operation".
        name: Keras's.
        variant: its arguments, as they are printed.
        upper, lower: where it is checked.
        loss: (x, y) -> scalar.
    """

    kind: str
    name: str
    variant: str
    upper: Any
    lower: Any
    loss: Callable[[Any, Any], tf.Tensor]


Maker = partial[Case]  # of a dtype: some kernels exist in float32 only


class Row(NamedTuple):
    """What was found."""

    kind: str
    name: str
    variant: str
    verdict: str
    said: str


def normal(shape: Any, seed: int = 0, scale: float = 1.0, mean: float = 0.0) -> Any:
    generator = np.random.default_rng(seed)
    return tf.constant(mean + scale * generator.normal(size=shape), tf.float64)


def weighed(outputs: Any, weights: tf.Tensor) -> tf.Tensor:
    """A scalar that is curved in every output, examples weighed by the upper level."""
    total = tf.zeros([], tf.float64)
    for index, leaf in enumerate(tf.nest.flatten(outputs)):
        leaf = tf.convert_to_tensor(leaf)
        if not leaf.dtype.is_floating:
            continue
        leaf = tf.cast(leaf, tf.float64)
        slope = normal([int(np.prod(leaf.shape))], 7 + index)
        each = tf.reshape(slope, leaf.shape) * leaf + 0.5 * leaf**2
        count = weights.shape[0]
        if leaf.shape.rank and leaf.shape[0] == count:
            each = tf.reduce_sum(tf.reshape(each, [count, -1]), 1) * weights
        total += tf.reduce_sum(each)
    return total


# Layers: keywords -> inputs. A shape is a variable of the lower level, which the upper
# level shifts; an array is data.
WORDS = np.array([[1, 2, 0], [3, 1, 2]])
PIXELS = {"value_range": (0, 1)}


def layers() -> dict[str, Any]:
    """Name -> [(keywords, inputs), ...] or the reason why there is nothing to check."""
    k = keras.layers
    sequence, image, volume = [SEQUENCE], [IMAGE], [VOLUME]
    pairs = [VECTOR, VECTOR]
    by_rank = {1: sequence, 2: image, 3: volume}
    table: dict[str, Any] = {
        "Activation": [({"activation": "tanh"}, [VECTOR])],
        "ELU": [({}, [VECTOR])],
        "LeakyReLU": [({}, [VECTOR])],
        "PReLU": [({"alpha_initializer": "normal"}, [VECTOR])],
        "ReLU": [({}, [VECTOR]), ({"max_value": 1.0, "negative_slope": 0.1}, [VECTOR])],
        "Softmax": [({}, [VECTOR])],
        "AdditiveAttention": [({}, [SEQUENCE, SEQUENCE])],
        "Attention": [
            ({}, [SEQUENCE, SEQUENCE]),
            ({"use_scale": True, "score_mode": "concat"}, [SEQUENCE, SEQUENCE]),
        ],
        "GroupQueryAttention": [
            (
                {"head_dim": 2, "num_query_heads": 4, "num_key_value_heads": 2},
                [SEQUENCE, SEQUENCE],
            )
        ],
        "MultiHeadAttention": [
            ({"num_heads": 2, "key_dim": 2}, [SEQUENCE, SEQUENCE]),
            ({"num_heads": 2, "key_dim": 2, "flash_attention": False}, 2 * [SEQUENCE]),
        ],
        "Dense": [
            ({"units": 3, "activation": "tanh"}, [VECTOR]),
            ({"units": 3, "lora_rank": 1}, [VECTOR]),
        ],
        "EinsumDense": [
            ({"equation": "abc,cd->abd", "output_shape": (None, 4)}, sequence)
        ],
        "Embedding": [({"input_dim": 4, "output_dim": 3}, [WORDS])],
        "ReversibleEmbedding": [({"input_dim": 4, "output_dim": 3}, [WORDS])],
        "Identity": [({}, [VECTOR])],
        "Lambda": [({"function": tf.sin}, [VECTOR])],
        "Masking": [({}, sequence)],
        "Dot": [({"axes": 1}, pairs), ({"axes": 1, "normalize": True}, pairs)],
        "BatchNormalization": [({}, image), ({"axis": 1}, sequence), ({}, [VECTOR])],
        "GroupNormalization": [({"groups": 3}, image)],
        "LayerNormalization": [({}, image), ({"axis": [1, 2]}, sequence)],
        "RMSNormalization": [({}, image)],
        "UnitNormalization": [({}, image)],
        "SpectralNormalization": [
            ({"layer": k.Dense(3, dtype="float64")}, [VECTOR]),
            ({"layer": k.Conv2D(2, 3, dtype="float64")}, image),
        ],
        "CategoryEncoding": INTEGERS,
        "Discretization": INTEGERS,
        "HashedCrossing": INTEGERS,
        "Hashing": INTEGERS,
        "IntegerLookup": INTEGERS,
        "StringLookup": INTEGERS,
        "TextVectorization": INTEGERS,
        "MaxNumBoundingBoxes": IMAGES_ONLY,
        "CutMix": IMAGES_ONLY,
        "MixUp": IMAGES_ONLY,
        "TFSMLayer": OTHER_BACKEND,
        "FlaxLayer": OTHER_BACKEND,
        "JaxLayer": OTHER_BACKEND,
        "TorchModuleWrapper": OTHER_BACKEND,
        "Layer": BASE,
        "Wrapper": BASE,
        "InputLayer": TOOL,
        "InputSpec": TOOL,
        "Input": TOOL,
        "serialize": TOOL,
        "deserialize": TOOL,
        "AugMix": [(PIXELS, image)],
        "AutoContrast": [(PIXELS, image)],
        "CenterCrop": [
            ({"height": 4, "width": 4}, image),
            ({"height": 8, "width": 8}, image),
        ],
        "ContrastLimitedAdaptiveHistogramEqualization": [
            ({**PIXELS, "tile_grid_size": (2, 2)}, image)
        ],
        "Equalization": [(PIXELS, image)],
        "RandAugment": [(PIXELS, image)],
        "RandomBrightness": [({"factor": 0.3, **PIXELS}, image)],
        "RandomColorDegeneration": [({"factor": 0.5, **PIXELS}, image)],
        "RandomColorJitter": [
            (
                {
                    "brightness_factor": 0.3,
                    "contrast_factor": 0.3,
                    "saturation_factor": 0.3,
                    "hue_factor": 0.3,
                    **PIXELS,
                },
                image,
            )
        ],
        "RandomContrast": [({"factor": 0.5, **PIXELS}, image)],
        "RandomCrop": [({"height": 4, "width": 4}, image)],
        "RandomElasticTransform": [({"factor": 1.0, **PIXELS}, image)],
        "RandomErasing": [({"factor": 1.0, **PIXELS}, image)],
        "RandomFlip": [({}, image)],
        "RandomGaussianBlur": [({"factor": 1.0, **PIXELS}, image)],
        "RandomGrayscale": [({"factor": 0.5}, image)],
        "RandomHue": [({"factor": 0.5, **PIXELS}, image)],
        "RandomInvert": [({"factor": 1.0, **PIXELS}, image)],
        "RandomPerspective": [({"factor": 1.0, "scale": 0.3}, image)],
        "RandomPosterization": [({"factor": 4, **PIXELS}, image)],
        "RandomRotation": [({"factor": 0.2}, image)],
        "RandomSaturation": [({"factor": 0.5, **PIXELS}, image)],
        "RandomSharpness": [({"factor": 0.5, **PIXELS}, image)],
        "RandomShear": [({"x_factor": 0.3, "y_factor": 0.3}, image)],
        "RandomTranslation": [({"height_factor": 0.3, "width_factor": 0.3}, image)],
        "RandomZoom": [({"height_factor": 0.3}, image)],
        "Resizing": [
            ({"height": 8, "width": 4, "interpolation": way, **more}, image)
            for way in ("bilinear", "nearest", "bicubic", "lanczos3", "lanczos5")
            for more in ({}, {"antialias": True})
        ],
        "Solarization": [(PIXELS, image)],
        "MelSpectrogram": [
            ({"fft_length": 8, "sequence_stride": 4, "num_mel_bins": 3}, [(2, 16)])
        ],
        "STFTSpectrogram": [
            (
                {
                    "mode": mode,
                    "frame_length": 8,
                    "frame_step": 4,
                    "fft_length": 8,
                },
                [(2, 16, 1)],
            )
            for mode in ("log", "magnitude", "psd", "real", "imag", "angle", "stft")
        ],
        "Normalization": [({"mean": 0.5, "variance": 2.0}, [VECTOR])],
        "Pipeline": [({"layers": [k.Rescaling(0.5, dtype="float64")]}, image)],
        "Rescaling": [({"scale": 0.5, "offset": 1.0}, image)],
        "ActivityRegularization": [({"l2": 0.1}, [VECTOR])],
        "AlphaDropout": [({"rate": 0.3}, [VECTOR])],
        "Dropout": [({"rate": 0.3}, [VECTOR])],
        "GaussianDropout": [({"rate": 0.3}, [VECTOR])],
        "GaussianNoise": [({"stddev": 0.3}, [VECTOR])],
        "Flatten": [({}, image)],
        "Permute": [({"dims": (2, 1)}, sequence)],
        "RepeatVector": [({"n": 3}, [VECTOR])],
        "Reshape": [({"target_shape": (2, 2)}, [VECTOR])],
        "Bidirectional": [({"layer": k.GRU(2, dtype="float64")}, sequence)],
        "GRU": [
            ({"units": 2}, sequence),
            ({"units": 2, "reset_after": False}, sequence),
            ({"units": 2, "unroll": True, "return_sequences": True}, sequence),
            ({"units": 2, "dropout": 0.3, "recurrent_dropout": 0.3}, sequence),
        ],
        "LSTM": [
            ({"units": 2}, sequence),
            ({"units": 2, "unroll": True, "return_sequences": True}, sequence),
            ({"units": 2, "dropout": 0.3, "recurrent_dropout": 0.3}, sequence),
        ],
        "SimpleRNN": [({"units": 2}, sequence)],
        "GRUCell": "as RNN(GRUCell)",
        "LSTMCell": "as RNN(LSTMCell)",
        "SimpleRNNCell": "as RNN(SimpleRNNCell)",
        "StackedRNNCells": "as RNN(StackedRNNCells)",
        "RNN": [
            ({"cell": cell}, sequence)
            for cell in (
                k.GRUCell(2, dtype="float64"),
                k.LSTMCell(2, dtype="float64"),
                k.SimpleRNNCell(2, dtype="float64"),
                k.StackedRNNCells(
                    [k.GRUCell(2, dtype="float64"), k.LSTMCell(2, dtype="float64")],
                    dtype="float64",
                ),
            )
        ],
        "TimeDistributed": [({"layer": k.Dense(2, dtype="float64")}, sequence)],
        "UpSampling1D": [({"size": 2}, sequence)],
        "UpSampling2D": [
            ({"size": 2, "interpolation": way}, image)
            for way in ("nearest", "bilinear", "bicubic", "lanczos3", "lanczos5")
        ],
        "UpSampling3D": [({"size": 2}, volume)],
    }
    for name in ("Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply"):
        table[name] = [({}, pairs)]
    table["Subtract"] = [({}, pairs)]
    for rank, shapes in by_rank.items():
        conv = {"filters": 2, "kernel_size": 3}
        table[f"Conv{rank}D"] = [
            (conv, shapes),
            ({**conv, "strides": 2, "padding": "same"}, shapes),
            ({**conv, "dilation_rate": 2, "padding": "same"}, shapes),
        ]
        table[f"Conv{rank}DTranspose"] = [
            (conv, shapes),
            ({**conv, "strides": 2, "padding": "same"}, shapes),
        ]
        if rank < 3:
            table[f"DepthwiseConv{rank}D"] = [({"kernel_size": 3}, shapes)]
            table[f"SeparableConv{rank}D"] = [(conv, shapes)]
        for kind in ("Average", "Max"):
            table[f"{kind}Pooling{rank}D"] = [
                ({"pool_size": 2}, shapes),
                ({"pool_size": 3, "strides": 1, "padding": "same"}, shapes),
            ]
            table[f"Global{kind}Pooling{rank}D"] = [({}, shapes)]
            table[f"Adaptive{kind}Pooling{rank}D"] = [({"output_size": 2}, shapes)]
        table[f"Cropping{rank}D"] = [({"cropping": 1}, shapes)]
        table[f"ZeroPadding{rank}D"] = [({"padding": 1}, shapes)]
        table[f"SpatialDropout{rank}D"] = [({"rate": 0.3}, shapes)]
        table[f"ConvLSTM{rank}D"] = [
            ({"filters": 2, "kernel_size": 2}, [(2, 3, *shapes[0][1:])])
        ]
    table["Conv2D"].append(
        ({"filters": 3, "kernel_size": 3, "groups": 3, "padding": "same"}, image)
    )
    table["DepthwiseConv2D"].append(
        ({"kernel_size": 3, "depth_multiplier": 2, "padding": "same"}, image)
    )
    return table


def layer_case(name: str, keywords: dict, inputs: list, dtype: str) -> Case:
    keras.utils.set_random_seed(0)
    of_dtype = {} if name == "Pipeline" else {"dtype": dtype}  # its layers have one
    layer = getattr(keras.layers, name)(**keywords, **of_dtype)
    given = [tf.constant(i) if isinstance(i, np.ndarray) else None for i in inputs]
    positive = keywords.get("value_range") is not None
    starts = [
        normal(i, 1 + n, *((0.1, 0.5) if positive else (1.0, 0.0)))
        for n, i in enumerate(inputs)
        if not isinstance(i, np.ndarray)
    ]
    takes = "training" in inspect.signature(layer.call).parameters
    several = name in ("MultiHeadAttention", "GroupQueryAttention")

    def call(values: list) -> Any:
        whole, rest = list(given), iter(values)
        whole = [tf.cast(next(rest), dtype) if v is None else v for v in whole]
        training = {"training": True} if takes else {}
        if several:
            return layer(*whole, **training)
        return layer(whole[0] if len(whole) == 1 else whole, **training)

    call(starts)  # builds it
    variables = layer.trainable_variables
    lower = {
        "inputs": starts,
        "weights": [
            tf.cast(v.value, tf.float64) + normal(v.shape, 50 + n, 0.1)
            for n, v in enumerate(variables)
        ],
    }
    upper = {"weights": normal([EXAMPLES], 3, 0.1, 1.0)}
    if starts:
        upper["shift"] = normal(starts[0].shape[1:], 4, 0.01)

    def loss(x: Any, y: Any) -> tf.Tensor:
        values = list(y["inputs"])
        if values:
            values[0] = values[0] + x["shift"]
        mapping = list(zip(variables, y["weights"], strict=True))
        with keras.StatelessScope(mapping, collect_losses=True):
            outputs = call(values)
        return weighed(outputs, x["weights"])

    shown = {key: _named(value) for key, value in keywords.items()}
    return Case("layer", name, _printed(shown), upper, lower, loss)


def _named(value: Any) -> Any:
    if isinstance(value, list):
        return [_named(one) for one in value]
    return type(value).__name__ if isinstance(value, keras.layers.Layer) else value


def _printed(keywords: dict) -> str:
    return ", ".join(
        f"{key}={getattr(value, '__name__', value)}" for key, value in keywords.items()
    )


def function_case(
    kind: str, name: str, variant: str, of: Callable, shape: Any, dtype: str
) -> Case:
    """A function of one tensor."""

    def loss(x: Any, y: Any) -> tf.Tensor:
        return weighed(of(tf.cast(y + x["shift"], dtype)), x["weights"])

    upper = {"weights": normal([EXAMPLES], 3, 0.1, 1.0), "shift": normal(shape[1:], 4)}
    upper["shift"] *= 0.01
    pixels = kind == "image operation"
    lower = normal(shape, 1, *((0.1, 0.5) if pixels else (1.0, 0.0)))
    return Case(kind, name, variant, upper, lower, loss)


def activation_makers() -> Iterator[Maker]:
    for name in names(keras.activations):
        if name not in ("serialize", "deserialize", "get"):
            of = getattr(keras.activations, name)
            if name == "threshold":
                of = partial(of, threshold=0.1, default_value=0.2)
            yield partial(function_case, "activation", name, "", of, (2, 6))


SPARSE = ("SparseCategoricalCrossentropy", "CategoricalGeneralizedCrossEntropy")
OF_LOGITS = (
    "BinaryCrossentropy",
    "BinaryFocalCrossentropy",
    "CategoricalCrossentropy",
    "CategoricalFocalCrossentropy",
    "SparseCategoricalCrossentropy",
)
IMAGE_SHAPED = ("Dice", "Tversky")


def loss_makers() -> Iterator[Maker]:
    """Every loss of predictions that are variables, and of labels that are too."""
    for name in names(keras.losses):
        kind = getattr(keras.losses, name)
        if not inspect.isclass(kind) or name == "Loss":
            continue
        if name in ("CTC", "Circle"):
            yield partial(_loss_case, name, {}, "integers")
            continue
        for logits in ({"from_logits": True}, {}) if name in OF_LOGITS else ({},):
            if name in SPARSE:
                yield partial(_loss_case, name, logits, "integers")
                continue
            yield partial(_loss_case, name, logits, "given")
            yield partial(_loss_case, name, logits, "learned")
            if "label_smoothing" in inspect.signature(kind).parameters:
                yield partial(
                    _loss_case, name, {**logits, "label_smoothing": 0.1}, "learned"
                )


def _loss_case(name: str, keywords: dict, labels: str, dtype: str) -> Case:
    loss_object = getattr(keras.losses, name)(reduction="none", dtype=dtype, **keywords)
    shape: tuple = (EXAMPLES, 4)
    indices = np.array([1, 3])
    if name == "CTC":
        shape, indices = (EXAMPLES, 5, 4), np.array([[1, 2], [3, 1]])
    if name == "Circle":  # of pairs, alike and not
        shape, indices = (4, 4), np.array([0, 0, 1, 1])
    to_probability = tf.sigmoid if name.startswith("Binary") else tf.nn.softmax
    probable = not keywords.get("from_logits") and name not in ("CTC", "Circle")

    def loss(x: Any, y: Any) -> tf.Tensor:
        if labels == "learned":
            true = tf.nn.softmax(x["labels"])
        elif labels == "given":
            true = tf.nn.softmax(normal(shape, 4))
        else:
            true = tf.constant(indices)
        if name == "Circle":
            y = tf.math.l2_normalize(y, axis=-1)
        predicted = to_probability(y) if probable else y
        return weighed(loss_object(true, predicted), x["w"])

    upper = {"w": normal([shape[0]], 3, 0.1, 1.0)}
    if labels == "learned":
        upper["labels"] = normal(shape, 4)
    variant = _printed({**keywords, "labels": labels})
    return Case("loss", name, variant, upper, normal(shape, 1), loss)


def regulariser_makers() -> Iterator[Maker]:
    for name in ("L1", "L2", "L1L2", "OrthogonalRegularizer"):
        keywords = {"l1": 0.1, "l2": 0.2} if name == "L1L2" else {}
        of = getattr(keras.regularizers, name)(**keywords)
        variant = _printed(keywords)
        yield partial(function_case, "regulariser", name, variant, of, (2, 3))


def image_makers() -> Iterator[Maker]:
    k = keras.ops.image
    shift = tf.constant([[1.1, 0.1, 0.2, -0.1, 0.9, 0.3, 0.0, 0.01]], tf.float64)
    corners = tf.constant([[[0, 0], [5, 0], [0, 5], [5, 5]]] * 2, tf.float64)
    moved = corners + normal([2, 4, 2], 5, 0.3)
    places = normal([3, 2, 3, 3], 6, 0.5, 2.3)
    table: dict[str, list[tuple[str, Callable]]] = {
        "affine_transform": [
            (way, lambda z, way=way: k.affine_transform(z, shift, interpolation=way))
            for way in ("bilinear", "nearest")
        ],
        "crop_images": [("", lambda z: k.crop_images(z, 1, 1, target_height=3,
                                                     target_width=3))],
        "elastic_transform": [("", lambda z: k.elastic_transform(z, seed=1))],
        "extract_patches": [("", lambda z: k.extract_patches(z, 3))],
        "gaussian_blur": [("", lambda z: k.gaussian_blur(z))],
        "hsv_to_rgb": [("", lambda z: k.hsv_to_rgb(z))],
        "map_coordinates": [
            (f"order={o}", lambda z, o=o: k.map_coordinates(z[0, :, :, :], places, o))
            for o in (0, 1)
        ],
        "pad_images": [("", lambda z: k.pad_images(z, 1, 1, 1, 1))],
        "perspective_transform": [
            ("", lambda z: k.perspective_transform(z, corners, moved))
        ],
        "resize": [
            (way, lambda z, way=way: k.resize(z, (8, 4), interpolation=way))
            for way in ("bilinear", "nearest", "bicubic", "lanczos3", "lanczos5")
        ],
        "rgb_to_grayscale": [("", lambda z: k.rgb_to_grayscale(z))],
        "rgb_to_hsv": [("", lambda z: k.rgb_to_hsv(z))],
        "scale_and_translate": [
            ("", lambda z: k.scale_and_translate(
                z, (2, 8, 4, 3), scale=tf.constant([1.3, 0.7], tf.float64),
                translation=tf.constant([0.1, 0.2], tf.float64),
                spatial_dims=(1, 2), method="linear"))
        ],
        "sobel_edges": [("", lambda z: k.sobel_edges(z))],
        "ssim": [("", lambda z: k.ssim(z, tf.reverse(z, [1]), 1.0, filter_size=3))],
    }  # fmt: skip
    for name, variants in table.items():
        if hasattr(k, name):
            for variant, of in variants:
                kind = "image operation"
                yield partial(function_case, kind, name, variant, of, IMAGE)


def names(module: Any) -> list[str]:
    """Its public classes and functions, each under its first name only."""
    found: dict[int, str] = {}
    for name, value in sorted(vars(module).items()):
        if not name.startswith("_") and callable(value):
            found.setdefault(id(value), name)
    return sorted(found.values())


def missing_layers() -> list[str]:
    """Names of `keras.layers` that the table does not know: new ones."""
    known = layers()
    ids = {id(getattr(keras.layers, name, None)) for name in known}
    return [
        name
        for name in names(keras.layers)
        if id(getattr(keras.layers, name)) not in ids
        and inspect.isclass(getattr(keras.layers, name))
    ]


def checked(make: Maker) -> Row:
    """The verdict on one case, in float64 if it can be computed in it."""
    try:
        return _checked(make("float64"))
    except UNFIT:
        case = make("float32")
        try:
            return _checked(case)
        except UNFIT as error:
            said = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
            return Row(case.kind, case.name, case.variant, "WRONG", said)


def problem_of(case: Case) -> tb.Problem:
    return tb.Problem(
        upper_loss=lambda x, y, batch: tf.add_n(
            [tf.reduce_sum(leaf) for leaf in tf.nest.flatten(y)]
        ),
        lower_loss=lambda x, y, batch: case.loss(x, y),
    )


def _checked(case: Case) -> Row:
    problem = problem_of(case)
    here = case.kind, case.name, case.variant
    data = tb.Batches(None, None)
    try:
        report = tb.check_second_derivatives(
            problem, data, case.upper, case.lower, probes=1
        )
    except tb.UnconnectedGradientError as error:
        return Row(*here, "constant", str(error).split(", so its")[0])
    lost = [one for one in report.operations if one.verdict in ("missing", "wrong")]
    if lost:
        return Row(*here, "refused", "; ".join(f"{one.name}" for one in lost))
    said = f"{report.error:.0e} ({report.noise:.0e})"
    if report.precision != "float64":
        said += f", {report.precision}"
    if not report.right:
        first = first_derivative_error(case)
        if first > 1e-3:
            why = f"differences of the loss miss its first derivative too ({first:.0e})"
            return Row(*here, "not smooth", why)
        return Row(*here, "WRONG", said)
    apart = eager_error(problem.prepared(case.upper, data), case, report.probes)
    if apart > max(EQUAL, report.noise):
        return Row(*here, "WRONG", f"eager and graph differ by {apart:.0e}")
    return Row(*here, "right", said)


def verdict(make: Maker) -> str:
    """That of `checked`, found with one trace where both products are right."""
    try:
        # TensorFlow cannot trace the gradient of this one a second time.
        if "CTC" not in make.args and agrees(make("float64")):
            return "right"
    except UNFIT:
        pass
    return checked(make).verdict


def agrees(case: Case) -> bool:
    """Whether both products of the graph are central differences of its gradient, to
    1e-6, and the eager ones are the graph's."""
    here = problem_of(case).prepared(case.upper, tb.Batches(None, None))
    c, y = structure.to_tensors((here.upper, case.lower))
    loss, batch = here.problem.lower_loss, here.batches.lower_at(0)
    v, u = (structure.direction(y, seed) for seed in (0, 1))
    w = structure.direction(c, 2)

    def products(c: Any, y: Any) -> tuple:
        _, gradient, pullback = derivatives.lower_gradient_pullback(loss, c, y, batch)
        mixed, curved = pullback(v)
        mixed = derivatives.fill_zeros(mixed, c)
        made = structure.dot(curved, u), structure.dot(mixed, w)
        return structure.dot(gradient, v), *made

    run = tf.function(products, autograph=False).get_concrete_function(c, y)
    _, *claimed = run(c, y)
    probes = []
    for name, one in zip(("g_yy v", "g_xy v"), map(float, claimed), strict=True):
        for h in (1e-3, 1e-4, 1e-5):
            ahead, behind = (
                run(c, structure.add_scaled(y, step, u))[0]
                if name == "g_yy v"
                else run(structure.add_scaled(c, step, w), y)[0]
                for step in (h, -h)
            )
            difference = float(ahead - behind) / (2 * h)
            if abs(difference - one) <= 1e-6 * max(abs(difference), abs(one)):
                break
        else:
            return False
        noise = abs(difference - one)
        probes.append(second_derivatives.Probe(name, one, difference, noise))
    return eager_error(here, case, tuple(probes)) <= EQUAL


def first_derivative_error(case: Case) -> float:
    """How far <g_y, u> is from differences of g, relatively, at the best width."""
    value = tf.function(lambda y: case.loss(case.upper, y), autograph=False)
    _, gradient = derivatives.lower_gradient(
        lambda x, y, batch: case.loss(x, y), case.upper, case.lower, None
    )
    u = tf.nest.map_structure(lambda leaf: normal(leaf.shape, 9), case.lower)
    claimed = float(structure.dot(gradient, u))
    errors = []
    for h in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        ahead = value(structure.add_scaled(case.lower, h, u))
        behind = value(structure.add_scaled(case.lower, -h, u))
        difference = float(ahead - behind) / (2 * h)
        size = max(abs(claimed), abs(difference))
        errors.append(abs(claimed - difference) / size if size else 0.0)
    return min(errors)


def eager_error(here: Any, case: Case, probes: tuple) -> float:
    """How far the eager products are from the graph's, relatively.

    Of the prepared problem: what a random layer samples is then the same in both.
    """
    v, u = (structure.direction(case.lower, seed) for seed in (0, 1))
    _, _, pullback = derivatives.lower_gradient_pullback(
        here.problem.lower_loss, here.upper, case.lower, here.batches.lower_at(0)
    )
    mixed, curved = pullback(v)
    mixed = derivatives.fill_zeros(mixed, case.upper)
    made = {
        "g_yy v": float(structure.dot(curved, u)),
        "g_xy v": float(structure.dot(mixed, structure.direction(case.upper, 2))),
    }
    apart = (
        (abs(made[one.product] - one.claimed), max(abs(one.claimed), one.noise))
        for one in probes
    )
    return max(error / size if size else error for error, size in apart)


# Compositions of others, and functions that a layer of the list hands its input to.
COMPOSED = {
    *("AugMix", "RandAugment", "ConvLSTM1D", "ConvLSTM3D", "affine_transform"),
    *("elastic_transform", "perspective_transform", "resize", "gaussian_blur"),
    *("RandomShear", "RandomTranslation", "RandomZoom"),  # as RandomRotation
    "RandomColorJitter",  # four other layers
    "Bidirectional",  # the loop of a cell, as in RNN, and a reversal
}
# These, of several rows of a name.
VARIANTS: dict[str, Callable[[dict], bool]] = {
    "RNN": lambda keywords: "Stacked" in type(keywords["cell"]).__name__,
    "GRU": lambda keywords: "reset_after" in keywords,  # the other one in the RNN
    "LSTM": lambda keywords: len(keywords) > 1,
    "SpectralNormalization": lambda keywords: (
        "Conv" in type(keywords["layer"]).__name__
    ),
    # Each kernel once, and a filter before one; UpSampling2D repeats or resizes.
    "Resizing": lambda keywords: (
        keywords["interpolation"] != "lanczos5"
        and ("antialias" not in keywords or keywords["interpolation"] == "bilinear")
    ),
    "UpSampling2D": lambda keywords: keywords["interpolation"] == "nearest",
}


def makers() -> Iterator[Maker]:
    """Everything, without what only composes others or repeats them."""
    for name, variants in sorted(layers().items()):
        if not hasattr(keras.layers, name) or isinstance(variants, str):
            continue
        for keywords, inputs in () if name in COMPOSED else variants:
            if name not in VARIANTS or VARIANTS[name](keywords):
                yield partial(layer_case, name, keywords, inputs)
    found = [make for of_kind in MAKERS.values() for make in of_kind()]
    learned = {str(make.args[:2]) for make in found if "learned" in make.args}
    for make in found:
        # Labels that are learned are differentiated in, besides.
        given = "given" in make.args and str(make.args[:2]) in learned
        if not given and not any(name in make.args for name in COMPOSED):
            yield make


def layer_rows(only: str) -> Iterator[Row]:
    for name, variants in sorted(layers().items()):
        if not hasattr(keras.layers, name) or not name.startswith(only):
            continue
        if isinstance(variants, str):
            yield Row("layer", name, "", "not applicable", variants)
            continue
        for keywords, inputs in variants:
            yield checked(partial(layer_case, name, keywords, inputs))


MAKERS = {
    "activation": activation_makers,
    "loss": loss_makers,
    "regulariser": regulariser_makers,
    "image operation": image_makers,
}


def swept(only: str = "", kind: str = "") -> Iterator[Row]:
    """A row for everything, or for names that begin so, or for all of a kind."""
    if kind in ("", "layer"):
        yield from layer_rows(only)
    for one, makers in MAKERS.items():
        for make in makers() if kind in ("", one) else ():
            if not only or make("float32").name.startswith(only):
                yield checked(make)


def table(rows: list[Row]) -> str:
    counts = {
        v: sum(r.verdict == v for r in rows) for v in sorted({r[3] for r in rows})
    }
    lines = [
        f"Keras {keras.__version__}, TensorFlow {tf.__version__}: "
        + ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
        + ".",
        "",
        "| kind | name | arguments | verdict | error (noise), or why |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="where the table goes")
    parser.add_argument("--only", default="", help="the beginning of a name")
    parser.add_argument("--kind", default="", choices=("", "layer", *MAKERS))
    arguments = parser.parse_args(argv)
    rows = []
    for row in swept(arguments.only, arguments.kind):
        rows.append(row)
        print("  ".join(row), flush=True)
    new = missing_layers()
    if new:
        print(f"not in the sweep: {new}")
    if arguments.out is not None:
        mark = "<!-- table -->\n"
        before = arguments.out.read_text() if arguments.out.exists() else ""
        head = before.split(mark)[0] + mark + "\n" if mark in before else ""
        arguments.out.write_text(head + table(rows))
    return int(bool(new) or any(row.verdict == "WRONG" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
