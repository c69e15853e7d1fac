"""Adam for upper variables of which a batch affects only a few entries."""

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("tfbilevel")
class LazyAdam(keras.optimizers.Optimizer):
    r"""Adam that leaves an entry and its moments unchanged while its gradient is 0.

        n_i <- n_i + 1
        m_i <- b1 m_i + (1 - b1) d_i
        s_i <- b2 s_i + (1 - b2) d_i^2
        x_i <- x_i - rate sqrt(1 - b2^n_i) / (1 - b1^n_i) m_i / (sqrt(s_i) + epsilon)

    for every entry i with d_i != 0. With one weight per training example and
    minibatches, Adam itself would keep moving the weights of all examples outside the
    batch along their last gradients, while these decay. Here each entry has its own
    moments and step count.

    Cost: one pass over the variables. Memory: three slots like them. Prefer Adam if
    every step affects every entry: the result is then the same, with one slot less.

    Args:
        learning_rate: a number or a Keras schedule.
        beta_1, beta_2, epsilon: as for `keras.optimizers.Adam`.
        name: the optimizer's name.
        **keywords: arguments of `keras.optimizers.Optimizer`; its `weight_decay` still
            applies to every entry at every step.

    Example:
        >>> optimizer = tb.LazyAdam(0.1)
        >>> x = keras.Variable([1.0, 1.0])
        >>> optimizer.apply([tf.constant([3.0, 0.0])], [x])
        >>> [round(float(entry), 3) for entry in x.numpy()]
        [0.9, 1.0]

    References:
        Kingma, Ba (2015), Adam: a method for stochastic optimization.
        arXiv:1412.6980. The lazy form is that of TensorFlow Addons' `LazyAdam` and
        PyTorch's `SparseAdam`, with a step count per entry.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        name: str = "lazy_adam",
        **keywords: Any,
    ):
        super().__init__(learning_rate=learning_rate, name=name, **keywords)
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    def build(self, variables: list) -> None:
        if self.built:
            return
        super().build(variables)
        self._first, self._second, self._count = (
            [self.add_variable_from_reference(v, name=name) for v in variables]
            for name in ("momentum", "velocity", "count")
        )

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        first, second, count = (
            slots[index] for slots in (self._first, self._second, self._count)
        )
        gradient = tf.cast(tf.convert_to_tensor(gradient), variable.dtype)
        b1, b2 = (tf.constant(b, gradient.dtype) for b in (self.beta_1, self.beta_2))
        touched = gradient != 0
        n = tf.convert_to_tensor(count) + tf.cast(touched, gradient.dtype)
        m, s = tf.convert_to_tensor(first), tf.convert_to_tensor(second)
        m = tf.where(touched, m + (gradient - m) * (1 - b1), m)
        s = tf.where(touched, s + (gradient * gradient - s) * (1 - b2), s)
        steps = tf.maximum(n, 1)  # 1 - b^0 would be 0 in entries that never moved
        rate = tf.cast(learning_rate, gradient.dtype)
        rate *= tf.sqrt(1 - tf.pow(b2, steps)) / (1 - tf.pow(b1, steps))
        move = tf.where(touched, rate * m / (tf.sqrt(s) + self.epsilon), 0)
        self.assign(first, m)
        self.assign(second, s)
        self.assign(count, n)
        self.assign_sub(variable, move)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
        }
