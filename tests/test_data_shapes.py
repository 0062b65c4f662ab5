"""Scenes: what they promise about colours, sizes, places and captions, in pixels."""

import re

import numpy as np
import pytest

from dalle2_jax.data import shapes
from dalle2_jax.data.shapes import Scene, Thing

CAPTION = re.compile(
    r"a (small|large) (\w+) (\w+)"
    r"(?: (above|below|left of|right of) a (small|large) (\w+) (\w+))?"
    r"(?: on a (white|gray|black) background)?"
)


def scenes(count, split="train", **options):
    return [
        shapes.sample_scene(np.random.default_rng((7, i)), split, **options)
        for i in range(count)
    ]


def single(shape, size="large", colour="orange", background="white"):
    chance = (0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
    return Scene((Thing(size, colour, shape),), None, background, False, chance)


def mask(scene, size=128):
    """Where the picture is not background."""
    picture = shapes.render(scene, size).astype(int)
    return (abs(picture - shapes.BACKGROUNDS[scene.background]) > 20).any(-1)


def test_captions_follow_the_grammar():
    for scene in scenes(200):
        match = CAPTION.fullmatch(shapes.caption(scene))
        assert match, shapes.caption(scene)
        assert (match[4] is None) == (len(scene.things) == 1)
        assert (match[8] is not None) == scene.says_background
        assert match[8] in (None, scene.background)


def test_every_value_occurs():
    drawn = scenes(2000)
    things = [thing for scene in drawn for thing in scene.things]
    assert {t.size for t in things} == set(shapes.SIZES)
    pairs = {(t.colour, t.shape) for t in things}
    assert len(pairs) == len(shapes.COLOURS) * len(shapes.SHAPES) - len(shapes.HELD_OUT)
    assert {s.relation for s in drawn} == {None, *shapes.RELATIONS}
    assert {s.background for s in drawn} == set(shapes.BACKGROUNDS)


def test_unseen_pairs_are_never_drawn_but_in_their_split():
    for split in ("train", "heldout"):
        for scene in scenes(500, split):
            assert not any(map(shapes.is_held_out, scene.things))
    for scene in scenes(100, "unseen"):
        assert any(map(shapes.is_held_out, scene.things))


def test_places_are_inside_and_clear_of_each_other():
    for scene in scenes(2000, pairs=0.8):
        places = shapes.places(scene)
        for thing, (x, y, radius) in zip(scene.things, places, strict=True):
            low, high = shapes.SIZES[thing.size]
            assert low <= radius <= high
            inside = shapes.MARGIN + radius - 1e-9
            assert inside <= x <= 1 - inside and inside <= y <= 1 - inside
        if scene.relation is None:
            continue
        first, second = places
        step = np.subtract(first[:2], second[:2])
        axis = np.array(shapes.RELATIONS[scene.relation])
        along, across = step @ axis, abs(step @ axis[::-1])
        assert along >= first.radius + second.radius + shapes.GAP - 1e-9
        assert across <= shapes.SLANT * along + 1e-9


@pytest.mark.parametrize("background", shapes.BACKGROUNDS)
@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_colours_are_exact(shape, background):
    for colour in shapes.COLOURS:
        picture = shapes.render(single(shape, colour=colour, background=background), 64)
        assert picture.dtype == np.uint8 and picture.shape == (64, 64, 3)
        assert tuple(picture[32, 32]) == shapes.COLOURS[colour]
        assert tuple(picture[0, 0]) == shapes.BACKGROUNDS[background]


@pytest.mark.parametrize(
    ("shape", "area", "width", "height"),
    [  # for a radius of 1
        ("circle", np.pi, 2, 2),
        ("square", np.pi, np.pi**0.5, np.pi**0.5),
        ("triangle", 3**1.5 / 4, 3**0.5, 1.5),
        ("star", 1.12257, 2 * np.sin(np.radians(72)), 1 + np.cos(np.radians(36))),
        ("cross", 2, 6 / 10**0.5, 6 / 10**0.5),
    ],
)
def test_geometry(shape, area, width, height):
    size = 512
    scene = single(shape)
    radius = shapes.places(scene)[0].radius * size
    picture = shapes.render(scene, size).astype(float)
    background, colour = shapes.BACKGROUNDS["white"][2], shapes.COLOURS["orange"][2]
    cover = (picture[..., 2] - background) / (colour - background)
    assert cover.sum() / radius**2 == pytest.approx(area, rel=0.01)
    rows, columns = np.nonzero(cover > 0.5)
    assert np.ptp(rows) / radius == pytest.approx(height, abs=0.04)
    assert np.ptp(columns) / radius == pytest.approx(width, abs=0.04)


@pytest.mark.parametrize("shape", ["triangle", "star"])
def test_points_up(shape):
    scene = single(shape)
    rows, columns = np.nonzero(mask(scene, 256))
    place = shapes.places(scene)[0]
    assert rows.min() / 256 == pytest.approx(place.y - place.radius, abs=0.02)
    tip = columns[rows == rows.min()].mean() / 256
    assert tip == pytest.approx(place.x, abs=0.01)
    assert rows.max() / 256 < place.y + 0.9 * place.radius


def test_any_small_shape_is_smaller_than_any_large_one():
    def span(shape, size, u):
        chance = (0.5, 0.5, 0.5, 0.5, u, 0.5)
        rows, columns = np.nonzero(mask(single(shape, size)._replace(chance=chance)))
        return max(np.ptp(rows), np.ptp(columns))

    largest_small = max(span(shape, "small", 1) for shape in shapes.SHAPES)
    smallest_large = min(span(shape, "large", 0) for shape in shapes.SHAPES)
    assert largest_small + 3 < smallest_large


def test_sizes_of_the_same_scene_agree():
    """A picture rendered small is the large one, shrunk."""
    for scene in scenes(20):
        small = shapes.render(scene, 32).astype(float)
        large = shapes.render(scene, 128).reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert abs(small - large).mean() < 1
        assert abs(small - large).max() < 70


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_contrasting_scenes_differ_in_one_attribute(split):
    for i, scene in enumerate(scenes(100, split)):
        group = shapes.contrasting(scene, np.random.default_rng(i), 4)
        assert len(group) == 4
        assert len({s.chance for s in group}) == 1
        varied = {
            (which, attribute)
            for which in range(len(scene.things))
            for attribute in Thing._fields
            if len({getattr(s.things[which], attribute) for s in group}) > 1
        }
        varied |= {
            attribute
            for attribute in ("relation", "background")
            if len({getattr(s, attribute) for s in group}) > 1
        }
        assert len(varied) <= 1
        for other in group:
            assert any(map(shapes.is_held_out, other.things)) == (split == "unseen")


def test_contrasting_captions_are_mostly_different():
    different = [
        len({shapes.caption(s) for s in shapes.contrasting(scene, rng, 4)})
        for rng, scene in (
            (np.random.default_rng(i), s) for i, s in enumerate(scenes(99))
        )
    ]
    assert min(different) >= 2 and np.mean(different) > 3
