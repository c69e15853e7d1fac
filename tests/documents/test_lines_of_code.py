"""The table of lines of code in docs/comparison.md: what it says of this library.

Counted are lines that are neither blank nor a comment, of the first block of Python on
each page. The other libraries' lines were counted by hand.
"""

import io
import pathlib
import re
import tokenize

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# | ... [its page](page.md) ... | number |
ROW = re.compile(r"^\|.*\[[^]]*\]\((\w+\.md)\).*?\| (\d+) \|", re.MULTILINE)
NOT_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT)
PAGES = ["label_cleaning.md", "tuning.md", "few_shot.md"]


def lines_of_code(code: str) -> int:
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type not in NOT_CODE and token.string.strip():
            found.update(range(token.start[0], token.end[0] + 1))
    return len(found)


def test_the_count_by_hand() -> None:
    code = 'import a  # of use\n\n# no code\nb = f(\n    """two\n    lines""",\n)\n'
    assert lines_of_code(code) == 5


def test_the_table_tells_the_lines_of_the_pages() -> None:
    text = (DOCS / "comparison.md").read_text()
    section = text.split("## Lines of code")[1].split("\n## ")[0]
    rows = ROW.findall(section)
    told = {page: int(number) for page, number in rows if page in PAGES}
    counted = {}
    for page in PAGES:
        block = BLOCK.search((DOCS / page).read_text())
        assert block, f"{page} has no code"
        counted[page] = lines_of_code(block[1])
    assert told == counted
