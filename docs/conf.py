"""How Sphinx builds the user guide: `make docs`."""

import inspect
import re
from typing import Any

import tfbilevel

project = "tfbilevel"
author = "the tfbilevel authors"
release = version = tfbilevel.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "contents"  # index.md is read on the code host too
html_theme = "furo"
html_title = f"tfbilevel {release}"
html_show_copyright = False
myst_heading_anchors = 3
default_role = "code"

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"
autodoc_inherit_docstrings = False  # Keras's are written for another tool
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False  # all docstrings are in Google's style
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("References", "notes")]


def as_restructured_text(app, what, name, obj, options, lines) -> None:
    """Docstrings are plain text: here their equations become literal blocks.

    An equation is an indented block outside of the sections (`Args:` and its like);
    elsewhere asterisks, bars and underscores mean themselves.
    """
    text, section, before = [], "", ""
    for line in lines:
        if re.fullmatch(r"[A-Z]\w+:", line):
            section = line
        equation = line.startswith("    ") and not section
        if equation and not before.startswith(" "):
            text += ["::", ""]
        before = line or before
        text.append(line if equation or section == "Example:" else escaped(line))
    if what == "property" and text:
        text[0] = f": {text[0]}"  # or napoleon takes what is before a colon for a type
    lines[:] = text


def escaped(line: str) -> str:
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*|]|_(?=\W|$))", r"\\\1", part)
        for part in parts
    )


def own_signature(app, what, name, obj, options, signature, returned) -> Any:
    """Keras's models and layers hide their arguments behind a `__new__`."""
    if what == "class" and signature == "(*args, **kwargs)":
        own = inspect.signature(obj.__init__)
        arguments = list(own.parameters.values())[1:]
        bare = [one.replace(annotation=one.empty) for one in arguments]
        return str(own.replace(parameters=bare, return_annotation=own.empty)), None
    return None


def is_plain_field(app, what, name, obj, skip, options) -> bool | None:
    """A named tuple's fields, which the docstring of the tuple describes."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app) -> None:
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
    app.connect("autodoc-process-signature", own_signature)
    app.connect("autodoc-skip-member", is_plain_field)
