"""Batches of pictures and tokens, the same for a seed and a step on any machine.

The picture at a position of the stream (step × batch size + row), the caption chosen
for it and its crop depend on the seed and the position alone: not on the number of
processes or threads, nor on where the iteration began.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

import numpy as np
from absl import flags
from PIL import Image

from dalle2_jax.data import image as images
from dalle2_jax.data.examples import BadExample, Source, as_list
from dalle2_jax.data.tokenizer import Tokenizer
from dalle2_jax.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")
TRIES = 100  # examples in a row that may be bad


class Batches:
    """An iterator over the batches of this process, endless."""

    def __init__(self, iterator):
        self._iterator = iterator
        self._skipped: Counter[str] = Counter()

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        batch, skipped = next(self._iterator)
        for bad in skipped:
            if bad.reason not in self._skipped:
                log.warning("skipping an example: %s", bad)
            self._skipped[bad.reason] += 1
        return batch

    def close(self) -> None:
        """Ends what reads ahead; there are no more batches."""
        self._iterator.close()

    def report(self) -> dict:
        """How many examples this iterator has skipped, and for which reasons."""
        return {"skipped": self._skipped.total(), "reasons": dict(self._skipped)}


def batches(
    source: Source,
    tokenizer: Tokenizer | None,
    *,
    batch_size: int,
    seed: int,
    sizes: Mapping[str, int],
    context_length: int | None = None,
    step: int = 0,
    crop: str = "center",
    crop_fraction: float = 1.0,
    degrade: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
    flip: bool = False,
    shuffle: bool = True,
    captions: bool = False,
    embeddings: bool = False,
    threads: int = 4,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Iterates over batches from `step` on: dicts of this process's rows.

    batch_size counts the rows of all processes; process k has the k-th run of
    batch_size / process_count rows. In a batch, with b such rows:
        NAME      uint8 [b, s, s, 3], for each NAME: s of `sizes`, all of one square,
                  which `crop` ("center" or "random") takes from the picture
        low       uint8 [b, l, l, 3], what `degrade` makes of "image", if given
        tokens    int32 [b, context_length], unless tokenizer is None
        caption   list of b str, if `captions`
        z_image   float32 [b, d], if `embeddings`; the source must have them
    With crop_fraction below 1, "image" is a random part of the picture at its size, of
    that fraction of its side. `flip` mirrors half of the pictures, whose captions must
    not speak of left and right. `shuffle` orders each epoch anew; endless sources are
    never shuffled. Each of `workers` processes makes whole batches with that many
    `threads`; without any, this one does. (Decoding leaves Python to the other threads,
    drawing `shapes` does not.)

    An unusable example is replaced by another one, counted in `.report()`, and logged
    once for each reason. Raises UserError if 100 in a row are unusable.
    """
    import grain

    if batch_size % process_count:
        raise UserError(
            f"a batch of {batch_size} does not divide by {process_count} processes"
        )
    if crop not in images.CROPS:
        raise UserError(f'crop is "{crop}"; it can be one of {images.CROPS}')
    if not 0 < crop_fraction <= 1:
        raise UserError(f"crop_fraction is {crop_fraction}; it is above 0 and up to 1")
    if len(source) == 0:
        raise UserError(f"{source.name} has no examples")
    if seed < 0:
        raise UserError(f"the seed is {seed}; it must be 0 or more")
    if source.embedded is not None:
        _check_pictures(source, sizes)
        if embeddings and (flip or crop != "center"):
            raise UserError(
                f"the embeddings of {source.name} are of the middle of each picture: "
                'crop must be "center" and flip False'
            )
    if workers < 0:
        raise UserError(f"workers is {workers}; the least, for none, is 0")

    def load(position: int, index: int) -> tuple[dict, list[BadExample]]:
        skipped = []
        for attempt in range(TRIES):
            if attempt:  # any other example will do, if it is always the same
                chance = np.random.default_rng((seed, position, attempt))
                index = int(chance.integers(len(source)))
            try:
                return prepare(source[index], position), skipped
            except BadExample as bad:
                skipped.append(bad)
        raise UserError(
            f"{TRIES} examples in a row of {source.name} are unusable; the last: "
            f"{skipped[-1]}"
        )

    chance_matters = crop == "random" or crop_fraction < 1 or flip or bool(degrade)

    def prepare(example: dict, position: int) -> dict:
        choices = as_list(example["caption"])
        rng, choice = None, 0
        if chance_matters or len(choices) > 1:  # a generator takes a while to make
            rng = np.random.default_rng((seed, position))
            choice = rng.integers(len(choices))
        row = {"caption": choices[choice]}
        if embeddings:
            row["z_image"] = np.asarray(example["z_image"], np.float32)
            row["tokens"] = example["tokens"][choice]
        if not sizes:
            return row
        square = square_of(example, max(sizes.values()), crop, rng)
        mirrored = flip and rng.random() < 0.5
        for name, size in sizes.items():
            picture = square(size)
            if mirrored:
                picture = picture[:, ::-1]
            if name == "image" and crop_fraction < 1:
                picture = _random_part(picture, round(size * crop_fraction), rng)
            row[name] = picture
        if degrade is not None:
            row["low"] = degrade(row["image"], rng)
        return row

    def collate(loaded) -> tuple[dict, list[BadExample]]:
        rows, skipped = zip(*loaded, strict=True)
        texts = [row.pop("caption") for row in rows]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if tokenizer is None:
            batch.pop("tokens", None)
        elif "tokens" not in batch:
            batch["tokens"] = tokenizer.encode(texts, context_length, warn=False)
        if captions:
            batch["caption"] = texts
        return batch, [bad for bads in skipped for bad in bads]

    indices = grain.MapDataset.range(len(source))
    if shuffle and not source.endless:
        indices = indices.shuffle(seed=seed % 2**32)  # all that grain takes
    # Whole local batches are dealt out to the processes, so that the rows of all of
    # them, one after the other, are the batch that one process alone would have.
    dataset = (
        indices.repeat(2**62 // len(source))  # for ever is too long to be sliced
        .map_with_index(load)
        .batch(batch_size // process_count, batch_fn=collate)
    )[step * process_count + process_index :: process_count]
    dataset = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )
    return Batches(_in_workers(dataset, workers))


def in_order(
    source: Source,
    indices: range,
    make: Callable[[dict], T],
    threads: int = 4,
    workers: int = 0,
) -> Iterator[T | BadExample]:
    """What `make` makes of the examples, one after the other and each once.

    In place of an unusable one comes its BadExample, which `make` may raise, too.
    """
    import grain

    def load(i: int) -> T | BadExample:
        try:
            return make(source[indices[int(i)]])
        except BadExample as bad:
            return bad

    dataset = (
        grain.MapDataset.range(len(indices))
        .map(load)
        .to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=4 * threads))
    )
    yield from _in_workers(dataset, workers)


def count_bad(
    found: Iterable[T | BadExample], counts: MutableMapping[str, int]
) -> Iterator[T]:
    """Passes on what is good, and counts what is bad by its reason."""
    for row in found:
        if isinstance(row, BadExample):
            counts[row.reason] = counts.get(row.reason, 0) + 1
        else:
            yield row


def _in_workers(dataset, workers: int):
    """The data set's iterator, with so many processes that prepare what it gives."""
    import grain

    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads its own, which need a program
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(workers, per_worker_buffer_size=2)
        )
    return iter(dataset)


def _check_pictures(source: Source, sizes: Mapping[str, int]) -> None:
    largest, have = max(sizes.values(), default=0), source.embedded.image_size or 0
    if largest > have:
        what = f"pictures of {have} px" if have else "no pictures"
        raise UserError(
            f"{source.name} has {what}, and {largest} px are needed: make it with "
            f"--image_size={largest}"
        )


def square_of(
    example: Mapping[str, Any],
    largest: int,
    crop: str = "center",
    rng: np.random.Generator | None = None,
) -> Callable[[int], np.ndarray]:
    """A picture's square as a function of the size wanted, uint8 [size, size, 3].

    Raises BadExample if it can't be read.
    """
    picture = example["image"]
    if callable(picture):
        return picture
    square = images.crop_square(read_picture(example, largest), crop, rng)
    return lambda size: images.resize_square(square, size)


def read_picture(
    example: Mapping[str, Any], at_least: int | None = None
) -> Image.Image:
    """The example's picture, see image.read; BadExample if it can't be read."""
    try:
        return images.read(example["image"], at_least)
    except UserError as error:
        raise BadExample("unreadable picture", f"{example['key']} ({error})") from error


def _random_part(
    picture: np.ndarray, side: int, rng: np.random.Generator
) -> np.ndarray:
    y, x = rng.integers(len(picture) - side + 1, size=2)
    return picture[y : y + side, x : x + side]
