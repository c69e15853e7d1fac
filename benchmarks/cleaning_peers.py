"""What `benchmarks/label_cleaning.py` compares `tb.LabelCleaner` with.

Every way trains the same network for the same epochs with the same augmentation, by
plain loops that use nothing of tfbilevel. They are written from the papers:

    trusted           cross-entropy on the trusted examples alone
    plain             cross-entropy on the doubtful labels alone
    mixed-w           (1 - w) doubtful + w trusted
    glc-w             the same, but doubtful labels by -log sum_k p_k T[k, given] (Gold
                      Loss Correction, Hendrycks et al. 2018)
    cleanlab-cv       cleanlab on 5-fold cross-validated probabilities, and a training
                      on the labels it keeps and the trusted ones
    cleanlab-trusted  the same with the probabilities of `trusted`
    oracle            the right labels and the trusted ones
"""

import time
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from cleaning_cells import Data

EPOCHS, RATE, BATCH, SURE_BATCH = 10, 2e-3, 128, 32
Losses = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def hard(labels: np.ndarray) -> Losses:
    """Cross-entropy with these labels: logits and row numbers -> losses."""
    labels = tf.constant(labels)
    return lambda logits, rows: tf.nn.sparse_softmax_cross_entropy_with_logits(
        tf.gather(labels, rows), logits
    )


def forward(labels: np.ndarray, transition: np.ndarray) -> Losses:
    of_given = tf.constant(transition.T[labels], tf.float32)
    return lambda logits, rows: (
        -tf.math.log(
            tf.reduce_sum(tf.nn.softmax(logits) * tf.gather(of_given, rows), axis=1)
            + 1e-8
        )
    )


def train(
    network: keras.Model,
    x: np.ndarray,
    doubtful: Losses | None,
    sure_x: np.ndarray,
    sure: Losses,
    weight: float,
    augment: Callable | None,
    epochs: int,
    seed: int,
) -> float:
    """Adam with a cosine decay on (1 - weight) doubtful + weight sure; CPU seconds.

    `doubtful` is None: batches of trusted examples alone, as many as there would be.
    """
    steps = int(np.ceil(len(x) / BATCH))
    rate = keras.optimizers.schedules.CosineDecay(RATE, epochs * steps)
    optimizer = keras.optimizers.Adam(rate)
    optimizer.build(network.trainable_variables)
    x, sure_x = tf.constant(x), tf.constant(sure_x)

    @tf.function(reduce_retracing=True)
    def step(rows: tf.Tensor, sure_rows: tf.Tensor) -> None:
        parts = [] if doubtful is None else [tf.gather(x, rows)]
        parts += [tf.gather(sure_x, sure_rows)] if weight else []
        inputs = tf.concat(parts, axis=0)
        with tf.GradientTape() as tape:
            inputs = inputs if augment is None else augment(inputs)
            logits = network(inputs, training=True)
            count = 0 if doubtful is None else tf.shape(rows)[0]
            loss = 0.0
            if doubtful is not None:
                own = tf.reduce_mean(doubtful(logits[:count], rows))
                loss += (1 - weight) * own
            if weight:
                own = tf.reduce_mean(sure(logits[count:], sure_rows))
                loss += weight * own
        gradients = tape.gradient(loss, network.trainable_variables)
        optimizer.apply_gradients(
            zip(gradients, network.trainable_variables, strict=True)
        )

    random = np.random.default_rng(seed)
    size = BATCH if doubtful is None else SURE_BATCH
    began = time.process_time()
    for _ in range(epochs):
        order = random.permutation(len(x))
        for first in range(0, len(order), BATCH):
            picked = random.integers(0, len(sure_x), size)
            step(tf.constant(order[first : first + BATCH]), tf.constant(picked))
    return time.process_time() - began


def probabilities(network: keras.Model, x: np.ndarray) -> np.ndarray:
    logits = network.predict(x, batch_size=1000, verbose=0)
    return np.asarray(tf.nn.softmax(logits), np.float64)


class Peers:
    """All ways on one cell.

    Args:
        data: of the cell.
        seed: of networks and batches.
    """

    def __init__(self, data: Data, seed: int):
        self.data, self.seed = data, seed
        self.rows: dict[str, dict[str, float]] = {}
        self.seconds = 0.0

    def run(self) -> dict[str, dict[str, float]]:
        """name -> accuracy, right, f1 (percent), and CPU seconds."""
        data = self.data
        of_trusted = self.trained("trusted", None, 1.0)
        plain = self.trained("plain", hard(data.given), 0.0)
        on_sure = probabilities(plain, data.sure_x)
        transition = np.eye(data.classes)
        for k in np.unique(data.sure_y):
            transition[k] = on_sure[data.sure_y == k].mean(axis=0)
        for weight in (0.3, 0.7):
            self.trained(f"mixed-{weight}", hard(data.given), weight)
            self.trained(
                f"glc-{weight}", forward(data.given, transition), weight, transition
            )
        self.cleaned("cleanlab-trusted", probabilities(of_trusted, data.x), 0.0)
        self.cross_validated()
        self.trained("oracle", hard(data.true), 0.3)
        return self.rows

    def trained(
        self,
        name: str,
        doubtful: Losses | None,
        weight: float,
        transition: np.ndarray | None = None,
    ) -> keras.Model:
        data, network = self.data, self.data.network(self.seed)
        sure = hard(data.sure_y)
        spent = self.fit(network, data.x, doubtful, data.sure_x, sure, weight)
        found = probabilities(network, data.x)
        if transition is not None:
            found = found * transition[:, data.given].T
        corrected = found.argmax(axis=1)
        self.note(name, network, corrected, corrected != data.given, spent)
        return network

    def fit(self, network: keras.Model, *parts, epochs: int = EPOCHS) -> float:
        return train(network, *parts, self.data.augment, epochs, self.seed)

    def cross_validated(self) -> None:
        from sklearn.model_selection import StratifiedKFold

        data = self.data
        found, spent = np.zeros((len(data.x), data.classes)), 0.0
        folds = StratifiedKFold(5, shuffle=True, random_state=self.seed)
        for rows, others in folds.split(data.given, data.given):
            network = data.network(self.seed)
            own = hard(data.given[rows])
            spent += self.fit(network, data.x[rows], own, data.sure_x, own, 0.0)
            found[others] = probabilities(network, data.x[others])
        self.cleaned("cleanlab-cv", found, spent)

    def cleaned(self, name: str, found: np.ndarray, spent: float) -> None:
        """cleanlab with its defaults; suspects get the likeliest class."""
        from cleanlab.filter import find_label_issues

        data = self.data
        suspects = find_label_issues(data.given, found)
        kept = np.flatnonzero(~suspects)
        x = np.concatenate([data.x[kept], data.sure_x])
        labels = hard(np.concatenate([data.given[kept], data.sure_y]))
        network = data.network(self.seed)
        epochs = max(1, round(EPOCHS * len(data.x) / len(x)))  # as many steps
        spent += self.fit(network, x, labels, x, labels, 0.0, epochs=epochs)
        corrected = np.where(suspects, found.argmax(axis=1), data.given)
        self.note(name, network, corrected, suspects, spent)

    def note(
        self,
        name: str,
        network: keras.Model,
        corrected: np.ndarray,
        suspects: np.ndarray,
        spent: float,
    ) -> None:
        predicted = probabilities(network, self.data.test_x).argmax(axis=1)
        self.rows[name] = scores(self.data, predicted, corrected, suspects, spent)


def scores(
    data: Data,
    predicted: np.ndarray,
    corrected: np.ndarray,
    suspects: np.ndarray,
    spent: float,
) -> dict[str, float]:
    """Test accuracy, right labels, F1 of the suspects in percent; CPU seconds."""
    wrong = data.given != data.true
    found = 2 * np.sum(suspects & wrong) / max(1, suspects.sum() + wrong.sum())
    shares = {
        "accuracy": np.mean(predicted == data.test_y),
        "right": np.mean(corrected == data.true),
        "f1": found,
    }
    percent = {name: round(100 * float(share), 2) for name, share in shares.items()}
    return {**percent, "cpu": round(spent, 1)}
