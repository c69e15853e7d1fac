"""Few-shot tasks per second from the pipeline, compared with what training needs.

    python benchmarks/episodes.py --out runs/bench-episodes

Samples meta-batches of glyphs (rotated, as in `few_shot.py`) as fast as possible, then
times the training step of ANIL on one fixed meta-batch, in the same process.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import few_shot  # noqa: E402

SHAPES = ((5, 1), (5, 5), (20, 1))  # ways and shots
STEPS = 8  # timed training steps


def measure(ways: int, shots: int, rounds: int) -> dict[str, float]:
    flags = ["--out", "x", "--ways", str(ways), "--shots", str(shots)]
    args = few_shot.parse_args(flags)
    splits = few_shot.load_splits(args)
    batches = iter(few_shot.draw(args, splits["train"], 0))
    for _ in range(3):
        fixed = next(batches)
    begun = time.perf_counter()
    for _ in range(rounds):
        next(batches)
    drawn = rounds / (time.perf_counter() - begun)
    model = few_shot.build_model(args, splits["train"].images.shape[1:])
    times = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        model.train_on_batch(fixed)
        times.append(time.perf_counter() - begun)
    needed = 1 / statistics.median(times[1:])
    return {
        "ways": ways,
        "shots": shots,
        "tasks_per_meta_batch": args.tasks,
        "drawn_tasks_per_second": drawn * args.tasks,
        "needed_tasks_per_second": needed * args.tasks,
        "ratio": drawn / needed,
    }


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=400)
    args = parser.parse_args(argv)
    found = [measure(*shape, args.rounds) for shape in SHAPES]
    for row in found:
        print(
            f"{row['ways']}-way {row['shots']}-shot: "
            f"{row['drawn_tasks_per_second']:.0f} tasks per second drawn, "
            f"{row['needed_tasks_per_second']:.0f} needed ({row['ratio']:.1f} times)"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "episodes.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()
