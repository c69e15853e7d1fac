"""Plants faults in a copy of the library, one by one, and runs the tests on it.

    python tests/mutations.py --check               every fault can still be planted
    python tests/mutations.py --out table.md        which test catches which fault
    python tests/mutations.py --only bamm pair      some of them

Each fault is of a file of its own, and gives a user wrong numbers. It is planted in a
temporary copy of the repository: nothing here is changed. The tests that are most
likely to see it run first, and only if these pass the whole suite of `make test`, then
that of `make test-slow` (with --slow in any case). At the end the tests that caught
something run on a copy without a fault, where they must pass. Neither pytest nor the CI
runs this file.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
COPIED = ("tfbilevel", "experiments", "data_prep", "tests", "docs", "benchmarks")
SECONDS = 3600  # for one run of the tests
NO_TESTS = 5  # pytest's exit status where none was selected


class Fault(NamedTuple):
    """A fault and where it goes.

    Attributes:
        name: what it is called here.
        what: what is wrong, for the table.
        old: found once in one file of the library; spaces and line breaks may differ.
        new: what takes its place.
        likely: the tests to try first: "file" or "file -k expression".
    """

    name: str
    what: str
    old: str
    new: str
    likely: tuple[str, ...]


FAULTS = [
    # Hypergradients.
    Fault(
        "persistent-es",
        "the noise of earlier windows is forgotten: a truncated gradient",
        'structure.where(begins, noise, structure.add(state["noise"], noise))',
        "noise",
        ("test_persistent_es.py",),
    ),
    Fault(
        "unroll",
        "a truncated unroll differentiates one step too many",
        "self.inner.steps - self.differentiated",
        "max(self.inner.steps - self.differentiated - 1, 0)",
        ("test_unroll.py -k truncat",),
    ),
    Fault(
        "trajectory",
        "a replayed step has the optimizer's first iteration, not its own",
        "iteration += tf.cast(passed, iteration.dtype)",
        "iteration += tf.cast(0 * passed, iteration.dtype)",
        ("test_unroll.py", "test_differentiable.py"),
    ),
    Fault(
        "implicit",
        "sign of g_xy v",
        "structure.scale(-1, value)",
        "structure.scale(1, value)",
        ("test_linear_solvers.py -k implicit", "test_contract.py -k implicit-cg"),
    ),
    Fault(
        "forward-unroll",
        "tangents of the optimizer's slots are dropped",
        "push((pair[0], *pair[1]))",
        "push((pair[0], pair[1][0], structure.zeros_like(pair[1][1])))",
        ("test_two_layer_network.py -k reverse_equals_forward",),
    ),
    Fault(
        "finite-difference",
        "the factor 1/2 of a central difference is missing",
        "tf.constant(0.5, width.dtype)",
        "tf.constant(1.0, width.dtype)",
        ("test_contract.py -k finite-difference",),
    ),
    Fault(
        "rank-one",
        "NaN in the upper gradient is no longer passed on",
        "tf.where(fine, coefficient, np.nan)",
        "coefficient",
        ("test_nonfinite.py",),
    ),
    Fault(
        "aggregation",
        "constant_lower changes nothing",
        "tf.cast(self.weight(0), g.dtype) if self.constant_lower else a",
        "a",
        ("test_pessimistic.py -k aggregation",),
    ),
    # Penalties.
    Fault(
        "value-gap",
        "the value function's derivative lacks the penalty's weight",
        "(-weight, constraint)",
        "(-1.0, constraint)",
        ("test_contract.py -k value-gap-scalar",),
    ),
    Fault(
        "gradient-norm",
        "the penalty's derivative is half of what it is",
        "structure.scale(weight, gradient)",
        "structure.scale(0.5 * weight, gradient)",
        ("test_contract.py -k gradient-norm",),
    ),
    Fault(
        "augmented-lagrangian",
        "the penalty has its first weight at every step",
        'vector = structure.add_scaled(state["multiplier"], state["weight"], gradient)',
        'vector = structure.add_scaled(state["multiplier"], self.weight, gradient)',
        ("test_augmented_lagrangian.py",),
    ),
    Fault(
        "f3sa",
        "the lower gradient at the point before is of another batch",
        "before.lower_gradient(last.lower, 1)[1]",
        "before.lower_gradient(last.lower, 2)[1]",
        ("test_recursions_penalty.py -k f3sa",),
    ),
    Fault(
        "bvfsm",
        "the barrier forgets that z minimises g with a ridge",
        "gap -= 0.5 * numbers.auxiliary_ridge * ridge",
        "gap -= 0.0 * numbers.auxiliary_ridge * ridge",
        ("test_recursions_penalty.py -k log",),
    ),
    Fault(
        "value-penalties",
        "the quadratic penalty is twice what it is",
        "tf.nn.relu(q) ** 2 / (2 * s)",
        "tf.nn.relu(q) ** 2 / s",
        ("test_recursions_penalty.py -k docstring",),
    ),
    Fault(
        "gaffa",
        "the multipliers follow h at y, not at theta",
        "of_y, _ = self._lagrangian(here.at(b), y, multiplier)"
        " of_theta, ahead = self._lagrangian(here.at(b), theta, z)",
        "of_y, ahead = self._lagrangian(here.at(b), y, multiplier);"
        " of_theta, _ = self._lagrangian(here.at(b), theta, z)",
        ("test_recursions_penalty.py -k gaffa",),
    ),
    Fault(
        "lower-constraints",
        "constraints read the first lower batch in every role",
        "values = here.evaluated(self, y, draw)",
        "values = here.evaluated(self, y, 0)",
        ("test_recursions_penalty.py -k gaffa-batch",),
    ),
    # Stochastic methods.
    Fault(
        "stocbio",
        "g_xy on the batch of the last factor, not on the one after it",
        "after = first + (terms if stride else 1)",
        "after = first + (terms if stride else 1) - 1",
        ("test_stochastic.py -k stocbio",),
    ),
    Fault(
        "bsa",
        "the longest product never comes up",
        "seed, 0, most, tf.int32",
        "seed, 0, most - 1 or 1, tf.int32",
        ("test_stochastic.py -k bsa",),
    ),
    Fault(
        "ttsa",
        "x slows down by the power of y",
        "upper_scale=tf.pow(count, -self.upper_power)",
        "upper_scale=tf.pow(count, -self.lower_power)",
        ("test_stochastic.py -k ttsa",),
    ),
    Fault(
        "bamm",
        "the multiplier's rate decays by tau, not by tau / 2",
        "tf.pow(count, -self.decay / 2)",
        "tf.pow(count, -self.decay)",
        ("test_bamm.py",),
    ),
    Fault(
        "srba",
        "the estimates never begin again from the large batch",
        "structure.where(large, structure.zeros_like(directions), directions)",
        "directions",
        ("test_recursive_estimates.py -k srba",),
    ),
    Fault(
        "vrbo",
        "the change that the step of x makes is left out",
        'structure.where(t > 0, upper, state["upper"])',
        "upper",
        ("test_recursive_estimates.py -k vrbo",),
    ),
    Fault(
        "slices",
        "the last slice is never chosen",
        "floormod(lower, self.lower)",
        "floormod(lower, tf.maximum(self.lower - 1, 1))",
        ("test_recursive_estimates.py",),
    ),
    # Linear solvers.
    Fault(
        "identity",
        "damping is ignored",
        "rate / (1 + rate * self.damping)",
        "rate",
        ("test_identity.py",),
    ),
    Fault(
        "conjugate-gradient",
        "the direction's coefficient forgets the preconditioner",
        "new_rz = system.dot(r, z)",
        "new_rz = system.dot(r, r)",
        ("test_more_linear_solvers.py -k precondition",),
    ),
    Fault(
        "neumann",
        "damping is ignored",
        "structure.scale(rate, product(term))",
        "structure.scale(rate, system.product(term))",
        ("test_linear_solvers.py -k damping",),
    ),
    Fault(
        "solver-state",
        "a warm solver carries zeros",
        "value if self._warm else ()",
        "structure.zeros_like(value) if self._warm else ()",
        ("test_linear_solvers.py -k warm",),
    ),
    # What all methods stand on.
    Fault(
        "inner-solver",
        "inner steps are not projected",
        "lower = here.problem.projected_lower(here.upper, lower)",
        "lower = structure.to_tensors(lower)",
        ("test_unroll.py -k projection",),
    ),
    Fault(
        "update-rule",
        "the bias correction of every step is that of the first",
        "OptimizerState(carried[0], new_rate, slots)",
        "OptimizerState(state.iteration, new_rate, slots)",
        ("test_differentiable.py",),
    ),
    Fault(
        "lazy-adam",
        "the second moment is corrected by beta_1",
        "tf.pow(b2, steps)",
        "tf.pow(b1, steps)",
        ("test_lazy_adam.py",),
    ),
    Fault(
        "derivatives",
        "a sum with a term that is not connected counts as not connected",
        "tf.add_n(present) if present else None",
        "tf.add_n(present) if len(present) == len(entries) else None",
        ("test_problem.py", "test_unroll.py -k prepare"),
    ),
    Fault(
        "structure",
        "only the first tensor is looked at for NaN",
        "tf.reduce_all(tf.stack(finite))",
        "finite[0]",
        ("test_structure.py -k finite",),
    ),
    Fault(
        "schedules",
        "a passage ends one step early",
        "tf.cast(step, tf.float64) / self.steps",
        "tf.cast(step, tf.float64) / max(self.steps - 1, 1)",
        ("test_schedules.py",),
    ),
    Fault(
        "batches",
        "draws beyond the last slice take the last, not the first again",
        "tf.math.floormod(tf.cast(draw, tf.int32), count)",
        "tf.minimum(tf.cast(draw, tf.int32), count - 1)",
        ("test_problem.py -k stacked", "test_stochastic.py -k beyond"),
    ),
    Fault(
        "randomness",
        "tasks, draws and roles share their seeds",
        "np.array([wrapped(factor), 0], np.int32)",
        "np.array([1, 0], np.int32)",
        ("test_random_losses.py -k 'share or stacked'",),
    ),
    Fault(
        "tasks",
        "the upper gradient of sequential tasks is their sum",
        "tf.reduce_mean(g, axis=0)",
        "tf.reduce_sum(g, axis=0)",
        ("test_over_tasks.py -k in_turn",),
    ),
    Fault(
        "workaround",
        "TensorFlow's own gradient, right only where labels sum to one",
        "(backprop + excess * softmax)",
        "backprop",
        ("test_second_derivatives.py -k 'label or cross'",),
    ),
    # Entry points.
    Fault(
        "minimize",
        "a loop that goes on counts its steps from 0 again",
        "tf.cast(carried[1].iteration, tf.int32)",
        "tf.constant(0)",
        ("test_minimize.py -k going_on",),
    ),
    Fault(
        "check",
        "the dense gradient is of the first lower batch",
        'getattr(getattr(method, "inner", None), "steps", 0)',
        "0",
        ("test_check.py -k dense",),
    ),
    Fault(
        "outer-update",
        "the optimizer's slots keep the NaN of a step that was refused",
        "tf.where(fine, variable.value, old)",
        "variable.value",
        ("test_model.py -k breaks", "test_nonfinite.py"),
    ),
    Fault(
        "training-state",
        "the states of random layers are not saved",
        "[*states, levels.base.state]",
        "[levels.base.state]",
        ("test_saved_models.py -k random_layers",),
    ),
    Fault(
        "fixed-state",
        "moving statistics see the first lower batch twice, and not the last",
        "(tf.constant(1), begun)",
        "(tf.constant(0), begun)",
        ("test_batch_statistics.py",),
    ),
    Fault(
        "layers",
        "the derivative of FeaturePenalties lacks its 1/2",
        "0.5 * upstream * squares",
        "upstream * squares",
        ("test_layers.py -k penalties",),
    ),
    Fault(
        "transition-matrix",
        "the rows and columns of the transition matrix are exchanged",
        "tf.transpose(tf.nn.log_softmax(tf.cast(own, dtype)))",
        "tf.nn.log_softmax(tf.cast(own, dtype))",
        ("test_layers_for_noisy_labels.py -k corrected",),
    ),
    Fault(
        "loss-weights",
        "second derivatives hold the weights of losses constant too",
        "return upstream * losses, None, upstream * weights",
        "return upstream * losses, None, upstream * fixed",
        ("test_learning_label_noise.py -k 'loss and unroll'",),
    ),
    Fault(
        "label-correction",
        "the other classes share too little of a label at the start",
        "others = (1 - self.confidence) / (classes - 1)",
        "others = (1 - self.confidence) / classes",
        ("test_layers_for_noisy_labels.py -k start_at_the_given",),
    ),
    Fault(
        "parts",
        "of several replicas each counts alike, whatever its number of examples",
        "return total_loss(tf.cast(share, value.dtype) * value)",
        "return total_loss(0.5 * value)",
        ("test_replicas.py -k two_replicas_are_equal",),
    ),
    Fault(
        "collectives",
        "the derivative of what every replica has is not summed over them",
        "return _total(*_dense(gradients))",
        "return _dense(gradients)",
        ("test_replicas.py -k two_replicas_are_equal",),
    ),
    Fault(
        "accumulated",
        "the derivative of a sum over parts lacks the smaller last one",
        "accumulated(derived, parts, both, arguments)",
        "accumulated(derived, parts._replace(rest=False), both, arguments)",
        ("test_microbatches.py -k every_method",),
    ),
    Fault(
        "cleaning-noise",
        "the given label is counted twice",
        "if _share_right(found, given) <= most:",
        "if _share_right(found, given) <= 1.0:",
        ("test_noise_models.py -k counted_twice",),
    ),
    Fault(
        "belief-doubt",
        "the belief hears labels that are surely wrong",
        "labels = doubted(labels, opinion)",
        "labels = labels",
        ("test_noise_models.py -k surely_wrong",),
    ),
    Fault(
        "tuner-guard",
        "the guard trains at the values found, not at the starts",
        'made["starts"] = train(starts)',
        'made["starts"] = train(tuned.values)',
        ("test_tuner.py -k worse",),
    ),
    Fault(
        "pair",
        "the lower batches that fill no whole group are left out",
        "math.ceil(length / count)",
        "length // count",
        ("test_problem.py -k pair", "test_edges.py -k pair"),
    ),
]


def places(fault: Fault, root: pathlib.Path) -> list[tuple[pathlib.Path, re.Match]]:
    """Where the fault's old text stands in the library."""
    words = [re.escape(word) for word in fault.old.split()]
    # A longer line may have been broken there, a shorter one joined.
    pattern = r"\s+".join(words).replace(r"\(", r"\(\s*").replace(r"\)", r",?\s*\)")
    return [
        (path, match)
        for path in sorted((root / "tfbilevel").rglob("*.py"))
        for match in re.finditer(pattern, path.read_text())
    ]


def place(fault: Fault, root: pathlib.Path) -> tuple[pathlib.Path, re.Match]:
    """The one place, or an error."""
    found = places(fault, root)
    if len(found) != 1:
        raise ValueError(
            f"{fault.name}: its old text must stand once in the library, in one file; "
            "change `old` to what stands there now. Received: "
            f"{fault.old!r}, found {[path.name for path, _ in found]}"
        )
    return found[0]


def problems() -> list[str]:
    """Why some faults cannot be planted as they are."""
    wrong, owners = [], {}
    for fault in FAULTS:
        try:
            path, _ = place(fault, ROOT)
        except ValueError as error:
            wrong.append(str(error))
            continue
        if path in owners:
            wrong.append(f"{fault.name} and {owners[path]} are both of {path.name}")
        owners[path] = fault.name
        for test in fault.likely:
            if len(test_files(test.split()[0], ROOT)) != 1:
                wrong.append(f"{fault.name}: there is not one {test.split()[0]}")
    return wrong


def test_files(name: str, root: pathlib.Path) -> list[pathlib.Path]:
    return list((root / "tests").rglob(name))


def copied(folder: pathlib.Path) -> None:
    """A copy of what the tests need."""
    leave_out = shutil.ignore_patterns("__pycache__", ".*", "_build")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=leave_out)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)


def tested(folder: pathlib.Path, *arguments: str) -> list[str]:
    """The tests that fail in a copy of the repository."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist"]
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "TF_NUM_INTRAOP_THREADS": "1",
    }
    try:
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"pytest {arguments} took over {SECONDS} s") from None
    output = done.stdout + done.stderr
    failed = re.findall(r"^FAILED (\S+::.*?)(?: - .*)?$", output, re.MULTILINE)
    fine = failed if done.returncode == 1 else done.returncode in (0, NO_TESTS)
    if not fine:  # not a test that failed
        raise RuntimeError(f"pytest {arguments} could not run:\n{output[-3000:]}")
    return failed


def likely_arguments(test: str, folder: pathlib.Path) -> list[str]:
    name, _, expression = test.partition(" -k ")
    (path,) = test_files(name, folder)
    chosen = ["-k", expression.strip("'")] if expression else []
    return [str(path.relative_to(folder)), *chosen]


def catcher(fault: Fault, folder: pathlib.Path, marked: list[str]) -> str:
    """The first test that fails, "" if none does; the likely ones are tried first."""
    tries = [likely_arguments(test, folder) for test in fault.likely]
    for arguments in [*tries, *(one[:1] for one in tries), []]:
        failed = tested(folder, "-x", *marked, *arguments)
        if failed:
            return failed[0]
    return ""


def unproven(tests: list[str], marked: list[str]) -> list[str]:
    """Those of the tests that fail without a fault too: they have caught nothing."""
    if not tests:
        return []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        copied(folder)
        return tested(folder, *marked, *sorted({*tests}))


class Found(NamedTuple):
    """What the tests say of a fault.

    Attributes:
        path: the file it was planted in.
        fast, slow: the test of `make test` and of `make test-slow` that caught it, ""
            if none did, `None` if that suite was not run.
        seconds: how long it took to know.
    """

    fault: Fault
    path: str
    fast: str
    slow: str | None
    seconds: float


def judged(fault: Fault, slow_too: bool) -> Found:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        copied(folder)
        path, match = place(fault, folder)
        text = path.read_text()
        path.write_text(text[: match.start()] + fault.new + text[match.end() :])
        begun = time.monotonic()
        fast = catcher(fault, folder, [])
        seconds = time.monotonic() - begun
        slow = None
        if slow_too or not fast:
            slow = catcher(fault, folder, ["-m", "slow"])
            seconds = time.monotonic() - begun
        where = str(path.relative_to(folder))
    return Found(fault, where, fast, slow, seconds)


HEAD = """\
| file | planted | `make test` | first test | `make test-slow` | seconds |
|---|---|---|---|---|---|
"""


def row(found: Found) -> str:
    # The others' yes is their test's; here the fast one's stands in a column.
    slow = "not run" if found.slow is None else found.slow or "no"
    cells = (
        f"`{found.path}`",
        f"{found.fault.name}: {found.fault.what}",
        "yes" if found.fast else "no",
        found.fast.removeprefix("tests/"),
        slow.removeprefix("tests/"),
        f"{found.seconds:.0f}",
    )
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="run no test")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone")
    parser.add_argument("--out", type=pathlib.Path, help="the table, as Markdown")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--slow", action="store_true", help="both suites, always")
    arguments = parser.parse_args()
    unknown = {*(arguments.only or ())} - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no fault is called {', '.join(sorted(unknown))}")
    wrong = problems()
    if wrong or arguments.check:
        print("\n".join(wrong) or f"{len(FAULTS)} faults can be planted")
        return int(bool(wrong))
    chosen = [f for f in FAULTS if not arguments.only or f.name in arguments.only]
    print(HEAD, end="", flush=True)
    rows = []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for found in pool.map(lambda f: judged(f, arguments.slow), chosen):
            rows.append(found)
            print(row(found), end="", flush=True)
            if arguments.out:
                arguments.out.write_text(HEAD + "".join(map(row, rows)))
    wrong = unproven([found.fast for found in rows if found.fast], [])
    wrong += unproven([found.slow for found in rows if found.slow], ["-m", "slow"])
    if wrong:
        print("These fail without a fault too, and have caught nothing:", *wrong)
        return 1
    fast = sum(bool(found.fast) for found in rows)
    caught = sum(bool(found.fast or found.slow) for found in rows)
    print(f"{caught} of {len(rows)} caught, {fast} by `make test` alone")
    return int(caught < len(rows))


if __name__ == "__main__":
    sys.exit(main())
