"""The judge agrees with a renderer that it knows nothing of, and is not fooled."""

import functools
import io
import itertools
import json
import types

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dalle2_jax.data import shapes
from dalle2_jax.errors import UserError
from dalle2_jax.evaluate import shapes as judge

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


def test_reads_every_caption_that_it_makes():
    rng = np.random.default_rng(0)
    for kind in judge.KINDS:
        captions = [judge.make_caption(kind, rng) for _ in range(300)]
        wanted = [judge.parse(caption) for caption in captions]
        assert {len(w.things) for w in wanted} == {2 if kind == "pair" else 1}
        for thing in (thing for w in wanted for thing in w.things):
            assert ((thing.colour, thing.shape) in judge.UNSEEN) == (kind == "unseen")


def test_intervals_are_wilsons():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    cell = judge.rate([True] * 81 + [False] * 182)
    assert (cell.right, cell.of) == (81, 263)
    assert [cell.low, cell.high] == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert judge.rate([False] * 10).low == 0.0
    assert judge.rate([True] * 10).high == pytest.approx(1.0)


def draw(model, prompts, *, seed):
    """Stands for a model: it knows single things only, and always makes them small."""
    rng = np.random.default_rng(seed)
    pictures = []
    for wanted in map(judge.parse, prompts):
        thing = shapes.Thing(*wanted.things[0])._replace(size="small")
        background = wanted.background or "white"
        chance = tuple(rng.random(6).tolist())
        scene = shapes.Scene((thing,), None, background, True, chance)
        pictures.append(shapes.render(scene, 64))
    return np.stack(pictures)


def test_the_command_reports_a_model(tmp_path, monkeypatch, capsys):
    from dalle2_jax import hub
    from dalle2_jax.pipeline import generate

    monkeypatch.setattr(hub, "load", lambda *paths: types.SimpleNamespace(path="here"))
    monkeypatch.setattr(generate, "text_to_image", draw)
    out = tmp_path / "new" / "report.json"
    judge.main(["--model=here", "--num=30", "--seed=1", f"--out={out}"])

    report = json.loads(out.read_text())
    assert (report["model"], report["num"], report["seed"]) == ("here", 30, 1)
    assert len(report["captions"]) == 90
    rates = report["accuracy"]
    assert rates["single"]["shape"]["rate"] == rates["unseen"]["colour"]["rate"] == 1
    assert 0 < rates["single"]["size"]["rate"] == rates["single"]["all"]["rate"] < 1
    assert rates["pair"]["count"]["rate"] == rates["pair"]["relation"]["rate"] == 0
    assert rates["single"]["background"]["of"] < 30
    table = capsys.readouterr().out
    assert "relation" in table and "100.0% (88.6% to 100.0%)" in table
    with Image.open(out.with_suffix(".png")) as gallery:
        assert gallery.size == (1088, 5 * 214)


def test_exchanged_captions_are_right_by_chance():
    """Of perfect pictures: as often as the captions themselves agree."""
    verdicts = judge.evaluate(
        lambda prompts, seed: draw(None, prompts, seed=seed), 40, seed=2
    )
    exchanged = judge.exchange_captions(verdicts)
    rates = judge.accuracy(exchanged)
    for kind in ("single", "unseen"):
        own = [v.caption for v in verdicts if v.kind == kind]
        things = [judge.parse(c).things[0] for c in own]
        pairs = list(zip(things, [*things[1:], things[0]], strict=True))
        assert rates[kind]["count"].rate == 1
        for name in ("colour", "shape"):
            same = sum(getattr(a, name) == getattr(b, name) for a, b in pairs)
            assert rates[kind][name].right == same
    assert [v.caption for v in exchanged[:2]] == [v.caption for v in verdicts[1:3]]


@pytest.mark.parametrize("arguments, message", [(["--num=0"], "--num=0: ask for")])
def test_the_command_refuses_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        judge.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
