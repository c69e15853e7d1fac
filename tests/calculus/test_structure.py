"""Arithmetic on nests equals NumPy on the flat vector."""

import collections
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import cast, flat, unflat

from tfbilevel._calculus import structure

QUICK = settings(max_examples=20, deadline=None)
SHAPES = [(), (3,), (2, 4), (1, 5, 2), (0,)]


@st.composite
def pairs(draw: Any) -> tuple[Any, Any]:
    """Two nests of one structure."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))

    def nest() -> Any:
        leaves = [generator.normal(size=shape) for shape in shapes]
        return {"z": leaves[0], "a": [(leaf,) for leaf in leaves[1:]]}

    return nest(), nest()


@QUICK
@given(pairs(), st.floats(-10, 10))
def test_arithmetic(both: tuple, coefficient: float) -> None:
    a, b = both
    u, v = cast(a, "float64"), cast(b, "float64")
    for got, want in (
        (structure.add(u, v), flat(a) + flat(b)),
        (structure.subtract(u, v), flat(a) - flat(b)),
        (structure.scale(coefficient, u), coefficient * flat(a)),
        (structure.add_scaled(u, coefficient, v), flat(a) + coefficient * flat(b)),
        (structure.zeros_like(u), 0 * flat(a)),
    ):
        tf.nest.assert_same_structure(got, u)
        # TensorFlow takes numbers below the smallest normal one for zero.
        np.testing.assert_allclose(flat(got), want, rtol=1e-14, atol=1e-300)
        for x, y in zip(tf.nest.flatten(got), tf.nest.flatten(u), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype
    np.testing.assert_allclose(structure.dot(u, v), flat(a) @ flat(b), atol=1e-12)
    np.testing.assert_allclose(structure.norm(u), np.linalg.norm(flat(a)), rtol=1e-12)


def test_norm_is_one_global_norm() -> None:
    """Not a sum of norms per tensor: 5, not 7."""
    assert float(structure.norm([tf.constant([3.0]), tf.constant([[4.0]])])) == 5.0


def test_numbers_are_not_rounded_to_float32_on_the_way_to_float64() -> None:
    leaf = tf.constant([1.0, 3.0], tf.float64)
    assert structure.scale(0.1, leaf)[0].numpy() == 0.1
    assert structure.add_scaled(leaf, 0.1, leaf)[0].numpy() == 1.0 + 0.1
    assert structure.scalar(0.1, tf.float64).numpy() == 0.1


def test_dtypes_mix() -> None:
    a = [tf.constant(1.5), tf.constant([2.0, 3.0], tf.float64)]
    scaled = structure.scale(tf.constant(2.0, tf.float64), a)
    assert [leaf.dtype for leaf in scaled] == [tf.float32, tf.float64]
    assert flat(scaled).tolist() == [3.0, 4.0, 6.0]
    assert float(structure.dot(a, a)) == 1.5**2 + 4 + 9
    assert structure.dot(a, a).dtype == tf.float32


def test_distinct_makes_new_tensors() -> None:
    a = [tf.constant(1.0)]
    made = structure.distinct(a)
    assert made[0] is not a[0] and float(made[0]) == 1.0


def test_where_scalar_and_per_start() -> None:
    a = {"m": tf.ones([3, 2]), "v": tf.ones([3])}
    b = structure.zeros_like(a)
    whole = structure.where(tf.constant(False), a, b)
    assert flat(whole).sum() == 0
    rows = structure.where(tf.constant([True, False, True]), a, b)
    assert rows["m"].numpy().tolist() == [[1, 1], [0, 0], [1, 1]]
    assert rows["v"].numpy().tolist() == [1, 0, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite_sees_one_bad_entry(bad: float) -> None:
    good = {"a": tf.ones([3]), "count": tf.constant(1), "b": tf.ones([2, 2])}
    assert bool(structure.all_finite(good))
    assert not bool(structure.all_finite({**good, "b": tf.constant([[1.0, bad]])}))
    assert bool(structure.all_finite({"count": tf.constant(1)}))


def test_paths_name_every_leaf_in_flat_order() -> None:
    nest = {"rate": 1.0, "layers": [(2.0, 3.0), {"bias": 4.0}]}
    assert structure.paths(nest, "upper") == [
        "upper['layers'][0][0]",
        "upper['layers'][0][1]",
        "upper['layers'][1]['bias']",
        "upper['rate']",
    ]
    assert structure.paths(1.0, "lower") == ["lower"]
    leaves = unflat(np.arange(4.0), nest)
    assert leaves["rate"] == 3.0  # flat order is that of tf.nest


def test_to_tensors_takes_variables_arrays_and_numbers() -> None:
    made = structure.to_tensors(
        [tf.Variable(1.0), keras.Variable([2.0]), np.array([3.0, 4.0]), 5.0]
    )
    assert all(tf.is_tensor(leaf) for leaf in made)
    assert not any(isinstance(leaf, tf.Variable) for leaf in made)
    assert flat(made).tolist() == [1, 2, 3, 4, 5]


def test_paths_of_an_ordered_dictionary_are_those_of_its_leaves() -> None:
    nest = collections.OrderedDict(weights=tf.ones(3), bias=[tf.zeros(1), tf.zeros(2)])
    names = dict(
        zip(structure.paths(nest, "x"), map(len, tf.nest.flatten(nest)), strict=True)
    )
    assert names == {"x['weights']": 3, "x['bias'][0]": 1, "x['bias'][1]": 2}


def test_stepped_keeps_entries_that_are_done() -> None:
    before, after = (
        (tf.zeros([3, 2]), tf.constant(1)),
        (tf.ones([3, 2]), tf.constant(2)),
    )
    going = tf.constant([True, False, True])
    rows, count = structure.stepped(going, before, after)
    assert rows.numpy().tolist() == [[1, 1], [0, 0], [1, 1]]
    assert int(count) == 2  # one number for all
    # One answer for all: the loop that asks has ended where it is no.
    assert structure.stepped(tf.constant(False), before, after) is after


def test_the_inner_product_of_every_entry_is_its_own() -> None:
    generator = np.random.default_rng(0)
    rows = [generator.normal(size=(2, 10)) for _ in range(2)]
    a, b = ({"z": v[:, :4], "a": [v[:, 4:].reshape(2, 3, 2)]} for v in rows)
    # `tf.nest` sorts the keys of a dictionary.
    p, q = (np.concatenate([v[:, 4:], v[:, :4]], axis=1) for v in rows)
    u, v = cast(a, "float64"), cast(b, "float64")
    whole, each = structure.InnerProduct(), structure.InnerProduct(leading=1)
    np.testing.assert_allclose(each.dot(u, v), (p * q).sum(1), rtol=1e-12)
    np.testing.assert_allclose(whole.dot(u, v), (p * q).sum(), rtol=1e-12)
    np.testing.assert_allclose(each.norm(u), np.linalg.norm(p, axis=1), rtol=1e-12)
    assert (each.shape(u), whole.shape(u)) == ([2], [])
    np.testing.assert_array_equal(each.to_vector(u), p)
    np.testing.assert_array_equal(whole.to_vector(u), flat(a))
    for space in (each, whole):
        made = space.from_vector(space.to_vector(u), u)
        np.testing.assert_array_equal(flat(made), flat(a))
        normed = space.each(lambda s, t: structure.dot(s, t), u, v)
        np.testing.assert_allclose(normed, space.dot(u, v), rtol=1e-12)
