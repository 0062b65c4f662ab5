"""Batches of pictures and tokens, the same for a seed and a step on any machine.

The picture at a position of the stream (step × batch size + row), the caption chosen
for it and its crop depend on the seed and the position alone: not on the number of
processes or threads, nor on where the iteration began.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import TypeVar

import numpy as np
from absl import flags

from dalle2_jax import rules
from dalle2_jax.data.examples import BadExample, Source
from dalle2_jax.data.rows import Rows
from dalle2_jax.data.tokenizer import Tokenizer
from dalle2_jax.errors import UserError, first_line

log = logging.getLogger(__name__)

T = TypeVar("T")
TRIES = 100  # examples in a row that may be bad
RULES = {
    "threads": rules.whole(0, 1024),
    "workers": rules.whole(0, 1024),
}
BLOCK = {"block": rules.COUNT}


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
    rows: Rows,
    *,
    batch_size: int,
    seed: int,
    context_length: int | None = None,
    block: int = 1,
    step: int = 0,
    captions: bool = False,
    threads: int = 4,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Iterates over batches from `step` on: dicts of this process's rows.

    batch_size counts the rows of all processes; process k has the k-th run of
    batch_size / process_count rows. In a batch, with b such rows:
        NAME      uint8 [b, s, s, 3], for each picture of `rows`
        low       uint8 [b, l, l, 3], if `rows` degrade
        tokens    int32 [b, context_length], unless tokenizer is None
        caption   list of b str, if `captions`
        z_image   float32 [b, d], if `rows` have embeddings
    Each epoch is in a new order, but endless sources come as they are. Every `block`
    neighbours of the source stay together, for a loss that compares the examples of a
    batch. Each of `workers` processes makes whole batches with that many `threads`;
    without any, this one does. (Decoding leaves Python to the other threads, drawing
    `shapes` does not.)

    An unusable example is replaced by another one, counted in `.report()`, and logged
    once for each reason. Raises UserError if 100 in a row are unusable, or if a worker
    is killed.
    """
    import grain

    if batch_size % process_count:
        raise UserError(
            f"a batch of {batch_size} does not divide by {process_count} processes"
        )
    if len(source) == 0:
        raise UserError(f"{source.name} has no examples")
    rules.check({"seed": seed}, {"seed": rules.SEED}, "batches")
    values = {"threads": threads, "workers": workers, "block": block}
    rules.check(values, RULES | BLOCK, "data")
    local = batch_size // process_count
    if local % block:
        raise UserError(
            f"data.block is {block}: it must divide the {local} rows of a process"
        )
    rows.check(source)

    def load(position: int, index: int) -> tuple[dict, list[BadExample]]:
        skipped = []
        for attempt in range(TRIES):
            if attempt:  # any other example will do, if it is always the same
                chance = np.random.default_rng((seed, position, attempt))
                index = int(chance.integers(len(source)))
            try:
                return rows.make(source[index], (seed, position)), skipped
            except BadExample as bad:
                skipped.append(bad)
        raise UserError(
            f"{TRIES} examples in a row of {source.name} are unusable; the last: "
            f"{skipped[-1]}"
        )

    def load_block(position: int, index: int) -> list[tuple[dict, list[BadExample]]]:
        first = index * block
        return [
            load(position * block + i, (first + i) % len(source)) for i in range(block)
        ]

    def collate(blocks) -> tuple[dict, list[BadExample]]:
        made, skipped = zip(*(row for rows in blocks for row in rows), strict=True)
        texts = [row.pop("caption") for row in made]
        try:
            batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
        except ValueError as error:  # embeddings that were put together of several
            raise UserError(
                f"examples of {source.name} don't go together: {first_line(error)}"
            ) from error
        if tokenizer is None:
            batch.pop("tokens", None)
        elif "tokens" not in batch:
            batch["tokens"] = tokenizer.encode(texts, context_length, warn=False)
        if captions:
            batch["caption"] = texts
        return batch, [bad for bads in skipped for bad in bads]

    blocks = -(-len(source) // block)
    indices = grain.MapDataset.range(blocks)
    if not source.endless:
        indices = indices.shuffle(seed=seed % 2**32)  # all that grain takes
    # Whole local batches are dealt out to the processes, so that the rows of all of
    # them, one after the other, are the batch that one process alone would have.
    dataset = (
        indices.repeat(2**62 // blocks)  # for ever is too long to be sliced
        .map_with_index(load_block)
        .batch(local // block, batch_fn=collate)
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
    rules.check({"threads": threads, "workers": workers}, RULES, "data")
    return _in_order(source, indices, make, threads, workers)


def _in_order(
    source: Source,
    indices: range,
    make: Callable[[dict], T],
    threads: int,
    workers: int,
) -> Iterator[T | BadExample]:
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


def _in_workers(dataset, workers: int) -> Iterator:
    """The data set's iterator, with so many processes that prepare what it gives."""
    import grain

    if not workers:
        return iter(dataset)
    if not flags.FLAGS.is_parsed():  # grain reads its own, which need a program
        flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(
        grain.MultiprocessingOptions(workers, per_worker_buffer_size=2)
    )
    return _Workers(iter(dataset))


class _Workers:
    """Grain's iterator, with its error for a killed worker in one line."""

    def __init__(self, iterator):
        self._iterator = iterator
        self.close = iterator.close

    def __iter__(self):
        return self

    def __next__(self):
        try:
            return next(self._iterator)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            code = re.search(r"-?\d+", str(error))
            raise UserError(
                f"a data worker ended (exit code {code and code[0]}); the system kills "
                "one (-9) when memory runs out: give fewer data.workers or data.threads"
            ) from error
