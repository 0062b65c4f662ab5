"""The judge agrees with a renderer that it knows nothing of, and is not fooled."""

import functools
import io
import itertools

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dalle2_jax.data import shapes
from dalle2_jax.errors import UserError
from dalle2_jax.evaluate import judge

SCENES = 500
KINDS = {"single": ("train", 0.0), "pair": ("train", 1.0), "unseen": ("unseen", 0.0)}


@functools.cache
def scenes(kind):
    rng = np.random.default_rng(7)
    split, pairs = KINDS[kind]
    return [shapes.sample_scene(rng, split, pairs) for _ in range(SCENES)]


def spoil(picture, rng):
    """A blurred and noisy picture."""
    blurred = ndimage.gaussian_filter(picture.astype(np.float32), (1.5, 1.5, 0))
    noise = rng.standard_normal(picture.shape, np.float32)
    return to_uint8(blurred + 10 * noise)


def to_uint8(picture):
    return np.rint(np.clip(picture, 0, 255)).astype(np.uint8)


def share_right(kind, size, change=lambda picture, rng: picture, count=SCENES):
    rng = np.random.default_rng(0)
    return np.mean(
        [
            judge.judge(change(shapes.render(scene, size), rng), shapes.caption(scene))[
                "all"
            ]
            for scene in scenes(kind)[:count]
        ]
    )


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_on_clean_pictures(kind, size):
    assert share_right(kind, size) >= 0.995


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_on_blurred_and_noisy_pictures(kind, size):
    assert share_right(kind, size, spoil) >= 0.97


def shift_colours(picture, rng):
    return to_uint8(spoil(picture, rng) + rng.integers(-30, 31, 3))


def compress(picture, rng):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=30)
    return np.asarray(Image.open(file))


def add_specks(picture, rng):
    picture = picture.copy()
    for y, x in rng.integers(0, len(picture) - 3, (8, 2)):
        picture[y : y + 3, x : x + 3] = rng.integers(0, 256, 3)
    return picture


@pytest.mark.parametrize("kind", ["single", "pair"])
@pytest.mark.parametrize("change", [shift_colours, compress, add_specks])
def test_agrees_on_changed_pictures(kind, change):
    assert share_right(kind, 128, change, count=200) >= 0.97


def alter(scene, attribute, rng):
    """Captions that are wrong in one attribute, or in one thing's."""

    def other(options, value):
        return str(rng.choice([option for option in options if option != value]))

    if attribute == "relation":
        return [scene._replace(relation=other(shapes.RELATIONS, scene.relation))]
    if attribute == "background":
        background = other(shapes.BACKGROUNDS, scene.background)
        return [scene._replace(background=background, says_background=True)]
    table = {"colour": shapes.COLOURS, "shape": shapes.SHAPES, "size": shapes.SIZES}
    altered = []
    for i, thing in enumerate(scene.things):
        value = other(table[attribute], getattr(thing, attribute))
        things = list(scene.things)
        things[i] = thing._replace(**{attribute: value})
        altered.append(scene._replace(things=tuple(things)))
    return altered


@pytest.mark.parametrize(
    "kind, attribute",
    [
        *itertools.product(KINDS, ["colour", "shape", "size", "background"]),
        ("pair", "relation"),
    ],
)
def test_finds_what_is_wrong_and_only_that(kind, attribute):
    rng = np.random.default_rng(1)
    for scene in scenes(kind)[:100]:
        if attribute == "relation" and len(set(scene.things)) == 1:
            continue  # of two equal things, each is above the other's being below
        picture = shapes.render(scene, 128)
        for wrong in alter(scene, attribute, rng):
            verdict = judge.judge(picture, shapes.caption(wrong))
            assert {name for name, right in verdict.items() if not right} == {
                attribute,
                "all",
            }


def test_finds_a_wrong_count():
    for scene in scenes("pair")[:50]:
        one = scene._replace(things=scene.things[:1], relation=None)
        verdict = judge.judge(shapes.render(scene, 128), shapes.caption(one))
        assert {name for name, right in verdict.items() if not right} == {
            "count",
            "all",
        }
        verdict = judge.judge(shapes.render(one, 128), shapes.caption(scene))
        wrong = {name for name, right in verdict.items() if not right}
        assert wrong >= {"count", "colour", "shape", "size", "relation", "all"}


def test_sees_where_things_are():
    for scene in scenes("single")[:50]:
        (place,) = shapes.places(scene)
        (found,) = judge.look(shapes.render(scene, 128)).found
        assert [found.x, found.y, found.radius] == pytest.approx(place, abs=0.004)


def painted(inside, side=128):
    """A blue thing, large where `inside(x, y)` has radius 1, on white."""
    x = (np.arange(side) + 0.5 - side / 2) / (0.22 * side)
    mask = inside(x[None, :], x[:, None])[..., None]
    return np.where(mask, judge.COLOURS["blue"], 245).astype(np.uint8)


@pytest.mark.parametrize(
    "inside",
    [
        lambda x, y: np.hypot(x / 1.5, y) < 1,  # an ellipse
        lambda x, y: np.maximum(abs(x) / 1.5, abs(y)) < 1,  # a rectangle
        lambda x, y: abs(x) + abs(y) < 1,  # a diamond
        lambda x, y: (np.hypot(x, y) < 1) & (y > 0),  # half a circle
        lambda x, y: abs(np.hypot(x, y) - 0.75) < 0.25,  # a ring
        lambda x, y: (y > -0.5) & (y + 1.7 * abs(x) < 1),  # a triangle upside down
        lambda x, y: (
            np.hypot(x, y) < 0.7 + 0.3 * np.cos(6 * np.arctan2(y, x))
        ),  # a flower
    ],
)
def test_a_shape_of_no_name_has_none(inside):
    (found,) = judge.look(painted(inside)).found
    assert found.thing.shape is None
    assert found.thing.colour == "blue"


@pytest.mark.parametrize("noise", [0, 10, 100])
@pytest.mark.parametrize("colour", [(245, 245, 245), (220, 40, 40), (128, 128, 128)])
def test_finds_nothing_where_nothing_is(colour, noise):
    rng = np.random.default_rng(0)
    picture = to_uint8(rng.normal(colour, noise, (96, 96, 3)))
    verdict = judge.judge(picture, "a small red circle above a small red star")
    assert not verdict["count"] and not verdict["shape"]


def test_refuses_what_it_cannot_judge():
    picture = np.zeros((128, 128, 3), np.uint8)
    for caption in ("", "a red circle", "a small red circle above", "a small red dog"):
        with pytest.raises(UserError, match="is not one of shapes"):
            judge.judge(picture, caption)
    with pytest.raises(ValueError, match="side 32.* 64 pixels or more"):
        judge.look(picture[:32, :32])
