"""What this machine can do: matrix products per second, bytes read per second."""

import argparse
import json
import time

import tensorflow as tf
from tensorflow_losses import use_threads


def best(function: tf.types.experimental.GenericFunction, repeats: int = 15) -> float:
    function().numpy()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function().numpy()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def product_rate(rows: int, inner: int, columns: int) -> float:
    """Floating-point operations per second of one float32 matrix product."""
    a = tf.random.stateless_uniform([rows, inner], [1, 2])
    b = tf.random.stateless_uniform([inner, columns], [3, 4])

    @tf.function(autograph=False)
    def product() -> tf.Tensor:
        # The sum of one row makes the product needed and costs nothing.
        return tf.reduce_sum(tf.matmul(a, b)[0])

    return 2.0 * rows * inner * columns / best(product)


def read_rate(megabytes: int) -> float:
    """Bytes per second of summing an array."""
    a = tf.ones([megabytes * 2**18])

    @tf.function(autograph=False)
    def total() -> tf.Tensor:
        return tf.reduce_sum(a)

    return megabytes * 2**20 / best(total)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    rows = arguments.rows
    shapes = {
        "square": (2048, 2048, 2048),
        "images x hidden": (rows, 784, 300),
        "images^T x hidden": (784, rows, 300),
        "images x classes": (rows, 784, 10),
        "images^T x classes": (784, rows, 10),
    }
    print(
        json.dumps(
            {
                "flops": {name: product_rate(*s) for name, s in shapes.items()},
                "bytes": {"cache": read_rate(16), "memory": read_rate(512)},
            }
        )
    )


if __name__ == "__main__":
    main()
