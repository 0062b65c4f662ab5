"""The flags of a command: parsed, explained, and run to one line for a mistake."""

import _thread
import contextlib
import faulthandler
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from logging import CRITICAL, WARNING, getLogger
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from dalle2_jax import config_file
from dalle2_jax.errors import UserError, cut, first_line

WIDTH, COLUMN = 80, 26  # of the help, in characters: a line, and a flag's name
CONFIG_HELP = (
    "A config file and a row of its table, as decoder.py:small; --config.KEY=VALUE "
    "changes a key."
)
# How the help shows what a flag takes, by absl's name of its type.
_TAKES = {"int": "N", "float": "X", "config file": "FILE[:ROW]"}


class Flags:
    """The flags of one command, in the groups that its help shows.

    Each command has its own, so two commands may have flags of the same name.
    """

    def __init__(self, arguments: str = "") -> None:
        """Take no arguments beside the flags, or what `arguments` calls them."""
        self.arguments = arguments
        self.values = flags.FlagValues()
        self.values.set_gnu_getopt()
        self.groups: dict[str, list[str]] = {}
        self._argv: list[str] = []  # where the flag of a config looks for its keys

    def group(self, title: str) -> Callable[..., flags.FlagHolder]:
        """Return a function define(absl's DEFINE_…, name, …) for flags of a group."""
        names = self.groups.setdefault(title, [])

        def define(make: Callable[..., Any], name: str, *args: Any, **options: Any):
            names.append(name)
            return make(name, *args, flag_values=self.values, **options)

        return define

    def config(self, name: str, default: str | None, help: str, **options: Any) -> Any:
        """Define the flag of a config file, and of its keys, as absl's DEFINE_… do."""
        holder = config_flags.DEFINE_config_file(
            name, default, help, sys_argv=self._argv, **options
        )
        self.values[name].parser = config_file.Parser()
        return holder

    def parse(self, argv: Sequence[str]) -> list[str]:
        """Parse a command line, and return what of it is no flag.

        Args:
          argv: the program's name, and the arguments.

        Raises:
          UserError, flags.Error, KeyError, AttributeError: a flag is not known, has no
            such value, or is given twice with different values.
        """
        for name in list(self.values):
            if "." in name:
                delattr(self.values, name)  # a key of an earlier config
            else:
                self.values[name].unparse()
        self._argv[:] = self.values.read_flags_from_files(list(argv), force_gnu=False)
        rest = self.values(self._argv)[1:]
        for name, texts in self._given().items():
            if len(set(texts)) > 1:
                raise UserError(
                    f"--{name} is given {len(texts)} times: "
                    f"{cut(' and '.join(texts), 200)}; give it once, in quotes if the "
                    "shell expands { } or * in it"
                )
        return rest

    def _given(self) -> dict[str, list[str]]:
        """The texts that each flag is given; not of flags that take several."""
        given: dict[str, list[str]] = {}
        arguments = iter(self._argv[1:])
        for argument in arguments:
            if argument == "--":
                break
            found = re.fullmatch(r"--?([^=]+)(?:=(.*))?", argument, re.DOTALL)
            if not found:
                continue
            name, text = found.groups()
            if name not in self.values:  # it parsed, so it is the "no" of a boolean
                name, text = name.removeprefix("no"), "false"
            flag = self.values[name]
            if text is None:
                text = "true" if flag.boolean else next(arguments, "")
            if not isinstance(flag, flags.MultiFlag):
                given.setdefault(name, []).append(text)
        return given

    def help(self) -> str:
        """Return the flags and what they mean, by group."""
        lines = []
        for title, names in self.groups.items():
            lines.append(f"\n{title}:")
            for name in names:
                lines += _explained(self.values[name])
        return "\n".join(lines)


def _explained(flag: flags.Flag) -> list[str]:
    """The lines of a flag in the help."""
    takes = _TAKES.get(flag.parser.flag_type(), "...")
    left = f"  --[no]{flag.name}" if flag.boolean else f"  --{flag.name}={takes}"
    # What absl adds of choices, and of flags that may be repeated, is said otherwise.
    text = re.sub(r"^<.*?>: |;\n.*", "", flag.help, flags=re.DOTALL)
    if choices := getattr(flag.parser, "enum_values", None):
        text = f"{text.rstrip('.')}: {', '.join(choices)}."
    if flag.default not in (None, "", False, []):
        text = f"{text.rstrip('.')} (default: {flag.default_as_str.strip(chr(39))})."
    lines = textwrap.wrap(text, WIDTH - COLUMN)
    if len(left) + 2 > COLUMN:
        return [left, *(" " * COLUMN + line for line in lines)]
    return [left.ljust(COLUMN) + lines[0], *(" " * COLUMN + line for line in lines[1:])]


def run(command: Flags, main: Callable[..., None], argv: Sequence[str], about: str):
    """Parse the flags of a command and call its `main`.

    --help prints `about` and the flags. A flag that can't be parsed and a UserError
    become "error: ..." on stderr and exit code 2; Ctrl-C becomes "interrupted" and
    exit code 130.
    """
    try:
        if any(re.fullmatch(r"-h|--?help(full|short)?", word) for word in argv[1:]):
            print(about + command.help())
            return
        try:
            rest = command.parse(argv)
        # ml_collections raises KeyError and AttributeError for keys that are not there.
        except (flags.Error, OSError, KeyError, AttributeError) as error:
            raise UserError(_explain(error, argv)) from error
        if rest and not command.arguments:
            raise UserError(f"unknown argument {rest[0]!r}: options begin with --")
        main(*[rest] if command.arguments else ())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(": ".join(filter(None, ["interrupted", str(stop)])), file=sys.stderr)
        sys.exit(130)
    # JAX looks for devices where they are first needed, with errors of any kind.
    except (AssertionError, RuntimeError):
        from dalle2_jax import runtime

        if problem := runtime.backend_problem():
            print(f"error: {problem}", file=sys.stderr)
            sys.exit(2)
        raise


def prepare_process() -> None:
    """Set up what libraries print, for a process that is a command."""
    faulthandler.enable()
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
    logging.use_absl_handler()
    flags.FLAGS(sys.argv[:1])  # absl's own, which its handler reads
    # Orbax tells all that it does, and of a save that fails many times what it raises.
    logging.set_verbosity(logging.FATAL)
    getLogger("asyncio").setLevel(CRITICAL)
    getLogger("dalle2_jax").setLevel(WARNING)
    sys.unraisablehook = _tell_unraisable


def _tell_unraisable(unraisable: Any) -> None:
    """As Python does, but for what TensorStore ends after its reader has failed.

    Ctrl-C in a callback of the garbage collector would be lost, and is made again.
    """
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        threading.Timer(0.1, _thread.interrupt_main).start()
    elif str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _explain(error: Exception, argv: Sequence[str]) -> str:
    """One line on what is wrong with a flag."""
    # absl makes what a flag's parser raises an error of its own.
    if isinstance(error.__context__, UserError):
        return str(error.__context__)
    if isinstance(error, flags.UnrecognizedFlagError) and "." in error.flagname:
        flag, _, key = error.flagname.partition(".")
        return f"--{error.flagname} changes a key of --{flag}, which is not given"
    if isinstance(error, KeyError | AttributeError):
        text = str(error)
        key, guess = re.search(r"\w+", text)[0], re.search(r"you mean \W*(\w+)", text)
        flag = next((a for a in argv if re.match(rf"--\w+\.(.*\.)?{key}\b", a)), key)
        hint = f"; did you mean {guess[1]!r}?" if guess else ""
        return f"{flag.split('=')[0]}: the config has no key {key!r}{hint}"
    return first_line(error)


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Say on stderr what is going on, and every minute that it still is."""
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
