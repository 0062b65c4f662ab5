"""The one exception that means "the user can fix this"."""

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in what the user gave: a path, a config, a size.

    Its message is one line: what was given, what is allowed, what to do. The scripts
    print it as `error: <message>` and exit with code 2; any other exception is a bug.
    """


def first_line(error: Exception) -> str:
    """What an exception of another library says, short enough for a UserError."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(names: Sequence[str], limit: int = 8) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
