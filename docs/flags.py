"""Write the tables of flags on the pages of the experiments, from the scripts' parsers.

    python docs/flags.py

A table stands between two comments on `docs/experiments/NAME.md`. The test
`tests/documents/test_published_commands.py` fails if one is not what this script
would write.
"""

import argparse
import importlib
import pathlib
import sys
from typing import Any
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- flags: written by docs/flags.py -->\n", "<!-- flags: end -->\n"
KINDS = {  # the scripts' argparse types, by the names that are no plain English
    "Path": "path",
    "finite": "number",
    "share": "number above 0, at most 1",
    "fraction": "number from 0 to below 1",
    "share_of_noise": "number from 0 to below 1",
}
COMMON = {"--help", "--out", "--resume", "--seed"}  # on docs/experiments.md


class _Stopped(Exception):
    pass


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that `experiments/<script>.py` makes in its `parse_args`."""
    made: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        made.append(parser)
        raise _Stopped

    folder = str(ROOT / "experiments")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = importlib.import_module(script)
    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            module.parse_args([])
        except _Stopped:
            return made[0]
    raise ValueError(f"experiments/{script}.py has a parse_args that parses nothing.")


def row(action: argparse.Action) -> str:
    name, *others = (f"`{one}`" for one in action.option_strings)
    if isinstance(action, argparse.BooleanOptionalAction):
        names = ", ".join([name, *others])
    else:  # names from publications, or from before
        names = name + (f" (also {', '.join(others)})" if others else "")
    cells = (names, values(action), default(action), help_text(action))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def values(action: argparse.Action) -> str:
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return "none"
    if action.choices:
        text = ", ".join(f"`{choice}`" for choice in action.choices)
    else:
        name = getattr(action.type, "__name__", "text")
        text = (
            KINDS.get(name, name).replace("int", "integer").replace("float", "number")
        )
    several = {"+": "one or more of: ", None: ""}
    return several.get(action.nargs, f"{action.nargs} of: ") + text


def default(action: argparse.Action) -> str:
    if action.default is None or action.default is False or action.required:
        return ""
    if isinstance(action.default, (list, tuple)):
        return " ".join(f"`{one}`" for one in action.default)
    return f"`{action.default}`"


def help_text(action: argparse.Action) -> str:
    return (action.help or "") % {"default": action.default}


def table(script: str) -> str:
    """The script's flags as a Markdown table."""
    flags = [
        one
        for one in parser_of(script)._actions  # argparse has no public list of them
        if one.option_strings and not COMMON & {*one.option_strings}
    ]
    head = "| Flag | Values | Default | Meaning |\n|---|---|---|---|\n"
    return head + "".join(map(row, flags))


def renewed(text: str, script: str) -> str:
    """The page with its table as the parser says."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"The page of {script} needs the lines {BEGIN!r} and {END!r}.")
    return before + begin + "\n" + table(script) + "\n" + end + after


def pages() -> dict[str, pathlib.Path]:
    """Script -> its page."""
    scripts = sorted((ROOT / "experiments").glob("*.py"))
    folder = ROOT / "docs" / "experiments"
    return {one.stem: folder / f"{one.stem}.md" for one in scripts}


if __name__ == "__main__":
    for name, page in pages().items():
        page.write_text(renewed(page.read_text(), name))
