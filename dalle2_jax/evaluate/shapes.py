"""Judges pictures of plain shapes from their pixels: does a picture show its caption?

It knows the contract of the captions and nothing of how pictures are made: the tables
below repeat the contract on purpose, so that a mistake in a renderer or a model cannot
hide in a table that both read.

    python -m dalle2_jax.evaluate.shapes --model=DIR --num=200 --seed=12345 \
        --out=report.json

samples from a model, prints how often each attribute is right, and writes the verdicts
to report.json and some of the pictures to report.png.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy import ndimage

from dalle2_jax.errors import UserError

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (50, 170, 70),
    "cyan": (60, 200, 220),
    "blue": (45, 85, 220),
    "purple": (140, 60, 190),
    "pink": (245, 130, 190),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (150, 150, 150), "black": (20, 20, 20)}
SIZES = ("small", "large")
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
UNSEEN = (  # in no picture that the bundled model was trained on
    ("red", "star"),
    ("blue", "triangle"),
    ("green", "cross"),
    ("yellow", "circle"),
    ("purple", "square"),
)
KINDS = ("single", "pair", "unseen")
ATTRIBUTES = ("count", "colour", "shape", "size", "relation", "background", "all")

SMALLEST_SIDE = 64  # pixels; a small star cannot be told apart below it
SPECK = 0.003  # of the picture's area: what is smaller is noise
EDGE = 0.06  # width, in sides, of the widest soft edge
FAR = 75  # distance in RGB beyond which a colour is none of a table
DOUBT = 80  # distance in RGB that a pixel must be nearer to count as half covered
LARGE = 0.18  # radius in sides: the geometric mean of the contract's 0.155 and 0.21
FIT = 0.8  # overlap (intersection over union) below which an outline is no shape
CHUNK = 25  # prompts sampled in one call


def _outline(radii: Sequence[float], degrees: Sequence[float]) -> np.ndarray:
    """Corners of a polygon as complex numbers x + iy, y down, ordered by angle."""
    corners = np.array(radii) * np.exp(1j * np.radians(degrees))
    return corners[np.argsort(np.angle(corners))]


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.conj() * b).imag


def _area(corners: np.ndarray) -> float:
    return _cross(np.roll(corners, 1), corners).sum() / 2


def _reach(corners: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Distance from the origin to the outline in each direction (radians)."""
    k = np.searchsorted(np.angle(corners), angle) % len(corners)
    start, edge = corners[k - 1], corners[k] - corners[k - 1]
    return _cross(start, edge) / _cross(np.exp(1j * angle), edge)


UP = -90  # degrees
INNER = np.cos(np.radians(72)) / np.cos(np.radians(36))  # of a regular five-pointed star
ARM = np.degrees(np.arctan(1 / 3))  # half the angle under which a cross's arm ends
OUTLINES = {  # around their centres of mass, with circumradius 1
    "circle": _outline([1] * 90, range(0, 360, 4)),
    "square": _outline([1] * 4, range(45, 360, 90)),
    "triangle": _outline([1] * 3, range(UP, UP + 360, 120)),
    "star": _outline([1, INNER] * 5, range(UP, UP + 360, 36)),
    "cross": _outline(
        [1, np.sqrt(0.2), 1] * 4,
        [turn + step for turn in range(0, 360, 90) for step in (-ARM, 45, ARM)],
    ),
}


def _ideals(outline: np.ndarray) -> np.ndarray:
    """A shape of area 1 on GRID, sharp and blurred: unit vectors [len(BLURS), pixels]."""
    sharp = abs(GRID) < _reach(outline, np.angle(GRID)) / np.sqrt(_area(outline))
    spacing = abs(GRID[0, 1] - GRID[0, 0])
    stack = [ndimage.gaussian_filter(1.0 * sharp, blur / spacing) for blur in BLURS]
    ideals = np.reshape(stack, [len(BLURS), -1])
    return ideals / np.linalg.norm(ideals, axis=1, keepdims=True)


GRID = np.linspace(-1.2, 1.2, 97) + 1j * np.linspace(-1.2, 1.2, 97)[:, None]
BLURS = (0, 0.05, 0.1, 0.15, 0.2)
IDEALS = {shape: _ideals(outline) for shape, outline in OUTLINES.items()}


class Thing(NamedTuple):
    """What a caption says of one thing, or what one in a picture looks like."""

    size: str
    colour: str | None
    shape: str | None


class Wanted(NamedTuple):
    """What a caption says. `relation` is that of the first thing to the second."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str | None


class Found(NamedTuple):
    """A thing in a picture; lengths in sides of the picture, y pointing down."""

    thing: Thing
    x: float
    y: float
    radius: float
    fit: float


class View(NamedTuple):
    """What a picture shows; what belongs to no table is None."""

    found: tuple[Found, ...]
    background: str | None


def parse(caption: str) -> Wanted:
    """Reads a caption of the contract's grammar; UserError if it is none."""
    one = f"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(OUTLINES)})"
    match = re.fullmatch(
        f"{one}(?: ({'|'.join(RELATIONS)}) {one})?"
        f"(?: on a ({'|'.join(BACKGROUNDS)}) background)?",
        caption,
    )
    if not match:
        raise UserError(
            f"caption {caption!r} is not one of shapes: write it as 'a small red circle"
            " above a large blue square on a white background'"
        )
    *first, relation, size, colour, shape, background = match.groups()
    things = (Thing(*first),)
    if relation:
        things += (Thing(size, colour, shape),)
    return Wanted(things, relation, background)


def look(picture: UInt8[np.ndarray, "side side 3"]) -> View:
    """Finds the things in an RGB picture and its background.

    Raises ValueError if the side is less than 64 pixels.
    """
    side = len(picture)
    if side < SMALLEST_SIDE:
        raise ValueError(f"a picture of side {side}: pass {SMALLEST_SIDE} or more")
    pixels = picture.astype(np.float32)
    border = np.ones((side, side), bool)
    border[2:-2, 2:-2] = False
    ground = np.median(pixels[border], axis=0)

    labels, count = ndimage.label(_cover(pixels, ground) > 0.5)
    areas = np.bincount(labels.ravel())
    names = [label for label in range(1, count + 1) if areas[label] >= SPECK * side**2]
    labels[~np.isin(labels, names)] = 0
    # What a thing's soft edge can reach and is nearest to it is its zone.
    far, (y, x) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    zones = np.where(far <= EDGE * side, labels[y, x], 0)
    found = [_inspect(pixels, ground, labels == n, zones == n) for n in names]
    return View(tuple(found), _nearest(ground, BACKGROUNDS))


def judge(picture: UInt8[np.ndarray, "side side 3"], caption: str) -> dict[str, bool]:
    """Whether a picture shows each attribute that a caption names.

    Keys: count, colour, shape, size, all; relation and background if the caption names
    them. When the count is wrong, the others tell of the things that match best.
    """
    wanted, view = parse(caption), look(picture)
    count = len(wanted.things)
    # Too few things in the picture: pretend more that match nothing, nowhere.
    nothing = Found(Thing("", None, None), np.nan, np.nan, np.nan, 0.0)
    found = view.found + (nothing,) * (count - len(view.found))
    verdicts = [
        _compare(wanted, chosen) for chosen in itertools.permutations(found, count)
    ]
    # Which thing is which: whoever makes most of the caption true.
    verdict = max(verdicts, key=lambda matches: sum(map(sum, matches.values())))
    right = {"count": len(view.found) == count}
    right |= {name: all(matches) for name, matches in verdict.items()}
    if wanted.background:
        right["background"] = view.background == wanted.background
    return right | {"all": all(right.values())}


def _compare(wanted: Wanted, found: Sequence[Found]) -> dict[str, list[bool]]:
    """For each attribute of the things, which of its occurrences are right."""
    matches = {
        name: [
            getattr(a, name) == getattr(b.thing, name)
            for a, b in zip(wanted.things, found, strict=True)
        ]
        for name in ("colour", "shape", "size")
    }
    if wanted.relation:
        first, second = found
        step = np.array([first.x - second.x, first.y - second.y])
        along = step @ RELATIONS[wanted.relation]
        across = np.abs(step).sum() - abs(along)
        matches["relation"] = [bool(along > across)]
    return matches


def _cover(
    pixels: Float[np.ndarray, "h w 3"], ground: Float[np.ndarray, " 3"]
) -> Float[np.ndarray, "h w"]:
    """How much of each pixel is covered by a thing of any of the colours, in [0, 1].

    A pixel at an edge lies between the background and a colour; of the colours, the one
    that explains the pixel best counts. Pixels inside outnumber those at edges, so that
    a pale red is rather pink than half a red.
    """
    best = np.full(pixels.shape[:2], np.inf, np.float32)
    cover = np.zeros_like(best)
    for colour in COLOURS.values():
        step = np.float32(colour) - ground
        part = np.clip((pixels - ground) @ step / (step @ step), 0, 1)
        error = np.linalg.norm(pixels - ground - part[..., None] * step, axis=-1)
        error += DOUBT * np.minimum(part, 1 - part)
        cover = np.where(error < best, part, cover)
        best = np.minimum(error, best)
    return cover


def _inspect(
    pixels: Float[np.ndarray, "h w 3"],
    ground: Float[np.ndarray, " 3"],
    mask: Bool[np.ndarray, "h w"],
    zone: Bool[np.ndarray, "h w"],
) -> Found:
    """Describes the thing that has the pixels in `mask`, and its edges in `zone`."""
    side = len(pixels)
    depth = ndimage.distance_transform_edt(mask)
    colour = np.median(pixels[depth >= depth.max() / 2], axis=0)
    step = colour - ground
    # Not clipped to [0, 1], so that noise is zero on average.
    cover = zone * ((pixels - ground) @ step / (step @ step))
    area = cover.sum()
    y, x = ndimage.center_of_mass(cover)

    unit = np.sqrt(area)
    place = [y + GRID.imag * unit, x + GRID.real * unit]
    seen = ndimage.map_coordinates(cover, place, order=1).ravel()
    fits = {
        shape: (ideals @ seen).max() / np.linalg.norm(seen)
        for shape, ideals in IDEALS.items()
    }
    shape = max(fits, key=fits.get)
    # The radius is that of the circle around the shape; for a square, which would look
    # small so, that of the circle of its area.
    radius = np.sqrt(area / (np.pi if shape == "square" else _area(OUTLINES[shape])))
    thing = Thing(
        "large" if radius > LARGE * side else "small",
        _nearest(colour, COLOURS),
        shape if fits[shape] >= FIT else None,
    )
    return Found(thing, (x + 0.5) / side, (y + 0.5) / side, radius / side, fits[shape])


def _nearest(colour: Float[np.ndarray, " 3"], table: dict) -> str | None:
    far = {name: np.linalg.norm(colour - value) for name, value in table.items()}
    name = min(far, key=far.get)
    return name if far[name] <= FAR else None
