"""Every experiment, shortened, and one page with their pictures, tables and commands.

    python experiments/gallery.py
    python experiments/gallery.py --only toy few-shot --out runs/two

Each experiment is started as a user would start it, in a process and a folder of its
own, two at a time, on data that need no files. The page, `index.html` in the folder of
the gallery, contains everything that it shows; it is written again whenever an
experiment ends. Started again after a kill, the gallery keeps the experiments that are
complete and continues the others. It reports those that failed, with the last line of
their error output, and then ends with exit status 1. All take seven minutes of CPU.
"""

import argparse
import base64
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Collection
from typing import Any

import filelock
import jinja2

EXPERIMENTS = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(EXPERIMENTS.parent))

# ruff: noqa: E402
from data_prep.command_line import one_line_errors, positive

TEMPLATE = EXPERIMENTS / "settings" / "gallery.html"
RESULT = "gallery.json"  # in an experiment's folder: its command and how it ended
NOISE = ("Writing to ", "Continuing ", "Files in ", "Report: ")  # lines about files
LONGEST = 40  # rows of a table on the page


@dataclasses.dataclass(frozen=True)
class Entry:
    """An experiment of the gallery.

    Attributes:
        script, flags: the command that runs it.
        title, shows: what the page says about it.
        cost: its CPU seconds, measured; the longest ones are started first.
    """

    script: str
    flags: str
    title: str
    shows: str
    cost: int


GALLERY = {
    "label-cleaning": Entry(
        "label_cleaning",
        "--epochs 6",
        "Label cleaning",
        "Wrong labels are found and corrected with 200 trusted ones, beside cleanlab "
        "and plain training.",
        38,
    ),
    "hyper-cleaning": Entry(
        "data_hyper_cleaning",
        "--method v-pbgd --outer-steps 2000 --gamma-steps 1500",
        "Data hyper-cleaning: V-PBGD",
        "One weight per training example finds the wrong labels, by a first-order "
        "penalty method.",
        20,
    ),
    "hyper-cleaning-aid": Entry(
        "data_hyper_cleaning",
        "--method aid-cg --upper-lr 0.3 --outer-steps 200",
        "Data hyper-cleaning: implicit gradients",
        "The same problem by conjugate gradients on the lower level's Hessian.",
        15,
    ),
    "toy": Entry(
        "toy_pbgd",
        "",
        "Toy of penalty-based bilevel descent",
        "A thousand starts end at the three local solutions.",
        6,
    ),
    "follower": Entry(
        "nonconvex_follower",
        "",
        "The non-convex follower",
        "Which of several lower solutions a method ends at decides what it finds.",
        23,
    ),
    "reweighting": Entry(
        "mnist_reweighting",
        "--dataset digits --compare --seconds 8",
        "Reweighting digits",
        "Seven methods in the same seconds: minibatches against full batches.",
        44,
    ),
    "newsgroups": Entry(
        "l2reg_twentynews",
        "--dataset generated --method all --outer-steps 80",
        "One penalty per word",
        "One L2 coefficient for every word of generated documents.",
        52,
    ),
    "synthetic": Entry(
        "synthetic_penalty",
        "--inner-steps 1 10 --outer-steps 20000 --starts 10",
        "Four synthetic problems",
        "What a singular lower Hessian does to each method.",
        59,
    ),
    "denoising": Entry(
        "data_denoising",
        "--epochs 40",
        "Denoising",
        "The importance of every training example, learned in minibatches.",
        49,
    ),
    "poisoning": Entry(
        "poisoning_mnist",
        "--dataset digits --outer-steps 200 --train-steps 2000",
        "Poisoning digits",
        "Sixty optimised images that ruin a classifier.",
        20,
    ),
    "clean-label": Entry(
        "clean_label_attack",
        "--max-targets 6",
        "A clean-label attack",
        "One image with the right label has another one misread.",
        36,
    ),
    "few-shot": Entry(
        "few_shot",
        "--method anil --outer-steps 200 --eval-every 50 --test-tasks 100",
        "Few-shot learning",
        "What to start from on a new task: ANIL on generated characters.",
        45,
    ),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs", "gallery")
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=GALLERY, default=list(GALLERY), help="which ones")
    add("--jobs", type=positive(int), default=2, help="experiments at a time")
    add("--open", action="store_true", help="open the page in a browser")
    return parser.parse_args(argv)


def command(name: str, entry: Entry) -> list[str]:
    """What a user types for it, in the repository's root."""
    script = f"experiments/{entry.script}.py"
    out = ["--out", f"runs/{name}"]
    return ["python", script, *shlex.split(entry.flags), *out]


# Running.


def run(folder: pathlib.Path, entry: Entry, threads: int) -> dict[str, Any]:
    """Run an experiment, or what is left of it, and return how it ended."""
    if is_complete(folder, entry):
        return result(folder)
    if folder.exists() and result(folder).get("flags") != entry.flags:
        shutil.rmtree(folder)  # of another command: only this script writes here
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / RESULT, {"flags": entry.flags})
    own = folder / "run"
    argv = [sys.executable, str(EXPERIMENTS / f"{entry.script}.py")]
    argv += [*shlex.split(entry.flags), "--out", str(own)]
    if (own / "config.json").exists():
        argv.append("--resume")
        # A gallery that was killed may have left the process that works there.
        with filelock.FileLock(own / ".lock"):
            pass
    environment = {"TF_NUM_INTRAOP_THREADS": str(threads)} | dict(os.environ)
    begun = time.monotonic()
    with (
        (folder / "stdout.txt").open("w") as printed,
        (folder / "stderr.txt").open("w") as errors,
    ):
        process = subprocess.Popen(argv, stdout=printed, stderr=errors, env=environment)
        _running.add(process)
        code, cpu = wait(process)
        _running.discard(process)
    ended = {
        "flags": entry.flags,
        "exit": code,
        "seconds": time.monotonic() - begun,
        "cpu_seconds": cpu,
    }
    write(folder / RESULT, ended)
    return ended


_running: set[subprocess.Popen] = set()


def wait(process: subprocess.Popen) -> tuple[int, float | None]:
    """The exit status and the CPU seconds of a process, where the system counts them.

    The seconds include those of its own processes.
    """
    if not hasattr(os, "wait4"):
        return process.wait(), None
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, used.ru_utime + used.ru_stime


def is_complete(folder: pathlib.Path, entry: Entry) -> bool:
    known = result(folder)
    return (known.get("flags"), known.get("exit")) == (entry.flags, 0)


def result(folder: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads((folder / RESULT).read_text())
    except (OSError, ValueError):
        return {}


def write(path: pathlib.Path, content: dict[str, Any] | str) -> None:
    """Write text, or a dictionary as JSON, so that the file is whole or as before."""
    text = content if isinstance(content, str) else json.dumps(content) + "\n"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def run_all(args: argparse.Namespace) -> list[str]:
    """Run the chosen experiments; returns the names of those that failed."""
    failed: list[str] = []
    names = sorted(args.only, key=lambda name: -GALLERY[name].cost)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    ended, lock = 0, threading.Lock()
    running: set[str] = set()

    def one(name: str) -> None:
        nonlocal ended
        with lock:  # the page that another one is writing has the former result
            running.add(name)
        folder = args.out / name
        kept = is_complete(folder, GALLERY[name])
        if not kept:
            print(f"{name}: started", flush=True)
        made = run(folder, GALLERY[name], threads)
        with lock:
            running.discard(name)
            ended += 1
            place = f"[{ended}/{len(names)}] {name}:"
            if made["exit"] == 0:
                what = "kept" if kept else f"done in {made['seconds']:.0f} s"
                print(f"{place} {what}", flush=True)
            else:
                failed.append(name)
                print(f"{place} failed: {reason(folder, made)}", flush=True)
            write(args.out / "index.html", page(args, len(names) - ended, running))

    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    try:
        for future in concurrent.futures.as_completed(
            [pool.submit(one, name) for name in names]
        ):
            future.result()
    except BaseException:  # Ctrl-C too: the experiments end, and can be continued
        pool.shutdown(wait=False, cancel_futures=True)
        for process in [*_running]:
            process.terminate()
        raise
    pool.shutdown()
    return failed


def reason(folder: pathlib.Path, made: dict[str, Any]) -> str:
    lines = (folder / "stderr.txt").read_text(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return f"exit status {made['exit']}" + (f", {said[-1]}" if said else "")


# The page.


def page(
    args: argparse.Namespace, left: int, running: Collection[str] = frozenset()
) -> str:
    """The page of the chosen experiments that have ended, with all that it shows.

    Args:
        args: of the command.
        left: how many have not ended.
        running: which of them are writing their files now.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    ended = {name: result(args.out / name) for name in GALLERY if name in args.only}
    sections = [
        section(name, args.out / name, made)
        for name, made in ended.items()
        if name not in running
        and "exit" in made
        and made["flags"] == GALLERY[name].flags
    ]
    return template.render(sections=sections, left=left)


def section(name: str, folder: pathlib.Path, made: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of an experiment, which ended as `made` says."""
    entry, own = GALLERY[name], folder / "run"
    printed = (folder / "stdout.txt").read_text(errors="replace").splitlines()
    summary = own / "summary.json"
    pictures = {
        path.name: base64.b64encode(path.read_bytes()).decode()
        for path in sorted(own.glob("*.png"))
    }
    return {
        "name": name,
        "entry": entry,
        "command": shlex.join(command(name, entry)),
        "ended": made,
        "failure": "" if made["exit"] == 0 else reason(folder, made),
        "printed": "\n".join(line for line in printed if not line.startswith(NOISE)),
        "tables": tables(json.loads(summary.read_text())) if summary.exists() else [],
        "pictures": pictures,
    }


def tables(summary: dict[str, Any], title: str = "") -> list[dict[str, Any]]:
    """The numbers of a summary as tables.

    Numbers and words of one level are a table of two columns. Dictionaries with such
    values, beside each other, are rows of one table.
    """
    plain = {key: value for key, value in summary.items() if is_plain(value)}
    groups = {key: value for key, value in summary.items() if isinstance(value, dict)}
    alike = {k: v for k, v in groups.items() if v and all(map(is_plain, v.values()))}
    made = []
    if plain:
        rows = [[key, shown(value)] for key, value in plain.items()]
        made.append({"title": title or "Result", "columns": [], "rows": rows})
    if alike:
        columns = list(dict.fromkeys(name for row in alike.values() for name in row))
        rows = [
            [key, *(shown(row.get(name, "")) for name in columns)]
            for key, row in alike.items()
        ]
        made.append({"title": title, "columns": ["", *columns], "rows": rows})
    for key, value in groups.items():
        if key not in alike:
            made += tables(value, f"{title}, {key}" if title else key)
    return [one | {"rows": one["rows"][:LONGEST]} for one in made]


def is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float))


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(__file__):
        for name in args.only:
            folder = args.out / name
            if folder.exists() and any(folder.iterdir()) and not result(folder):
                raise ValueError(
                    "--out must be new, or the folder of a gallery, whose experiments "
                    f"may be begun again. Name another one. Received: {folder}, made "
                    "by another program"
                )
        args.out.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(args.out / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(
                "--out must not be in use: another gallery is made there. End it or "
                f"wait for it. Received: --out {args.out}"
            ) from None
    try:
        failed = run_all(args)
    finally:
        lock.release()
    index = (args.out / "index.html").resolve()
    print(f"Page: {index}")
    if args.open:
        webbrowser.open(index.as_uri())
    if failed:
        print(f"failed: {', '.join(failed)}; started again, they go on")
        raise SystemExit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the experiments too
    main()
