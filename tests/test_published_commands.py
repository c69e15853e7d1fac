"""Every command line that the documentation gives is accepted as it stands, and its
tables of flags are those of the scripts."""

import importlib.util
import pathlib
import re
import shlex
from typing import Any

import pytest
from experiment_scripts import ROOT, load_experiment

import tfbilevel as tb

SCRIPTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))
OWN_PAGES = {script: f"docs/experiments/{script}.md" for script in SCRIPTS}
PAGES = (
    "README.md",
    "docs/experiments.md",
    "docs/published_commands.md",
    *OWN_PAGES.values(),
)
COMMAND = re.compile(r"python experiments/(\w+)\.py((?: [^`|\n\\]*(?:\\\n)?)*)")


def commands(page: str) -> list[tuple[str, list[str]]]:
    """Script and flags of every command of the page."""
    text = (ROOT / page).read_text()
    return [
        (script, shlex.split(flags.replace("\\\n", " ").partition("#")[0]))
        for script, flags in COMMAND.findall(text)
    ]


def test_there_are_commands_of_every_script() -> None:
    for script, page in OWN_PAGES.items():
        assert script in {name for name, _ in commands(page)}, page
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


def test_every_experiment_has_its_page() -> None:
    """Linked from the overview, with nothing else beside them."""
    overview = (ROOT / "docs" / "experiments.md").read_text()
    found = {page.stem for page in (ROOT / "docs" / "experiments").glob("*.md")}
    assert found == {*SCRIPTS}
    for script in SCRIPTS:
        assert f"](experiments/{script}.md)" in overview, script


def flags_of_docs() -> Any:
    """`docs/flags.py`, which is run as a file."""
    spec = importlib.util.spec_from_file_location(
        "flags_of_docs", ROOT / "docs" / "flags.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS)
def test_tables_of_flags_are_those_of_the_parsers(script: str) -> None:
    """`python docs/flags.py` writes them."""
    flags = flags_of_docs()
    page = (ROOT / OWN_PAGES[script]).read_text()
    assert flags.renewed(page, script) == page
    shown = {*re.findall(r"`(--[a-z-]+)`", flags.table(script))}
    # Independently of argparse: what the source adds.
    source = (ROOT / "experiments" / f"{script}.py").read_text()
    added = {*re.findall(r'^    add\(\s*"(--[a-z-]+)"', source, re.MULTILINE)}
    assert added <= shown


def test_every_method_is_named_in_the_literature() -> None:
    page = (ROOT / "docs" / "literature.md").read_text()
    flags, named = flags_of_docs(), set()
    for script in SCRIPTS:
        for action in flags.parser_of(script)._actions:
            if "--method" in action.option_strings:
                named |= {*action.choices} - {"all"}
    assert len(named) > 30
    named |= {
        name
        for name, value in vars(tb).items()
        if isinstance(value, type) and issubclass(value, tb.Method)
    } - {"Method"}
    missing = {
        name
        for name in named
        if not re.search(
            rf"(?<![\w+-]){re.escape(name)}(?![\w+-])", page, re.IGNORECASE
        )
    }
    assert missing == set()
