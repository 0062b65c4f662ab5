"""Where captioned pictures come from: shapes, a folder, tars, TFDS, or a mixture.

Every source is a random-access sequence of examples, dicts with the keys
    image    bytes of a file, a PIL image, or a function from a size to uint8 [h, w, 3]
    caption  str, or a list of them to choose from
    key      str, of no other example
With CLIP's embeddings there are also those that data/embeddings.py describes.
"""

import ast
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from dalle2_jax import rules
from dalle2_jax.data import shapes
from dalle2_jax.data.embeddings import embeddings
from dalle2_jax.data.examples import (
    ENDLESS,
    SPLITS,
    BadExample,
    Listing,
    Source,
    as_list,
    clean,
    counted,
    decode,
    select,
    warn_once,
)
from dalle2_jax.data.folder import folder
from dalle2_jax.data.mixture import mix
from dalle2_jax.data.tars import webdataset
from dalle2_jax.errors import UserError, first_line, short
from dalle2_jax.files import check_files

log = logging.getLogger(__name__)


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
    "folder"      a folder of pictures, in it and in the folders in it, with captions in
                  its metadata.jsonl (fields file_name and caption or text) or beside
                  each picture in a .txt. Pictures are files with the extensions of
                  image.EXTENSIONS, in any case. Hidden files (.NAME, __MACOSX) are not
                  read. Links are followed, but no folder is read twice.
    "webdataset"  tars of KEY.png (or another of those extensions) with KEY.txt or
                  KEY.json (field caption or text): a path or URL that fsspec reads,
                  with globs and braces.
    "tfds"        a data set prepared as array_record: its folder, or its name and
                  `data_dir`. `tfds_split` is what TFDS calls its split, `image` and
                  `caption` are its fields, as "captions/text".
    "embeddings"  a folder of CLIP's embeddings of another source, as
                  `dalle2 embed` makes it.
    "mixture"     no path. `parts`: each a dict of source (a kind), path, weight and
                  options, which has its own split; see mixture.mix. `defaults`: by
                  kind, the options that parts don't give.

    A .txt is UTF-8 and has one caption, or several, one a line. JSON has several as a
    list. One of several is drawn each time that the picture is. What is left out, such
    as a picture without a caption, is counted in the source's `left_out`.

    A path may begin with ~. All with a path take `holdout`, the fraction of the
    pictures that make up the split "heldout"; the others are "train". With fewer than
    10 pictures, or a holdout of 0, both splits are all of them. And `keep`, a file with
    the keys of the examples that are read, as `dalle2 filter` writes it;
    all others are as if they were not there. Shapes take the seed, and have a third
    split "unseen": scenes with a (colour, shape) that the others never show.

    Raises UserError if there is nothing to read.
    """
    if kind not in OPENERS:
        raise UserError(f'data "{kind}": there is {", ".join(OPENERS)}')
    opener = OPENERS[kind]
    options = {name: value for name, value in options.items() if value is not None}
    parameters = inspect.signature(opener).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    known += [] if kind in PATHLESS else ["holdout", "keep"]
    if unknown := [name for name in options if name not in known]:
        raise UserError(f'data "{kind}" has no option "{unknown[0]}", but {known}')
    check_options(options, f"data.{kind}")
    rules.check({"seed": seed}, {"seed": rules.SEED}, f"data.{kind}")
    if bool(path) != (kind not in PATHLESS):
        needs = "takes no path" if path else "needs a path"
        raise UserError(f'data "{kind}" {needs}, and was given "{path or ""}"')
    splits = shapes.SPLITS if kind == "shapes" else SPLITS
    if split not in splits:
        raise UserError(f'data "{kind}" has no split "{split}", but {splits}')
    if kind in PATHLESS:
        return opener(split, seed, **options)
    chosen = {name: options.pop(name) for name in ("holdout", "keep") & options.keys()}
    path = os.path.expanduser(path)  # leaves URLs as they are
    source = select(opener(path, **options), split, **chosen)
    if source.left_out:
        warn_once(f"{source.name}: left out: {counted(source.left_out)}")
    return source


def check_options(options: Mapping[str, Any], where: str) -> None:
    """Raise a UserError unless the options of a source have values that can be."""
    rules.check(options, {k: RULES[k] for k in options if k in RULES}, where)


def open_all(
    kind: str, path: str = "", split: str = "", options: Sequence[str] = ()
) -> Source:
    """Opens a source as commands name it, to be read once from its first example on.

    Without a split all of its examples are read (of shapes those of "train"). Options
    are as "NAME=VALUE", the value in Python's way of writing it, or a plain word.
    """
    given: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"option {option!r}: write NAME=VALUE")
        if name in given:
            raise UserError(f"option {option!r}: {name} is given twice")
        try:
            given[name] = ast.literal_eval(value)
        # Of a deep nest, Python's parser raises MemoryError.
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            given[name] = value
    _check_names(given)
    if not split and kind not in PATHLESS:
        if "holdout" in given:
            raise UserError("option holdout: give a split, too; else all are read")
        given["holdout"] = 0.0
    return open_source(kind, path, split or "train", **given)


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


# shapes


def _shapes(split: str, seed: int, *, pairs: float = 0.5, contrast: int = 1) -> Source:
    def read(i: int) -> dict:
        group, member = divmod(i, contrast)
        rng = np.random.default_rng((seed, shapes.SPLITS.index(split), group))
        scene = shapes.sample_scene(rng, split, pairs)
        if contrast > 1:
            scene = shapes.contrasting(scene, rng, contrast)[member]
        return {
            "image": partial(shapes.render, scene),
            "caption": shapes.caption(scene),
        }

    return Source("shapes", range(ENDLESS), read, endless=True)


# several of them


def _mixture(
    split: str,
    seed: int,
    *,
    parts: Any = (),
    defaults: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Source:
    if not isinstance(parts, list | tuple):
        raise UserError(f"the parts of a mixture are {short(parts)}: give a list")
    opened, weights = [], []
    for part in parts:
        if not isinstance(part, Mapping) or not {"source", "weight"} <= part.keys():
            raise UserError(
                f"a part of a mixture is {short(part)}: it must be as "
                "{'source': 'folder', 'path': '/pictures', 'weight': 1.0}"
            )
        given = dict(part)
        kind, path = given.pop("source"), given.pop("path", None)
        if kind == "mixture":
            raise UserError("a mixture can't be part of a mixture: list its parts")
        if not isinstance(kind, str) or not isinstance(path, str | os.PathLike | None):
            raise UserError(f"a part of a mixture is {short(part)}: not text")
        weights.append(given.pop("weight"))
        _check_names(given)
        given = {**defaults.get(kind, {}), **given}
        opened.append(open_source(kind, path, split, seed, **given))
    return mix(opened, weights, seed)


def _check_names(options: Mapping[Any, Any]) -> None:
    """Raise a UserError for an option with the name of an argument of open_source."""
    for name in options:
        known = isinstance(name, str) and name.isidentifier()
        if not known or name in ("kind", "path", "split", "seed"):
            raise UserError(f"{short(name)} is not an option of a source")


# TFDS


def _tfds(
    path: str,
    *,
    tfds_split: str = "train",
    image: str = "image",
    caption: str = "caption",
    data_dir: str | None = None,
) -> Listing:
    import tensorflow_datasets as tfds
    from etils import epath

    data_dir = data_dir and os.path.expanduser(data_dir)
    folder = epath.Path(path)
    if os.path.isdir(path):
        check_files(path)
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
        try:
            record = source[i]
        except Exception as error:  # of a damaged record, nearly any
            raise BadExample("damaged record", str(i)) from error
        value = record
        for field in caption.split("/"):
            value = value[field]
        if isinstance(text, tfds.features.ClassLabel):
            value = text.int2str(value)
        several = [value] if isinstance(value, str | bytes) else list(value)
        several = [v if isinstance(v, str) else decode(v, str(i)) for v in several]
        return {"image": record[image], "caption": clean(several, str(i))}

    return Listing(f"tfds {path}", [str(i) for i in range(len(source))], read)


def _feature(features, path: str):
    """What `path` names in the features of a TFDS, within sequences too, or None."""
    for name in path.split("/"):
        features = getattr(features, "feature", features)  # of a sequence
        if not hasattr(features, "keys") or name not in features:
            return None
        features = features[name]
    return getattr(features, "feature", features)


# Those that need a path give a Listing, the others a Source.
OPENERS: dict[str, Callable[..., Listing | Source]] = {
    "shapes": _shapes,
    "mixture": _mixture,
    "folder": folder,
    "webdataset": webdataset,
    "tfds": _tfds,
    "embeddings": embeddings,
}
PATHLESS = ("shapes", "mixture")
# What their options may be.
RULES = {
    "pairs": rules.CHANCE,
    "contrast": rules.COUNT,
    "holdout": rules.number(0, 1, below=True),
    "tfds_split": rules.TEXT,
    "image": rules.TEXT,
    "caption": rules.TEXT,
    "data_dir": rules.optional(rules.TEXT),
}
