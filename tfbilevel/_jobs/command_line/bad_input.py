"""What the user must correct before a command can run."""

import difflib
from collections.abc import Iterable


class BadInput(Exception):
    """One line about wrong input; the command ends with exit code 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message: which known name may be meant, and all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1, 0.5)
    if not close:
        lower = {each.lower(): each for each in known}
        close = [lower[name.lower()]] if name.lower() in lower else []
    meant = f"Did you mean {close[0]!r}? " if close else ""
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f"{meant}It has: {shown}"
