"""How often a model's pictures of plain shapes show their captions.

As a command it is `dalle2 evaluate`.
"""

import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.progress import track

from dalle2_jax.evaluate.judge import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    judge,
)

UNSEEN = (  # in no picture that the bundled model was trained on
    ("red", "star"),
    ("blue", "triangle"),
    ("green", "cross"),
    ("yellow", "circle"),
    ("purple", "square"),
)
KINDS = ("single", "pair", "unseen")
CHUNK = 25  # prompts sampled in one call


class Verdict(NamedTuple):
    """What became of one caption."""

    kind: str
    caption: str
    picture: np.ndarray
    right: dict[str, bool]


def make_caption(kind: str, rng: np.random.Generator) -> str:
    """Draws a caption of a kind: single, pair, or unseen (a single held-out thing)."""
    if kind == "unseen":
        named = [UNSEEN[rng.integers(len(UNSEEN))]]
    else:
        seen = [
            pair for pair in itertools.product(COLOURS, SHAPES) if pair not in UNSEEN
        ]
        named = [seen[rng.integers(len(seen))] for _ in range(1 + (kind == "pair"))]
    things = [f"a {rng.choice(SIZES)} {colour} {shape}" for colour, shape in named]
    caption = f" {rng.choice(list(RELATIONS))} ".join(things)
    if rng.random() < 0.5:
        caption += f" on a {rng.choice(list(BACKGROUNDS))} background"
    return caption


def evaluate(
    sample: Callable[[list[str], int], UInt8[np.ndarray, "n side side 3"]],
    num: int,
    seed: int,
) -> list[Verdict]:
    """Judges `num` pictures of each kind, made by `sample` from prompts and a seed."""
    rng = np.random.default_rng(seed)
    captions = [(kind, make_caption(kind, rng)) for kind in KINDS for _ in range(num)]
    verdicts = []
    for start in track(range(0, len(captions), CHUNK), "sampling", transient=True):
        kinds, prompts = zip(*captions[start : start + CHUNK], strict=True)
        pictures = sample(list(prompts), seed + start)
        for kind, prompt, picture in zip(kinds, prompts, pictures, strict=True):
            verdicts.append(Verdict(kind, prompt, picture, judge(picture, prompt)))
    return verdicts


def exchange_captions(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Judges each picture by the caption of the next one of its kind.

    What is right then is right by chance: so often would it be if the model did not
    read its captions.
    """
    exchanged = []
    for kind in KINDS:
        own = [verdict for verdict in verdicts if verdict.kind == kind]
        for verdict, other in zip(own, [*own[1:], *own[:1]], strict=True):
            right = judge(verdict.picture, other.caption)
            exchanged.append(Verdict(kind, other.caption, verdict.picture, right))
    return exchanged


class Rate(NamedTuple):
    """How often an attribute is right, and the 95% Wilson score interval (1927)."""

    right: int
    of: int
    rate: float
    low: float
    high: float


def rate(right: Sequence[bool]) -> Rate:
    """How often it is right of what was judged, at least once."""
    z, n, p = 1.959964, len(right), sum(right) / len(right)
    centre = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    scale = 1 + z**2 / n
    low, high = max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)
    return Rate(sum(right), n, p, low, high)


def accuracy(verdicts: Sequence[Verdict]) -> dict[str, dict[str, Rate]]:
    """For each kind and attribute that its captions name, how often it is right."""
    table = {}
    for kind in KINDS:
        judged = [verdict.right for verdict in verdicts if verdict.kind == kind]
        columns = {a: [right[a] for right in judged if a in right] for a in ATTRIBUTES}
        table[kind] = {name: rate(column) for name, column in columns.items() if column}
    return table


def format_table(table: dict[str, dict[str, Rate]]) -> str:
    """The accuracies as text: a row for each attribute, a column for each kind."""
    lines = ["".join(f"{head:>26}" for head in ("", *KINDS))[14:]]
    for attribute in ATTRIBUTES:
        cells = [table[kind].get(attribute) for kind in KINDS]
        texts = [
            f"{c.rate:.1%} ({c.low:.1%} to {c.high:.1%})" if c else "" for c in cells
        ]
        lines.append(f"{attribute:12}" + "".join(f"{text:>26}" for text in texts))
    return "\n".join(lines)


def draw_gallery(verdicts: Sequence[Verdict], columns: int = 8) -> Image.Image:
    """For each kind, a row of right pictures and one of wrong ones, with captions."""
    side, width, height = 128, 136, 214  # pixels of a picture and of its cell
    rows = [
        [v for v in verdicts if v.kind == kind and v.right["all"] == right][:columns]
        for kind in KINDS
        for right in (True, False)
    ]
    rows = [row for row in rows if row]
    gallery = Image.new("RGB", (columns * width, len(rows) * height), "white")
    draw, font = ImageDraw.Draw(gallery), ImageFont.load_default(10)
    for y, row in enumerate(rows):
        for x, verdict in enumerate(row):
            left, top = x * width, y * height
            picture = Image.fromarray(verdict.picture).resize((side, side))
            gallery.paste(ImageOps.expand(picture, 1, "gray"), (left + 3, top + 3))
            wrong = [name for name, right in verdict.right.items() if not right]
            caption = textwrap.fill(verdict.caption, 26)
            wrong = textwrap.fill(", ".join(wrong[:-1]), 26)  # less "all"
            draw.text((left + 4, top + side + 6), caption, "black", font)
            draw.text((left + 4, top + height - 2), wrong, "red", font, anchor="ld")
    return gallery


if __name__ == "__main__":
    from dalle2_jax.commands import main

    main("evaluate")
