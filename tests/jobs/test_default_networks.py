"""Networks for those who bring none."""

import keras
import numpy as np
import pytest

from tfbilevel._jobs.default_networks import default_network, kind_of, text_layer


@pytest.mark.parametrize(
    "kind, shape",
    [
        ("tabular", (3,)),
        ("image", (28, 28)),
        ("image", (5, 7, 3)),
        ("image", (64, 64, 3)),
        ("image", (1, 9, 1)),
        ("text", (6,)),
    ],
)
def test_logits_of_every_shape(kind, shape):
    x = np.random.default_rng(0).integers(0, 9, (4, *shape)).astype("float32")
    network = default_network(shape, 5, kind, examples=x, vocabulary=9)
    outputs = np.asarray(network(x))
    assert outputs.shape == (4, 5) and np.isfinite(outputs).all()
    assert network.count_params() < 500_000
    assert keras.models.clone_model(network)(x).shape == (4, 5)


@pytest.mark.parametrize("kind, shape", [("tabular", (3,)), ("image", (8, 8, 1))])
def test_inputs_are_standardised(kind, shape):
    """A network made for inputs 1,000 times as large and shifted gives the same."""
    x = np.random.default_rng(0).normal(size=(50, *shape)).astype("float32")
    large = 1000 * x + 5000
    keras.utils.set_random_seed(1)
    one = default_network(shape, 2, kind, examples=x)
    keras.utils.set_random_seed(1)
    other = default_network(shape, 2, kind, examples=large)
    np.testing.assert_allclose(one(x), other(large), rtol=1e-2, atol=1e-3)


def test_a_text_is_the_sum_of_its_words_over_the_root_of_their_number():
    """By hand, from the network's own matrices; an empty text has the sum 0."""
    network = default_network((4,), 2, "text", vocabulary=7)
    embeddings, w, b = (np.asarray(each) for each in network.get_weights())
    words = np.array([[3, 5, 0, 0], [0, 0, 0, 0]], "float32")
    sums = (embeddings[3] + embeddings[5]) / np.sqrt(2), 0 * embeddings[0]
    for row, total in zip(words, sums, strict=True):
        np.testing.assert_allclose(network(row[None])[0], total @ w + b, atol=1e-6)


def test_text_network_is_saved(tmp_path):
    network = default_network((4,), 2, "text", vocabulary=7)
    network.save(tmp_path / "network.keras")
    words = np.array([[3, 5, 0, 0]], "float32")
    loaded = keras.models.load_model(tmp_path / "network.keras")
    np.testing.assert_array_equal(loaded(words), network(words))


def test_texts_become_numbers_of_words_and_pairs():
    layer = text_layer(["red fish", "red red fish", "", "blue"])
    numbers = np.asarray(layer(np.array(["red fish", "fish red", ""])))
    names = layer.get_vocabulary()
    read = [[names[n] for n in row if n] for row in numbers.tolist()]
    assert read[0] == ["red", "fish", "red fish"] and read[2] == []
    assert read[1] == ["fish", "red", "[UNK]"]
    long = text_layer(["word " * 3000] * 20)
    assert long(np.array(["word"])).shape == (1, 512)


def test_kinds():
    assert kind_of(np.array(["a", "b"])) == kind_of(["a", "b"]) == "text"
    assert kind_of(np.zeros((2, 4, 4))) == kind_of(np.zeros((2, 4, 4, 3))) == "image"
    assert kind_of(np.zeros((2, 4))) == "tabular"


@pytest.mark.parametrize("kind, shape", [("sound", (3,)), ("image", (3,))])
def test_refused(kind, shape):
    with pytest.raises(ValueError, match=r"must (be one|have 2 or 3).*Received: "):
        default_network(shape, 2, kind)
