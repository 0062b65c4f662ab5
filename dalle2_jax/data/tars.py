"""Tar shards in webdataset's layout, here or at any URL that fsspec reads."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from dalle2_jax.data.examples import BadExample, Listing, caption_of, clean, decode
from dalle2_jax.data.image import EXTENSIONS
from dalle2_jax.errors import UserError, first_line

log = logging.getLogger(__name__)

# What pip installs for a protocol whose file system is not there.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
# Members are usually smaller than this, and so an index is read in few requests; of
# larger ones no more than their headers.
BLOCK = 2**20
# Bytes between two members that are fetched sooner than a second request is answered.
GAP = 2**16
# By what file systems tell that a file has changed.
VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified")

# By key and extension: where a member's bytes begin and end.
Index = dict[str, dict[str, Sequence[int]]]


def webdataset(path: str) -> Listing:
    """Tars are read where they are, at random: an index tells where a member lies."""
    fs, shards = _shards(path)
    keys, examples, incomplete = [], [], 0
    with ThreadPoolExecutor() as pool:
        indices = list(pool.map(partial(_index, fs), shards))
    for shard, index in zip(shards, indices, strict=True):
        for key, members in index.items():
            picture = next((members[e] for e in EXTENSIONS if e in members), None)
            text = next((e for e in (".txt", ".json") if e in members), None)
            if picture is None or text is None:
                incomplete += 1
                continue
            keys.append(f"{os.path.basename(shard)}:{key}")
            examples.append((shard, picture, text, members[text]))
    if not examples:
        raise UserError(
            f"found no pictures with captions in {path}: its tars need KEY.png (.jpg, "
            ".webp) with KEY.txt or KEY.json"
        )
    if incomplete:
        log.warning("%s: %d incomplete examples are left out", path, incomplete)

    def read(i: int) -> dict:
        shard, picture, kind, text = examples[i]
        try:
            data, caption = _fetch(fs, shard, picture, text)
        except OSError as error:
            raise BadExample("cannot read the tar", keys[i]) from error
        if len(data) < picture[1] - picture[0] or len(caption) < text[1] - text[0]:
            raise BadExample("tar cut short", keys[i])
        caption = decode(caption, keys[i])
        if kind == ".json":
            try:
                caption = caption_of(json.loads(caption))
            except ValueError:
                raise BadExample("caption not JSON", keys[i]) from None
        return {"image": data, "caption": clean(caption, keys[i])}

    return Listing(f"webdataset {path}", keys, read, left_out=incomplete)


def _fetch(fs, shard: str, *members: Sequence[int]) -> list[bytes]:
    """The bytes of members of a tar: in one request, where they lie close together."""
    first = min(begin for begin, _ in members)
    last = max(end for _, end in members)
    if last - first - sum(end - begin for begin, end in members) > GAP:
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


def _expand_braces(pattern: str) -> list[str]:
    """ "a-{00..02}.tar" to three names, "{a,b}.tar" to two."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    inside = found[1]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = int(numbers[1]), int(numbers[2])
        options = [f"{i:0{len(numbers[1])}d}" for i in range(first, last + 1)]
    else:
        options = inside.split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return list(
        itertools.chain.from_iterable(
            _expand_braces(before + o + after) for o in options
        )
    )


def _index(fs, shard: str) -> Index:
    """Where a tar's members lie; of one that is not here, remembered in a file."""
    try:
        file = _remembered(fs, shard)
        if file is not None and file.is_file():
            with contextlib.suppress(ValueError):
                return json.loads(file.read_text())
        index, whole = _members(fs, shard)
    except OSError as error:
        raise UserError(f"cannot read {shard}: {first_line(error)}") from error
    if file is not None and whole:
        with contextlib.suppress(OSError):  # it is read again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
                json.dump(index, new)
            os.replace(new.name, file)
    return index


def _remembered(fs, shard: str) -> Path | None:
    """The file of a remote tar's index, named by all that changes with the tar.

    None for a tar that is here, and where it couldn't be told that it has changed.
    """
    from fsspec.implementations.local import LocalFileSystem

    info = fs.info(shard)
    versions = [str(info[name]) for name in VERSIONS if name in info]
    if isinstance(fs, LocalFileSystem) or not versions:
        return None
    what = [fs.unstrip_protocol(shard), str(info["size"]), *versions]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256("\n".join(what).encode()).hexdigest()
    return Path(cache) / "dalle2_jax" / "tars" / f"{name}.json"


def _members(fs, shard: str) -> tuple[Index, bool]:
    """Where members begin and end, and whether the tar is whole."""
    members: Index = {}
    options = {"block_size": BLOCK, "cache_type": "readahead"}
    try:
        with (
            fs.open(shard, "rb", **options) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            for member in tar:
                key, extension = os.path.splitext(member.name)
                if member.isfile():
                    where = (member.offset_data, member.offset_data + member.size)
                    members.setdefault(key, {})[extension.lower()] = where
    except tarfile.ReadError as error:
        if members:
            log.warning(
                "%s is damaged after %d examples: %s", shard, len(members), error
            )
            return members, False
        raise UserError(
            f"{shard} is not a tar, or a compressed one, which cannot be read at random"
        ) from error
    return members, True
