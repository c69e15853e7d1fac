"""The results of `tuning.py` as one small file and as Markdown, mean and each seed.

python benchmarks/tuning_table.py runs/tuning docs/results/tuning.json
"""

import json
import pathlib
import sys

import numpy as np

WAYS = {
    "plain": "no regularisation",
    "starts": "the tuner's starts, not tuned",
    "tuner": "**tuner**, its defaults",
    "tuner of the search": "**tuner**, `guard=False`",
    "random": "keras-tuner, random",
    "bayesian": "keras-tuner, Bayesian",
    "randomized": "`RandomizedSearchCV`",
    "halving": "`HalvingRandomSearchCV`",
}


def small(rows: dict[str, list[dict]]) -> dict[str, dict]:
    """Of every way the training that counts, and what all of them took."""
    one = rows["starts"][0]["seconds"] if rows.get("starts") else float("nan")
    made = {}
    for way, trials in rows.items():
        if not trials:
            continue
        longest = max(row.get("epochs", 0) for row in trials)
        whole = [row for row in trials if row.get("epochs", 0) == longest]
        row = max(whole, key=lambda each: each["validation_accuracy"])
        seconds = sum(each["seconds"] for each in trials)
        made[way] = {
            "runs": len(trials),
            "seconds": round(seconds, 2),
            "trainings": round(seconds / one, 2),
            **{k: v for k, v in row.items() if k not in ("seconds", "epochs")},
        }
    return made


def markdown(seeds: dict[str, dict]) -> str:
    """A table of one problem, from seed -> way -> what counts."""
    lines = [
        "| Training | Runs | Test accuracy: mean (each seed) | Test loss | "
        "Validation accuracy | Seconds, in trainings |",
        "|---|---|---|---|---|---|",
    ]
    for way, name in WAYS.items():
        found = [each[way] for each in seeds.values() if way in each]
        if not found:
            continue
        accuracies = [100 * row["test_accuracy"] for row in found]
        each = ", ".join(f"{a:.1f}" for a in accuracies)
        loss, valid, cost = (
            np.mean([row[k] for row in found])
            for k in ("test_loss", "validation_accuracy", "trainings")
        )
        runs = "/".join(sorted({str(row["runs"]) for row in found}, key=int))
        lines.append(
            f"| {name} | {runs} | {np.mean(accuracies):.2f} ({each}) | {loss:.3f} | "
            f"{100 * valid:.1f} | {cost:.1f} |"
        )
    return "\n".join(lines)


def main(folder: str, out: str) -> None:
    results: dict[str, dict[str, dict]] = {}
    for path in sorted(pathlib.Path(folder).glob("*-*.json")):
        problem, seed = path.stem.rsplit("-", 1)
        results.setdefault(problem, {})[seed] = small(json.loads(path.read_text()))
    pathlib.Path(out).write_text(json.dumps(results, indent=1) + "\n")
    for problem, seeds in results.items():
        print(f"\n{problem}\n\n{markdown(seeds)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
