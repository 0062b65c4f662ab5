"""Files of weights: opened within bounds, their values finite, their bytes verified."""

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dalle2_jax.errors import UserError, first_line, short

_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of each that is read
_LARGEST_HEADER = 2**24  # bytes; Karlo's largest has some 2**17
# The bits of the exponent, which are all set in NaN and infinity and nothing else.
_EXPONENTS = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}
_CHUNK = 2**16  # values that stay in a core's cache


class Weights(NamedTuple):
    """Weights on disk: nothing is read before `read` is called with a name."""

    where: Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def open_safetensors(path: Path) -> Weights:
    """Open a file of safetensors; its header alone is read.

    Raises:
      UserError: the file is missing, damaged or no file of safetensors. `read` raises
        it for a tensor that is no array of finite float16, bfloat16, float32 or
        float64.
    """
    _check_start(path)
    try:
        file = safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: part.get_dtype() for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, first_line(error)) from error

    def read(name: str) -> np.ndarray:
        if dtypes[name] not in _DTYPES:
            raise UserError(
                f"{path}: {name} is of dtype {dtypes[name]}: must be one of "
                + ", ".join(_DTYPES)
            )
        needed = math.prod(shapes[name]) * _DTYPES[dtypes[name]]
        if needed > memory():  # safetensors would panic
            raise UserError(
                f"{path}: {name} takes {needed / 1e9:,.0f} GB, this machine has "
                f"{memory() / 1e9:,.0f} GB of memory"
            )
        try:
            array = file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, first_line(error)) from error
        return checked(array, name, path)

    return Weights(path, shapes, read)


def checked(array: np.ndarray, name: str, where: Any) -> np.ndarray:
    """Return an array of finite numbers as it is.

    Raises:
      UserError: a number is NaN or infinite.
    """
    if not is_finite(array):
        raise UserError(
            f"{where}: {name} holds NaN or infinity: use a checkpoint from before the "
            "training diverged, or copy the file again"
        )
    return array


def is_finite(array: np.ndarray) -> bool:
    """Return whether no number of an array is NaN or infinite; at some 7 GB/s."""
    flat = np.ravel(array)
    chunks = (flat[i : i + _CHUNK] for i in range(0, flat.size, _CHUNK))
    bits = _EXPONENTS.get(flat.dtype)
    if bits is None:
        return all(np.isfinite(chunk).all() for chunk in chunks)
    mask = np.uint16(bits)  # four times as fast as isfinite is here
    return all(((chunk.view(np.uint16) & mask) != mask).all() for chunk in chunks)


def place(
    put: Callable[[np.ndarray], Any], array: np.ndarray, name: str, where: Any
) -> Any:
    """Return what `put` makes of an array.

    Raises:
      UserError: `put` has raised OverflowError, as `cast` does.
    """
    try:
        return put(array)
    except OverflowError as error:
        raise UserError(
            f"{where}: {name} holds numbers beyond {error}: take bfloat16 or float32"
        ) from error


def cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Return an array of finite numbers in a dtype.

    Raises:
      OverflowError: a number is beyond the dtype, which its message is.
    """
    dtype = np.dtype(dtype)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        array = np.asarray(array, dtype)
    if not is_finite(array):
        raise OverflowError(dtype.name)
    return array


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path, checksums: Mapping[str, Any]) -> None:
    """Compare files in a folder with their SHA-256, by name.

    Raises:
      UserError: a file is missing or outside the folder, or has other bytes than were
        written.
    """
    for name, wanted in checksums.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{folder}: sha256 names {short(name)}, outside the folder")
        check_regular(path)
        if sha256(path) != wanted:
            raise UserError(
                f"{path} is truncated or damaged (its SHA-256 is not the one in "
                "config.json): copy or export the model again"
            )


def memory() -> int:
    """Return the bytes of memory that this machine has."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on every system
        return 2**63


def check_regular(path: Path) -> None:
    """Raise a UserError for what is no file, or is one that has no end, as a pipe."""
    if not path.is_file():
        reason = "no regular file" if path.exists() else "missing"
        raise UserError(f"{path} is {reason}: copy or export the whole model again")


def _check_start(path: Path) -> None:
    """Raise a UserError for what is no file of safetensors by its first bytes."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        raise _damaged(path, error.strerror) from error
    if start == b"version ":
        raise UserError(
            f"{path} is a pointer of Git LFS and not the file itself: run git lfs pull"
        )
    if int.from_bytes(start, "little") > _LARGEST_HEADER:
        raise _damaged(path, "it is no file of safetensors, or its header is too large")


def _damaged(path: Path, reason: str | None) -> UserError:
    return UserError(
        f"{path} is truncated or damaged ({reason}): copy, download or export it again"
    )
