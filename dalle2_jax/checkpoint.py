"""Exported models: a directory with everything that sampling needs, nothing pickled:

config.json                  {"format": 1, "parts": {NAME: {...}}, "sha256": {...}}
NAME.safetensors             the params of one part, named "a/b/kernel"
tokenizer/
statistics.safetensors       for instance mean and deviation of the embeddings
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from dalle2_jax import storage, tensors
from dalle2_jax.errors import UserError, cut, short
from dalle2_jax.files import read_json

# What is done with each param as it is read, so that no more than one lies around: it
# may be cast and put onto a device. Raises OverflowError if the cast makes infinities.
Place = Callable[[np.ndarray], Any]
# Called with a part's name, section and weights before these are read; raises a
# UserError if they make no network.
Accept = Callable[[str, dict[str, Any], tensors.Weights], None]

FORMAT = 1
LARGEST_CONFIG = 2**20  # bytes
# CLIP's learned factor, which no tower alone has; OpenAI's ViT-L/14 is at this limit.
LOGIT_SCALE = np.float32(math.log(100.0))
BUNDLED = Path(__file__).parent / "assets"  # the model that ships


class Export(NamedTuple):
    """A model as it lies on disk."""

    config: dict[str, Any]
    params: dict[str, dict]  # by part: nested dicts of arrays
    tokenizer_dir: Path | None
    statistics: dict[str, Any]


def export(
    directory: str | Path,
    *,
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Any = None,
    statistics: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model; a model that is already there is replaced as a whole.

    Args:
        directory: where to, or a URL; what is there already must be a model, or empty.
        params: of each part by its name, nested dicts of arrays.
        config: what config.json holds, with an entry in config["parts"] for each part.
        tokenizer: anything with `save(directory)`, or None.
        statistics: nested dict of arrays, or None.

    Raises:
        UserError: something else is in the way, or the directory can't be written.
    """
    with _replacing(directory) as new:
        for name, tree in params.items():
            _save(new / f"{name}.safetensors", tree)
        if statistics:
            _save(new / "statistics.safetensors", statistics)
        if tokenizer is not None:
            tokenizer.save(new / "tokenizer")
        _write_config(new, config)


def copy(
    model: str | Path, directory: str | Path, dtype: str | np.dtype | None = None
) -> None:
    """Copies a model; one that is already there is replaced as a whole.

    Args:
        model, directory: from where and to where; each may be a URL.
        dtype: of the params in the copy, as "float16" to halve its size; None keeps
            what they have. Statistics stay as they are.
    """
    with _replacing(directory) as new:
        source = storage.fetch(model)
        shutil.copytree(source, new, dirs_exist_ok=True)
        if dtype is not None:
            found = load(source, place=lambda array: tensors.cast(array, dtype))
            for name, params in found.params.items():
                _save(new / f"{name}.safetensors", params)
            _write_config(new, found.config)


def load(
    directory: str | Path,
    place: Place = np.asarray,
    only: Sequence[str] | None = None,
    accept: Accept | None = None,
) -> Export:
    """Read what `export` wrote.

    Args:
        directory: the model, or its URL, from which it is copied for this process.
        place: called with each param, not with statistics; numpy's arrays stay by
            default.
        only: the parts to read; None for all.
        accept: called for every part before the first is read.

    Raises:
        UserError: the directory is not a model, a file is missing, can't be read or has
            other bytes than were written, or a param is not finite. Models of version
            0.1 have no checksums and are read without.
    """
    directory = storage.fetch(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(
            f"{directory} is not a model: it has no config.json "
            "(train.py leaves one in WORKDIR/model)"
        )
    config = _tuples(read_json(path, LARGEST_CONFIG))
    parts, checksums = config.get("parts"), config.pop("sha256", {})
    if "format" not in config or not all(
        isinstance(value, dict) for value in (parts, checksums)
    ):
        raise UserError(
            f"{path} is not the config of a model of this package: it needs format, "
            "and parts and sha256 must be objects"
        )
    if config["format"] != FORMAT:
        raise UserError(
            f"{directory} has format {short(config['format'])}, this version of "
            f"dalle2_jax reads format {FORMAT}: update dalle2_jax or export the model "
            "again"
        )
    for name, section in parts.items():
        if not re.fullmatch(r"\w+", name) or not isinstance(section, dict):
            raise UserError(
                f"{path}: the part {short(name)} must be an object, and its name of "
                "letters, digits and _"
            )
    if only is not None:
        for name in parts.keys() - set(only):
            checksums.pop(f"{name}.safetensors", None)
        parts = {name: parts[name] for name in parts if name in only}
    found = {
        name: tensors.open_safetensors(directory / f"{name}.safetensors")
        for name in parts
    }
    if accept is not None:
        for name, section in parts.items():
            accept(name, section, found[name])
    tensors.verify(directory, checksums)
    statistics = directory / "statistics.safetensors"
    tokenizer_dir = directory / "tokenizer"
    return Export(
        config={**config, "parts": parts},
        params={name: _read(weights, place) for name, weights in found.items()},
        tokenizer_dir=tokenizer_dir if tokenizer_dir.is_dir() else None,
        statistics=_read(tensors.open_safetensors(statistics))
        if statistics.exists()
        else {},
    )


def merge(models: Sequence[Export]) -> Export:
    """Put models together; of parts that several have, the last is taken.

    But a CLIP with both towers goes before one that has only one of them, and two CLIPs
    of one tower each make one with both.

    Raises:
        UserError: their towers have embeddings of different dimensions.
    """
    parts: dict[str, Any] = {}
    params: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    text = None
    for model in models:
        for name, section in model.config["parts"].items():
            tree = model.params[name]
            if name == "clip" and name in parts:
                have, new = _towers(parts[name]), _towers(section)
                if new < have:
                    continue
                if not new & have:
                    section = _join(parts[name], section)
                    tree = {**params[name], **tree, "logit_scale": LOGIT_SCALE}
            parts[name], params[name] = section, tree
        statistics |= model.statistics
        text = model.tokenizer_dir or text
    return Export({"parts": parts}, params, text, statistics)


def _towers(clip: Mapping[str, Any]) -> set[str]:
    net = clip["net"]
    keys = {"text": "text_width", "vision": "image_size"}
    return {tower for tower, key in keys.items() if net.get(key) is not None}


def _join(*clips: Mapping[str, Any]) -> dict[str, Any]:
    """One CLIP of two that have a tower each."""
    vision, text = (
        clip["net"] for clip in sorted(clips, key=lambda x: "text" in _towers(x))
    )
    if vision["embed_dim"] != text["embed_dim"]:
        raise UserError(
            f"CLIP's image tower makes embeddings of dimension {vision['embed_dim']}, "
            f"its text tower of {text['embed_dim']}: load towers of one CLIP"
        )
    net = {**vision, **text}
    activation = vision.get("activation", text.get("activation"))
    if activation != text.get("activation"):
        net["vision_activation"] = activation
    return {"net": net}


def check(params: Any, abstract: Any, where: str | Path) -> None:
    """Accounts for every name on both sides, or raises a UserError that lists them.

    Args:
        params: tree of arrays (or anything with a shape) that was read.
        abstract: tree of what is wanted, as from `jax.eval_shape`.
        where: what was read, for the message.
    """
    have, want = _shapes(params), _shapes(abstract)
    problems = {
        "missing": [name for name in want if name not in have],
        "unexpected": [name for name in have if name not in want],
        "wrong shape": [
            f"{name} {have[name]} instead of {want[name]}"
            for name in want
            if name in have and have[name] != want[name]
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{k}: {shorten(v)}" for k, v in problems.items() if v)
        raise UserError(f"{where} does not fit this config: {listed}")


def fingerprint(params: Any) -> str:
    """SHA-256 of the names, shapes and values (as float32) of a tree of params."""
    digest = hashlib.sha256()
    for name, value in sorted(flatten_dict(dict(params), sep="/").items()):
        array = np.ascontiguousarray(value, np.float32)
        digest.update(f"{name} {np.shape(value)}".encode())
        digest.update(array.data)
    return digest.hexdigest()


@contextlib.contextmanager
def _replacing(directory: str | os.PathLike) -> Iterator[Path]:
    """Yields a new directory, which at the end is put in the place of a model.

    So nobody sees a half-written model, and what fails leaves the old one there.
    """
    location = storage.url(directory)
    directory = location or storage.expand(directory).absolute()
    try:
        if location:
            names = storage.names(location)
        elif directory.is_dir():
            names = os.listdir(directory)
        else:
            names = ["a file"] * directory.exists()
        if names and "config.json" not in names:
            raise UserError(
                f"{directory} exists and is not a model: give a new directory"
            )
        if not location:
            directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=None if location else directory.parent, prefix=".model-"
        ) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            yield new
            if location:
                storage.replace(new, location, last="config.json")
                return
            if directory.exists():
                directory.rename(Path(scratch) / "old")
            new.rename(directory)
    except OSError as error:
        raise UserError(f"cannot write the model {directory}: {error}") from error


def _save(path: Path, tree: Mapping[str, Any]) -> None:
    arrays = flatten_dict(dict(tree), sep="/")
    save_file({k: np.asarray(v, order="C") for k, v in arrays.items()}, path)
    path.chmod(0o644)  # safetensors leaves it to its owner alone


def _read(weights: tensors.Weights, place: Place = np.asarray) -> dict[str, Any]:
    params = {
        name: tensors.place(place, weights.read(name), name, weights.where)
        for name in weights.shapes
    }
    try:
        return unflatten_dict(params, sep="/")
    except (TypeError, LookupError, ValueError) as error:  # "a" beside "a/b"
        raise UserError(f"{weights.where} has a name below that of a tensor") from error


def _write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, with the checksums of all the files that are there."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    checksums = {
        path.relative_to(directory).as_posix(): tensors.sha256(path)
        for path in sorted(paths)
        if path.name != "config.json"
    }
    text = json.dumps({**config, "format": FORMAT, "sha256": checksums}, indent=2)
    (directory / "config.json").write_text(text + "\n")


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were in the config."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = jax.tree_util.keystr
    return {name(k, simple=True, separator="/"): tuple(v.shape) for k, v in leaves}


def shorten(names: Sequence[str], limit: int = 8) -> str:
    """Return the first names and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(cut(name, 100) for name in names[:limit]) + more
