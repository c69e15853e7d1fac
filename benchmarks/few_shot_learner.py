"""`tb.FewShotLearner` against `experiments/few_shot.py`, at equal numbers of steps.

    python benchmarks/few_shot_learner.py --out runs/bench-few-shot-learner

Omniglot, 5-way 1-shot, both with the same method and seed: CPU seconds of the whole
process on one thread, and the accuracy on tasks of test characters. The learner is run
transductively, as the experiment is, and with its default normalisation. TFDS_DATA_DIR
is the folder of tensorflow-datasets.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAMES = {"anil": "anil", "iaptt": "iaptt-gm"}  # the learner's and the experiment's
QUERIES = {"anil": 5, "iaptt": 15}  # the experiment's defaults


def learn(method: str, steps: int, transductive: bool) -> dict[str, float]:
    """What a user writes, apart from the data."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    import tfbilevel as tb
    from data_prep import omniglot
    from data_prep.classes import with_rotations

    def arrays(split: str) -> tuple:
        some = with_rotations(splits[split])
        return some.images, np.repeat(some.names, np.diff(some.starts))

    splits = omniglot.load()
    learner = tb.FewShotLearner(method=method, transductive=transductive)
    learner.fit(
        *arrays("train"),
        ways=5,
        shots=1,
        queries=QUERIES[method],
        epochs=1,
        steps_per_epoch=steps,
        verbose=0,
    )
    score = learner.score(*arrays("test"), episodes=600)
    return {"accuracy": 100 * score.accuracy, "margin": 100 * score.margin}


def timed(command: list[str]) -> tuple[float, str]:
    """CPU seconds of a process on one thread, and what it printed."""
    names = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
    single = {**dict.fromkeys(names, "1"), "TF_CPP_MIN_LOG_LEVEL": "3"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **single},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, done.stdout


def experiment(out: pathlib.Path, method: str, steps: int) -> dict[str, float]:
    """One evaluation on validation tasks, at the end."""
    script = str(ROOT / "experiments" / "few_shot.py")
    flags = ["--dataset", "omniglot", "--method", NAMES[method], "--out", str(out)]
    counts = {"outer-steps": steps, "eval-every": steps, "test-tasks": 600}
    counts["validation-tasks"] = 8
    for name, value in counts.items():
        flags += [f"--{name}", str(value)]
    used, _ = timed([script, *flags])
    found = json.loads((out / "summary.json").read_text())
    margin = found["test_accuracy_ci95"]
    return {"cpu": used, "accuracy": found["test_accuracy"], "margin": margin}


def main(argv: list[str] | None = None) -> dict | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--method", choices=list(NAMES), default="anil")
    parser.add_argument("--outer-steps", type=int, default=1000)
    parser.add_argument("--learn", choices=("transductive", "default"))
    args = parser.parse_args(argv)
    steps = args.outer_steps
    if args.learn:  # the process that is timed
        found = learn(args.method, steps, args.learn == "transductive")
        print(json.dumps(found))
        return None
    results = {"few_shot.py": experiment(args.out / "experiment", args.method, steps)}
    for kind in ("transductive", "default"):
        flags = ["--out", str(args.out), "--method", args.method, "--learn", kind]
        used, printed = timed([__file__, *flags, "--outer-steps", str(steps)])
        found = json.loads(printed.splitlines()[-1])
        results[f"FewShotLearner, {kind}"] = {"cpu": used, **found}
    for name, row in results.items():
        print(
            f"{name:30}{row['accuracy']:8.2f} ± {row['margin']:.2f} percent"
            f"{row['cpu']:8.0f} CPU seconds"
        )
    (args.out / "few_shot_learner.json").write_text(
        json.dumps(results, indent=2) + "\n"
    )
    return results


if __name__ == "__main__":
    main()
