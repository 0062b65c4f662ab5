"""The one exception that means "the user can fix this"."""

from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave: a path, a config, a size.

    Its message is one line: what was given, what is allowed, what to do. The scripts
    print it as `error: <message>` and exit with code 2; any other exception is a bug.
    """


def first_line(error: Exception) -> str:
    """Return what an exception of another library says, short enough for a UserError.

    Whatever it quotes of a file is cut, too.
    """
    return cut((str(error).strip() or type(error).__name__).splitlines()[0], 300)


def short(value: Any) -> str:
    """Return the repr of any value as one short line."""
    try:
        text = repr(value)
    except Exception:  # of an integer with too many digits, for one
        text = f"<{type(value).__name__}>"
    return cut(" ".join(text.split()), 60)


def cut(text: str, limit: int) -> str:
    """Return a text of at most ``limit`` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
