"""The input pipeline on one core: ours beside webdataset's in torch's DataLoader.

    python benchmarks/loading.py                     (needs torch and webdataset)
    python benchmarks/loading.py --sizes 256 --picture 640 480

Both read the same tars of JPEGs, which are made here from a seed, and turn them into
batches of uint8 pictures and of tokens: decoded by Pillow, the middle square, resized.
Both let Pillow decode at 1/2, 1/4 or 1/8 of the size where that leaves enough pixels,
so that pictures must be equal to the last bit, or the script ends; "full" decodes all
pixels, as a loader does that doesn't care. webdataset reads the tars from front to
back, ours at random. All take turns; a turn's first batches don't count.
"""

import argparse
import contextlib
import functools
import io
import multiprocessing
import os
import statistics
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one core, and a fork

import numpy as np
from PIL import Image, ImageDraw

from dalle2_jax.data import tokenizer as tokenizers
from dalle2_jax.data.batches import batches
from dalle2_jax.data.rows import Rows
from dalle2_jax.data.sources import captions, open_source

BATCH = 64
CONTEXT = 77
SHARDS = 4
COMPARED = 8  # batches
QUALITY = 90
ADJECTIVES = "bright old quiet narrow green distant broken wooden crowded empty".split()
THINGS = "street harbour garden kitchen mountain dog bicycle market bridge face".split()


class Loader(NamedTuple):
    """Who makes batches, and how.

    Attributes:
      who: "ours" or "webdataset".
      how: threads or processes.
      start: -> an iterator over batches, which can be closed.
      full: whether JPEGs are decoded at their whole size.
    """

    who: str
    how: str
    start: Callable[[], Any]
    full: bool = False


# The pictures.


def write_tars(folder: Path, count: int, size: tuple[int, int], seed: int) -> None:
    """As many pictures in SHARDS tars, each with a caption that no other has."""
    for shard, indices in enumerate(np.array_split(np.arange(count), SHARDS)):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for i in indices:
                rng = np.random.default_rng((seed, i))
                file = io.BytesIO()
                make_picture(rng, *size).save(file, "JPEG", quality=QUALITY)
                add(tar, f"{i:06d}.jpg", file.getvalue())
                add(tar, f"{i:06d}.txt", make_caption(rng, i).encode())


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def make_caption(rng: np.random.Generator, i: int) -> str:
    first, second = rng.choice(ADJECTIVES, 2)
    near, far = rng.choice(THINGS, 2)
    return f"a photo, number {i}, of a {first} {near} in front of a {second} {far}"


def make_picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Like a photo to a JPEG decoder: soft fields, things with edges, and grain."""
    light = sum(
        contrast * field(rng, cells, width, height)
        for cells, contrast in ((3, 45), (12, 20), (48, 10), (160, 5))
    )
    colour = [20 * field(rng, 4, width, height) for _ in range(3)]
    values = np.stack(colour, axis=-1) + light[..., None] + 120
    picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(8):
        x, y = rng.uniform(0, (width, height))
        a, b = rng.uniform(0.02, 0.2, 2) * min(width, height)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        paint = tuple(rng.integers(256, size=3).tolist())
        shape((x - a, y - b, x + a, y + b), fill=paint)
    grain = 5 * rng.standard_normal((height, width, 1), np.float32)
    values = np.asarray(picture) + grain
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def field(rng: np.random.Generator, cells: int, width: int, height: int) -> np.ndarray:
    """Smooth noise, [height, width], that changes over 1 / cells of the picture."""
    noise = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
    return np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))


# Who reads them. A batch has pictures [b, size, size, 3] under str(size), and tokens.


def ours(
    source: Any, tokenizer: tokenizers.Tokenizer, sizes: Sequence[int], threads: int
) -> Iterator[dict[str, Any]]:
    return batches(
        source,
        tokenizer,
        Rows({str(size): size for size in sizes}),
        batch_size=BATCH,
        seed=0,
        context_length=CONTEXT,
        threads=threads,
    )


def theirs(
    folder: Path,
    tokenizer: tokenizers.Tokenizer,
    sizes: Sequence[int],
    workers: int,
    full: bool,
) -> Iterator[dict[str, Any]]:
    import webdataset
    from torch.utils.data import DataLoader

    def load(example: dict[str, Any]) -> dict[str, Any]:
        picture = Image.open(io.BytesIO(example["jpg"]), formats=["JPEG"])
        if not full:
            picture.draft(None, (max(sizes), max(sizes)))
        square = middle(picture.convert("RGB"))
        row: dict[str, Any] = {str(size): resize(square, size) for size in sizes}
        row["caption"] = example["txt"].decode()
        return row

    def collate(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        batch = {str(s): np.stack([row[str(s)] for row in rows]) for s in sizes}
        texts = [row["caption"] for row in rows]
        batch["tokens"] = tokenizer.encode(texts, CONTEXT, warn=False)
        return batch

    tars = [str(file) for file in sorted(folder.glob("*.tar"))]
    data = webdataset.WebDataset(tars, shardshuffle=False).map(load)
    data = data.batched(BATCH, collation_fn=collate, partial=False).repeat()
    context = "fork" if workers else None  # which starts at once
    # A generator, whose end is the loader's.
    yield from DataLoader(
        data, batch_size=None, num_workers=workers, multiprocessing_context=context
    )


def middle(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    if picture.size == (side, side):
        return picture
    x, y = ((length - side) // 2 for length in picture.size)
    return picture.crop((x, y, x + side, y + side))


def resize(square: Image.Image, size: int) -> np.ndarray:
    if square.size != (size, size):
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(square)


def loaders(
    folder: Path, source: Any, tokenizer: tokenizers.Tokenizer, sizes: Sequence[int]
) -> list[Loader]:
    found = [
        Loader(
            "ours",
            f"{threads} thread{'s' * (threads > 1)}",
            functools.partial(ours, source, tokenizer, sizes, threads),
        )
        for threads in (1, 2)
    ]
    for full in (False, True):
        for workers in (0, 1):
            start = functools.partial(theirs, folder, tokenizer, sizes, workers, full)
            how = "1 worker" if workers else "no worker"
            found.append(Loader("webdataset", how, start, full))
    return found


# Measuring.


def compare(us: Loader, them: Loader, count: int) -> float:
    """The mean difference of pictures with the same tokens, of 255; 0 if all are equal.

    Ends the script if one has a picture that the other has not.
    """
    wanted = {}
    for batch in take(them, COMPARED):
        batch = {name: np.asarray(value) for name, value in batch.items()}
        tokens = batch.pop("tokens")
        for i, row in enumerate(tokens):
            wanted[row.tobytes()] = {name: value[i] for name, value in batch.items()}
    differences = []
    for batch in take(us, -(-count // BATCH)):  # an epoch
        tokens = batch.pop("tokens")
        for i, row in enumerate(tokens):
            expected = wanted.pop(row.tobytes(), {})
            for name, picture in expected.items():
                difference = np.abs(np.int16(batch[name][i]) - np.int16(picture))
                differences.append(difference.mean())
    if wanted:
        sys.exit(f"{len(wanted)} pictures of webdataset's are not among ours")
    return float(np.mean(differences))


def take(loader: Loader, count: int) -> Iterator[dict[str, Any]]:
    with contextlib.closing(loader.start()) as iterator:
        for _ in range(count):
            yield next(iterator)


def turn(loader: Loader, flags: argparse.Namespace) -> float:
    """Pictures a second."""
    now = cpu_time if flags.cpu_time else time.perf_counter
    with contextlib.closing(loader.start()) as iterator:
        for _ in range(flags.warmup):
            next(iterator)
        start = now()
        for _ in range(flags.batches):
            next(iterator)
        return flags.batches * BATCH / (now() - start)


def cpu_time() -> float:
    """Seconds of the CPU of this process and of its workers."""
    workers = [child.pid for child in multiprocessing.active_children()]
    # What clock_getcpuclockid(3) makes of the number of a process.
    clocks = [~pid << 3 | 2 for pid in workers if pid is not None]
    return time.process_time() + sum(time.clock_gettime(clock) for clock in clocks)


def measure(
    folder: Path,
    source: Any,
    tokenizer: tokenizers.Tokenizer,
    sizes: Sequence[int],
    flags: argparse.Namespace,
) -> list[str]:
    all_of_them = loaders(folder, source, tokenizer, sizes)
    us = all_of_them[0]
    difference = {}
    for full in (False, True):
        them = next(x for x in all_of_them if x.who != us.who and x.full == full)
        difference[full] = compare(us, them, len(source))
    if difference[False]:
        sys.exit(
            f"{sizes} px: pictures differ by {difference[False]} of 255: must be 0"
        )
    rates: dict[Loader, list[float]] = {loader: [] for loader in all_of_them}
    for _ in range(flags.blocks):
        for loader, found in rates.items():
            found.append(turn(loader, flags))
    medians = {loader: statistics.median(found) for loader, found in rates.items()}
    best = max(rate for loader, rate in medians.items() if loader.who == us.who)
    rows = []
    for loader, rate in medians.items():
        mine = loader.who == us.who
        cells = [
            " and ".join(map(str, sizes)),
            loader.who + (", full" if loader.full else ""),
            loader.how,
            f"{rate:.0f}",
            f"{min(rates[loader]):.0f} … {max(rates[loader]):.0f}",
            f"{1e3 / rate:.2f}",
            "" if mine else f"{best / rate:.2f}",
            "" if mine else f"{difference[loader.full]:.2g}",
        ]
        rows.append(row(cells))
    return rows


# Writing it down.


COLUMNS = (
    *("size, px", "whose", "how", "images/s", "of all blocks", "ms an image"),
    *("ours, the faster / theirs", "mean difference, of 255"),
)


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["64", "256", "64,256"],
        help="of the pictures in a batch, as 64, or 64,256 for both",
    )
    parser.add_argument("--count", type=int, default=2000, help="pictures in the tars")
    parser.add_argument("--picture", type=int, nargs=2, default=(512, 512), help="px")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    parser.add_argument("--folder", help="keeps the tars, for another run")
    parser.add_argument("--warmup", type=int, default=2, help="batches")
    parser.add_argument("--blocks", type=int, default=5, help="that take turns")
    parser.add_argument("--batches", type=int, default=16, help="of a block")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of the CPU in place of the wall's, where others use it too",
    )
    flags = parser.parse_args(argv)
    if flags.count < COMPARED * BATCH + BATCH:
        parser.error(f"--count must be {COMPARED * BATCH + BATCH} or more")

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(1)
    # Workers neither use JAX nor our threads.
    warnings.filterwarnings("ignore", message=".*fork.*")
    with contextlib.ExitStack() as stack:
        folder = Path(
            flags.folder or stack.enter_context(tempfile.TemporaryDirectory())
        )
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.glob("*.tar")):
            write_tars(folder, flags.count, tuple(flags.picture), flags.seed)
        size = sum(file.stat().st_size for file in folder.glob("*.tar"))
        source = open_source("webdataset", f"{folder}/*.tar", holdout=0.0)
        print(f"{len(source)} pictures, {size / len(source) / 1024:.0f} KiB each\n")
        tokenizer = tokenizers.train(captions(source), 1024, CONTEXT)
        print(row(COLUMNS))
        print(row(["---"] * len(COLUMNS)), flush=True)
        for sizes in flags.sizes:
            sizes = [int(size) for size in sizes.split(",")]
            rows = measure(folder, source, tokenizer, sizes, flags)
            print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
