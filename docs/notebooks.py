"""Write each tutorial as a Jupyter notebook beside its page.

    python docs/notebooks.py

The pages are the source: their text becomes text cells, their Python blocks code cells.
The notebooks hold no outputs. The test `tests/documents/test_notebooks.py` fails if one
is not what this script would write.
"""

import pathlib
import re

import nbformat
from nbformat import v4

TUTORIALS = pathlib.Path(__file__).resolve().parent / "tutorials"
FENCED = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def pages() -> list[pathlib.Path]:
    """The tutorials: pages with code."""
    return [
        page
        for page in sorted(TUTORIALS.glob("*.md"))
        if FENCED.search(page.read_text())
    ]


def notebook(page: pathlib.Path) -> nbformat.NotebookNode:
    """The page as a notebook without outputs."""
    cells = []
    for number, part in enumerate(FENCED.split(page.read_text())):  # text, code, ...
        make = v4.new_code_cell if number % 2 else v4.new_markdown_cell
        if part.strip():
            cells.append(make(part.strip("\n"), id=f"cell-{number}"))
    language = {"name": "python"}
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    return v4.new_notebook(
        cells=cells, metadata={"kernelspec": kernel, "language_info": language}
    )


def written(page: pathlib.Path) -> str:
    """The text of the notebook's file."""
    return nbformat.writes(notebook(page)) + "\n"


if __name__ == "__main__":
    for page in pages():
        page.with_suffix(".ipynb").write_text(written(page))
