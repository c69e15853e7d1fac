"""The machine's speed: operations of matrix products and bytes read, per second."""

import argparse
import json
import time
from collections.abc import Callable

import protocol
import tensorflow as tf
from tensorflow_losses import use_threads


def best(function: Callable[[], tf.Tensor], repeats: int = 15) -> float:
    function().numpy()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function().numpy()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def product_rate(rows: int, inner: int, columns: int, copies: int = 1) -> float:
    """Floating-point operations per second of `copies` float32 matrix products."""
    left = [tf.random.stateless_uniform([rows, inner], (i, 2)) for i in range(copies)]
    right = tf.random.stateless_uniform([inner, columns], (3, 4))

    @tf.function(autograph=False)
    def products() -> tf.Tensor:
        # Summing one row makes TensorFlow compute the product, at almost no cost.
        return tf.add_n([tf.reduce_sum(tf.matmul(a, right)[0]) for a in left])

    return 2.0 * copies * rows * inner * columns / best(products)


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
    flops = {name: product_rate(*shape) for name, shape in shapes.items()}
    # Many at once; otherwise the time of a function call would dominate.
    size = protocol.BATCH_SIZE
    small = {
        "minibatch x hidden": (size, 784, 300),
        "minibatch^T x hidden": (784, size, 300),
        "minibatch x classes": (size, 784, 10),
        "minibatch^T x classes": (784, size, 10),
    }
    flops |= {name: product_rate(*shape, copies=100) for name, shape in small.items()}
    read = {"cache": read_rate(16), "memory": read_rate(512)}
    gpus = tf.config.list_physical_devices("GPU")
    details = tf.config.experimental.get_device_details(gpus[0]) if gpus else {}
    device = details.get("device_name", "GPU" if gpus else "CPU")
    print(json.dumps({"flops": flops, "bytes": read, "device": device}))


if __name__ == "__main__":
    main()
