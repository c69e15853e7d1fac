"""The rooms of the library, counted from its own imports.

    python tests/documents/test_rooms.py

prints the rooms from the lowest to the highest, with what each imports.
"""

import ast
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tfbilevel"

# A room imports those before it alone. docs/architecture.md tells what they are for.
ROOMS = (
    "_workarounds",
    "_calculus",
    "_optimizers",
    "_randomness",
    "_core",
    "_linear_solvers",
    "_tasks",
    "_check",
    "_methods",
    "_keras",
    "_minimize",
    "compat",
    "_jobs",
)
DOORS = ("__init__", "__main__", "_version")  # what is public, the command, a number


def files() -> Iterator[pathlib.Path]:
    return (path for path in PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    """The room of a module, `tfbilevel._core.problem` say."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: pathlib.Path) -> set[str]:
    """The modules of the library that a file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            found.add(module)
            found |= {f"{module}.{a.name}" for a in node.names if module == "tfbilevel"}
    return {name for name in found if name.startswith("tfbilevel.")}


def arrows() -> dict[str, set[str]]:
    """Room -> the other rooms that it imports."""
    found: dict[str, set[str]] = {name: set() for name in ROOMS}
    for path in files():
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if here not in DOORS:
            used = {room(module) for module in imports(path)}
            found[here] |= used - {here, "_version"}
    return found


def test_every_file_is_in_a_room() -> None:
    top = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert top - {"__pycache__", "py"} == {*ROOMS, *DOORS}
    assert len(ROOMS) <= 13


def test_rooms_import_only_lower_rooms() -> None:
    """So there is no cycle either."""
    wrong = {
        name: higher
        for name, others in arrows().items()
        if (higher := {o for o in others if ROOMS.index(o) >= ROOMS.index(name)})
    }
    assert wrong == {}


def test_methods_do_not_ask_whether_there_are_tasks() -> None:
    methods = list((PACKAGE / "_methods").rglob("*.py"))
    assert len(methods) > 15
    asking = []
    for path in methods:
        for node in ast.walk(ast.parse(path.read_text())):
            named = (getattr(node, field, None) for field in ("id", "attr", "arg"))
            if "leading" in named:
                asking.append(path.name)
    assert asking == []


def test_files_are_short() -> None:
    allowed = {PACKAGE / "_keras" / "model.py": 500}
    folders = {PACKAGE: 400, ROOT / "experiments": 600}
    long = {
        str(path.relative_to(ROOT)): lines
        for folder, most in folders.items()
        for path in folder.rglob("*.py")
        if (lines := path.read_text().count("\n")) > allowed.get(path, most)
    }
    assert long == {}


if __name__ == "__main__":
    for name, others in arrows().items():
        below = ", ".join(sorted(others, key=ROOMS.index)) or "nothing"
        print(f"{name:16} imports {below}")
    print(sum(map(len, arrows().values())), "arrows")
