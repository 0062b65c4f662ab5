"""Reads the weights that lie in a folder of transformers or diffusers.

NAME.safetensors, or several of them with NAME.safetensors.index.json, or NAME.bin,
which is a pickle and is read by PyTorch's own reader of weights alone.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from dalle2_jax.errors import UserError, first_line

# What transformers and diffusers call their files.
NAMES = ("model", "diffusion_pytorch_model", "pytorch_model")


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
