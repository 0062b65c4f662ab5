"""Read files that others wrote: none may hang the program or fill the memory."""

import errno
import json
import math
import os
import stat
from typing import Any

from dalle2_jax.errors import UserError

LARGEST_JSON = 2**26  # bytes; the largest index of a public model has some 2**18
DEEPEST_JSON = 100  # levels


def read_bytes(path: str | os.PathLike, largest: int) -> bytes:
    """Return the content of a regular file of at most `largest` bytes.

    Raises OSError, with one line in `strerror`, if there is none: a named pipe would
    wait for ever, and a device such as /dev/zero has no end.
    """
    try:
        found = os.stat(path)
    except ValueError:  # a name with "\0" or that the file system can't encode
        raise OSError(errno.EINVAL, "no valid file name", path) from None
    if stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EISDIR, "it is a directory", path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    if found.st_size > largest:
        said = f"larger than {largest:,} bytes"
        raise OSError(errno.EFBIG, said, path)
    with open(path, "rb", buffering=0) as file:
        return file.read(found.st_size)


def read_json(
    path: str | os.PathLike, largest: int = LARGEST_JSON, finite: bool = True
) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises UserError as `parse_json` does, or if the file is missing or can't be read.
    """
    try:
        text = read_bytes(path, largest)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return parse_json(text, path, finite)


def parse_json(
    text: bytes | str, where: str | os.PathLike, finite: bool = True
) -> dict[str, Any]:
    """Return the JSON object that a text holds.

    Lone surrogates ("\\ud83d") are left in strings: Python writes file names that are
    not UTF-8 with them.

    Args:
      text: UTF-8, with or without a byte order mark.
      where: what the error names.
      finite: whether NaN, Infinity and numbers beyond float64 are errors.

    Raises:
      UserError: it is not UTF-8, not JSON, not an object, nested more than 100 levels
        deep, or has a name twice in an object.
    """
    options = {"parse_constant": _finite, "parse_float": _finite} if finite else {}
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(
            text.removeprefix("\ufeff"), object_pairs_hook=_object, **options
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold a JSON object, {{...}}")
    level = [value]
    for _ in range(DEEPEST_JSON):
        values = [c for v in level for c in (v.values() if isinstance(v, dict) else v)]
        level = [v for v in values if isinstance(v, dict | list)]
        if not level:
            return value
    raise _too_deep(where)


def _too_deep(where: str | os.PathLike) -> UserError:
    return UserError(f"{where} is not valid JSON: more than {DEEPEST_JSON} levels deep")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not a finite number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} occurs twice")
    return found
