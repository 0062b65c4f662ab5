"""Reads the weights that lie in a folder of transformers or diffusers.

NAME.safetensors, or several of them with NAME.safetensors.index.json, or NAME.bin,
which is a pickle and is read by PyTorch's own reader of weights alone.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dalle2_jax.errors import UserError, first_line

# What transformers and diffusers call their files.
NAMES = ("model", "diffusion_pytorch_model", "pytorch_model")

DTYPES = ("float32", "bfloat16", "float16")


class Weights(NamedTuple):
    """Weights on disk: nothing is read before `read` is called with a name."""

    where: Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def find(folder: str | Path) -> Weights:
    """The weights in a folder, whatever the file format; safetensors before pickles.

    Raises:
      UserError: there are none, a file is damaged, or PyTorch is needed and missing.
    """
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}")

    def present(ending: str) -> list[Path]:
        paths = [Path(folder) / f"{name}{ending}" for name in NAMES]
        return [path for path in paths if path.is_file()]

    for path in present(".safetensors"):
        return _safetensors(path, [path])
    for path in present(".safetensors.index.json"):
        return _safetensors(path, _shards(path))
    for path in present(".bin"):
        return _pickled(path)
    raise UserError(
        f"{folder} has no weights: none of {', '.join(NAMES)} is there as "
        ".safetensors, .safetensors.index.json or .bin"
    )


def of(where: Path, arrays: Mapping[str, np.ndarray]) -> Weights:
    """Arrays that are there already, as if they had been found."""
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    return Weights(where, shapes, arrays.__getitem__)


def join(where: Path, parts: Iterable[tuple[str, Weights]]) -> Weights:
    """Several as one: (prefix of all its names, weights) of each."""
    homes = {
        f"{prefix}{name}": (found, name)
        for prefix, found in parts
        for name in found.shapes
    }
    shapes = {full: found.shapes[name] for full, (found, name) in homes.items()}

    def read(full: str) -> np.ndarray:
        found, name = homes[full]
        return found.read(name)

    return Weights(where, shapes, read)


def read_json(path: Path) -> dict[str, Any]:
    """A config's JSON object.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object)")
    return value


def caster(dtype: str | None) -> Callable[[np.ndarray], np.ndarray]:
    """Casts arrays to a dtype by its name, or leaves them as they are.

    Raises:
      UserError: it is no dtype of weights.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    return lambda array: array if dtype is None else array.astype(jnp.dtype(dtype))


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({first_line(error)})") from error
    return [index.with_name(name) for name in sorted(names)]


def _safetensors(where: Path, paths: list[Path]) -> Weights:
    shapes, files = {}, {}
    for path in paths:
        with _open(path) as file:
            for name in file.keys():
                shapes[name] = tuple(file.get_slice(name).get_shape())
                files[name] = path

    def read(name: str) -> np.ndarray:
        with _open(files[name]) as file:
            return file.get_tensor(name)

    return Weights(where, shapes, read)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is missing, truncated or damaged ({first_line(error)}): "
            "copy or download it again"
        ) from error


def _pickled(path: Path) -> Weights:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a pickle, which only PyTorch can read safely: install it "
            "(pip install torch), or save the weights as safetensors"
        ) from None
    try:
        # Reads tensors and nothing else: a pickle can hold code, which is not run.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # What a damaged or malicious file raises depends on where it is wrong.
    except Exception as error:
        raise UserError(
            f"{path} is damaged, or holds more than weights ({first_line(error)})"
        ) from error

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        if tensor.dtype == torch.bfloat16:  # numpy has none
            tensor = tensor.float()
        return tensor.numpy()

    return Weights(path, shapes, read)
