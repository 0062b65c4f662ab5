"""What a picture of plain shapes shows, by its pixels, and whether its caption says so.

It knows the contract of the captions and nothing of how pictures are made: the tables
below repeat the contract on purpose, so that a mistake in a renderer or a model cannot
hide in a table that both read.
"""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Complex, Float, Float32, UInt8
from numpy.typing import ArrayLike
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
SHAPES = ("circle", "square", "triangle", "star", "cross")
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
ATTRIBUTES = ("count", "colour", "shape", "size", "relation", "background", "all")

# Lengths and areas are in sides of the picture; colours differ by distance in RGB.
SPECK = 0.003  # area of the largest thing that is only noise
EDGE = 0.06  # width of the widest soft edge
LARGE = 0.18  # radius between the contract's 0.155 and 0.21, by their geometric mean
FAINT = 50  # a thing that differs less from the background is none
FAR = 75  # a colour that differs more from all of a table is none of it
DOUBT = 80  # how much better a pixel must be explained as half covered than as covered
FIT = 0.93  # least correlation of a thing with its shape
CLEAR = 1.4  # how many times as far from a correlation of 1 the next best shape must be
MOST = 4  # things compared with a caption: more than it can name


class Thing(NamedTuple):
    """What a caption says of a thing, or a thing looks like; None is neither."""

    size: str | None
    colour: str | None
    shape: str | None


class Wanted(NamedTuple):
    """What a caption says; the relation is that of the first thing to the second."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str | None


class Found(NamedTuple):
    """A thing in a picture; y points down, `fit` is the correlation with its shape."""

    thing: Thing
    x: float
    y: float
    radius: float
    fit: float


class View(NamedTuple):
    """What a picture shows, the largest thing first."""

    found: tuple[Found, ...]
    background: str | None


NOTHING = Found(Thing(None, None, None), np.nan, np.nan, np.nan, 0.0)


def parse(caption: str) -> Wanted:
    """Reads a caption of the contract's grammar; UserError if it is none."""
    one = f"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    match = re.fullmatch(
        f"{one}(?: ({'|'.join(RELATIONS)}) {one})?"
        f"(?: on a ({'|'.join(BACKGROUNDS)}) background)?",
        caption,
    )
    if not match:
        raise UserError(
            f"caption {caption!r} is not one of shapes: write it like 'a small red "
            "circle above a large blue square on a white background'"
        )
    *first, relation, size, colour, shape, background = match.groups()
    second = [Thing(size, colour, shape)] if relation else []
    return Wanted((Thing(*first), *second), relation, background)


def judge(picture: UInt8[np.ndarray, "side side 3"], caption: str) -> dict[str, bool]:
    """Whether a picture shows each attribute that a caption names.

    The keys are those of ATTRIBUTES; relation and background only if the caption names
    them. When the count is wrong, the others tell of the things that match best.
    Raises what `parse` raises for a caption and `look` for a picture.
    """
    wanted, view = parse(caption), look(picture)
    count = len(wanted.things)
    candidates = [*view.found[:MOST], *[NOTHING] * (count - len(view.found))]
    # Which is which: the choice that makes most of the caption true.
    matches = max(
        (
            _compare(wanted, found)
            for found in itertools.permutations(candidates, count)
        ),
        key=lambda matches: sum(map(sum, matches.values())),
    )
    right = {"count": len(view.found) == count}
    right |= {attribute: all(which) for attribute, which in matches.items()}
    if wanted.background:
        right["background"] = view.background == wanted.background
    return right | {"all": all(right.values())}


def look(picture: UInt8[np.ndarray, "side side 3"]) -> View:
    """Finds the things in an RGB picture, and its background.

    Raises ValueError if the side is less than 64 pixels.
    """
    side = len(picture)
    if side < 64:  # at which a small star is still told from a small circle
        raise ValueError(f"a picture of side {side}: pass one of 64 pixels or more")
    pixels = picture.astype(np.float32)
    border = np.ones((side, side), bool)
    border[2:-2, 2:-2] = False
    ground = np.median(pixels[border], axis=0)

    differs = np.linalg.norm(pixels - ground, axis=-1) > FAINT / 2
    covered = np.zeros((side, side), bool)
    covered[differs] = _cover(pixels[differs], ground) > 0.5
    labels, _ = ndimage.label(covered)
    areas = np.bincount(labels.ravel())
    labels[areas[labels] < SPECK * side**2] = 0
    # A thing's zone is where its soft edge can reach and no other thing is nearer.
    distance, nearest = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    zones = np.where(distance <= EDGE * side, labels[tuple(nearest)], 0)
    found = [
        _inspect(pixels, ground, labels == label, zones == label, box)
        for label, box in enumerate(ndimage.find_objects(zones), start=1)
        if box
    ]
    found = sorted(filter(None, found), key=lambda thing: -thing.radius)
    return View(tuple(found), _nearest(ground, BACKGROUNDS))


def _compare(wanted: Wanted, found: Sequence[Found]) -> dict[str, list[bool]]:
    """For each attribute, whether it is right wherever it occurs."""
    matches = {
        name: [
            getattr(thing, name) == getattr(other.thing, name)
            for thing, other in zip(wanted.things, found, strict=True)
        ]
        for name in ("colour", "shape", "size")
    }
    if wanted.relation:
        first, second = found
        step = np.array([first.x - second.x, first.y - second.y])
        along = step @ RELATIONS[wanted.relation]
        across = abs(step).sum() - abs(along)
        matches["relation"] = [bool(along > across)]
    return matches


def _cover(
    pixels: Float32[np.ndarray, "n 3"], ground: Float32[np.ndarray, " 3"]
) -> Float32[np.ndarray, " n"]:
    """How much of each pixel is covered by a thing of any colour, in [0, 1].

    A pixel at an edge lies between the background and a colour; of the colours, the one
    that explains the pixel best counts. Covered pixels outnumber half covered ones, so
    that a pale red is rather pink than half a red.
    """
    best = np.full(len(pixels), np.inf, np.float32)
    cover = np.zeros_like(best)
    for colour in COLOURS.values():
        step = np.float32(colour) - ground
        if np.linalg.norm(step) < FAINT:
            continue
        part = np.clip((pixels - ground) @ step / (step @ step), 0, 1)
        error = np.linalg.norm(pixels - ground - part[..., None] * step, axis=-1)
        error += DOUBT * np.minimum(part, 1 - part)
        cover = np.where(error < best, part, cover)
        best = np.minimum(error, best)
    return cover


def _inspect(
    pixels: Float32[np.ndarray, "h w 3"],
    ground: Float32[np.ndarray, " 3"],
    mask: Bool[np.ndarray, "h w"],
    zone: Bool[np.ndarray, "h w"],
    box: tuple[slice, slice],
) -> Found | None:
    """Describes the thing with its inside in `mask`, its edge in `zone`, both in `box`.

    None if it hardly differs from the background.
    """
    side = len(pixels)
    pixels, mask, zone = pixels[box], mask[box], zone[box]
    depth = ndimage.distance_transform_edt(mask)
    colour = np.median(pixels[depth >= depth.max() / 2], axis=0)
    step = colour - ground
    if np.linalg.norm(step) < FAINT:
        return None
    # Not clipped to [0, 1]: its noise is 0 on average, and its sum withstands a blur.
    cover = zone * ((pixels - ground) @ step) / (step @ step)
    area = max(float(cover.sum()), 1.0)
    y, x = map(float, ndimage.center_of_mass(mask))

    unit = np.sqrt(area)
    place = [y + GRID.imag * unit, x + GRID.real * unit]
    seen = ndimage.map_coordinates(cover, place, order=1).ravel()
    seen /= np.linalg.norm(seen)
    fits = {shape: float((ideals @ seen).max()) for shape, ideals in IDEALS.items()}
    *_, other, shape = sorted(fits, key=fits.get)
    clear = fits[shape] >= FIT and 1 - fits[other] >= CLEAR * (1 - fits[shape])
    # The circumradius. A square would look small with it: its radius, which the
    # contract leaves open, is that of the circle of its area.
    radius = np.sqrt(area / (np.pi if shape == "square" else _area(OUTLINES[shape])))
    radius = float(radius) / side
    thing = Thing(
        "large" if radius > LARGE else "small",
        _nearest(colour, COLOURS),
        shape if clear else None,
    )
    x, y = (box[1].start + x + 0.5) / side, (box[0].start + y + 0.5) / side
    return Found(thing, x, y, radius, fits[shape])


def _nearest(colour: Float32[np.ndarray, " 3"], table: dict) -> str | None:
    """The colour's name in a table, None if it is far from all of them."""
    distances = {name: np.linalg.norm(colour - rgb) for name, rgb in table.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= FAR else None


def _outline(radii: ArrayLike, degrees: ArrayLike) -> Complex[np.ndarray, " n"]:
    """Corners of a polygon as complex numbers x + iy, y down, ordered by angle."""
    corners = np.array(radii) * np.exp(1j * np.radians(degrees))
    return corners[np.argsort(np.angle(corners))]


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.conj() * b).imag


def _area(corners: Complex[np.ndarray, " n"]) -> float:
    return float(_cross(np.roll(corners, 1), corners).sum()) / 2


def _reach(
    corners: Complex[np.ndarray, " n"], angle: Float[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w"]:
    """Distance from the origin to the outline in each direction (radians)."""
    k = np.searchsorted(np.angle(corners), angle) % len(corners)
    start, edge = corners[k - 1], corners[k] - corners[k - 1]
    return _cross(start, edge) / _cross(np.exp(1j * angle), edge)


def _ideals(corners: Complex[np.ndarray, " n"]) -> Float[np.ndarray, "blurs pixels"]:
    """A shape of area 1 on GRID, sharp and blurred, as unit vectors."""
    sharp = abs(GRID) < _reach(corners, np.angle(GRID)) / np.sqrt(_area(corners))
    spacing = (GRID[0, 1] - GRID[0, 0]).real
    stack = [ndimage.gaussian_filter(1.0 * sharp, blur / spacing) for blur in BLURS]
    vectors = np.reshape(stack, [len(BLURS), -1])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


UP = -90  # degrees
INNER = np.cos(np.radians(72)) / np.cos(
    np.radians(36)
)  # of a regular five-pointed star
ARM = np.degrees(
    np.arctan(1 / 3)
)  # half the angle under which the end of an arm is seen
OUTLINES = {  # around their centres of mass, with circumradius 1
    "circle": _outline([1] * 90, range(0, 360, 4)),
    "square": _outline([1] * 4, range(45, 360, 90)),
    "triangle": _outline([1] * 3, range(UP, UP + 360, 120)),
    "star": _outline([1, INNER] * 5, range(UP, UP + 360, 36)),
    "cross": _outline(
        [1, np.sqrt(0.2), 1] * 4,
        [arm + corner for arm in range(0, 360, 90) for corner in (-ARM, 45, ARM)],
    ),
}
GRID = np.linspace(-1.2, 1.2, 97) + 1j * np.linspace(-1.2, 1.2, 97)[:, None]
BLURS = (0, 0.05, 0.1, 0.15, 0.2)  # standard deviations, where a shape's area is 1
IDEALS = {shape: _ideals(corners) for shape, corners in OUTLINES.items()}
