"""The pictures of a run, as files of a directory in which others may lie."""

import itertools
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dalle2_jax import storage
from dalle2_jax.errors import UserError, cut, first_line


class PictureFiles:
    """The pictures of a run, written as soon as they are made.

    They have the next free numbers of the directory, and nothing in it is replaced.
    """

    def __init__(self, directory: Path):
        self.directory, self.written = directory, []
        numbers = [re.fullmatch(r"([0-9]+)\.png", p.name) for p in directory.iterdir()]
        first = max((int(found[1]) for found in numbers if found), default=-1) + 1
        self._names = (f"{number:03d}.png" for number in itertools.count(first))

    def write(self, picture: Any, metadata: Mapping[str, str]) -> None:
        """Write a picture, with text in its metadata."""
        self.written.append(self._write_as(self._names, picture, metadata))

    def write_grid(self, grid: Any) -> str:
        """Write grid.png, or grid_002.png and so on beside the grids of other runs."""
        names = (f"grid_{number:03d}.png" for number in itertools.count(2))
        return self._write_as(itertools.chain(["grid.png"], names), grid, {})

    def _write_as(
        self, names: Iterable[str], picture: Any, metadata: Mapping[str, str]
    ) -> str:
        """Write a picture under the first name that is free, and return the name."""
        from dalle2_jax.data import image

        for name in names:
            try:
                image.save_png(self.directory / name, picture, metadata, replace=False)
                return name
            except FileExistsError:
                continue
            except OSError as error:
                raise UserError(
                    f"cannot write {self.directory / name}: {error.strerror}; {self}"
                ) from error

    def __str__(self) -> str:
        """Say where they are."""
        if not self.written:
            return "no picture is saved"
        first, last = self.written[0], self.written[-1]
        if first == last:
            return f"1 picture is in {self.directory}: {first}"
        count = len(self.written)
        return f"{count} pictures are in {self.directory}: {first} to {last}"


def make_directory(path: str) -> Path:
    """Create the directory of --out and try to write in it; UserError if that fails."""
    storage.check_local(path, "--out")
    if not path or "\0" in path:
        raise UserError(f"--out={path!a} is no folder: give one, as --out=samples")
    try:
        directory = Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"--out={cut(path, 100)}: {first_line(error).rstrip('.')}; write the path "
            "without ~"
        ) from error
    try:
        if directory.exists() and not directory.is_dir():
            raise UserError(f"--out={cut(path, 100)} is a file: give a folder")
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe_") as probe:
            probe.write(b"0")
    except OSError as error:
        raise UserError(
            f"cannot write to --out={cut(path, 100)}: {error.strerror}"
        ) from error
    return directory
