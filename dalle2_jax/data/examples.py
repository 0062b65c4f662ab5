"""What every source of captioned pictures is made of: examples, and which are read."""

import functools
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from dalle2_jax.errors import UserError, short
from dalle2_jax.files import parse_json, read_lines

log = logging.getLogger(__name__)

ENDLESS = 2**31 - 1  # examples of a source that has no end
SPLITS = ("train", "heldout")
HOLDOUT = 0.02
FEWEST_TO_HOLD_OUT = 10
CAPTION_FIELDS = ("caption", "text")
LONGEST_CAPTION = 100_000  # characters of all captions of an example
MOST_CAPTIONS = 1000  # of an example
LARGEST_TEXT = 2**20  # bytes of a file with captions
LARGEST_PICTURE = 2**29  # bytes of a file
LONGEST_LINE = 2**24  # bytes of a line of JSON
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")


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

    `left_out` counts what is not an example, by the reason: pictures without a caption,
    captions without a picture, files of formats that are not read.
    """

    name: str
    keys: Sequence[str]
    read: Callable[[int], dict]
    embedded: Embedded | None = None
    left_out: Mapping[str, int] = MappingProxyType({})


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
        left_out: Mapping[str, int] = MappingProxyType({}),
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
    keep: Any = None,
) -> Source:
    """One split's examples. Their keys tell who is held out, whatever their order.

    `keep` is a file as `dalle2 filter` writes it: lines of JSON with the
    keys of the examples that are read.

    Raises UserError if the file keeps nothing.
    """
    keys = unique([printable(key) for key in listing.keys])
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
        printable(listing.name),
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


def printable(key: str) -> str:
    """Return a file's name as valid Unicode: bytes that aren't UTF-8 become "\\udce9".

    Few libraries take a name as Python has it.
    """
    return key if key.isascii() else key.encode("utf-8", "backslashreplace").decode()


def counted(counts: Mapping[str, int]) -> str:
    """How often what was counted, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{number:,} {name}" for name, number in ordered)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, but once only: a run opens a source several times."""
    log.warning("%s", message)


def is_hidden(path: str) -> bool:
    """Whether a path in a folder or tar is not data: a dotfile, or of the system."""
    return any(
        part in SYSTEM_FOLDERS or (part.startswith(".") and part not in (".", ".."))
        for part in path.split("/")
    )


def _hash(key: str) -> int:
    """Of a key without its number, so that one picture's captions are in one split."""
    return zlib.crc32(re.sub(r" #\d+$", "", key).encode())


def read_keep(path: Any) -> set[str]:
    """The keys in a file of lines {"key": "..."}; UserError if it is not one."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"keep={short(path)} is not a path")
    path = os.path.expanduser(path)
    keys = set()
    try:
        for line in read_lines(path, LONGEST_LINE):
            if line.strip():
                keys.add(printable(str(parse_json(line, path, finite=False)["key"])))
    except OSError as error:
        raise UserError(f"cannot read keep={path}: {error.strerror}") from error
    except (ValueError, KeyError) as error:
        raise UserError(
            f'keep={path} is not a list of keys: each line must be {{"key": "..."}}'
        ) from error
    return keys


def as_list(caption: str | list[str]) -> list[str]:
    """The captions of an example, which may have one or several."""
    return [caption] if isinstance(caption, str) else caption


def clean(caption: Any, key: str) -> str | list[str]:
    """Return the caption, or each of several, in one line.

    Of several, those that are None or empty are left out. Raises BadExample if none is
    left, and if they are too many, too long, not text or not valid Unicode.
    """
    several = [caption] if isinstance(caption, str) else caption
    if isinstance(several, list):
        several = [c for c in several if c is not None]
    if not isinstance(several, list) or not all(isinstance(c, str) for c in several):
        raise BadExample("no caption" if caption is None else "caption not text", key)
    if sum(map(len, several)) > LONGEST_CAPTION:
        raise BadExample("caption too long", key)
    several = [" ".join(c.split()) for c in several]
    several = [c for c in several if c]
    if not several:
        raise BadExample("empty caption", key)
    if len(several) > MOST_CAPTIONS:
        raise BadExample("too many captions", key)
    try:
        "".join(several).encode()
    except UnicodeEncodeError:  # half of a character beyond "\uffff"
        raise BadExample("caption not UTF-8", key) from None
    return several[0] if len(several) == 1 else several


def decode(text: bytes, key: str) -> str:
    """UTF-8, with or without a byte order mark; BadExample if it is not."""
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadExample("caption not UTF-8", key) from None


def captions_of_text(text: bytes, key: str) -> str | list[str]:
    """Return the captions in a text file, one a line, as `clean` does."""
    return clean(re.split(r"[\r\n]+", decode(text, key)), key)


def captions_of_record(record: Mapping[str, Any], key: str) -> str | list[str]:
    """Return the captions of a JSON record, as `clean` does.

    They are in the first of the fields "caption" and "text" that has any.
    """
    problem = BadExample("no caption", key)
    for name in CAPTION_FIELDS:
        if record.get(name) is not None:
            try:
                return clean(record[name], key)
            except BadExample as bad:
                problem = bad
    raise problem


def captions_of_json(text: bytes, key: str) -> str | list[str]:
    """Return the captions in a JSON file, as `captions_of_record` does."""
    try:
        record = parse_json(decode(text, key), key, finite=False)
    except UserError:
        raise BadExample("caption not JSON", key) from None
    return captions_of_record(record, key)
