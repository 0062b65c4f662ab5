"""Directories that users name: by a path, or by the URL of object storage.

Object storage has no directories that can be appended to, renamed or locked. What is
read from there is first copied to a temporary directory, and what is written is made in
one and copied at the end.
"""

import atexit
import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from dalle2_jax.errors import UserError, first_line

EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}


def url(path: str | os.PathLike) -> str | None:
    """Return the URL that `path` is, or None if it is a path of this machine.

    `pathlib` leaves one slash of two, so that "gs:/bucket" counts as "gs://bucket".
    """
    found = re.fullmatch(r"([a-z][a-z0-9+.-]+):(//?)(.*)", os.fspath(path), re.DOTALL)
    return f"{found[1]}://{found[3].rstrip('/')}" if found else None


def directory(path: str | os.PathLike, name: str) -> Path:
    """Return a path of this machine as an absolute one, "~" expanded.

    Raises UserError if it is a URL or there is no such user.

    Args:
        path: what the user gave.
        name: of the argument, for the message.
    """
    check_local(path, name)
    return expand(path).absolute()


def check_local(path: str | os.PathLike, name: str) -> None:
    """Raise UserError if a path is a URL; `name` is of the argument."""
    if found := url(path):
        raise UserError(
            f"{name}={found} is a URL: give a directory of this machine, for instance "
            "where the bucket is mounted, and copy it afterwards"
        )


def expand(path: str | os.PathLike) -> Path:
    """Return a path of this machine with "~" expanded.

    Raises UserError if there is no such user, the path is too long or may not be looked
    at, or it has a zero byte or is not UTF-8, which the libraries that read and write
    models need.
    """
    text = os.fspath(path)
    if re.search("[\0\ud800-\udfff]", text):
        raise UserError(f"{text!a} is no path of UTF-8 text: rename the directory")
    try:
        found = Path(path).expanduser()
        found.exists()
        return found
    except RuntimeError as error:
        raise UserError(
            f"{path}: {first_line(error).rstrip('.')}; write the path without ~"
        ) from error
    except OSError as error:
        raise UserError(f"cannot use the path {text:.200}: {error.strerror}") from error


def join(path: str | os.PathLike, *names: str) -> str:
    """Return what is below a path or a URL."""
    return "/".join([url(path) or os.fspath(path), *names])


def file_system(location: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it.

    Raises UserError if there is none of that kind, or a package is missing.
    """
    import fsspec

    kind = location.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(location)
    except ImportError as error:
        what = f"pip install 'dalle2_jax[{EXTRAS[kind]}]'" if kind in EXTRAS else error
        raise UserError(
            f"{location}: {kind}:// needs another package: {what}"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{location}: there is no {kind}://: give a directory, or a URL as gs:// "
            "or s3://"
        ) from error
    except OSError as error:  # some connect at once
        raise UserError(f"cannot reach {location}: {first_line(error)}") from error


@contextlib.contextmanager
def reaching(location: str, what: str = "cannot reach") -> Iterator[None]:
    """Turn whatever a file system raises into a UserError."""
    try:
        yield
    except UserError:
        raise
    # Of the network, of permissions and of credentials, each package has its own.
    except Exception as error:
        raise UserError(f"{what} {location}: {first_line(error)}") from error


def names(location: str) -> dict[str, str]:
    """Return what is below a URL: of each file its name from there, and its path."""
    fs, root = file_system(location)
    with reaching(location):
        found = {}
        for file in fs.find(root):
            name = file.removeprefix(root).lstrip("/")
            # It is what a local copy will be called.
            if not name or ".." in PurePosixPath(name).parts:
                raise UserError(
                    f"{location} has a file of a name not allowed: {file!r}"
                )
            found[name] = file
        return found


def fetch(path: str | os.PathLike) -> Path:
    """Return the directory of a model on this machine: `path`, or a copy of a URL's.

    The copy is deleted when the process ends.

    Raises UserError if the URL can't be read or has no model.
    """
    location = url(path)
    if location is None:
        return expand(path)
    files = names(location)
    if not {"config.json", "model_index.json"} & files.keys():
        raise UserError(
            f"{location} is not a model: it has no config.json (train.py leaves one in "
            "WORKDIR/model)"
        )
    fs, _ = file_system(location)
    folder = temporary()
    with reaching(location):
        for name, file in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(file, str(target))
    return folder


def replace(folder: Path, location: str, last: str) -> None:
    """Put the files of a folder in the place of all that is at a URL.

    The file `last` tells that the others are complete: it is deleted before they
    change, and written after them.
    """
    old = names(location)
    fs, root = file_system(location)
    new = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file()
    }
    with reaching(location, "cannot write to"):
        if last in old:
            fs.rm_file(old[last])
        for name in sorted(new, key=lambda name: name == last):
            fs.put_file(str(new[name]), f"{root}/{name}")
        for name in old.keys() - new.keys():
            fs.rm_file(old[name])


def temporary() -> Path:
    """Return a new directory that is deleted when the process ends."""
    return Path(
        _until_exit.enter_context(tempfile.TemporaryDirectory(prefix="dalle2_jax-"))
    )


_until_exit = contextlib.ExitStack()
atexit.register(_until_exit.close)
