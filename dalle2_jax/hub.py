"""Models by path or by name: whatever their format, here or on the Hugging Face hub."""

import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dalle2_jax import checkpoint, storage, tensors
from dalle2_jax.convert import karlo, weights
from dalle2_jax.errors import UserError, first_line, short
from dalle2_jax.parts.accept import part as accept_part
from dalle2_jax.pipeline import accept, models, values
from dalle2_jax.runtime import use_compilation_cache

# What is fetched of every repository, but for hidden folders.
CONFIGS = ("*.json", "*.txt")
HIDDEN = ("*/.*", ".*")
MOST_TILE = 2**16  # pixels a side


def load(
    *paths: str | Path,
    dtype: DTypeLike = "float32",
    offload: bool = False,
    tile: int | None = None,
    overlap: int | None = None,
    variant: str | None = None,
) -> models.Model:
    """Load a model, replicated over all devices.

    Weights are read one at a time and cast at once, so that memory holds no more than
    the model in ``dtype``, and one weight. Compiled programs are kept on disk from then
    on, see runtime.use_compilation_cache.

    Args:
      paths: of each a directory, a URL (gs://, s3://) or a hub id: an exported model, a
        folder of a diffusers unCLIP pipeline ("kakaobrain/karlo-v1-alpha"), or of a
        transformers CLIPModel ("openai/clip-vit-large-patch14") or one tower of it with
        its projection. None at all: the bundled model. Several are put together, and of
        parts that more than one has the last is taken. But a CLIP with both towers goes
        before one that has only one of them, and two of one tower each make one with
        both.
      dtype: of the params and the activations: "float32", "bfloat16" or "float16", or
        as jnp.bfloat16.
      offload: keep the params in the host's memory, and on the devices only those of
        the network that runs.
      tile: run upsamplers on tiles of so many pixels a side, in the memory that one
        takes. Pictures differ a little from those made whole, the less the larger tile
        and overlap are; a tile as large as the crops of its training loses nothing that
        an upsampler has learnt to use.
      overlap: of neighbouring tiles, in pixels; by default a quarter of a tile.
      variant: which files of weights to read where a part has several, as "fp16"; by
        default those without a variant, then the most precise.

    Raises:
      UserError: a path is not a model and cannot be fetched, a file is damaged, a
        number in it is not finite, names and shapes do not fit the networks that its
        config describes, parts do not fit one another, or the tiles do not fit its
        upsamplers.
    """
    if tile is None and overlap is not None:
        raise UserError(f"overlap={short(overlap)}: give tile, too")
    if tile is not None:
        tile = values.check_integer("tile", tile, 1, MOST_TILE)
        overlap = tile // 4 if overlap is None else overlap
        overlap = values.check_integer("overlap", overlap, 0, tile - 1)
    model = _load(paths or ("bundled",), dtype, offload, None, variant)
    return model if tile is None else models.tiled(model, tile, overlap)


def load_clip(
    path: str | Path, *, dtype: DTypeLike = "float32", variant: str | None = None
) -> models.Model:
    """Load CLIP alone, for `encode_text` and `encode_image`; of any of those formats.

    A folder of transformers may hold one tower with its projection.

    Args and Raises: see `load`.
    """
    model = _load((path,), dtype, False, ("clip",), variant)
    models.require(model, "clip")
    return model


def load_local_clip(
    path: str | Path, *, dtype: str = "float32"
) -> tuple[models.Model, str]:
    """CLIP on the devices of this process alone, and its fingerprint.

    Its params are float32, as those that stages read; `dtype` is of the activations.
    Args and Raises: see `load`.
    """
    export = karlo.read_any(find(path), only=("clip",), accept=accept_part)
    devices = models.mesh(jax.local_devices())
    placed = jax.tree.map(models.placer(devices), export.params)
    whole = [(str(path), export._replace(params=placed))]
    model = models.assemble(whole, devices, jnp.dtype(dtype))
    accept.whole(model)
    models.require(model, "tokenizer", "clip")
    return model, checkpoint.fingerprint(export.params["clip"])


def _load(
    paths: Sequence[Any],
    dtype: Any,
    offload: Any,
    only: Sequence[str] | None,
    variant: Any,
) -> models.Model:
    for path in paths:
        if not isinstance(path, str | os.PathLike) or not str(path):
            raise UserError(
                f"path={short(path)}: give a directory, a URL or the name of a model; "
                "several one after the other, not in a list"
            )
    dtype = _check_dtype(dtype)
    offload = values.check_bool("offload", offload)
    if variant is not None and not (isinstance(variant, str) and variant):
        raise UserError(f'variant={short(variant)}: give text, as "fp16"')
    use_compilation_cache(quiet=True)
    devices = models.mesh()
    put = models.placer(devices, dtype, offload)

    def place(array: np.ndarray) -> object:
        return put(tensors.cast(array, dtype))

    def read(path: str | Path) -> checkpoint.Export:
        return karlo.read_any(find(path, variant), place, only, variant, accept_part)

    exports = [(str(path), read(path)) for path in paths]
    model = models.assemble(exports, devices, dtype)
    accept.whole(model)
    return model


def _check_dtype(dtype: Any) -> np.dtype:
    """Return the dtype of a name or of what else NumPy takes for one."""
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if found is None or found.name not in weights.DTYPES:
        allowed = ", ".join(weights.DTYPES)
        raise UserError(f"dtype={short(dtype)}: must be one of {allowed}")
    return found


def find(path: str | Path, variant: str | None = None) -> Path:
    """Return a model's directory: itself, "bundled", or a copy of a URL or the hub's.

    Of each part the weights are fetched that `weights.choose` prefers, and no others.

    Raises:
      UserError: there is no such directory, and the hub has no such name, or can't be
        reached and the files are not in its cache; or no weights are of the variant.
    """
    if path == "bundled":
        return checkpoint.BUNDLED
    if storage.url(path):
        return storage.fetch(path)
    folder = storage.expand(path)
    try:
        exists = folder.exists()
    except OSError as error:  # a name that is too long
        raise UserError(f"cannot read {short(str(path))}: {error.strerror}") from error
    if exists or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return folder
    try:
        return _fetch(str(path), variant)
    except UserError:
        raise
    # It raises errors of its own, of the network's and of the file system's.
    except Exception as error:
        raise UserError(
            f"{path} is no directory here, and can't be fetched from the Hugging Face "
            f"hub ({first_line(error)}): check the name and the connection, or "
            "download it elsewhere and give its directory"
        ) from error


def _fetch(name: str, variant: str | None) -> Path:
    import huggingface_hub as hf

    try:
        files = hf.list_repo_files(name)
    except Exception as error:  # offline, for one
        # What an earlier call has fetched always has the configs.
        try:
            return Path(
                hf.snapshot_download(
                    name,
                    allow_patterns=list(CONFIGS),
                    ignore_patterns=list(HIDDEN),
                    local_files_only=True,
                )
            )
        except Exception:
            raise error from None
    if variant is not None:
        weights.check_variant(name, files, variant)
    wanted = [glob.escape(file) for file in needed(files, variant)]
    return Path(hf.snapshot_download(name, allow_patterns=wanted))


def needed(files: Iterable[str], variant: str | None = None) -> list[str]:
    """Return which files of a repository a model is made of.

    Args:
      files: their paths in the repository.
      variant: see `load`.
    """
    folders = defaultdict(list)
    for path in map(PurePosixPath, sorted(files)):
        if not any(part.startswith(".") for part in path.parts):
            folders[path.parent].append(path.name)
    found = []
    for folder, names in folders.items():
        chosen = weights.choose(names, variant)
        if not chosen and "model_index.json" not in names:
            # Of a model of this package, whose files have their parts' names.
            chosen = [name for name in names if name.endswith(".safetensors")]
        configs = [
            name
            for name in names
            if name.endswith((".json", ".txt")) and weights.parse(name) is None
        ]
        found += [str(folder / name) for name in (*configs, *chosen)]
    return found
