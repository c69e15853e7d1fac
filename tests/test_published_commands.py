"""Every command line that the documentation gives is accepted as it stands."""

import pathlib
import re
import shlex

import pytest
from experiment_scripts import ROOT, load_experiment

PAGES = ("README.md", "docs/experiments.md", "docs/published_commands.md")
COMMAND = re.compile(r"python experiments/(\w+)\.py((?: [^`|\n\\]*(?:\\\n)?)*)")


def commands(page: str) -> list[tuple[str, list[str]]]:
    """Script and flags of every command of the page."""
    text = (ROOT / page).read_text()
    return [
        (script, shlex.split(flags.replace("\\\n", " ").partition("#")[0]))
        for script, flags in COMMAND.findall(text)
    ]


def test_there_are_commands_of_every_script() -> None:
    found = {script for page in PAGES for script, _ in commands(page)}
    assert found == {path.stem for path in (ROOT / "experiments").glob("*.py")}
    assert len(commands("docs/published_commands.md")) > 80


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page: str, tmp_path: pathlib.Path) -> None:
    """Nothing is read or written: files that they name need not be there."""
    for script, flags in commands(page):
        given = flags if "--out" in flags else [*flags, "--out", "runs/x"]
        try:
            load_experiment(script).parse_args(given)
        except SystemExit:
            pytest.fail(f"refused: python experiments/{script}.py {shlex.join(flags)}")
