"""Models by path or by name: whatever their format, here or on the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from dalle2_jax import checkpoint, storage
from dalle2_jax.convert import karlo, weights
from dalle2_jax.errors import UserError, first_line
from dalle2_jax.pipeline import models

# What is fetched of a repository: never a copy of the weights in another format, or in
# half precision. Pickles only where there is nothing else.
FILES = ("*.json", "*.txt", "*.safetensors")
PICKLES = ("*.bin",)
COPIES = ("*.fp16.*", "*.non_ema.*", "*/.*")


def load(
    *paths: str | Path,
    dtype: str = "float32",
    offload: bool = False,
    tile: int | None = None,
    overlap: int | None = None,
) -> models.Model:
    """Loads a model, replicated over all devices.

    Weights are read one at a time and cast at once, so that memory holds no more than
    the model in ``dtype``, and one weight.

    Args:
      paths: of each a directory, a URL (gs://, s3://) or a hub id: an exported model, a
        folder of a diffusers unCLIP pipeline ("kakaobrain/karlo-v1-alpha"), or of a
        transformers CLIPModel ("openai/clip-vit-large-patch14"). None at
        all: the bundled model. Several are put together, and of parts that more than
        one has the last is taken. But a CLIP with both towers goes before one that has
        only the text's.
      dtype: of the params and the activations: "float32", "bfloat16" or "float16".
      offload: keep the params in the host's memory, and on the devices only those of
        the network that runs.
      tile: run upsamplers on tiles of so many pixels a side, in the memory that one
        takes. Pictures differ a little from those made whole, the less the larger tile
        and overlap are; a tile as large as the crops of its training loses nothing that
        an upsampler has learnt to use.
      overlap: of neighbouring tiles, in pixels; by default a quarter of a tile.

    Raises:
      UserError: a path is not a model and cannot be fetched, a file is damaged, or
        names and shapes do not fit the networks that its config describes, or the
        tiles do not fit its upsamplers.
    """
    model = _load(paths or ("bundled",), dtype, offload, None)
    if tile is None:
        if overlap is not None:
            raise UserError(f"overlap={overlap}: give tile, too")
        return model
    return models.tiled(model, tile, tile // 4 if overlap is None else overlap)


def load_clip(path: str | Path, *, dtype: str = "float32") -> models.Model:
    """Loads CLIP alone, for `encode_text` and `encode_image`; of any of those formats.

    Args and Raises: see `load`.
    """
    model = _load((path,), dtype, False, ("clip",))
    models.require(model, "clip")
    return model


def load_local_clip(
    path: str | Path, *, dtype: str = "float32"
) -> tuple[models.Model, str]:
    """CLIP on the devices of this process alone, and its fingerprint.

    Its params are float32, as those that stages read; `dtype` is of the activations.
    Args and Raises: see `load`.
    """
    export = karlo.read_any(find(path), only=("clip",))
    devices = models.mesh(jax.local_devices())
    placed = jax.tree.map(models.placer(devices), export.params)
    whole = [(str(path), export._replace(params=placed))]
    model = models.assemble(whole, devices, jnp.dtype(dtype))
    models.require(model, "tokenizer", "clip")
    return model, checkpoint.fingerprint(export.params["clip"])


def _load(
    paths: Sequence[str | Path],
    dtype: str,
    offload: bool,
    only: Sequence[str] | None,
) -> models.Model:
    if dtype not in weights.DTYPES:
        raise UserError(f"dtype={dtype!r}: must be one of {', '.join(weights.DTYPES)}")
    devices = models.mesh()
    place = models.placer(devices, jnp.dtype(dtype), offload)
    exports = [(str(path), karlo.read_any(find(path), place, only)) for path in paths]
    return models.assemble(exports, devices, jnp.dtype(dtype))


def find(path: str | Path) -> Path:
    """The directory of a model: itself, "bundled", a copy of a URL or of the hub's.

    Raises:
      UserError: there is no such directory, and the hub has no such name, or can't be
        reached and the files are not in its cache.
    """
    if path == "bundled":
        return checkpoint.BUNDLED
    if storage.url(path):
        return storage.fetch(path)
    folder = storage.expand(path)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return folder
    from huggingface_hub import snapshot_download

    def fetch(patterns: Sequence[str]) -> Path:
        return Path(
            snapshot_download(
                str(path), allow_patterns=list(patterns), ignore_patterns=list(COPIES)
            )
        )

    try:
        found = fetch(FILES)
        if not any(found.rglob("*.safetensors")):
            found = fetch(FILES + PICKLES)
        return found
    # It raises errors of its own, of the network's and of the file system's.
    except Exception as error:
        raise UserError(
            f"{path} is no directory here, and can't be fetched from the Hugging Face "
            f"hub ({first_line(error)}): check the name and the connection, or "
            "download it elsewhere and give its directory"
        ) from error
