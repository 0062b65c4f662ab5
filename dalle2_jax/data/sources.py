"""Where captioned pictures come from: shapes, a folder, tar shards, TFDS.

Every source is a random-access sequence of examples, dicts with the keys
    image    bytes of a file, a PIL image, or a function from a size to uint8 [h, w, 3]
    caption  str, or a list of them to choose from
    key      str, to name the example in messages
"""

import inspect
import itertools
import json
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from dalle2_jax.data import shapes
from dalle2_jax.data.image import EXTENSIONS
from dalle2_jax.errors import UserError, first_line

log = logging.getLogger(__name__)

ENDLESS = 2**31 - 1  # scenes of `shapes`
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


class Source:
    """Examples by index. `endless` ones are drawn at random and need no shuffling."""

    def __init__(
        self,
        name: str,
        indices: Sequence[int] | np.ndarray,
        read: Callable[[int], dict],
        endless: bool = False,
    ):
        self.name, self.endless = name, endless
        self._indices, self._read = indices, read

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> dict:
        """Raises BadExample if the example is unusable."""
        return self._read(int(self._indices[i]))


def open_source(
    kind: str,
    path: str | os.PathLike | None = None,
    split: str = "train",
    seed: int = 0,
    **options,
) -> Source:
    """Opens captioned pictures.

    kind, path, and the options they take (one that is None counts as not given):
    "shapes"      no path. `pairs`, the part of scenes with two things, and `contrast`:
                  every so many scenes in a row differ in one attribute only.
    "folder"      a folder of pictures, with captions in metadata.jsonl (fields
                  file_name and caption or text) or beside each picture in a .txt.
    "webdataset"  tars of KEY.png (.jpg, .webp) with KEY.txt or KEY.json (field caption
                  or text): a path or URL that fsspec reads, with globs and braces.
    "tfds"        a data set prepared as array_record: its folder, or its name and
                  `data_dir`. `tfds_split` is what TFDS calls its split, `image` and
                  `caption` are its fields, as "captions/text".
    All but shapes take `holdout`, the fraction of the pictures that make up the split
    "heldout"; the others are "train". With fewer than 10 pictures, or a holdout of 0,
    both splits are all of them. Shapes take the seed, and have a third split "unseen":
    scenes with a (colour, shape) that the others never show.

    Raises UserError if there is nothing to read.
    """
    if kind not in OPENERS:
        raise UserError(f'data "{kind}": there is {", ".join(OPENERS)}')
    opener = OPENERS[kind]
    options = {name: value for name, value in options.items() if value is not None}
    parameters = inspect.signature(opener).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if unknown := [name for name in options if name not in known]:
        raise UserError(f'data "{kind}" has no option "{unknown[0]}", but {known}')
    if bool(path) != (kind != "shapes"):
        needs = "takes no path" if path else "needs a path"
        raise UserError(f'data "{kind}" {needs}, and was given "{path or ""}"')
    splits = shapes.SPLITS if kind == "shapes" else SPLITS
    if split not in splits:
        raise UserError(f'data "{kind}" has no split "{split}", but {splits}')
    if kind == "shapes":
        return opener(split, seed, **options)
    return opener(os.fspath(path), split, **options)


def captions(source: Source, limit: int = 20_000) -> list[str]:
    """Those of up to `limit` examples, evenly spread, to train a tokenizer on."""
    count = len(source)
    if source.endless:
        indices = range(min(count, limit))
    else:
        indices = range(0, count, -(-count // limit))
    found = []
    for i in indices:
        try:
            found += as_list(source[i]["caption"])
        except BadExample as error:
            log.info("%s", error)
    return found


def as_list(caption: str | list[str]) -> list[str]:
    return [caption] if isinstance(caption, str) else caption


def _hold_out(
    name: str,
    keys: Sequence[str],
    read: Callable[[int], dict],
    split: str,
    holdout: float,
) -> Source:
    """One split's examples. Their keys tell who is held out, whatever their order."""
    count = len(keys)
    if not 0 <= holdout < 1:
        raise UserError(f"holdout is {holdout}; it is a fraction, from 0 to below 1")
    if count < FEWEST_TO_HOLD_OUT or holdout == 0:
        return Source(name, range(count), read)
    hashes = [zlib.crc32(key.encode()) for key in keys]
    order = np.argsort(hashes, kind="stable")
    held_out = max(1, round(count * holdout))
    indices = order[:held_out] if split == "heldout" else order[held_out:]
    return Source(name, np.sort(indices), read)


def _clean(caption, key: str) -> str | list[str]:
    """The caption, or each of several, in one line; raises BadExample without any."""
    several = [caption] if isinstance(caption, str) else caption
    if not isinstance(several, list) or not all(isinstance(c, str) for c in several):
        raise BadExample("no caption" if caption is None else "caption not text", key)
    several = [" ".join(c.split()) for c in several]
    several = [c for c in several if c]
    if not several:
        raise BadExample("empty caption", key)
    return several[0] if len(several) == 1 else several


def _caption_of(record):
    """The caption of a JSON record, unchecked, or None."""
    fields = record if isinstance(record, dict) else {}
    return next((fields[name] for name in CAPTION_FIELDS if name in fields), None)


# shapes


def _shapes(split: str, seed: int, *, pairs: float = 0.5, contrast: int = 1) -> Source:
    if contrast < 1:
        raise UserError(f"contrast is {contrast}; the least, for none, is 1")
    if seed < 0:
        raise UserError(f"the seed is {seed}; it must be 0 or more")

    def read(i: int) -> dict:
        group, member = divmod(i, contrast)
        rng = np.random.default_rng((seed, shapes.SPLITS.index(split), group))
        scene = shapes.sample_scene(rng, split, pairs)
        if contrast > 1:
            scene = shapes.contrasting(scene, rng, contrast)[member]
        return {
            "image": partial(shapes.render, scene),
            "caption": shapes.caption(scene),
            "key": str(i),
        }

    return Source("shapes", range(ENDLESS), read, endless=True)


# a folder


def _folder(path: str, split: str, *, holdout: float = HOLDOUT) -> Source:
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"there is no folder {path}")
    files = {
        os.path.relpath(os.path.join(where, name), folder)
        for where, _, names in os.walk(folder, followlinks=True)
        for name in names
    }
    pictures = sorted(f for f in files if f.lower().endswith(EXTENSIONS))
    if not pictures:
        raise UserError(f"the folder {path} has no pictures ({', '.join(EXTENSIONS)})")
    if "metadata.jsonl" in files:
        keys, read = _with_metadata(folder, files)
    else:
        keys, read = _with_sidecars(folder, files, pictures)
    return _hold_out(f"folder {path}", keys, read, split, holdout)


def _with_sidecars(folder: Path, files: set[str], pictures: list[str]):
    captioned = [f for f in pictures if os.path.splitext(f)[0] + ".txt" in files]
    if not captioned:
        raise UserError(
            f"the folder {folder} has no captions: give it a metadata.jsonl with the "
            "fields file_name and caption, or a .txt beside each picture"
        )
    if len(captioned) < len(pictures):
        missing = len(pictures) - len(captioned)
        log.warning("%s: %d pictures without a caption are left out", folder, missing)

    def read(i: int) -> dict:
        file = folder / captioned[i]
        text = _read_bytes(file.with_suffix(".txt")).decode(errors="replace")
        caption = _clean(text, str(file))
        return {"image": _read_bytes(file), "caption": caption, "key": str(file)}

    return captioned, read


def _with_metadata(folder: Path, files: set[str]):
    examples, missing = [], []
    with open(folder / "metadata.jsonl", encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            name = caption = None
            try:
                record = json.loads(line)
                name = os.path.normpath(record["file_name"])
                caption = _caption_of(record)
            except (ValueError, KeyError, TypeError):
                pass  # the example is bad: no name
            if name is not None and name not in files:
                missing.append(f"{name} (line {number})")
            examples.append((name, caption, f"{folder}/metadata.jsonl line {number}"))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{folder}/metadata.jsonl names a picture that is not there: "
            f"{missing[0]}{more}; add the file or take out the line"
        )
    if all(name is None or caption is None for name, caption, _ in examples):
        raise UserError(
            f"{folder}/metadata.jsonl has no captions; a line is "
            '{"file_name": "a.png", "caption": "what it shows"}'
        )

    def read(i: int) -> dict:
        name, caption, key = examples[i]
        if name is None:
            raise BadExample("metadata without file_name", key)
        caption = _clean(caption, key)
        return {"image": _read_bytes(folder / name), "caption": caption, "key": name}

    return [name or key for name, _, key in examples], read


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadExample(f"cannot read ({error.strerror})", str(file)) from error


# tars


def _webdataset(path: str, split: str, *, holdout: float = HOLDOUT) -> Source:
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
            caption = fs.cat_file(shard, *text).decode(errors="replace")
            data = fs.cat_file(shard, *picture)
        except OSError as error:
            raise BadExample("cannot read the tar", keys[i]) from error
        if len(data) < picture[1] - picture[0]:
            raise BadExample("tar cut short", keys[i])
        if kind == ".json":
            try:
                caption = _caption_of(json.loads(caption))
            except ValueError:
                raise BadExample("caption not JSON", keys[i]) from None
        return {"image": data, "caption": _clean(caption, keys[i]), "key": keys[i]}

    return _hold_out(f"webdataset {path}", keys, read, split, holdout)


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


# TFDS


def _tfds(
    path: str,
    split: str,
    *,
    holdout: float = HOLDOUT,
    tfds_split: str = "train",
    image: str = "image",
    caption: str = "caption",
    data_dir: str | None = None,
) -> Source:
    import tensorflow_datasets as tfds
    from etils import epath

    folder = epath.Path(path)
    if folder.is_dir() and not (folder / "dataset_info.json").exists():
        raise UserError(f"the folder {path} has no dataset_info.json of TFDS")
    try:
        if folder.is_dir():
            builder = tfds.builder_from_directory(path)
        else:
            builder = tfds.builder(path, data_dir=data_dir)
        features = builder.info.features
    # TFDS raises anything, down to the failed import of TensorFlow.
    except Exception as error:
        said = first_line(error)
        if "tensorflow" in said:
            said += "; if it needs TensorFlow, pip install 'dalle2_jax[tf]'"
        raise UserError(f"cannot open TFDS {path}: {said}") from error
    if not isinstance(_feature(features, image), tfds.features.Image):
        raise UserError(f'TFDS {path} has no images "{image}", but {[*features]}')
    text = _feature(features, caption)
    if not isinstance(text, tfds.features.Text | tfds.features.ClassLabel):
        raise UserError(f'TFDS {path} has no captions "{caption}", but {[*features]}')
    try:
        # The bytes are decoded with those of all other sources, where bad ones count.
        source = builder.as_data_source(
            tfds_split, decoders={image: tfds.decode.SkipDecoding()}
        )
    except Exception as error:
        raise UserError(
            f"cannot read TFDS {path}: {first_line(error)} (it must be prepared, "
            'with file_format="array_record")'
        ) from error

    def read(i: int) -> dict:
        record = source[i]
        value = record
        for field in caption.split("/"):
            value = value[field]
        if isinstance(text, tfds.features.ClassLabel):
            value = text.int2str(value)
        several = [value] if isinstance(value, str | bytes) else list(value)
        several = [
            v if isinstance(v, str) else v.decode("utf-8", "replace") for v in several
        ]
        return {
            "image": record[image],
            "caption": _clean(several, str(i)),
            "key": str(i),
        }

    keys = [str(i) for i in range(len(source))]
    return _hold_out(f"tfds {path}", keys, read, split, holdout)


def _feature(features, path: str):
    """What `path` names in the features of a TFDS, within sequences too, or None."""
    for name in path.split("/"):
        features = getattr(features, "feature", features)  # of a sequence
        if not hasattr(features, "keys") or name not in features:
            return None
        features = features[name]
    return getattr(features, "feature", features)


OPENERS = {
    "shapes": _shapes,
    "folder": _folder,
    "webdataset": _webdataset,
    "tfds": _tfds,
}
