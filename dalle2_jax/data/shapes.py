"""Procedural scenes of one or two plain shapes with captions: data without a download.

A caption is "a SIZE COLOUR SHAPE", or two of these with a RELATION in between, followed
or not by " on a BACKGROUND background" (unsaid: the background is any).

Lengths are fractions of the picture's side and y points down. Every shape lies within
the square of half-side `radius` around its centre: the radius is the circumradius of
triangle, star and cross, and the square has the area of the circle (half-side 0.886
radius), so that a small shape of any kind looks smaller than a large one of any other.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

SIZES = {"small": (0.13, 0.155), "large": (0.21, 0.24)}  # range of the radius
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
SHAPES = ("circle", "square", "triangle", "star", "cross")
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (150, 150, 150), "black": (20, 20, 20)}
HELD_OUT = (  # never in the splits "train" and "heldout"
    ("red", "star"),
    ("blue", "triangle"),
    ("green", "cross"),
    ("yellow", "circle"),
    ("purple", "square"),
)
SPLITS = ("train", "heldout", "unseen")

MARGIN = 0.02  # least distance of a shape from the border
GAP = 0.05  # least distance of two shapes along the axis of their relation
LARGEST_OF_TWO = 0.225  # radius; two of 0.24 would leave no room for margin and gap
SLANT = 0.5  # greatest offset across the relation's axis, as a part of that along it


class Thing(NamedTuple):
    """A shape to be drawn, by its words in SIZES, COLOURS and SHAPES."""

    size: str
    colour: str
    shape: str


class Scene(NamedTuple):
    """What is to be seen (one or two things) and said, and where chance puts it."""

    things: tuple[Thing, ...]
    relation: str | None  # of the first thing to the second
    background: str
    says_background: bool
    chance: tuple[float, ...]  # six numbers in [0, 1), turned into places by `places`


class Place(NamedTuple):
    """Where a thing is, in sides of the picture from its upper left corner."""

    x: float
    y: float
    radius: float


def sample_scene(
    rng: np.random.Generator, split: str = "train", pairs: float = 0.5
) -> Scene:
    """Draws a scene: a pair of things with probability `pairs`, else a single one.

    In the splits "train" and "heldout" no thing is one of `HELD_OUT`; in "unseen" one
    thing is.
    """
    count = 2 if rng.random() < pairs else 1
    things = [_sample_thing(rng) for _ in range(count)]
    if split == "unseen":
        i = rng.integers(count)
        colour, shape = HELD_OUT[rng.integers(len(HELD_OUT))]
        things[i] = things[i]._replace(colour=colour, shape=shape)
    return Scene(
        tuple(things),
        _pick(rng, RELATIONS) if count == 2 else None,
        _pick(rng, BACKGROUNDS),
        bool(rng.random() < 0.5),
        tuple(rng.random(6).tolist()),
    )


def contrasting(scene: Scene, rng: np.random.Generator, count: int) -> list[Scene]:
    """`count` variants of a scene, alike but for one attribute, which chance chooses.

    The attribute's values are all different for as long as they last, so that only who
    sees that attribute can tell which caption is whose. What CLIP is slow to see is
    chosen more often: shape and relation.
    """
    attributes = [*3 * ["shape"], "colour", "size", "background"]
    if scene.relation is not None:
        attributes += 4 * ["relation"]
    attribute = _pick(rng, attributes)
    which = int(rng.integers(len(scene.things)))
    thing = scene.things[which]
    if attribute == "background":
        scenes = [
            scene._replace(background=value, says_background=True)
            for value in BACKGROUNDS
        ]
    elif attribute == "relation":
        scenes = [scene._replace(relation=value) for value in RELATIONS]
    else:
        values = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}[attribute]
        things = [thing._replace(**{attribute: value}) for value in values]
        scenes = [
            scene._replace(
                things=(*scene.things[:which], t, *scene.things[which + 1 :])
            )
            for t in things
            if is_held_out(t) == is_held_out(thing)
        ]
    rng.shuffle(scenes)
    return [scenes[i % len(scenes)] for i in range(count)]


def is_held_out(thing: Thing) -> bool:
    """Whether it is kept from training, of whatever size it is."""
    return (thing.colour, thing.shape) in HELD_OUT


def caption(scene: Scene) -> str:
    """The scene in words, as the contract at the top of this file has it."""
    text = f" {scene.relation} ".join(f"a {' '.join(thing)}" for thing in scene.things)
    if scene.says_background:
        text += f" on a {scene.background} background"
    return text


def places(scene: Scene) -> tuple[Place, ...]:
    """Centre and radius of each thing, inside the picture and clear of each other.

    The named axis dominates: along it the centres are at least both radii and `GAP`
    apart, across it at most `SLANT` of that distance.
    """
    along, across, where_x, where_y, *chance = scene.chance
    radii = []
    for thing, u in zip(scene.things, chance, strict=False):
        low, high = SIZES[thing.size]
        if all(t.size == "large" for t in scene.things) and len(scene.things) == 2:
            high = LARGEST_OF_TWO
        radii.append(_between(low, high, u))
    if scene.relation is None:
        low, high = MARGIN + radii[0], 1 - MARGIN - radii[0]
        x, y = _between(low, high, where_x), _between(low, high, where_y)
        return (Place(x, y, radii[0]),)

    reach = sum(radii)
    distance = _between(reach + GAP, 1 - 2 * MARGIN - reach, along)
    offset = SLANT * distance * (2 * across - 1)
    dx, dy = RELATIONS[scene.relation]  # from the second thing to the first
    step = np.array([dx, dy]) * distance + np.array([dy, dx]) * offset
    # The second centre is where both things are inside: one range for each axis.
    first, second = radii
    low = MARGIN + np.maximum(second, first - step)
    high = 1 - MARGIN - np.maximum(second, first + step)
    centre = _between(low, high, np.array([where_x, where_y]))
    return (Place(*(centre + step), first), Place(*centre, second))


def render(scene: Scene, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Paints the scene, its edges smoothed over one pixel."""
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for thing, place in zip(scene.things, places(scene), strict=True):
        x, columns = _window(place.x, place.radius, size)
        y, rows = _window(place.y, place.radius, size)
        distance = _distance(thing.shape, x[None, :], y[:, None], place.radius)
        cover = np.clip(0.5 - distance * size, 0, 1)[..., None]
        part = picture[rows, columns]
        part += cover * (np.array(COLOURS[thing.colour], np.float32) - part)
    return np.rint(picture).astype(np.uint8)


def _distance(
    shape: str, x: Float[np.ndarray, "1 w"], y: Float[np.ndarray, "h 1"], r: float
) -> Float[np.ndarray, "h w"]:
    """Signed distance from a shape's outline, negative inside; exact near its edges."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - r * np.float32(np.sqrt(np.pi) / 2)
    if shape == "cross":  # arms of a third of its width
        arm = r / np.float32(np.sqrt(10))
        x, y = abs(x), abs(y)
        return np.minimum(
            np.maximum(x - arm, y - 3 * arm), np.maximum(x - 3 * arm, y - arm)
        )
    # Lines at one distance from the centre, at even angles: a triangle is what lies
    # inside of all three (one runs below), a star what lies outside of at most one of
    # five (one runs above).
    count, reach, start = {
        "triangle": (3, 1 / 2, np.pi / 2),
        "star": (5, np.cos(2 * np.pi / 5), -np.pi / 2),
    }[shape]
    angles = start + 2 * np.pi * np.arange(count) / count
    most = next_most = np.full(np.broadcast_shapes(x.shape, y.shape), -np.inf, "f")
    for angle in angles.tolist():
        line = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
        next_most = np.maximum(next_most, np.minimum(most, line))
        most = np.maximum(most, line)
    return (most if shape == "triangle" else next_most) - np.float32(r * reach)


def _window(centre: float, radius: float, size: int):
    """The pixels that a thing can touch, about its centre and as a slice."""
    low = max(int((centre - radius) * size) - 1, 0)
    high = min(int((centre + radius) * size) + 2, size)
    pixels = (np.arange(low, high, dtype=np.float32) + 0.5) / size - np.float32(centre)
    return pixels, slice(low, high)


def _sample_thing(rng: np.random.Generator) -> Thing:
    """Any thing but the held-out ones, all equally likely."""
    while True:
        thing = Thing(_pick(rng, SIZES), _pick(rng, COLOURS), _pick(rng, SHAPES))
        if not is_held_out(thing):
            return thing


def _pick(rng: np.random.Generator, options) -> str:
    return tuple(options)[rng.integers(len(options))]


def _between(low, high, u):
    return low + (high - low) * u
