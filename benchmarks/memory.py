"""Peak memory of the three ways to unroll, and of microbatches, 784-300-10 in float32.

    python benchmarks/memory.py --out runs/bench

Each case runs in a separate process. Its memory is the peak, minus the memory after
TensorFlow and the data were loaded. `tape` at 200 steps of 5,000 images needs about
8 GB; leave it out with `--cases` if that is too much.
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
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "contestants"))

import protocol  # noqa: E402


class Case(NamedTuple):
    memory: str
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
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=("replay", "checkpoint", "tape", "long"),
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
    # The weights are found by index, because a part of the images has a part of them.
    problem = tb.microbatched(
        tb.Problem(library.upper_loss, library.minibatch_loss),
        upper=case.microbatches,
        lower=case.microbatches,
    )
    unroll = library.make_method("rhg", case.steps)
    method = tb.Unroll(unroll.inner, memory=case.memory)
    batches = library.make_batches("rhg", instance)
    batches = batches._replace(lower=(*batches.lower, tf.range(case.rows)))
    x = tf.constant(instance.upper)
    y = [tf.constant(leaf) for leaf in instance.lower]
    # One product starts the thread pools, whose memory does not belong to the method.
    tf.matmul(tf.ones([256, 256]), tf.ones([256, 256])).numpy()
    baseline = protocol.resident()

    @tf.function(autograph=False)
    def hypergradient(x: tf.Tensor, y: list) -> tf.Tensor:
        state = method.init(problem, x, y)
        return problem.step(method, x, y, batches, state).upper_gradient

    start = time.perf_counter()
    with most_resident() as most:
        gradient = hypergradient(x, y)
        norm = float(tf.norm(gradient).numpy())
    return {
        **case._asdict(),
        "seconds": time.perf_counter() - start,
        "baseline_bytes": baseline,
        "peak_bytes": protocol.peak_resident(),
        "method_bytes": most[0] - baseline,
        "hypergradient_norm": norm,
    }


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
        "| memory | steps | images | parts | whole process MiB | above start MiB | s "
        "| hypergradient norm |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results.values():
        lines.append(
            f"| {r['memory']} | {r['steps']} | {r['rows']} "
            f"| {r['microbatches']} "
            f"| {r['peak_bytes'] / 2**20:.0f} | {r['method_bytes'] / 2**20:.0f} "
            f"| {r['seconds']:.1f} | {r['hypergradient_norm']:.6e} |"
        )
    if "tape" in results and "replay" in results:
        share = results["replay"]["method_bytes"] / results["tape"]["method_bytes"]
        lines += ["", f"replay over tape: {share:.3f}"]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
