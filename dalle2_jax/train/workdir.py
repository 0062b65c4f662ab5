"""The directory of a run: on this machine, or in object storage."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import jax

from dalle2_jax import storage
from dalle2_jax.errors import UserError, first_line

KEPT = ("metrics.jsonl", "wandb_id.txt")  # what a resumed run reads of the log
SECONDS = 60  # between two uploads of what has changed


class Workdir:
    """Where a run writes its log, and where its checkpoints and model go.

    In object storage nothing can be appended to a file: the log is written to a
    temporary directory, which `push` uploads.

    Attributes:
        path: as the user gave it, absolute; or a URL.
        files: the directory of this machine that the log is written to.
    """

    def __init__(self, path: str | os.PathLike):
        """Create the directory, or fetch the log of a run in object storage.

        Raises UserError if nothing can be written there.
        """
        location = storage.url(path)
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._time = time.monotonic()
        self._url = location
        if location is None:
            self.files = _make(storage.expand(path).absolute())
            self.path = str(self.files)
            return
        if not location.startswith("gs://"):
            raise UserError(
                f"workdir {location} is a URL, and checkpoints can be written to gs:// "
                "alone: give a directory, for instance where the bucket is mounted"
            )
        self.path, self.files = location, storage.temporary()
        there = storage.names(location)
        fs, root = storage.file_system(location)
        with storage.reaching(location, "cannot write to workdir"):
            for name in KEPT:
                if name in there:
                    fs.get_file(there[name], str(self.files / name))
            if jax.process_index() == 0:
                fs.pipe_file(f"{root}/.lock", b"")
        self._uploaded = self._changed()

    def join(self, name: str) -> str:
        """Return the path or URL of what is in the workdir."""
        return storage.join(self.path, name)

    def push(self, wait: int = 0) -> None:
        """Upload the files that have changed, if the last time is `wait` seconds ago.

        Raises UserError if they can't be uploaded.
        """
        if self._url is None or time.monotonic() < self._time + wait:
            return
        self._time = time.monotonic()
        fs, root = storage.file_system(self._url)
        for name, state in self._changed().items():
            with storage.reaching(self._url, "cannot write the log to"):
                fs.put_file(str(self.files / name), f"{root}/{name}")
            self._uploaded[name] = state

    def _changed(self) -> dict[str, tuple[int, int]]:
        """Of each file that is not as it was uploaded, its size and time."""
        found = {}
        for path in self.files.rglob("*"):
            if path.is_file():
                info = path.stat()
                name = path.relative_to(self.files).as_posix()
                found[name] = (info.st_size, info.st_mtime_ns)
        return {n: s for n, s in found.items() if self._uploaded.get(n) != s}

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs out, as they would spoil each other's files.

        The system ends the lock with the process, however that ends. Object storage has
        no such lock; what has changed is uploaded at the end, also after an error.
        """
        if self._url:
            try:
                yield
            finally:
                with contextlib.suppress(UserError):  # the first error is to be told
                    self.push()
            return
        if jax.process_index() > 0:
            yield
            return
        lock = filelock.FileLock(self.files / ".lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise UserError(
                f"another run is at work in {self.path}: wait for its end, or give "
                "another workdir"
            ) from error
        # It is no file, or the file system has no locks.
        except (OSError, NotImplementedError) as error:
            raise UserError(
                f"cannot lock {self.path}/.lock: {first_line(error)}; remove it, or "
                "give another workdir"
            ) from error
        try:
            yield
        finally:
            lock.release()


def _make(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"can't write to workdir {path}: {error.strerror}") from error
    return path
