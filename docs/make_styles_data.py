"""Prepares the pictures of things in eight styles for training.

    python docs/make_styles_data.py SHARDS OUT

SHARDS are webdataset tars of 128 px pictures, each with the captions
["THING in the style of STYLE", "THING"]. Writes:

OUT/128            all pictures in tars, those of one thing beside each other, for
                   --config.data.block. The longer caption is there three times, and so
                   is chosen three times as often.
OUT/64             the same at 64 px, for all stages but the upsampler.
OUT/heldout.jsonl  for --config.data.keep: one in 20 pairs of a thing and a style, by a
                   hash of both.
OUT/train.jsonl    all others but the pictures that look like a held-out one: some
                   things have two names and one picture.
"""

import io
import json
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from dalle2_jax.data import image
from dalle2_jax.data.sources import open_all

SHARDS = 8
EVERY = 20
# Root mean square of the difference at 32 px, of 0 to 1, below which two are alike.
ALIKE = 0.015


def main(shards: str, out: str) -> None:
    source = open_all("webdataset", shards)
    examples = [source[i] for i in range(len(source))]
    for example in examples:
        thing, style = example["caption"][0].split(" in the style of ")
        example |= {"thing": thing, "style": style}
    # A thing's styles in any order, so that each is beside each of the others.
    examples.sort(key=lambda e: (e["thing"], hash_of(e["thing"], e["style"])))
    for i, example in enumerate(examples):
        shard = f"styles-{i * SHARDS // len(examples):05d}.tar"
        example |= {"shard": shard, "name": example["key"].split(":", 1)[1]}
    folder = Path(out).expanduser()
    for size in (64, 128):
        write_shards(examples, folder / str(size), size)
    write_lists(examples, folder)


def write_lists(examples: list[dict], folder: Path) -> None:
    hashes = np.array([hash_of(e["thing"], e["style"]) for e in examples])
    held_out = hashes % EVERY == 0
    pictures = small(examples)
    squares = np.square(pictures).sum(1)
    products = pictures @ pictures[held_out].T
    apart = (squares[:, None] + squares[held_out] - 2 * products) / pictures.shape[1]
    lists = {"heldout": held_out, "train": apart.min(1) >= ALIKE**2}
    for name, chosen in lists.items():
        lines = [line(examples[i]) for i in np.flatnonzero(chosen)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        print(f"{name}: {len(lines)} pictures")
    print(f"left out, as they look like a held-out one: {sum(~held_out & ~chosen)}")


def hash_of(thing: str, style: str) -> int:
    return zlib.crc32(f"{thing}\t{style}".encode())


def line(example: dict) -> str:
    fields = {
        "key": f"{example['shard']}:{example['name']}",
        "thing": example["thing"],
        "style": example["style"],
    }
    return json.dumps(fields) + "\n"


def small(examples: list[dict]) -> np.ndarray:
    """The pictures at 32 px, [n, 32 · 32 · 3] from 0 to 1."""
    pictures = [image.square(example["image"], 32) for example in examples]
    return np.stack(pictures).reshape(len(examples), -1).astype(np.float32) / 255


def write_shards(examples: list[dict], folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in dict.fromkeys(example["shard"] for example in examples):
        with tarfile.open(folder / shard, "w") as tar:
            for example in examples:
                if example["shard"] == shard:
                    add(tar, f"{example['name']}.webp", resize(example["image"], size))
                    full, bare = example["caption"]
                    captions = json.dumps({"caption": [full] * 3 + [bare]})
                    add(tar, f"{example['name']}.json", captions.encode())
    print(f"{size} px: {len(examples)} pictures in {folder}")


def resize(content: bytes, size: int) -> bytes:
    """The file of the picture at a size; itself if it has it."""
    if Image.open(io.BytesIO(content)).size == (size, size):
        return content
    file = io.BytesIO()
    picture = Image.fromarray(image.square(content, size))
    picture.save(file, format="WEBP", quality=90, method=4)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
