"""One outer step of first-order methods with a transformer as the lower network.

    python benchmarks/large_lower.py --out runs/bench

The lower network has 100 million parameters: a decoder of Keras layers, 12 blocks of
width 768 with 12 heads, a vocabulary of 19,000; random tokens; bfloat16 activations,
float32 variables. The upper variables are one weight per training sequence. Every
method makes one outer step in a process of its own: compiled once before, then timed.
Memory is the peak above what the process had after TensorFlow was loaded, so y is part
of it. These methods take no second derivatives, for which such a network would need
several times the memory.

Writes large_lower.json, and prints a table.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "contestants"))
sys.path.insert(0, str(ROOT / "benchmarks"))

METHODS = ("value-gap", "f2sa", "bome", "meha")
SEQUENCES = 64  # of training data, one weight each


def network(blocks: int, width: int, heads: int, vocabulary: int, length: int) -> Any:
    """A decoder: tokens [b, length] -> logits [b, length, vocabulary]."""
    import keras

    layers = keras.layers
    tokens = keras.Input((length,), dtype="int32")
    x = layers.Embedding(vocabulary, width)(tokens)
    for _ in range(blocks):
        attended = layers.MultiHeadAttention(heads, width // heads)
        inner = layers.LayerNormalization()(x)
        x = x + attended(inner, inner, use_causal_mask=True)
        inner = layers.Dense(4 * width, activation="gelu")(
            layers.LayerNormalization()(x)
        )
        x = x + layers.Dense(width)(inner)
    # The loss is in float32.
    logits = layers.Dense(vocabulary, use_bias=False, dtype="float32")
    return keras.Model(tokens, logits(layers.LayerNormalization()(x)))


def method_of(name: str) -> Any:
    import keras

    import tfbilevel as tb

    sgd = keras.optimizers.SGD
    inner = tb.InnerSolver(sgd(1e-2), steps=1)
    return {
        "value-gap": lambda: tb.ValueGap(inner, sgd(1e-2), weight=1.0),
        "f2sa": lambda: tb.F2SA(inner, sgd(1e-2), weight=1.0),
        "bome": lambda: tb.BOME(inner, sgd(1e-2)),
        "meha": lambda: tb.MEHA(sgd(1e-2)),
    }[name]()


def measure(name: str, sizes: list[int], batch: int, threads: int) -> dict[str, Any]:
    """Make two outer steps in this process; the second is timed."""
    import keras
    import protocol
    import tensorflow as tf
    from memory import most_resident

    import tfbilevel as tb

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    keras.utils.set_random_seed(0)
    tf.matmul(tf.ones([256, 256]), tf.ones([256, 256])).numpy()
    baseline = protocol.resident()
    with most_resident() as most:
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
        lower = network(*sizes)
        keras.mixed_precision.set_global_policy("float32")
        weights = tb.ExampleWeights(SEQUENCES)
        length, vocabulary = sizes[-1], sizes[-2]
        tokens = tf.random.stateless_uniform(
            [SEQUENCES, length], (0, 0), 0, vocabulary, tf.int32
        )

        def losses(model: Any, batch: Any) -> tf.Tensor:
            """One per sequence: the next token's mean cross-entropy."""
            each = tb.sparse_cross_entropy(model(batch)[:, :-1], batch[:, 1:])
            return tf.reduce_mean(each, axis=1)

        model = tb.BilevelModel(
            weights,
            lower,
            lambda upper, lower, batch: tf.reduce_mean(losses(lower, batch)),
            lambda upper, lower, batch: upper.mean(losses(lower, batch[0]), batch[1]),
        )
        model.compile(method_of(name), keras.optimizers.Adam(0.1), jit_compile=False)
        index = tf.range(batch)
        element = tb.Batches(tokens[-batch:], (tokens[:batch], index))
        data = tf.data.Dataset.from_tensors(element).repeat()
        model.fit(data, steps_per_epoch=1, verbose=0)
        start = time.perf_counter()
        history = model.fit(data, steps_per_epoch=1, verbose=0).history
        seconds = time.perf_counter() - start
    return {
        "method": name,
        "parameters": lower.count_params(),
        "tokens": batch * length,
        "seconds": seconds,
        "method_bytes": most[0] - baseline,
        "upper_loss": history["upper_loss"][0],
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| method | parameters | tokens in a batch | seconds | GiB above start |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['method']} | {r['parameters'] / 1e6:.1f} million | {r['tokens']} "
        f"| {r['seconds']:.1f} | {r['method_bytes'] / 2**30:.1f} |"
        for r in results
    ]
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument(
        "--sizes",
        nargs=5,
        type=int,
        default=[12, 768, 12, 19_000, 128],
        help="blocks, width, heads, vocabulary, length",
    )
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    rest = arguments.sizes, arguments.batch, arguments.threads
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, *rest)))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = []
    for name in arguments.methods:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, f"--measure={name}"]
        command += ["--sizes", *map(str, arguments.sizes)]
        command += [f"--batch={arguments.batch}", f"--threads={arguments.threads}"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"},
        )
        if done.returncode != 0:
            print(f"error: {name} failed:\n{done.stderr[-3000:]}", file=sys.stderr)
            return 1
        results.append(json.loads(done.stdout.splitlines()[-1]))
        path = arguments.out / "large_lower.json"
        path.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
