"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in what the user gave: a path, a config, a size.

    Its message is one line: what was given, what is allowed, what to do. The scripts
    print it as `error: <message>` and exit with code 2; any other exception is a bug.
    """


def first_line(error: Exception) -> str:
    """What an exception of another library says, short enough for a UserError."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
