"""Peak memory of the ways to unroll, of microbatches and of other methods, beside
`tb.memory_estimate`, 784-300-10 in float32.

    python benchmarks/memory.py --out runs/bench
    python benchmarks/memory.py --estimates --out runs/bench

Each case runs in a separate process. Its memory is the peak, minus the memory after
TensorFlow and the data were loaded. What the estimate says before the step is compared
with TensorFlow's own count of its tensors (it has one on CPUs with oneDNN), and with
the memory of the process. Both are of the first step. `tape` at 200 steps of 5,000
images needs about 8 GB; leave it out with `--cases` if that is too much.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "contestants"))

import protocol  # noqa: E402


class Case(NamedTuple):
    memory: str  # of `tb.Unroll`, or another method
    steps: int
    rows: int
    microbatches: int = 1


CASES = {
    "replay": Case("replay", 200, 5000),
    "checkpoint": Case("checkpoint", 200, 5000),
    "tape": Case("tape", 200, 5000),
    "long": Case("checkpoint", 10_000, 500),
    "long-full-batch": Case("checkpoint", 10_000, 5000),
    "batch": Case("replay", 5, 40_000),
    "batch-in-8": Case("replay", 5, 40_000, microbatches=8),
    "tape-short": Case("tape", 20, 5000),
    "implicit": Case("implicit", 20, 5000),
    "value-gap": Case("value-gap", 20, 5000),
    "convolutions": Case("convolutions", 3, 2000),
}
ESTIMATED = (
    *("replay", "checkpoint", "tape-short", "implicit", "value-gap"),
    *("batch", "batch-in-8", "convolutions"),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=("replay", "checkpoint", "tape", "long"),
    )
    parser.add_argument(
        "--estimates",
        action="store_const",
        dest="cases",
        const=ESTIMATED,
        help="the cases of the table in docs/memory.md",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(json.dumps(measure(CASES[arguments.measure], arguments.threads)))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    results, failed = {}, []
    for name in arguments.cases:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, f"--measure={name}"]
        done = subprocess.run(
            [*command, f"--threads={arguments.threads}"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"},
        )
        if done.returncode != 0:
            print(
                f"error: {name} ended with status {done.returncode} (-9: out of "
                f"memory):\n{done.stderr[-3000:]}",
                file=sys.stderr,
            )
            failed.append(name)
            continue
        results[name] = json.loads(done.stdout)
        # Written after each case, because the next one may run out of memory.
        (arguments.out / "memory.json").write_text(json.dumps(results, indent=2) + "\n")
        (arguments.out / "memory.md").write_text(table(results))
    if results:
        print(table(results))
    return int(bool(failed))


def measure(case: Case, threads: int) -> dict:
    """Compute one hypergradient in this process."""
    import library
    import tensorflow as tf

    import tfbilevel as tb

    library.use_threads(threads)
    instance = protocol.make_instance("mlp", case.rows, case.steps)
    x = tf.constant(instance.upper)
    y = [tf.constant(leaf) for leaf in instance.lower]
    upper_loss, lower_loss = library.upper_loss, library.minibatch_loss
    if case.memory == "convolutions":
        upper_loss, lower_loss, y = convolutions()
    # The weights are found by index, because a part of the images has a part of them.
    problem = tb.microbatched(
        tb.Problem(upper_loss, lower_loss),
        upper=case.microbatches,
        lower=case.microbatches,
    )
    method = make_method(case)
    batches = library.make_batches("rhg", instance)
    batches = batches._replace(lower=(*batches.lower, tf.range(case.rows)))
    del instance
    state = method.init(problem, x, y)
    # One product starts the thread pools, whose memory does not belong to the method.
    tf.matmul(tf.ones([256, 256]), tf.ones([256, 256])).numpy()
    estimate = tb.memory_estimate(problem, method, x, y, batches)
    baseline = protocol.resident()
    before = count_of_tensors("current")

    @tf.function(autograph=False)
    def step(x: tf.Tensor, y: list, state: object) -> tuple:
        return problem.step(method, x, y, batches, state)[:3]

    start = time.perf_counter()
    with most_resident() as most:
        gradient = step(x, y, state)[0]
        norm = float(tf.norm(gradient).numpy())
    given = (x, y, batches, state)
    given_bytes = sum(
        leaf.shape.num_elements() * leaf.dtype.size for leaf in tf.nest.flatten(given)
    )
    peak, tensors = count_of_tensors("peak"), None
    if peak is not None and before is not None:
        tensors = peak - before + given_bytes
    return {
        **case._asdict(),
        "seconds": time.perf_counter() - start,
        "baseline_bytes": baseline,
        "peak_bytes": protocol.peak_resident(),
        "method_bytes": most[0] - baseline,
        "given_bytes": given_bytes,
        "tensor_bytes": tensors,
        "estimate_bytes": estimate.peak,
        "estimate": estimate.to_dict(),
        "hypergradient_norm": norm,
    }


def make_method(case: Case) -> Any:
    import keras
    import library

    import tfbilevel as tb

    unroll = library.make_method("rhg", case.steps)
    if case.memory == "implicit":
        return tb.Implicit(unroll.inner, tb.ConjugateGradient(10, rtol=0.0))
    if case.memory == "value-gap":
        inner = tb.InnerSolver(keras.optimizers.SGD(0.1), steps=case.steps)
        return tb.ValueGap(inner, keras.optimizers.SGD(0.1), weight=0.1)
    if case.memory == "convolutions":
        return unroll
    return tb.Unroll(unroll.inner, memory=case.memory)


def convolutions() -> tuple:
    """The losses of a convolutional network, and its variables."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    layers = keras.layers
    network = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )

    def cross_entropy(y: list, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        images = tf.reshape(images, [-1, 28, 28, 1])
        logits, _ = network.stateless_call(y, [], images)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)

    def upper_loss(x: tf.Tensor, y: list, batch: tuple) -> tf.Tensor:
        return tf.reduce_mean(cross_entropy(y, *batch))

    def lower_loss(x: tf.Tensor, y: list, batch: tuple) -> tf.Tensor:
        weights = tf.gather(tf.sigmoid(x), batch[2])
        return tf.reduce_mean(weights * cross_entropy(y, *batch[:2]))

    return upper_loss, lower_loss, [tf.identity(v) for v in network.trainable_variables]


def count_of_tensors(which: str) -> int | None:
    """TensorFlow's count of the bytes of its tensors, "current" or "peak"; `None` if it
    has none on this machine."""
    import tensorflow as tf

    try:
        if which == "current":
            tf.config.experimental.reset_memory_stats("CPU:0")
        return tf.config.experimental.get_memory_info("CPU:0")[which]
    except ValueError:
        return None


@contextlib.contextmanager
def most_resident() -> Iterator[list[int]]:
    """The largest number of bytes in memory within the context, looked up every 5 ms:
    the process's own peak may be that of making the data."""
    most, ended = [protocol.resident()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            most[0] = max(most[0], protocol.resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def table(results: dict[str, dict]) -> str:
    lines = [
        "| case | steps | images | parts | whole process MiB | above start MiB "
        "| with what was given MiB | tensors MiB | estimate MiB | tensors / estimate "
        "| process / estimate | s | hypergradient norm |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        process = r["method_bytes"] + r["given_bytes"]
        tensors, estimate = r["tensor_bytes"], r["estimate_bytes"]
        counted = ("-", "-")
        if tensors is not None:
            counted = (f"{tensors / 2**20:.0f}", f"{tensors / estimate:.2f}")
        lines.append(
            f"| {name} | {r['steps']} | {r['rows']} | {r['microbatches']} "
            f"| {r['peak_bytes'] / 2**20:.0f} | {r['method_bytes'] / 2**20:.0f} "
            f"| {process / 2**20:.0f} | {counted[0]} | {estimate / 2**20:.0f} "
            f"| {counted[1]} | {process / estimate:.2f} "
            f"| {r['seconds']:.1f} | {r['hypergradient_norm']:.6e} |"
        )
    if "tape" in results and "replay" in results:
        share = results["replay"]["method_bytes"] / results["tape"]["method_bytes"]
        lines += ["", f"replay over tape: {share:.3f}"]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
