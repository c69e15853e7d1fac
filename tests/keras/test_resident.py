"""Batches that do not change stay on the device; others are passed on."""

import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb
from tfbilevel._keras.resident import Resident

FULL = np.arange(12.0, dtype="float32").reshape(4, 3)


def _all(dataset, count=1):
    """What is read of a dataset, element by element."""
    resident, iterator, made = Resident("/CPU:0"), iter(dataset), []
    while True:
        try:
            made += list(resident.read(iterator, count))
        except StopIteration:
            return made


@pytest.mark.parametrize("count", [1, 3])
def test_a_repeated_full_batch_is_one_tensor_beside_changing_ones(count):
    small = tf.data.Dataset.from_tensor_slices(FULL).batch(1)
    pairs = tb.pair(tf.data.Dataset.from_tensors(FULL), small).repeat(2)
    made = _all(pairs, count)
    assert len(made) == 8
    for k, element in enumerate(made):
        np.testing.assert_array_equal(element.upper, FULL)
        np.testing.assert_array_equal(element.lower, FULL[k % 4 : k % 4 + 1])
    assert all(element.upper is made[1].upper for element in made[1:])
    assert made[0].lower is not made[4].lower


def test_an_element_made_again_with_other_numbers_is_read_again():
    """One element, in every repetition another: a random crop of a full batch."""
    counter = tf.data.Dataset.counter(0, 1)
    dataset = counter.map(lambda k: FULL + tf.cast(k, tf.float32)).take(5)
    for k, element in enumerate(_all(dataset)):
        np.testing.assert_array_equal(element, FULL + k)


@pytest.mark.parametrize("value", [["a", "b"], tf.constant([1.0], tf.bfloat16), 3.0])
def test_what_cannot_be_looked_at_is_passed_on(value):
    dataset = tf.data.Dataset.from_tensors(tf.constant(value)).repeat(3)
    made = _all(dataset)
    assert len(made) == 3 and made[1] is not made[2]


def test_sparse_batches_are_passed_on():
    sparse = tf.sparse.from_dense(FULL)
    made = _all(tf.data.Dataset.from_tensors(sparse).repeat(2))
    np.testing.assert_array_equal(tf.sparse.to_dense(made[1]), FULL)
