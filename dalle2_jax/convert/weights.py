"""The weights in a folder of transformers or diffusers.

They are one file, or several with an index, of safetensors or pickles, and a folder may
hold several variants of them:

    model.safetensors                           model.fp16.safetensors
    model.safetensors.index.json                model.safetensors.index.fp16.json
    diffusion_pytorch_model.bin                 pytorch_model.bin.index.json

Pickles are read by PyTorch's own reader of weights alone.
"""

import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dalle2_jax import checkpoint
from dalle2_jax.errors import UserError, first_line, short
from dalle2_jax.files import read_json
from dalle2_jax.tensors import (
    Weights,
    cast,
    check_regular,
    checked,
    open_safetensors,
)

# What transformers and diffusers call their files.
NAMES = ("model", "diffusion_pytorch_model", "pytorch_model")
# Of variants without another choice, those that say more come first.
_VARIANTS = ("fp32", "ema", "bf16", "fp16")

DTYPES = ("float32", "bfloat16", "float16")

_VARIANT = r"(?:\.(?!safetensors|bin|index|json)([\w-]+?))?"
_NAME = re.compile(
    rf"({'|'.join(NAMES)}){_VARIANT}(-\d+-of-\d+)?{_VARIANT}\.(safetensors|bin)"
    rf"(\.index{_VARIANT}\.json)?"
)


class File(NamedTuple):
    """What the name of a file of weights says.

    Attributes:
      name: of the file.
      stem: one of NAMES.
      variant: as "fp16"; "" for none.
      kind: "safetensors" or "bin".
      role: "whole", "index", or "shard", which only an index makes readable.
    """

    name: str
    stem: str
    variant: str
    kind: str
    role: str


def parse(name: str) -> File | None:
    """Return what a file's name says; None if it isn't one of weights."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    stem, before, shard, after, kind, index, of_index = match.groups()
    role = "index" if index else "shard" if shard else "whole"
    return File(name, stem, before or after or of_index or "", kind, role)


def choose(names: Iterable[str], variant: str | None = None) -> list[str]:
    """Return which of a folder's files to read: a whole one, or an index and shards.

    The variant that is asked for comes first, then none, then what is most precise; of
    each safetensors before pickles.

    Returns:
      Names; empty if none is a file of weights.
    """
    found = [file for file in map(parse, sorted(names)) if file is not None]

    def rank(file: File) -> tuple[Any, ...]:
        known = (variant or "", "", *_VARIANTS)
        place = known.index(file.variant) if file.variant in known else len(known)
        order = file.role == "index", NAMES.index(file.stem)
        return place, file.variant, file.kind == "bin", *order

    heads = [file for file in found if file.role != "shard"]
    if not heads:
        return []
    best = min(heads, key=rank)
    shards = [
        file.name
        for file in found
        if best.role == "index" and file[1:4] == best[1:4] and file.role == "shard"
    ]
    return [best.name, *shards]


def variants(names: Iterable[str]) -> list[str]:
    """Return the variants that are in the names of files, each once."""
    files = [parse(name) for name in names]
    return sorted({file.variant for file in files if file is not None} - {""})


def check_variant(where: Any, paths: Iterable[str], variant: str) -> None:
    """Raise a UserError if none of the files of a model is of that variant."""
    found = variants(path.rpartition("/")[2] for path in paths)
    if variant not in found:
        raise UserError(
            f"{where} has no weights of the variant {short(variant)}: it has "
            f"{', '.join(found) or 'no variants'}"
        )


def find(folder: str | Path, variant: str | None = None) -> Weights:
    """Return the weights in a folder, whatever the file format (see `choose`).

    Raises:
      UserError: there are none, a file is damaged, or PyTorch is needed and missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    names = [path.name for path in folder.iterdir() if path.is_file()]
    chosen = choose(names, variant)
    if not chosen:
        raise UserError(
            f"{folder} has no weights: none of {', '.join(NAMES)} is there as "
            ".safetensors or .bin, whole or with an index, or as a variant of these"
        )
    file = parse(chosen[0])
    where = folder / file.name
    paths = _shards(where) if file.role == "index" else [where]
    if file.kind == "safetensors":
        return _merge(where, [open_safetensors(path) for path in paths])
    others = [n for n in variants(names) if choose(names, n)[0].endswith("safetensors")]
    torch = _torch(where, others)
    return _merge(where, [_pickled(path, torch) for path in paths])


def read_config(
    folder: Path, *needed: str, name: str = "config.json"
) -> dict[str, Any]:
    """Return a config, which must have the keys that are needed."""
    config = read_json(folder / name, checkpoint.LARGEST_CONFIG)
    for key in needed:
        if key not in config:
            raise UserError(f"{folder / name} lacks the key {key}")
    return config


def of(where: Path, arrays: Mapping[str, np.ndarray]) -> Weights:
    """Return arrays in memory as weights."""
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    return Weights(where, shapes, arrays.__getitem__)


def join(where: Path, parts: Iterable[tuple[str, Weights]]) -> Weights:
    """Return several weights as one; each comes with a prefix of its names."""
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


def caster(dtype: str | None) -> Callable[[np.ndarray], np.ndarray]:
    """Return what casts arrays to a dtype, or for None leaves them as they are.

    Raises:
      UserError: the dtype is not one of DTYPES.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    return lambda array: array if dtype is None else cast(array, jnp.dtype(dtype))


def _merge(where: Path, files: list[Weights]) -> Weights:
    return files[0] if len(files) == 1 else join(where, [("", file) for file in files])


def _shards(index: Path) -> list[Path]:
    """The files that an index names, which must lie beside it."""
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"{index} is damaged: weight_map must be an object of names")
    for name in weights.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
            raise UserError(
                f"{index} names the file {short(name)}: must be one beside it, of "
                "letters, digits and . _ -"
            )
    return [index.with_name(name) for name in sorted(set(weights.values()))]


def _torch(path: Path, variants: list[str]) -> Any:
    try:
        import torch
    except ImportError:
        other = f", or give variant={variants[0]!r}" if variants else ""
        raise UserError(
            f"{path} is a pickle, which only PyTorch can read safely: install it "
            f"(pip install torch), or save the weights as safetensors{other}"
        ) from None
    return torch


def _pickled(path: Path, torch: Any) -> Weights:
    check_regular(path)
    # Of today's format, an archive, or of before PyTorch 1.6, which can't be mapped.
    archive = zipfile.is_zipfile(path)
    try:
        if archive:
            with zipfile.ZipFile(path) as members:
                sizes = sum(member.file_size for member in members.infolist())
            if sizes > path.stat().st_size:
                raise ValueError("compressed, or with overlapping members")
        # Reads tensors and nothing else: a pickle can hold code, which is not run.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if not isinstance(name, str) or tensor.layout != torch.strided:
                raise ValueError(f"{short(name)} is no weight")
            if tensor.numel() * tensor.element_size() > path.stat().st_size:
                raise ValueError(f"{short(name)} is larger than the file")
    # What a damaged or malicious file raises depends on where it is wrong.
    except Exception as error:
        # PyTorch would advise to run the code.
        refused = isinstance(error, pickle.UnpicklingError)
        reason = "code, or another object" if refused else first_line(error)
        raise UserError(
            f"{path} is damaged, or holds more than weights ({reason})"
        ) from error

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        if not tensor.is_floating_point():
            raise UserError(
                f"{path}: {short(name)} is of dtype {tensor.dtype}: must be one of "
                "floating-point numbers"
            )
        if tensor.dtype == torch.bfloat16:  # numpy has none
            tensor = tensor.float()
        return checked(tensor.detach().numpy(), name, path)

    return Weights(path, shapes, read)
