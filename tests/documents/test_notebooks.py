"""The notebooks: each is its page. `test_tutorials.py` runs one in a kernel."""

import importlib.util
import pathlib
from typing import Any

import nbformat
import pytest
from test_docs import ROOT

TUTORIALS = ROOT / "docs" / "tutorials"
PAGES = sorted(page for page in TUTORIALS.glob("*.md") if page.stem != "index")


def notebooks_of_docs() -> Any:
    """`docs/notebooks.py`, which is run as a file."""
    spec = importlib.util.spec_from_file_location(
        "notebooks_of_docs", ROOT / "docs" / "notebooks.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_tutorial_is_a_notebook_too() -> None:
    assert notebooks_of_docs().pages() == PAGES and len(PAGES) >= 7
    found = sorted(TUTORIALS.glob("*.ipynb"))
    assert found == [page.with_suffix(".ipynb") for page in PAGES]
    index = (TUTORIALS / "index.md").read_text()
    for page in PAGES:
        assert f"]({page.stem}.md)" in index and f"]({page.stem}.ipynb)" in index


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_notebook_is_its_page(page: pathlib.Path) -> None:
    """`python docs/notebooks.py` writes it. Its cells in order are the page."""
    written = page.with_suffix(".ipynb").read_text()
    assert written == notebooks_of_docs().written(page)
    notebook = nbformat.reads(written, 4)
    nbformat.validate(notebook)
    lines, code = [], []
    for cell in notebook.cells:
        lines += cell.source.splitlines()
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            code += cell.source.splitlines()
    # Independently of the script: the page without fences and empty lines.
    inside, expected_code, expected = False, [], []
    for line in page.read_text().splitlines():
        if line == "```python" or (inside and line == "```"):
            inside = not inside
            continue
        expected.append(line)
        if inside:
            expected_code.append(line)
    assert [x for x in lines if x] == [x for x in expected if x]
    assert [x for x in code if x] == [x for x in expected_code if x]
