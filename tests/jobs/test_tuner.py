"""`tb.HyperparameterTuner`: what it finds, and what it takes."""

import pathlib
import types
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb
from tfbilevel._jobs.tuning.job import of_arrays

hyper = tb.hyper
layers = keras.layers


def sequential(shape: tuple, *parts: Any) -> keras.Model:
    return keras.Sequential([keras.Input(shape), *parts])


def test_ridge_regression_finds_the_best_penalty_of_a_grid() -> None:
    """The loss of a grid is computed by linear algebra; the horizon covers the way
    from one solution to the next."""
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(12, 1)) / 3
    x, xv = generator.normal(size=(2, 16, 12)).astype("float32")
    noise = generator.normal(size=(2, 16, 1))
    y, yv = x @ weights + noise[0], xv @ weights + noise[1]

    def loss(penalty: float) -> float:
        """Of mean((x w - y)^2) + penalty |w|^2."""
        w = np.linalg.solve(x.T @ x / 16 + penalty * np.eye(12), x.T @ y / 16)
        return float(np.mean((xv @ w - yv) ** 2))

    grid = {p: loss(p) for p in np.geomspace(1e-4, 10, 100)}
    best = min(grid, key=grid.__getitem__)
    assert loss(1e-4) > 1.2 * grid[best] < loss(10)  # it matters, both ways
    tuner = tb.HyperparameterTuner(
        sequential((12,), layers.Dense(1, use_bias=False)),
        [hyper.L2("global", start=1e-3, range=(1e-4, 10.0))],
        optimizer=keras.optimizers.SGD(0.1),
        inner_steps=30,
        horizon=30,
        guard=False,
    )
    assert tuner.fit(
        x, y, validation_data=(xv, yv), epochs=100, batch_size=16, verbose=0
    )
    assert 0.5 * best < tuner.best_["l2"] < 2 * best
    assert loss(tuner.best_["l2"]) < 1.01 * grid[best]
    # The network is at the solution for the last penalty.
    assert tuner.evaluate(xv, yv)["loss"] == pytest.approx(grid[best], rel=0.02)
    found = tuner.predict(xv)
    r2 = 1 - np.sum((found - yv[:, 0]) ** 2) / np.sum((yv - yv.mean()) ** 2)
    assert tuner.score(xv, yv) == pytest.approx(r2, rel=1e-4)


def images(generator: Any, n: int) -> tuple:
    """Two bars, and their places as labels."""
    y = generator.integers(0, 3, n)
    x = generator.normal(size=(n, 6, 6, 1)) * 0.3
    x[np.arange(n), :, 2 * y] += 1
    return x.astype("float32"), np.array(["left", "middle", "right"])[y]


@pytest.mark.slow
def test_images_with_text_labels_from_arrays(tmp_path: pathlib.Path) -> None:
    x, y = images(np.random.default_rng(1), 120)
    network = sequential(
        (6, 6, 1),
        layers.Conv2D(4, 3, activation="relu"),
        layers.BatchNormalization(),
        layers.Dropout(0.0),
        layers.Flatten(),
        layers.Dense(3, activation="softmax"),
    )
    search = [
        hyper.L2("per-layer"),
        hyper.LabelSmoothing(),
        hyper.Dropout(),
        hyper.Shift(),
        hyper.InputScale("global", name="factor"),
        hyper.OptimizerOption("beta_1", 0.9, (0.5, 0.99), "complement"),
    ]
    tuner = tb.HyperparameterTuner(
        network,
        search,
        optimizer=keras.optimizers.Adam(0.02),
        refit="auto",
        guard=False,
    )
    seen: list = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(logs["val_accuracy"])
    )
    fitted = tuner.fit(x, y, epochs=5, batch_size=16, callbacks=[watch], verbose=0)
    assert fitted is tuner and len(seen) == 5
    assert tuner.history_["val_accuracy"] == seen
    assert tuner.score(x, y) > 0.9
    # Of the network of the search and the new one, the better one is kept.
    assert list(tuner.scores_) == ["search", "refit"]
    assert tuner.scores_["search"]["accuracy"] == seen[-1]
    kept = tuner.scores_.pop(tuner.choice_)
    (other,) = tuner.scores_.values()
    assert (kept["accuracy"], -kept["loss"]) >= (other["accuracy"], -other["loss"])
    assert tuner.predict(x[:3]).tolist() == y[:3].tolist()
    chances = tuner.predict_proba(x)
    np.testing.assert_allclose(chances.sum(axis=1), 1.0, rtol=1e-5)
    assert tuner.classes_.tolist() == ["left", "middle", "right"]
    assert np.mean(tuner.classes_[chances.argmax(1)] == y) == tuner.score(x, y)
    # The table: from the start, one column for each number.
    made = tuner.hyperparameters_
    conv, _, drop, _, dense = (layer.name for layer in network.layers)
    own = [f"l2[{conv}]", f"l2[{dense}]", "label_smoothing", f"dropout[{drop}]"]
    assert list(made.columns) == ["epoch", *own, "shift", "factor", "beta_1"]
    assert made.shape == (6, 8)
    assert made["label_smoothing"][0] == pytest.approx(0.05)
    assert made["shift"][1] == made["shift"][0]  # the warm-up, a quarter of 5 steps
    assert made["shift"][5] != pytest.approx(made["shift"][0], rel=1e-3)
    assert tuner.best_["l2"].shape == (2,)
    assert tuner.best_["shift"] == pytest.approx(made["shift"][5], rel=1e-5)
    # The tuned network is one of Keras: its parts have the values, and it is saved.
    rescaling, inner = tuner.model_.layers
    assert rescaling.scale == pytest.approx(tuner.best_["factor"])
    assert inner.layers[2].rate == pytest.approx(np.ravel(tuner.best_["dropout"])[0])
    tuner.model_.save(tmp_path / "tuned.keras")
    again = keras.models.load_model(tmp_path / "tuned.keras")
    np.testing.assert_allclose(again.predict(x, verbose=0), chances, rtol=1e-5)
    assert network.get_weights()[0].shape == (3, 3, 1, 4)  # cloned, not trained
    figure = tuner.plot()
    assert [a.get_title() for a in figure.axes] == [one.name for one in search]
    assert figure.axes[0].get_yscale() == "log"
    figure.savefig(tmp_path / "tuning.png")


@pytest.mark.slow
def test_datasets_several_outputs_and_a_refit_on_everything() -> None:
    generator = np.random.default_rng(2)
    x = generator.normal(size=(96, 4)).astype("float32")
    kind, amount = (x[:, 0] > 0).astype(int), x[:, 1] - x[:, 2]
    data = tf.data.Dataset.from_tensor_slices((x, (kind, amount)))

    def network() -> keras.Model:
        inputs = keras.Input((4,))
        hidden = layers.Dense(16, activation="relu")(inputs)
        heads = [layers.Dense(2, name="kind"), layers.Dense(1, name="amount")]
        return keras.Model(inputs, [head(hidden) for head in heads])

    tuner = tb.HyperparameterTuner(
        network,
        [hyper.LossWeights(), hyper.Noise(0.05)],
        optimizer=keras.optimizers.Adam(0.03),
        inner_steps=2,
        refit="all",
    )
    tuner.fit(
        data.take(64).batch(16),
        validation_data=data.skip(64).batch(16),
        epochs=15,
        verbose=0,
    )
    found = tuner.evaluate(x, [kind, amount])
    assert found["accuracy"] > 0.9 and found["r2_1"] > 0.8
    assert set(tuner.history_) >= {"upper_loss", "val_accuracy", "val_r2_1"}
    classes, numbers = tuner.predict(x)
    assert np.mean(classes == kind) == pytest.approx(found["accuracy"])
    assert np.corrcoef(numbers, amount)[0, 1] > 0.9
    assert tuner.best_["loss_weights"].shape == (2,)
    # With two outputs the loss decides; what is kept is trained again on everything.
    losses = {name: one["loss"] for name, one in tuner.scores_.items()}
    assert set(losses) == {"search", "starts"}
    better = min(losses, key=losses.__getitem__)
    assert tuner.choice_ == {"search": "refit", "starts": "starts"}[better]


@pytest.mark.slow
def test_a_short_horizon_makes_the_learning_rate_too_small() -> None:
    """Noisy least squares with curvatures 1 and 1/100 (Wu and others, 2018). One step
    ahead, noise in the steep direction costs more than the flat one gains."""
    generator = np.random.default_rng(3)
    x = generator.choice([-1.0, 1.0], size=(512, 2)) * np.array([1.0, 0.1])
    y = x @ np.array([[1.0], [100.0]]) + generator.normal(size=(512, 1))
    rates = {}
    for horizon in (1, 40):
        tuner = tb.HyperparameterTuner(
            sequential(
                (2,), layers.Dense(1, use_bias=False, kernel_initializer="zeros")
            ),
            [hyper.LearningRate(range=(1e-3, 0.9))],
            optimizer=keras.optimizers.SGD(0.1),
            inner_steps=20,
            horizon=horizon,
            guard=False,
        )
        tuner.fit(x, y, epochs=30, batch_size=8, verbose=0)
        rates[horizon] = tuner.best_["learning_rate"]
    assert rates[1] < 0.6 * rates[40], rates

    def loss(rate: float, steps: int) -> float:
        """After so many steps by hand, mean over 20 orders of the batches."""
        found = []
        for seed in range(20):
            order, w = np.random.default_rng(seed), np.zeros((2, 1))
            for _ in range(steps):
                rows = order.integers(0, 512, 8)
                w -= rate / 4 * x[rows].T @ (x[rows] @ w - y[rows])
            found.append(np.mean((x @ w - y) ** 2))
        return float(np.mean(found))

    # The larger rate is the worse one after one step, and the better one in the end.
    assert loss(rates[1], 1) < loss(rates[40], 1)
    assert loss(rates[1], 300) > 2 * loss(rates[40], 300)


def regression() -> tuple[np.ndarray, ...]:
    """16 rows to train on, 16 to tune on; the columns differ in size."""
    generator = np.random.default_rng(4)
    x, xv = generator.normal(size=(2, 16, 3)).astype("float32")
    weights = np.array([[1.0], [-2.0], [0.5]])
    noise = generator.normal(size=(2, 16, 1)) / 2
    return x, x @ weights + noise[0], xv, xv @ weights + noise[1]


def test_what_makes_matters_worse_is_not_kept() -> None:
    """A search that goes uphill ends at the strongest penalty. The network kept instead
    is gradient descent by hand at the penalty of the start."""
    x, y, xv, yv = regression()
    uphill = keras.optimizers.SGD(-100.0)
    options = {"optimizer": keras.optimizers.SGD(0.1), "upper_optimizer": uphill}
    network = sequential(
        (3,), layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    )
    search = [hyper.L2("global", start=0.01, range=(1e-4, 1.0))]
    data = {"validation_data": (xv, yv), "epochs": 60, "batch_size": 16, "verbose": 0}
    unguarded = tb.HyperparameterTuner(network, search, guard=False, **options)
    assert unguarded.fit(x, y, **data).choice_ == "search"
    assert unguarded.best_["l2"] > 0.9 and list(unguarded.scores_) == ["search"]
    tuner = tb.HyperparameterTuner(network, search, **options).fit(x, y, **data)
    assert tuner.choice_ == "starts" and list(tuner.scores_) == ["search", "starts"]
    assert tuner.scores_["search"] == unguarded.scores_["search"]
    assert tuner.best_["l2"] == pytest.approx(0.01, rel=1e-5)
    w = np.zeros((3, 1))
    for _ in range(60):
        w -= 0.1 * (x.T @ (x @ w - y) / 8 + 2 * 0.01 * w)
    np.testing.assert_allclose(tuner.model_.get_weights()[0], w, rtol=1e-4)
    loss = np.mean((xv @ w - yv) ** 2)
    r2 = 1 - loss / np.var(yv)
    for found in (tuner.scores_["starts"], tuner.evaluate(xv, yv)):
        assert found == pytest.approx({"loss": loss, "r2": r2}, rel=1e-4)
    assert tuner.score(xv, yv) > unguarded.score(xv, yv) + 0.1


@pytest.mark.parametrize(
    ("monitor", "outputs", "scores", "kept"),
    [
        ("auto", 1, {"search": (0.4, 0.8), "starts": (0.5, 0.9)}, "starts"),
        ("score", 2, {"search": (0.4, 0.8), "starts": (0.5, 0.9)}, "starts"),
        ("loss", 1, {"search": (0.4, 0.8), "starts": (0.5, 0.9)}, "search"),
        ("auto", 2, {"search": (0.4, 0.8), "starts": (0.5, 0.9)}, "search"),
        ("auto", 1, {"search": (0.5, 0.8), "refit": (0.4, 0.8)}, "refit"),
        ("auto", 1, {"search": (0.5, 0.8), "starts": (0.5, 0.8)}, "search"),
        ("auto", 1, {"search": (np.nan, 0.9), "starts": (2.0, 0.1)}, "starts"),
        ("loss", 1, {"search": (np.nan, 0.9), "starts": (2.0, 0.1)}, "starts"),
    ],
)
def test_which_network_is_kept(monitor, outputs, scores, kept) -> None:
    tuner = tb.HyperparameterTuner(monitor=monitor)
    tuner.scores_ = {
        name: {"loss": loss, "accuracy": accuracy}
        for name, (loss, accuracy) in scores.items()
    }
    job = types.SimpleNamespace(outputs=[types.SimpleNamespace(metric="accuracy")])
    job.outputs *= outputs
    assert tuner._best(job) == kept


def test_parameters_are_those_of_scikit_learn() -> None:
    from sklearn.base import clone

    search = [hyper.L2()]
    tuner = tb.HyperparameterTuner(layers, search, seed=3)  # nothing is checked yet
    copy = clone(tb.HyperparameterTuner(None, (), seed=3))
    assert copy.get_params()["seed"] == 3
    assert tuner.search is search
    assert tuner.set_params(horizon=7).horizon == 7
    with pytest.raises(ValueError, match="`step` must be an argument of Hyper"):
        tuner.set_params(step=1)


X, Y = np.ones((8, 3), "float32"), np.arange(8) % 2
TWO = sequential((3,), layers.Dense(2))
ONE = sequential((3,), layers.Dense(1))
L2 = [hyper.L2()]


@pytest.mark.parametrize(
    ("model", "options", "data", "words"),
    [
        (TWO, {"search": []}, (X, Y), "`search` must be a list of hyperparameters"),
        (TWO, {"search": [hyper.L2(), hyper.L2()]}, (X, Y), "two hyper.*of one name"),
        (TWO, {"horizon": 0}, (X, Y), "`horizon` must be an integer of at least 1"),
        (
            TWO,
            {"refit": "no"},
            (X, Y),
            "`refit` must be one of 'auto', False, True, 'all'",
        ),
        (TWO, {"upper_optimizer": 3}, (X, Y), "`upper_optimizer` must be a Keras opt"),
        (TWO, {"guard": "yes"}, (X, Y), "`guard` must be one of True, False"),
        (TWO, {"monitor": "auc"}, (X, Y), "`monitor` must be one of 'auto', 'score'"),
        (3, {}, (X, Y), "`model` must be a Keras model, or a function"),
        (TWO, {}, (X, Y[:5]), "one entry for each example. Received: 5 for 8"),
        (TWO, {}, (X * np.nan, Y), "NaN or infinity.*8 such rows, the first is 0"),
        (TWO, {}, (X[:, :2], Y), "must take examples of shape"),
        (TWO, {}, (X, Y * 0), "at least two classes"),
        (TWO, {}, (X, np.arange(8) % 3), "one output per class, 3 here"),
        (TWO, {"loss": "mse"}, (X, Y), "outputs like `y`"),
        (ONE, {"loss": "median"}, (X, Y), "`loss` must be a Keras loss"),
        (
            ONE,
            {"search": [hyper.LabelSmoothing()]},
            (X, Y * 0.5),
            "classification only",
        ),
        (ONE, {"loss": ["mse", "mse"]}, (X, Y * 0.5), "for each of the 1 outputs"),
        (TWO, {"optimizer": keras.optimizers.Nadam()}, (X, Y), "Nadam is not a diff"),
        (
            TWO,
            {"search": [hyper.Momentum()], "optimizer": "adam"},
            (X, Y),
            "Adam has learning_rate, beta_1.*Received: 'momentum'",
        ),
    ],
)
def test_errors_come_before_training(model, options, data, words) -> None:
    tuner = tb.HyperparameterTuner(model, **{"search": L2, **options})
    with pytest.raises(ValueError, match=words):
        tuner.fit(*data, epochs=1, verbose=0)


def test_integers_become_what_the_network_takes() -> None:
    """Pixels become floating, so that they can be augmented; word numbers stay."""
    words = keras.Sequential(
        [keras.Input((4,), dtype="int32"), layers.Embedding(9, 3), layers.Flatten()]
    )
    words.add(layers.Dense(2))
    pixels = sequential((4,), layers.Dense(2))
    x = np.arange(32, dtype="uint8").reshape(8, 4) % 9
    for model, dtype in ((pixels, "float32"), (words, "uint8")):
        job = of_arrays(model, None, x, Y, (x, Y), 0.2, 0)
        for stream in (job.training, job.validation, job.everything):
            assert next(iter(stream(4, 0)))[0].dtype == dtype
    assert job.deviation == pytest.approx(x.std())


def test_errors_of_validation_data() -> None:
    tuner = tb.HyperparameterTuner(TWO, L2)
    data = tf.data.Dataset.from_tensor_slices((X, Y))
    rows = [
        (X, {"validation_data": (X[:, :2], Y)}, "hold examples like those of `x`"),
        (X, {"validation_data": X}, "must be a pair"),
        (X, {"validation_data": (X, Y + 1)}, "one output per class, 3 here"),
        (X, {"validation_split": 1.0}, "above 0 and below 1"),
        (data.batch(4), {}, "must be a tf.data.Dataset where `x` is one"),
        (data, {"validation_data": data}, "must be a dataset of batches"),
        (
            data.batch(4).repeat(),
            {"validation_data": data.batch(4)},
            "must be finite datasets",
        ),
    ]
    for x, options, words in rows:
        with pytest.raises(ValueError, match=words):
            labels = None if isinstance(x, tf.data.Dataset) else Y
            tuner.fit(x, labels, epochs=1, verbose=0, **options)
