"""Folders of CLIP's embeddings of a source, and the source that reads them.

    metadata.json                      of what, by which CLIP; `count` is null until the
                                       folder is complete
    shard-00000-of-00002.array_record  the examples, see `write_shard`
    shard-00000-of-00002.json          their keys, what was skipped, sums of z_image

Each shard appears under its name only when it is complete.
"""

import importlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dalle2_jax.data.examples import BadExample, Embedded, Listing, as_list, clean
from dalle2_jax.errors import UserError, first_line, short
from dalle2_jax.files import read_json

FORMAT = 1
METADATA = "metadata.json"
LARGEST_KEYS = 2**30  # bytes of a shard's JSON


def begin(folder: str | Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a folder to be written, or of one to go on with.

    Args:
      settings: JSON values: `clip` (checkpoint.fingerprint), `image_size` (None without
        pictures), `shards`, and all else that must not change between two calls.

    Raises:
      UserError: the folder can't be written, has something else in it, or was begun
        with other settings.
    """
    if "://" in str(folder):
        raise UserError(
            f"out={folder} is a URL: give a directory, for instance where the bucket "
            "is mounted"
        )
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"out={folder} is not UTF-8, which array_record needs: give another name"
        ) from None
    folder = Path(folder)
    wanted = {"format": FORMAT, **settings}
    # In this order, for other processes may be beginning the same.
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if (folder / METADATA).is_file():
        found = read_json(folder / METADATA, finite=False)
        for key, value in wanted.items():
            if key not in found or found[key] != value:
                raise UserError(
                    f"{folder} was begun with {key}={short(found.get(key))}, and not "
                    f"{short(value)}: give the same again, or another directory"
                )
        return found
    if not all(name.startswith(METADATA) for name in there):
        raise UserError(
            f"{folder} exists and holds no embeddings: give a new directory"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {**wanted, "count": None}
        _write_json(folder / METADATA, metadata)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    return metadata


def shard(folder: str | Path, number: int, shards: int) -> Path:
    """The file of a shard; there is one of its name in .json, too."""
    return Path(folder) / f"shard-{number:05d}-of-{shards:05d}.array_record"


def write_shard(
    file: Path, examples: Iterable[Mapping[str, Any]], skipped: Mapping[str, int]
) -> list[str]:
    """Writes the examples of a shard, and returns their keys.

    An example has `key`, str; `captions`, list of n str; `z_image`, float [d], not of
    unit length; `z_text`, float [n, d]; `tokens`, int32 [n, l]; and `image`, the bytes
    of a picture's file, or None. `skipped` counts, once all are read, those that were
    unusable, by reason.
    """
    from flax.serialization import msgpack_serialize

    keys, total, squares = [], 0.0, 0.0
    unfinished = file.with_suffix(".unfinished")
    # Groups of one, for records that are read at random.
    records = _array_record("array_record_module")
    writer = records.ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")
    for example in examples:
        writer.write(msgpack_serialize(dict(example)))
        keys.append(example["key"])
        z_image = np.asarray(example["z_image"], np.float64)
        total, squares = total + z_image, squares + z_image**2
    writer.close()
    told = {
        "keys": keys,
        "skipped": dict(skipped),
        "sum": np.ravel(total).tolist(),
        "sum_of_squares": np.ravel(squares).tolist(),
    }
    _write_json(file.with_suffix(".json"), told)
    os.replace(unfinished, file)
    return keys


def finish(folder: str | Path) -> dict[str, Any] | None:
    """Completes the metadata, unless a shard is still missing.

    Adds `count`, `skipped` by reason, and `mean` and `std`, those of z_image in each of
    its dimensions. Any process may call it after its last shard.
    """
    metadata = _metadata(folder)
    if not all(file.is_file() for file in _files(folder, metadata)):
        return None
    told = [_told(file) for file in _files(folder, metadata)]
    count = sum(len(t["keys"]) for t in told)
    if count == 0:
        raise UserError(f"{folder} has no examples: all were skipped")
    full = [t for t in told if t["keys"]]
    mean = np.sum([t["sum"] for t in full], axis=0) / count
    variance = np.sum([t["sum_of_squares"] for t in full], axis=0) / count - mean**2
    metadata |= {
        "count": count,
        "skipped": dict(sum((Counter(t["skipped"]) for t in told), Counter())),
        "mean": mean.tolist(),
        "std": np.sqrt(variance.clip(0)).tolist(),
    }
    _write_json(Path(folder) / METADATA, metadata)
    return metadata


def _array_record(module: str) -> ModuleType:
    """Return a module of array_record, for which some systems have no package."""
    try:
        return importlib.import_module(f"array_record.python.{module}")
    except ImportError as error:
        raise UserError(
            "embeddings are stored with array_record, which is not installed: pip "
            "install array_record, on Linux or macOS"
        ) from error


def embeddings(path: str) -> Listing:
    """Examples with the fields that `write_shard` says, "caption" being `captions`.

    Raises UserError if the folder is none of embeddings, or not complete.
    """
    from flax.serialization import msgpack_restore

    if not os.path.isfile(os.path.join(path, METADATA)):
        raise UserError(f"{path} has no {METADATA}: make it with dalle2 embed")
    metadata = _metadata(path)
    # One after the other: so many as it claims may never end.
    missing = next((f for f in _files(path, metadata) if not f.is_file()), None)
    if missing or metadata.get("count") is None:
        what = f"{missing.name} is missing" if missing else "it is not complete"
        raise UserError(f"{path}: {what}; the command that made it goes on from there")
    of_file = {file: _told(file)["keys"] for file in _files(path, metadata)}
    keys = [key for some in of_file.values() for key in some]
    files = [str(f) for f, some in of_file.items() if some]  # others can't be opened
    reader = _array_record("array_record_data_source").ArrayRecordDataSource
    try:
        records = reader(files)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
    if not len(records) == len(keys) == metadata["count"]:
        raise UserError(
            f"{path} has {len(records)} records and {len(keys)} keys of "
            f"{metadata['count']} examples: copy or embed it again"
        )

    def read(i: int) -> dict:
        try:
            example = msgpack_restore(records[i])
            _check(example)
        except Exception as error:  # of damaged bytes, nearly any
            raise BadExample("damaged record", keys[i]) from error
        return {**example, "caption": example["captions"]}

    embedded = Embedded(metadata["clip"], metadata["image_size"])
    return Listing(f"embeddings {path}", keys, read, embedded)


def _check(example: Mapping[str, Any]) -> None:
    """Raise an error if an example is not as `write_shard` says."""
    captions = example["captions"]
    z_image, z_text, tokens = (example[k] for k in ("z_image", "z_text", "tokens"))
    if not (
        as_list(clean(captions, "")) == captions
        and z_image.ndim == 1
        and z_text.shape == (len(captions), *z_image.shape)
        and tokens.ndim == 2
        and len(tokens) == len(captions)
        and np.issubdtype(tokens.dtype, np.integer)
        and np.isfinite(z_image).all()
        and np.isfinite(z_text).all()
    ):
        raise ValueError("not an example")


def _files(folder: str | Path, metadata: Mapping[str, Any]) -> Iterator[Path]:
    count = metadata["shards"]
    return (shard(folder, number, count) for number in range(count))


def _metadata(folder: str | Path) -> dict[str, Any]:
    """What a folder's metadata holds, with what there must be of the right type."""
    file = Path(folder) / METADATA
    metadata = read_json(file, finite=False)
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{folder} has format {short(metadata.get('format'))}, this version of "
            f"dalle2_jax reads format {FORMAT}: embed again"
        )
    types = {"clip": str, "image_size": int | None, "shards": int, "count": int | None}
    for name, kind in types.items():
        value = metadata.get(name, ...)
        number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not isinstance(value, kind) or isinstance(value, int) and not number:
            raise UserError(f"{file} is damaged: it has no valid {name!r}; embed again")
    return metadata


def _told(file: Path) -> dict[str, Any]:
    """What a shard's JSON holds."""
    told = read_json(file.with_suffix(".json"), LARGEST_KEYS, finite=False)
    keys = told.get("keys")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{file.with_suffix('.json')} has no list of keys: embed again")
    return told


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    """At once, so that nobody reads a part of it."""
    new = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    new.write_text(json.dumps(value) + "\n")
    os.replace(new, file)
