"""Tar shards in webdataset's layout, here or at any URL that fsspec reads."""

import itertools
import json
import logging
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from dalle2_jax.data.examples import BadExample, Listing, caption_of, clean, decode
from dalle2_jax.data.image import EXTENSIONS
from dalle2_jax.errors import UserError, first_line

log = logging.getLogger(__name__)


def webdataset(path: str) -> Listing:
    """Tars are read where they are, at random: an index tells where a member lies."""
    fs, shards = _shards(path)
    keys, examples, incomplete = [], [], 0
    with ThreadPoolExecutor() as pool:
        indices = list(pool.map(partial(_members, fs), shards))
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
            caption = fs.cat_file(shard, *text)
            data = fs.cat_file(shard, *picture)
        except OSError as error:
            raise BadExample("cannot read the tar", keys[i]) from error
        if len(data) < picture[1] - picture[0]:
            raise BadExample("tar cut short", keys[i])
        caption = decode(caption, keys[i])
        if kind == ".json":
            try:
                caption = caption_of(json.loads(caption))
            except ValueError:
                raise BadExample("caption not JSON", keys[i]) from None
        return {"image": data, "caption": clean(caption, keys[i])}

    return Listing(f"webdataset {path}", keys, read)


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
    except (ImportError, ValueError, OSError) as error:
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


def _members(fs, shard: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Key to extension to where the member's bytes begin and end."""
    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with fs.open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
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
            return members
        raise UserError(
            f"{shard} is not a tar, or a compressed one, which cannot be read at random"
        ) from error
    return members
