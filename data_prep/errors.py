"""Another library's error message, shortened to one line."""


def one_line(error: BaseException) -> str:
    """The error's first line, at most 200 characters, all printable."""
    first = (str(error).splitlines() or [""])[0][:200]
    return first.encode("unicode_escape").decode() or type(error).__name__
