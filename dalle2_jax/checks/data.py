"""What a sample of the data is like: which examples are of use, pictures, captions."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from dalle2_jax import checkpoint, parts
from dalle2_jax.checks import captions, embeddings
from dalle2_jax.checks.finding import Finding, ok
from dalle2_jax.data import filter as rules
from dalle2_jax.data.batches import count_bad, in_order
from dalle2_jax.data.examples import Source, as_list, counted
from dalle2_jax.data.rows import read_picture, square_of
from dalle2_jax.pipeline import encode, models

BLANK = 2.0  # deviation of the pixels below which a picture shows nothing
ALIKE = 0.99  # cosine of the embeddings of two pictures that are nearly the same
DRAWN = 64  # px of a drawn picture where nothing says how large it is to be
MANY = 0.05  # of the sample: worth a warning


def check(
    config: ConfigDict,
    source: Source,
    stage: parts.Stage | None,
    load: parts.Load,
    examples: int,
) -> list[Finding]:
    """Looks at a sample of the data as the stage reads it.

    Args:
      config: of the stage.
      source: the examples to train on.
      stage: None if it couldn't be built: its tokenizer is then not known.
      load: reads the models that the config names.
      examples: how many to look at.

    Raises:
      UserError: a model that the config names can't be read.
    """
    base, _ = parts.stage.load_models(config, load)
    clip = None if base is None else _clip_of(base, config)
    clip_size = None if clip is None else encode.image_size(clip)
    values = config.to_dict()
    size = values.get("size") or values["net"].get("image_size") or clip_size or DRAWN
    embed = clip is not None and source.embedded is None
    rows, bad = sample(
        source,
        examples,
        draw=size,
        clip_size=clip_size if embed else None,
        threads=config.data.threads,
    )
    findings = [judge_examples(rows, bad, source)]
    if not rows:
        return findings
    if embed:
        rows = list(encode.encode_examples(clip, rows))
    z_image = None
    if "z_image" in rows[0]:
        z_image = np.stack([row["z_image"] for row in rows]).astype(np.float32)
    if "digest" in rows[0]:
        findings.append(judge_sizes(rows, size))
        findings.append(judge_blank(rows))
    if not source.endless:
        findings.append(judge_duplicates(rows, z_image))
    texts = [caption for row in rows for caption in row["captions"]]
    model = {} if stage is None else stage.export({})
    if config.stage != "upsampler" and model.get("tokenizer"):
        text, net = model["tokenizer"], model["config"]["parts"]["clip"]["net"]
        findings += captions.judge(
            texts,
            captions.count_tokens(text, texts),
            net["context_length"],
            source.endless,
        )
    reads = config.stage in ("prior", "ar_prior", "decoder")
    if z_image is not None and base is not None and reads:
        own = config.stage != "decoder" and not config.init_from
        findings.append(embeddings.judge(z_image, base.statistics, own))
    if source.embedded is not None and base is not None and "clip" in base.params:
        if source.embedded.clip == checkpoint.fingerprint(base.params["clip"]):
            findings.append(ok("clip", "the embeddings are of the base's CLIP"))
    return findings


def _clip_of(base: checkpoint.Export, config: ConfigDict) -> models.Model | None:
    """The CLIP of a model with what it takes to embed, on the devices, or None."""
    section = base.config["parts"].get("clip")
    if not section or not section["net"].get("image_size") or not base.tokenizer_dir:
        return None
    devices = models.mesh()
    alone = base._replace(
        config={"parts": {"clip": section}},
        params={"clip": jax.tree.map(models.placer(devices), base.params["clip"])},
    )
    return models.assemble([("the base", alone)], devices, parts.dtype_of(config))


def look(
    example: Mapping[str, Any], *, draw: int, clip_size: int | None
) -> dict[str, Any]:
    """What the checks need of an example.

    Args:
      draw: side at which a picture that is drawn on demand is looked at.
      clip_size: side of the square for CLIP; None if it isn't needed.

    Returns:
      key, captions; of a picture `std` and `digest` of its pixels, `side`, its shorter
      one (but not of one that is drawn), and `clip_image`; the embeddings that the
      example has.
    """
    row: dict[str, Any] = {
        "key": example["key"],
        "captions": as_list(example["caption"]),
    }
    row |= {k: example[k] for k in ("z_image", "z_text") if k in example}
    picture = example["image"]
    if picture is None:
        return row
    if callable(picture):
        pixels = picture(draw)
    else:
        read = read_picture(example)
        row["side"] = min(read.size)
        pixels = np.asarray(read)
        example = {**example, "image": pixels}  # decoded once
    row["std"] = rules.deviation(pixels)
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes())
    row["digest"] = digest.hexdigest()
    if clip_size is not None and "z_image" not in row:
        row["clip_image"] = square_of(example, clip_size)(clip_size)
    return row


def sample(
    source: Source,
    count: int,
    *,
    draw: int,
    clip_size: int | None,
    threads: int,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Looks at so many examples, spread evenly over a source.

    Returns:
      What `look` gives of those of use, and how many were not, by the reason.
    """
    step = 1 if source.endless else max(1, len(source) // count)
    indices = range(0, len(source), step)[:count]
    make = partial(look, draw=draw, clip_size=clip_size)
    bad: Counter[str] = Counter()
    return list(count_bad(in_order(source, indices, make, threads), bad)), bad


def judge_examples(
    rows: Sequence[Mapping[str, Any]], bad: Counter[str], source: Source
) -> Finding:
    """How many can be used, and why the others can't."""
    count = len(rows) + bad.total()
    found = f"{len(rows)} of {count} examples looked at can be used"
    if not source.endless:
        found += f", of {len(source):,} in {source.name}"
    remedy = []
    if bad:
        found += f"; not: {counted(bad)}"
        remedy.append("these are skipped and others taken in their place")
    if source.left_out:
        found += f"; left out: {counted(source.left_out)}"
        remedy.append("mend what is left out if it should be read")
    if not remedy:
        return ok("examples", found)
    level = "problem" if bad.total() > count / 2 else "warning"
    return Finding(level, "examples", found, ", ".join(remedy))


def judge_sizes(rows: Sequence[Mapping[str, Any]], size: int) -> Finding:
    """How large the pictures are; they are trained on at `size`."""
    sides = np.array([row["side"] for row in rows if "side" in row])
    if not len(sides):
        drawn = any("digest" in row for row in rows)
        return ok("sizes", "drawn at any size" if drawn else "there are no pictures")
    small = int((sides < size).sum())
    found = (
        f"the shorter side is {sides.min()} to {sides.max()} px, median "
        f"{np.median(sides):g}; {small} of {len(sides)} are below the {size} px that "
        "are trained at"
    )
    if not small:
        return ok("sizes", found)
    level = "problem" if small > len(sides) / 2 else "warning"
    remedy = f"they are enlarged, and blurred; filter with --min_side={size}"
    return Finding(level, "sizes", found, remedy)


def judge_blank(rows: Sequence[Mapping[str, Any]]) -> Finding:
    """How many pictures show nothing."""
    blank = [row["key"] for row in rows if "std" in row and row["std"] < BLANK]
    found = f"{len(blank)} of {len(rows)} pictures are of one colour"
    if not blank:
        return ok("blank", found)
    remedy = f"filter with --min_std={BLANK:g}"
    return Finding("warning", "blank", f"{found}, as {blank[0]}", remedy)


def judge_duplicates(
    rows: Sequence[Mapping[str, Any]], z_image: Float[np.ndarray, "n d"] | None
) -> Finding:
    """How many pictures are the same as one before, to the pixel or nearly.

    Args:
      rows: of `look`.
      z_image: of all of them, or None.
    """
    keys = [row["key"] for row in rows]
    first: dict[str, int] = {}
    same = [
        first.setdefault(row.get("digest", str(i)), i) for i, row in enumerate(rows)
    ]
    exact = [(i, j) for j, i in enumerate(same) if i != j]
    found = f"{len(exact)} of {len(rows)} pictures repeat another to the pixel"
    examples = exact
    if z_image is not None:
        near = rules.near_duplicates(z_image, ALIKE)
        alike = [(int(i), j) for j, i in enumerate(near) if i != j]
        found += f", {len(alike)} are like another by CLIP (cosine {ALIKE} or more)"
        examples = exact or alike
    if not examples:
        return ok("duplicates", found)
    i, j = examples[0]
    found += f", as {keys[i]} and {keys[j]}"
    if exact or len(examples) > MANY * len(rows):
        remedy = f"look at them; filter with --model=MODEL --duplicates={ALIKE}"
        return Finding("warning", "duplicates", found, remedy)
    return ok("duplicates", found)
