"""What every source of captioned pictures is made of: examples, and which are read."""

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dalle2_jax.errors import UserError

ENDLESS = 2**31 - 1  # examples of a source that has no end
SPLITS = ("train", "heldout")
HOLDOUT = 0.02
FEWEST_TO_HOLD_OUT = 10
CAPTION_FIELDS = ("caption", "text")


class BadExample(Exception):
    """One example is unusable: its key, and a reason to count it under."""

    def __init__(self, reason: str, key: str):
        super().__init__(reason, key)
        self.reason, self.key = reason, key

    def __str__(self) -> str:
        return f"{self.reason}: {self.key}"


class Embedded(NamedTuple):
    """What examples bring that come with CLIP's embeddings.

    Attributes:
      clip: the fingerprint of the CLIP's params (checkpoint.fingerprint).
      image_size: side of the pictures in pixels; None where there are none.
    """

    clip: str
    image_size: int | None


class Listing(NamedTuple):
    """All that a source has: a key for each example, and how the i-th is read.

    `left_out` counts pictures without a caption and captions without a picture, which
    are no examples.
    """

    name: str
    keys: Sequence[str]
    read: Callable[[int], dict]
    embedded: Embedded | None = None
    left_out: int = 0


class Source:
    """Examples by index. `endless` ones are drawn at random and need no shuffling.

    Each has a key of its own, by default its index. `embedded` is None where examples
    are pictures with captions and no more; `left_out` is as of Listing.
    """

    def __init__(
        self,
        name: str,
        indices: Sequence[int] | np.ndarray,
        read: Callable[[int], dict],
        endless: bool = False,
        keys: Sequence[str] | None = None,
        embedded: Embedded | None = None,
        left_out: int = 0,
    ):
        self.name, self.endless, self.embedded = name, endless, embedded
        self.left_out = left_out
        self._indices, self._read, self._keys = indices, read, keys

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> dict:
        """Raises BadExample if the example is unusable."""
        i = int(self._indices[i])
        key = str(i) if self._keys is None else self._keys[i]
        return {"key": key, **self._read(i)}


def select(
    listing: Listing,
    split: str,
    holdout: float | int = HOLDOUT,
    keep: str | Path | None = None,
) -> Source:
    """One split's examples. Their keys tell who is held out, whatever their order.

    `keep` is a file as `python -m dalle2_jax.filter` writes it: lines of JSON with the
    keys of the examples that are read.

    Raises UserError if holdout is no fraction, or the file keeps nothing.
    """
    if not 0 <= holdout < 1:
        raise UserError(f"holdout is {holdout}; it is a fraction, from 0 to below 1")
    keys = unique(listing.keys)
    indices = np.arange(len(keys))
    if keep is not None:
        kept = read_keep(keep)
        indices = np.flatnonzero([key in kept for key in keys])
        if not len(indices):
            raise UserError(
                f"keep={keep} has none of the {len(keys)} examples of {listing.name}: "
                "it was made of another source"
            )
    if len(indices) >= FEWEST_TO_HOLD_OUT and holdout > 0:
        hashes = [_hash(keys[i]) for i in indices]
        order = indices[np.argsort(hashes, kind="stable")]
        held_out = max(1, round(len(order) * holdout))
        part = order[:held_out] if split == "heldout" else order[held_out:]
        indices = np.sort(part)
    return Source(
        listing.name,
        indices,
        listing.read,
        keys=keys,
        embedded=listing.embedded,
        left_out=listing.left_out,
    )


def unique(keys: Sequence[str]) -> Sequence[str]:
    """Numbers those that occur again: "a", "a #2", "a #3"."""
    if len(set(keys)) == len(keys):
        return keys
    seen: Counter[str] = Counter()
    numbered = []
    for key in keys:
        seen[key] += 1
        numbered.append(key if seen[key] == 1 else f"{key} #{seen[key]}")
    return numbered


def _hash(key: str) -> int:
    """Of a key without its number, so that one picture's captions are in one split."""
    stem = re.sub(r" #\d+$", "", key)
    return zlib.crc32(stem.encode(errors="surrogateescape"))


def read_keep(path: str | Path) -> set[str]:
    """The keys in a file of lines {"key": "..."}; UserError if it is not one."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return {str(json.loads(line)["key"]) for line in lines if line.strip()}
    except OSError as error:
        raise UserError(f"cannot read keep={path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'keep={path} is not a list of keys: each line must be {{"key": "..."}}'
        ) from error


def as_list(caption: str | list[str]) -> list[str]:
    """The captions of an example, which may have one or several."""
    return [caption] if isinstance(caption, str) else caption


def clean(caption, key: str) -> str | list[str]:
    """The caption, or each of several, in one line; raises BadExample without any."""
    several = [caption] if isinstance(caption, str) else caption
    if not isinstance(several, list) or not all(isinstance(c, str) for c in several):
        raise BadExample("no caption" if caption is None else "caption not text", key)
    several = [" ".join(c.split()) for c in several]
    several = [c for c in several if c]
    if not several:
        raise BadExample("empty caption", key)
    return several[0] if len(several) == 1 else several


def decode(text: bytes, key: str) -> str:
    """UTF-8, with or without a byte order mark; BadExample if it is not."""
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadExample("caption not UTF-8", key) from None


def caption_of(record):
    """The caption of a JSON record, unchecked, or None."""
    fields = record if isinstance(record, dict) else {}
    return next((fields[name] for name in CAPTION_FIELDS if name in fields), None)
