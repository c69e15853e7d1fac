"""Vector arithmetic on nests of tensors.

A structure is any `tf.nest` nest. Arithmetic is done leaf by leaf, and a scalar
coefficient is cast to each leaf's dtype, so float32 and float64 leaves can be mixed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._workarounds.vectorized_map import vectorized_map


def scalar(value: Any, dtype: tf.DType) -> tf.Tensor:
    """A number or scalar tensor in `dtype`.

    `tf.cast` alone would first round a Python number to float32, also for float64.
    """
    if tf.is_tensor(value):
        return tf.cast(value, dtype)
    return tf.convert_to_tensor(value, dtype)


def distinct(a: Any) -> Any:
    """The same values in new tensors.

    A tape identifies tensors by object identity. If the lower variables start as the
    same tensors as the upper ones (MAML), their derivatives would be mixed up.
    """
    return tf.nest.map_structure(tf.identity, a)


def add(a: Any, b: Any) -> Any:
    """a + b."""
    return tf.nest.map_structure(tf.add, a, b)


def subtract(a: Any, b: Any) -> Any:
    """a - b."""
    return tf.nest.map_structure(tf.subtract, a, b)


def coefficient(value: Any, leaf: tf.Tensor) -> tf.Tensor:
    """A number, a scalar, or one value per leading entry, shaped to multiply a leaf."""
    made = scalar(value, leaf.dtype)
    if not made.shape.rank:
        return made
    ones = tf.ones([leaf.shape.rank - made.shape.rank], tf.int32)
    return tf.reshape(made, tf.concat([tf.shape(made), ones], axis=0))


def scale(factor: Any, a: Any) -> Any:
    """factor * a, for a scalar factor or one with the leading axes of every leaf."""
    return tf.nest.map_structure(lambda u: coefficient(factor, u) * u, a)


def add_scaled(a: Any, factor: Any, b: Any) -> Any:
    """a + factor * b, with a factor as for `scale`."""
    return tf.nest.map_structure(lambda u, v: u + coefficient(factor, u) * v, a, b)


def dot(a: Any, b: Any, leading: int = 0) -> tf.Tensor:
    """The inner product over all leaves, in the first leaf's dtype.

    The result is a scalar. With `leading` axes that all leaves share, it has one value
    for each entry of these axes.
    """
    products = [
        tf.reduce_sum(u * v, axis=list(range(leading, u.shape.rank)))
        for u, v in zip(tf.nest.flatten(a), tf.nest.flatten(b), strict=True)
    ]
    total = products[0]
    for product in products[1:]:
        total = total + tf.cast(product, total.dtype)
    return total


def norm(a: Any, leading: int = 0) -> tf.Tensor:
    """The Euclidean norm over all leaves (one global norm, not a sum of norms).

    With `leading` axes there is one norm for each of their entries, as in `dot`.
    """
    return tf.sqrt(dot(a, a, leading))


def ratio(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """a / b, and 0 where b is 0."""
    return tf.math.divide_no_nan(a, b)


def size(a: Any) -> int:
    """The number of entries of all leaves together."""
    return sum(
        int(tf.convert_to_tensor(v).shape.num_elements()) for v in tf.nest.flatten(a)
    )


def to_vector(a: Any, leading: int = 0) -> tf.Tensor:
    """All entries in one vector, of the first leaf's dtype.

    With `leading` axes that all leaves share, there is one vector for each entry.
    """
    leaves = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(a)]
    parts = [
        tf.reshape(tf.cast(leaf, leaves[0].dtype), [*leaf.shape[:leading], -1])
        for leaf in leaves
    ]
    return tf.concat(parts, axis=leading)


def from_vector(vector: tf.Tensor, like: Any, leading: int = 0) -> Any:
    """The nest `like` filled with the entries of a vector: inverse of `to_vector`."""
    leaves = tf.nest.flatten(like)
    leaves = [tf.convert_to_tensor(leaf) for leaf in leaves]
    sizes = [leaf.shape[leading:].num_elements() for leaf in leaves]
    parts = tf.split(vector, sizes, axis=leading)
    return tf.nest.pack_sequence_as(
        like,
        [
            tf.cast(tf.reshape(part, leaf.shape), leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        ],
    )


def zeros_like(a: Any) -> Any:
    """Zeros of the same structure, shapes and dtypes."""
    return tf.nest.map_structure(tf.zeros_like, a)


def where(condition: tf.Tensor, a: Any, b: Any) -> Any:
    """a where `condition` holds, else b.

    `condition` is a scalar or has the leading axes of every leaf.
    """

    def choose(u: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        missing = u.shape.rank - condition.shape.rank
        shape = tf.concat([tf.shape(condition), tf.ones([missing], tf.int32)], axis=0)
        return tf.where(tf.reshape(condition, shape), u, v)

    return tf.nest.map_structure(choose, a, b)


def stepped(going: tf.Tensor, before: Any, after: Any) -> Any:
    """`after` for the entries that are still `going`, `before` for the others.

    If `going` is a scalar, the result is `after`. A scalar leaf is shared by all
    entries: it takes its value from `after`.
    """
    if not going.shape.rank:
        return after

    def chosen(new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
        return where(going, new, old) if new.shape.rank else new

    return tf.nest.map_structure(chosen, after, before)


@dataclasses.dataclass(frozen=True)
class InnerProduct:
    """The inner product of nests of tensors: one number, or one for each entry of a
    leading axis.

    Attributes:
        leading: 0; or 1 if all leaves share a leading axis, each entry of which is a
            separate vector (for example, one per task).
    """

    leading: int = 0

    def dot(self, a: Any, b: Any) -> tf.Tensor:
        """<a, b>, in the first leaf's dtype."""
        return dot(a, b, self.leading)

    def norm(self, a: Any) -> tf.Tensor:
        """The Euclidean norm of `a`."""
        return norm(a, self.leading)

    def shape(self, a: Any) -> tf.TensorShape:
        """The shape of `norm(a)`."""
        return tf.nest.flatten(a)[0].shape[: self.leading]

    def to_vector(self, a: Any) -> tf.Tensor:
        """The entries of `a` in one vector, or in one vector per entry of the axis."""
        return to_vector(a, self.leading)

    def from_vector(self, vector: tf.Tensor, like: Any) -> Any:
        """The inverse of `to_vector`, with the structure of `like`."""
        return from_vector(vector, like, self.leading)

    def each(self, function: Callable, *nests: Any) -> Any:
        """The function applied to the nests, or to each entry of the axis alone."""
        if not self.leading:
            return function(*nests)
        return vectorized_map(lambda entries: function(*entries), nests)


def all_finite(a: Any) -> tf.Tensor:
    """Whether every entry of every floating-point leaf is finite: a scalar bool."""
    finite = [
        tf.reduce_all(tf.math.is_finite(leaf))
        for leaf in tf.nest.flatten(a)
        if leaf.dtype.is_floating
    ]
    return tf.reduce_all(tf.stack(finite)) if finite else tf.constant(True)


def to_tensors(a: Any) -> Any:
    """The same structure with every leaf (array, number, variable) a tensor."""
    return tf.nest.map_structure(
        lambda leaf: tf.convert_to_tensor(
            leaf.value if isinstance(leaf, keras.Variable) else leaf
        ),
        a,
    )


def copied(a: Any) -> Any:
    """Copies, which keep their values when the given variables or arrays change."""
    return to_tensors(
        tf.nest.map_structure(
            lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, a
        )
    )


def paths(a: Any, root: str) -> list[str]:
    """A readable name for every leaf: `upper['rate']`, `lower[0]`, or just `upper`."""
    # Not keras.tree, which orders the entries of an OrderedDict differently.
    leaves = tf.nest.flatten(a)
    numbered = tf.nest.pack_sequence_as(a, range(len(leaves)))
    names = [""] * len(leaves)
    for path, number in keras.tree.flatten_with_path(numbered):
        names[number] = root + "".join(f"[{key!r}]" for key in path)
    return names


def require_floating(a: Any, name: str) -> None:
    """Raise unless `a` is a non-empty nest of floating-point tensors."""
    leaves = tf.nest.flatten(a)
    if not leaves:
        raise ValueError(
            f"`{name}` must hold at least one tensor. Pass a nest of "
            f"floating-point tensors. Received: {name}={a!r}"
        )
    for leaf, path in zip(leaves, paths(a, name), strict=True):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not tf.as_dtype(dtype).is_floating:
            raise ValueError(
                f"`{name}` must be a nest of floating-point tensors, because "
                f"gradients are taken with respect to it. Cast {path} to a "
                f"floating-point dtype or pass it in the batch. Received: "
                f"{path} of dtype {dtype if dtype is not None else type(leaf)}"
            )


def require_like(a: Any, reference: Any, name: str, rule: str) -> None:
    """Raise unless `a` has the structure, shapes and dtypes of `reference`."""
    try:
        tf.nest.assert_same_structure(a, reference)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must {rule}. Return the same nest. Received: {a!r} where "
            f"{reference!r} was expected"
        ) from error
    for got, want, path in zip(
        tf.nest.flatten(a),
        tf.nest.flatten(reference),
        paths(reference, name),
        strict=True,
    ):
        if got.dtype != want.dtype or not got.shape.is_compatible_with(want.shape):
            raise ValueError(
                f"`{name}` must {rule}. Keep the shape and dtype of every leaf. "
                f"Received: {path} of shape {got.shape} and dtype {got.dtype.name} "
                f"where shape {want.shape} and dtype {want.dtype.name} was expected"
            )


def direction(like: Any, seed: int) -> Any:
    """A random vector of length 1."""
    made = tf.nest.pack_sequence_as(
        like,
        [
            tf.random.stateless_normal(tf.shape(leaf), (seed, index), dtype=leaf.dtype)
            for index, leaf in enumerate(tf.nest.flatten(like))
        ],
    )
    return scale(1.0 / norm(made), made)
