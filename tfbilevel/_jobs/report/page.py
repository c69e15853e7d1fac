"""Pages from templates: one self-contained HTML file each."""

import os
import pathlib
import tempfile
from typing import Any

from tfbilevel._jobs.optional_packages import optional_package
from tfbilevel._version import __version__

FOLDER = pathlib.Path(__file__).parent


def write_page(path: str | os.PathLike, template: str, **values: Any) -> None:
    """Renders a template of this folder into `path`. Whole or not at all.

    Everything in `values` is text: what has a meaning in HTML is escaped.
    """
    jinja2 = optional_package("jinja2", "A report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(version=__version__, **values)
    write_whole(path, text)


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Writes a text file in one moment: a failure leaves what was there before."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(partial, 0o644)  # a temporary file is its owner's alone
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
