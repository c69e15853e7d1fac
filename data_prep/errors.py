"""What another library's error says, in one line of one's own."""


def one_line(error: BaseException) -> str:
    """Its first line, at most 200 characters, none of them unprintable."""
    first = (str(error).splitlines() or [""])[0][:200]
    return first.encode("unicode_escape").decode() or type(error).__name__
