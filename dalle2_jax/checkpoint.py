"""Exported models: a directory with everything that sampling needs, nothing pickled:

config.json                  {"format": 1, "parts": {NAME: {...}}, ...}
NAME.safetensors             the params of one part, named "a/b/kernel"
tokenizer/
statistics.safetensors       for instance mean and deviation of the embeddings
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dalle2_jax import files, storage
from dalle2_jax.errors import UserError

# What is done with each param as it is read, so that no more than one lies around: it
# may be cast and put onto a device.
Place = Callable[[np.ndarray], Any]

FORMAT = 1
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
        text = json.dumps({**config, "format": FORMAT}, indent=2)
        (new / "config.json").write_text(text + "\n")
        for name, tree in params.items():
            _save(new / f"{name}.safetensors", tree)
        if statistics:
            _save(new / "statistics.safetensors", statistics)
        if tokenizer is not None:
            tokenizer.save(new / "tokenizer")


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
            for name, params in load(source).params.items():
                cast = jax.tree.map(lambda x: x.astype(dtype), params)
                _save(new / f"{name}.safetensors", cast)


def load(
    directory: str | Path,
    place: Place = np.asarray,
    only: Sequence[str] | None = None,
) -> Export:
    """Reads what `export` wrote.

    Args:
        directory: the model, or its URL, from which it is copied for this process.
        place: called with each param, not with statistics; numpy's arrays stay by
            default.
        only: the parts to read; None for all.

    Raises:
        UserError: the directory is not a model, a file is missing or can't be read, or
            a number in it is not finite.
    """
    directory = storage.fetch(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(
            f"{directory} is not a model: it has no config.json "
            "(train.py leaves one in WORKDIR/model)"
        )
    try:
        config = _tuples(files.read_json(path))
        version, parts = config["format"], dict(config["parts"])
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the config of a model of this package ({error!r})"
        ) from error
    if version != FORMAT:
        raise UserError(
            f"{directory} has format {version}, this version of dalle2_jax reads "
            f"format {FORMAT}: update dalle2_jax or export the model again"
        )
    names = [name for name in parts if only is None or name in only]
    tokenizer_dir = directory / "tokenizer"
    statistics = directory / "statistics.safetensors"
    return Export(
        config={**config, "parts": {name: parts[name] for name in names}},
        params={
            name: _load(directory / f"{name}.safetensors", place) for name in names
        },
        tokenizer_dir=tokenizer_dir if tokenizer_dir.is_dir() else None,
        statistics=_load(statistics) if statistics.exists() else {},
    )


def merge(models: Sequence[Export]) -> Export:
    """Puts models together; of parts that several have, the last is taken.

    But a CLIP with both towers goes before one that has only the text's.
    """
    parts: dict[str, Any] = {}
    params: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    text = None
    for model in models:
        for name, section in model.config["parts"].items():
            net = section["net"]
            if name == "clip" and name in parts and net.get("image_size") is None:
                continue
            parts[name], params[name] = section, model.params[name]
        statistics |= model.statistics
        text = model.tokenizer_dir or text
    return Export({"parts": parts}, params, text, statistics)


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


def _load(path: Path, place: Place = np.asarray) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing: copy or export the whole model again")
    try:
        with safe_open(path, framework="numpy") as file:
            params = {
                name: place(_finite(file.get_tensor(name), f"{name} in {path}"))
                for name in file.keys()
            }
        return unflatten_dict(params, sep="/")
    except SafetensorError as error:
        raise UserError(
            f"{path} is truncated or damaged ({error}): copy or export it again"
        ) from error


def _finite(array: np.ndarray, what: str) -> np.ndarray:
    if bad := array.size - np.count_nonzero(np.isfinite(array)):
        raise UserError(
            f"{bad:,} of {array.size:,} numbers of {what} are not finite: train or "
            "export the model again"
        )
    return array


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
    return ", ".join(names[:limit]) + more
