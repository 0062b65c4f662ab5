"""Which examples of a source are worth training on, by the rules of data/filter.py."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.data import filter as rules
from dalle2_jax.data import image
from dalle2_jax.data.batches import count_bad, in_order
from dalle2_jax.data.examples import Source, as_list
from dalle2_jax.data.rows import read_picture
from dalle2_jax.errors import UserError
from dalle2_jax.pipeline import encode
from dalle2_jax.pipeline.models import Model


def look(
    example: Mapping[str, Any],
    *,
    limits: rules.Limits,
    pictures: bool,
    clip_size: int | None,
) -> dict[str, Any]:
    """The rule that an example breaks, or what the rules on embeddings need of it.

    Args:
      pictures: whether there is a rule on pictures.
      clip_size: side of the picture for CLIP; None if no embedding is to be computed.
    """
    captions = as_list(example["caption"])
    row: dict[str, Any] = {"key": example["key"], "captions": captions}
    rule = rules.caption_problem(captions, limits)
    if rule is None and (pictures or clip_size is not None):
        picture = read_picture(example)
        std = rules.deviation(np.asarray(picture))
        rule = rules.picture_problem(*picture.size, std, limits)
        if clip_size is not None:
            row["clip_image"] = image.crop_resize(picture, clip_size)
    if rule is not None:
        return {"key": example["key"], "rule": rule}
    return row | {k: example[k] for k in ("z_image", "z_text") if k in example}


def choose(
    source: Source,
    limits: rules.Limits,
    model: Model | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    threads: int = 4,
    workers: int = 0,
) -> tuple[list[str], list[dict[str, Any]], dict[str, Any]]:
    """The keys of the examples of a source that stay, the others, and the report.

    Args:
      source: a Source with an end.
      model: with a CLIP, if there are rules on embeddings and the source has none.
      limit: how many of its first examples to look at; None for all.

    Raises:
      UserError: a limit is out of range, or the rules need what is not there.
    """
    rules.check_limits(limits)
    pictures = any(getattr(limits, name) is not None for name in rules.OF_PICTURES)
    compares = any(getattr(limits, name) is not None for name in rules.OF_EMBEDDINGS)
    computes = compares and source.embedded is None
    if source.endless:
        raise UserError(f"{source.name} has no end: there is nothing to choose from")
    if pictures and source.embedded is not None and source.embedded.image_size is None:
        raise UserError(f"{source.name} has no pictures: leave out the rules on them")
    if computes and model is None:
        raise UserError("rules on embeddings need CLIP: give --model=MODEL")
    make = partial(
        look,
        limits=limits,
        pictures=pictures,
        clip_size=encode.image_size(model) if computes else None,
    )
    count = min(len(source), limit or len(source))
    bad: Counter[str] = Counter()
    removed: list[dict[str, Any]] = []

    def left() -> Iterator[dict[str, Any]]:
        found = in_order(source, range(count), make, threads, workers)
        for row in count_bad(found, bad):
            if "rule" in row:
                removed.append(row)
            else:
                yield row

    rows = encode.encode_examples(model, left(), batch_size) if computes else left()
    rows = list(rows)
    keys = [row["key"] for row in rows]
    problems: Sequence[Any] = [None] * len(rows)
    if compares and rows:
        z_image = np.stack([row["z_image"] for row in rows])
        z_text = [row["z_text"] for row in rows]
        problems = rules.embedding_problems(z_image, z_text, limits)
    kept = []
    for key, problem in zip(keys, problems, strict=True):
        if problem is None:
            kept.append(key)
            continue
        rule, first = problem
        same = {} if first is None else {"of": keys[first]}
        removed.append({"key": key, "rule": rule, **same})
    by_rule = Counter(row["rule"] for row in removed) + bad
    return kept, removed, {"examples": count, "kept": len(kept), "removed": by_rule}


def write(
    folder: Path,
    kept: Sequence[str],
    removed: Sequence[Mapping[str, Any]],
    report: Mapping[str, Any],
) -> None:
    """Writes keep.jsonl, removed.jsonl and report.json; UserError if it can't."""

    def lines(rows: Sequence[Mapping[str, Any]]) -> str:
        return "".join(json.dumps(row) + "\n" for row in rows)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "keep.jsonl").write_text(lines([{"key": key} for key in kept]))
        (folder / "removed.jsonl").write_text(lines(removed))
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
