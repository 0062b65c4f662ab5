"""CLIP's embeddings of all of a source, written to disk."""

import io
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from dalle2_jax.data import embeddings
from dalle2_jax.data.batches import count_bad, in_order
from dalle2_jax.data.examples import Source, as_list
from dalle2_jax.data.rows import square_of
from dalle2_jax.pipeline import encode
from dalle2_jax.pipeline.models import Model


def embed(
    clip: Model,
    source: Source,
    out: str | Path,
    settings: Mapping[str, Any],
    *,
    batch_size: int = 64,
    threads: int = 4,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> dict[str, Any] | None:
    """Writes this process's shards; returns the metadata if none is missing now.

    Args:
      clip: a Model with a CLIP.
      source: a Source with an end, or settings["examples"] to be its end.
      out: see data/embeddings.py.
      settings: what identifies the folder: `clip`, the fingerprint; `examples`, how
        many; `shard_size`; `image_size`, or None; `image_format`; `z_dtype`.
      batch_size: pictures at once on a device.
    """
    make = partial(
        prepare,
        size=encode.image_size(clip),
        stored=settings["image_size"],
        image_format=settings["image_format"],
    )
    z_dtype = settings["z_dtype"]
    examples, shard_size = settings["examples"], settings["shard_size"]
    shards = -(-examples // shard_size)
    embeddings.begin(out, {**settings, "shards": shards})
    for number in range(process_index, shards, process_count):
        file = embeddings.shard(out, number, shards)
        if file.exists():
            continue
        start = number * shard_size
        indices = range(start, min(start + shard_size, examples))
        skipped: Counter[str] = Counter()
        rows = count_bad(in_order(source, indices, make, threads, workers), skipped)
        found = (
            {**row, "z_image": row["z_image"].astype(z_dtype)}
            | {"z_text": row["z_text"].astype(z_dtype)}
            for row in encode.encode_examples(clip, rows, batch_size)
        )
        keys = embeddings.write_shard(file, found, skipped)
        bad = "".join(f", {n} skipped: {reason}" for reason, n in skipped.items())
        print(f"shard {number + 1}/{shards}: {len(keys)} pictures{bad}")
    return embeddings.finish(out)


def prepare(
    example: Mapping[str, Any], *, size: int, stored: int | None, image_format: str
) -> dict[str, Any]:
    """An example with its middle square for CLIP, and as a file of the stored size."""
    square = square_of(example, max(size, stored or 0))
    row = {"key": example["key"], "captions": as_list(example["caption"])}
    row |= {"clip_image": square(size), "image": None}
    if stored is not None:
        file = io.BytesIO()
        Image.fromarray(square(stored)).save(file, image_format, quality=95)
        row["image"] = file.getvalue()
    return row
