"""Tar shards in webdataset's layout, here or at any URL that fsspec reads."""

import contextlib
import hashlib
import json
import math
import os
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dalle2_jax.data.examples import (
    LARGEST_PICTURE,
    LARGEST_TEXT,
    BadExample,
    Listing,
    captions_of_json,
    captions_of_text,
    counted,
    is_hidden,
    warn_once,
)
from dalle2_jax.data.image import EXTENSIONS
from dalle2_jax.data.tar_members import read_members
from dalle2_jax.errors import UserError, first_line
from dalle2_jax.files import read_json

# What pip installs for a protocol whose file system is not there.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
# Members are usually smaller than this, and so an index is read in few requests; of
# larger ones no more than their headers.
BLOCK = 2**20
# Bytes between two members that are fetched sooner than a second request is answered.
GAP = 2**16
# By what file systems tell that a file has changed.
VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified")
MOST_SHARDS = 1_000_000
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
LARGEST_INDEX = 2**30  # bytes of a file


class Index(NamedTuple):
    """What is in a tar.

    Attributes:
      examples: by key and extension, where a member's bytes begin and end.
      left_out: how many members are not read, by the reason.
    """

    examples: dict[str, dict[str, Sequence[int]]]
    left_out: dict[str, int]


def webdataset(path: str) -> Listing:
    """Tars are read where they are, at random: an index tells where a member lies."""
    fs, shards = _shards(path)
    keys, examples = [], []
    left_out: Counter[str] = Counter()
    with ThreadPoolExecutor() as pool:
        indices = list(pool.map(partial(_index, fs), shards))
    for shard, index in zip(shards, indices, strict=True):
        left_out.update(index.left_out)
        for key, members in index.examples.items():
            picture = next((members[e] for e in EXTENSIONS if e in members), None)
            kind = next((e for e in (".txt", ".json") if e in members), None)
            if picture is None:
                left_out["captions without a picture" if kind else "other files"] += 1
            elif kind is None:
                left_out["pictures without a caption"] += 1
            elif _size(picture) > LARGEST_PICTURE:
                left_out["pictures that are too large"] += 1
            elif _size(members[kind]) > LARGEST_TEXT:
                left_out["captions that are too long"] += 1
            else:
                keys.append(f"{os.path.basename(shard)}:{key}")
                examples.append((shard, picture, kind, members[kind]))
    if not examples:
        has = f"; left out: {counted(left_out)}" if left_out else ""
        raise UserError(
            f"found no pictures with captions in {path}: its tars need KEY.png "
            f"({', '.join(EXTENSIONS[1:])}) with KEY.txt or KEY.json{has}"
        )

    def read(i: int) -> dict:
        shard, picture, kind, text = examples[i]
        try:
            data, caption = _fetch(fs, shard, picture, text)
        # File systems raise errors of their own, of the network's too.
        except Exception as error:
            raise BadExample("cannot read the tar", keys[i]) from error
        if len(data) < _size(picture) or len(caption) < _size(text):
            raise BadExample("tar cut short", keys[i])
        captions = captions_of_text if kind == ".txt" else captions_of_json
        return {"image": data, "caption": captions(caption, keys[i])}

    return Listing(f"webdataset {path}", keys, read, left_out=left_out)


def _size(member: Sequence[int]) -> int:
    begin, end = member
    return end - begin


def _fetch(fs, shard: str, *members: Sequence[int]) -> list[bytes]:
    """The bytes of members of a tar: in one request, where they lie close together."""
    first = min(begin for begin, _ in members)
    last = max(end for _, end in members)
    if last - first - sum(map(_size, members)) > GAP:
        return [_read(fs, shard, begin, end) for begin, end in members]
    together = _read(fs, shard, first, last)
    return [together[begin - first : end - first] for begin, end in members]


def _read(fs, shard: str, begin: int, end: int) -> bytes:
    from fsspec.implementations.local import LocalFileSystem

    if not isinstance(fs, LocalFileSystem):
        return fs.cat_file(shard, start=begin, end=end)
    with open(shard, "rb", buffering=0) as file:  # with less ado than fsspec
        file.seek(begin)
        return file.read(end - begin)


def _shards(path: str):
    """The file system of a path or URL, and the tars that its globs and braces mean."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    patterns = _expand_braces(path)
    if not patterns:
        raise UserError(f"the braces of {path} are an empty range")
    try:
        fs, _ = fsspec.core.url_to_fs(patterns[0])
        shards = []
        for pattern in patterns:
            _, plain = fsspec.core.url_to_fs(pattern)
            if fs.isfile(plain):
                found = [plain]
            elif fs.isdir(plain):
                found = [f for f in fs.ls(plain, detail=False) if f.endswith(".tar")]
            else:
                found = fs.glob(plain)
            if isinstance(fs, LocalFileSystem):
                found = _files(found)
            if not found:
                raise UserError(f"there is no tar at {pattern}")
            shards += sorted(found)
    except UserError:
        raise
    except ImportError as error:
        protocol = path.partition("://")[0]
        if protocol not in EXTRAS:
            raise UserError(f"cannot read {path}: {first_line(error)}") from error
        raise UserError(
            f"cannot read {path}: {protocol}:// needs another package, pip install "
            f"'dalle2_jax[{EXTRAS[protocol]}]'"
        ) from error
    # File systems raise errors of their own, of the network's and of permissions.
    except Exception as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
    return fs, shards


def _files(names: Sequence[str]) -> list[str]:
    """Leave out what is not a file: a named pipe would wait for ever."""
    files = [name for name in names if os.path.isfile(name)]
    if odd := [name for name in names if not os.path.isfile(name)]:
        warn_once(f"left out: {len(odd)} names that are not files, as {odd[0]}")
    return files


def _expand_braces(pattern: str) -> list[str]:
    """ "a-{00..02}.tar" to three names, "{a,b}.tar" to two.

    UserError if there are more than MOST_SHARDS.
    """
    most = math.prod(map(_count_options, BRACES.findall(pattern)))
    expanded, left = [], [pattern]
    while left and most <= MOST_SHARDS:
        name = left.pop()
        found = BRACES.search(name)
        if found is None:
            expanded.append(name)
            continue
        before, after = name[: found.start()], name[found.end() :]
        left += [before + option + after for option in reversed(_options(found[1]))]
        most = max(most, len(expanded) + len(left))
    if most > MOST_SHARDS:
        shown = pattern if len(pattern) < 200 else f"{pattern[:200]}..."
        raise UserError(
            f"the braces of {shown} are more than {MOST_SHARDS:,} names: give fewer"
        )
    return expanded


def _options(inside: str) -> list[str]:
    if numbers := NUMBERS.fullmatch(inside):
        first, last = int(numbers[1]), int(numbers[2])
        return [f"{i:0{len(numbers[1])}d}" for i in range(first, last + 1)]
    return inside.split(",")


def _count_options(inside: str) -> int:
    if numbers := NUMBERS.fullmatch(inside):
        return max(0, int(numbers[2]) - int(numbers[1]) + 1)
    return inside.count(",") + 1


def _index(fs, shard: str) -> Index:
    """What is in a tar; of one that is not here, remembered in a file."""
    try:
        info = fs.info(shard)
        file = _remembered(fs, shard, info)
        if file is not None and file.is_file():
            with contextlib.suppress(UserError, TypeError):
                return Index(**read_json(file, LARGEST_INDEX))
        index, whole = _read_index(fs, shard, info)
    except OSError as error:
        raise UserError(f"cannot read {shard}: {first_line(error)}") from error
    if file is not None and whole:
        with contextlib.suppress(OSError):  # it is read again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
                json.dump(index._asdict(), new)
            os.replace(new.name, file)
    return index


def _remembered(fs, shard: str, info: Mapping[str, Any]) -> Path | None:
    """The file of a remote tar's index, named by all that changes with the tar.

    None for a tar that is here, where it couldn't be told that it has changed, and
    without a home.
    """
    from fsspec.implementations.local import LocalFileSystem

    versions = [str(info[name]) for name in VERSIONS if name in info]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if isinstance(fs, LocalFileSystem) or not versions or not os.path.isabs(cache):
        return None
    what = [fs.unstrip_protocol(shard), str(info["size"]), *versions, "index 2"]
    name = hashlib.sha256("\n".join(what).encode(errors="surrogateescape")).hexdigest()
    return Path(cache) / "dalle2_jax" / "tars" / f"{name}.json"


def _read_index(fs, shard: str, info: Mapping[str, Any]) -> tuple[Index, bool]:
    """What is in a tar, and whether it is whole."""
    options = {"block_size": BLOCK, "cache_type": "readahead"}
    try:
        with fs.open(shard, "rb", **options) as file:
            members, left_out, problem = read_members(file, info.get("size"))
    except tarfile.HeaderError as error:
        raise UserError(
            f"{shard} is not a tar, or a compressed one, which cannot be read at random"
        ) from error
    index = Index({}, left_out)
    for name, where in members.items():
        if not is_hidden(name):
            key, extension = os.path.splitext(name)
            index.examples.setdefault(key, {})[extension.lower()] = where
    if problem is not None:
        left_out["damaged tars"] += 1
        warn_once(
            f"{shard} is damaged, {problem}: {len(members)} files of it are read, "
            "others may be lost"
        )
    return index, problem is None
