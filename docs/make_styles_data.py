"""Prepares the pictures of things in eight styles for training.

    python docs/make_styles_data.py SHARDS OUT

SHARDS are webdataset tars of 128 px pictures, each with the captions
["THING in the style of STYLE", "THING"]. OUT gets the same tars at 64 px, in OUT/64,
which all stages but the upsampler can train on, and two lists for --config.data.keep
that fit both sizes:

heldout.jsonl  one in 20 pairs of a thing and a style, by a hash of both.
train.jsonl    all others but the pictures that look like a held-out one: some things
               have two names and one picture.
"""

import io
import json
import sys
import tarfile
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from dalle2_jax.data import image
from dalle2_jax.data.sources import open_all

SIZE = 64
EVERY = 20
# Root mean square of the difference at 32 px, of 0 to 1, below which two are alike.
ALIKE = 0.015


def main(shards: str, out: str) -> None:
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    source = open_all("webdataset", shards)
    examples = [source[i] for i in range(len(source))]
    rows = [row(example) for example in examples]
    write_lists(rows, small(examples), folder)
    write_shards(examples, folder / str(SIZE))


def row(example: dict) -> dict[str, str]:
    thing, style = example["caption"][0].split(" in the style of ")
    return {"key": example["key"], "thing": thing, "style": style}


def is_held_out(thing: str, style: str) -> bool:
    return zlib.crc32(f"{thing}\t{style}".encode()) % EVERY == 0


def small(examples: list[dict]) -> np.ndarray:
    """The pictures at 32 px, [n, 32 · 32 · 3] from 0 to 1."""
    pictures = [image.square(example["image"], 32) for example in examples]
    return np.stack(pictures).reshape(len(examples), -1).astype(np.float32) / 255


def write_lists(rows: list[dict], pictures: np.ndarray, folder: Path) -> None:
    held_out = np.array([is_held_out(row["thing"], row["style"]) for row in rows])
    squares = np.square(pictures).sum(1)
    products = pictures @ pictures[held_out].T
    apart = (squares[:, None] + squares[held_out] - 2 * products) / pictures.shape[1]
    nearest = apart.min(1)
    lists = {"heldout": held_out, "train": nearest >= ALIKE**2}
    for name, chosen in lists.items():
        lines = [json.dumps(rows[i]) + "\n" for i in np.flatnonzero(chosen)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        print(f"{name}: {len(lines)} pictures")
    print(f"left out, as they look like a held-out one: {sum(~held_out & ~chosen)}")


def write_shards(examples: list[dict], folder: Path) -> None:
    """Writes the pictures at SIZE, in tars of the names that the keys tell."""
    shards = defaultdict(list)
    for example in examples:
        shard, key = example["key"].split(":", 1)
        shards[shard].append((key, example))
    folder.mkdir(exist_ok=True)
    for shard, members in shards.items():
        with tarfile.open(folder / shard, "w") as tar:
            for key, example in members:
                add(tar, f"{key}.webp", encode(image.square(example["image"], SIZE)))
                captions = {"caption": example["caption"]}
                add(tar, f"{key}.json", json.dumps(captions).encode())
    print(f"{len(shards)} shards of {SIZE} px in {folder}")


def encode(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="WEBP", quality=90, method=6)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
