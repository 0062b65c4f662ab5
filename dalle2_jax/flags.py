"""Runs a script so that its user's mistakes end in one line and exit code 2."""

import contextlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from logging import CRITICAL, WARNING, getLogger
from typing import Any

from absl import app, flags, logging

from dalle2_jax.errors import UserError, first_line


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls ``main``.

    A flag that can't be parsed (an unknown config file or key, a value of the wrong
    type) and a UserError become "error: ..." on stderr.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(list(argv))
            if len(rest) > 1:
                raise UserError(f"unknown argument {rest[1]!r}: options begin with --")
            # A config file that isn't there is an error only once its value is used.
            for value in flags.FLAGS.flag_values_dict().values():
                hasattr(value, "items")
            return rest
        # ml_collections raises KeyError and AttributeError for keys that are not there.
        except (flags.Error, UserError, OSError, KeyError, AttributeError) as error:
            return _fail(_explain(error, argv))

    def call(argv: Sequence[str]) -> None:
        try:
            main()
        except UserError as error:
            _fail(str(error))
        # JAX looks for devices where they are first needed, with errors of any kind.
        except (AssertionError, RuntimeError):
            from dalle2_jax import runtime

            if problem := runtime.backend_problem():
                _fail(problem)
            raise

    # Orbax tells all that it does, and of a save that fails many times what it raises.
    logging.set_verbosity(logging.FATAL)
    getLogger("asyncio").setLevel(CRITICAL)
    getLogger("dalle2_jax").setLevel(WARNING)
    sys.unraisablehook = _tell_unraisable
    app.run(call, flags_parser=parse)


def _tell_unraisable(unraisable: Any) -> None:
    """As Python does, but for what TensorStore ends after its reader has failed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _explain(error: Exception, argv: Sequence[str]) -> str:
    """One line on what is wrong with a flag."""
    text = str(error)
    if isinstance(error, KeyError | AttributeError):
        key, guess = re.search(r"\w+", text)[0], re.search(r"you mean \W*(\w+)", text)
        flag = next((a for a in argv if re.match(rf"--config\.(.*\.)?{key}\b", a)), key)
        hint = f"; did you mean {guess[1]!r}?" if guess else ""
        return f"{flag.split('=')[0]}: the config has no key {key!r}{hint}"
    if "No such file or directory" in text and "config" in text:
        path = next((a for a in argv if a.startswith("--config=")), "--config")
        return f"{path}: there is no such config file"
    # An error in a config file arrives as the text of its traceback.
    found = re.search(r"^[\w.]*UserError: (.*)", text, re.MULTILINE)
    return found[1] if found else first_line(error)


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Says on stderr what is going on, and every minute that it still is."""
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(60):
            print(f"... {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    print(what, file=sys.stderr, flush=True)
    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()
