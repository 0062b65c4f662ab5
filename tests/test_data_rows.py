"""Rows: what is made of an example's picture, and what can't be made."""

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.data.examples import BadExample, Source
from dalle2_jax.data.rows import Rows
from dalle2_jax.errors import UserError
from tests.test_data_batches import gradient, numbered, png

SIZES = {"image": 16}  # the gradients' height: nothing is resized


def make(rows, count=72):
    """Rows of one gradient, each by a seed of its own."""
    example = numbered(1)[0]
    return [rows.make(example, (3, position)) for position in range(count)]


def corners(made):
    """The column that the upper left pixel of each picture was in."""
    return {int(row["image"][0, 0, 0]) // 10 for row in made}


def test_a_square_is_taken_from_the_middle_or_anywhere():
    assert corners(make(Rows(SIZES))) == {4}
    assert corners(make(Rows(SIZES, crop="random"))) == set(range(9))


def test_half_of_the_pictures_are_mirrored():
    made = make(Rows(SIZES, flip=True), 200)
    assert corners(made) == {4, 19}
    mirrored = np.mean([row["image"][0, 0, 0] == 190 for row in made])
    assert 0.4 < mirrored < 0.6


def test_a_part_is_taken_of_the_image_only():
    rows = Rows({"image": 16, "clip_image": 16}, crop_fraction=0.25)
    for row in make(rows):
        part, whole = row["image"], row["clip_image"]
        assert part.shape == (4, 4, 3) and whole.shape == (16, 16, 3)
        x, y = part[0, 0, 0] // 10 - 4, part[0, 0, 1] // 10
        np.testing.assert_array_equal(part, whole[y : y + 4, x : x + 4])


def test_without_an_image_no_part_is_taken():
    for row in make(Rows({"clip_image": 16}, crop_fraction=0.25), 2):
        assert row["clip_image"].shape == (16, 16, 3)


def test_all_pictures_of_a_row_are_of_one_square():
    sizes = {"image": 16, "small": 4}
    for row in make(Rows(sizes, crop="random", flip=True)):
        small = Image.fromarray(row["image"]).resize((4, 4), Image.Resampling.BOX)
        np.testing.assert_allclose(row["small"], np.asarray(small, int), atol=8)


def test_jitter_moves_all_pictures_of_a_row_alike():
    """A white picture with a black middle: the middle is moved, and nothing else."""
    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[12:20, 12:20] = 0
    example = {"key": "a", "image": Image.fromarray(picture), "caption": "a"}
    rows = Rows({"image": 32, "small": 16}, jitter=0.2)
    places = []
    for position in range(50):
        row = rows.make(example, (3, position))
        dark = 255 - row["image"][..., 0].astype(float)
        small = 255 - row["small"][..., 0].astype(float)
        where = [
            np.average(np.arange(n) + 0.5, weights=d.sum(0)) / n
            for n, d in ((32, dark), (16, small))
        ]
        assert where[0] == pytest.approx(where[1], abs=0.02)
        places.append((where[0], dark.sum() / 255 / 64))
    places, areas = np.transpose(places)
    assert 0.37 < places.min() < 0.43 and 0.57 < places.max() < 0.63
    assert 0.6 < areas.min() < 0.8 and 1.25 < areas.max() < 1.6  # exp(∓0.4)


def test_what_degrades_sees_the_part():
    def degrade(picture, rng):
        return picture[::2, ::2]

    for row in make(Rows(SIZES, crop_fraction=0.5, degrade=degrade)):
        assert row["image"].shape == (8, 8, 3)
        np.testing.assert_array_equal(row["low"], row["image"][::2, ::2])


def test_the_seed_decides():
    rows = Rows(SIZES, crop="random", flip=True)
    for one, other in zip(make(rows), make(rows), strict=True):
        assert one["caption"] == other["caption"]
        np.testing.assert_array_equal(one["image"], other["image"])


def test_a_picture_that_cannot_be_read():
    example = {"key": "a", "image": png(gradient(1))[:60], "caption": "cut"}
    with pytest.raises(BadExample, match="unreadable picture: a"):
        Rows(SIZES).make(example, (0, 0))
    assert Rows({}).make(example, (0, 0)) == {"caption": "cut"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "top"}, "crop is 'top': must be one of center, random"),
        ({"crop_fraction": 0.0}, "crop_fraction is 0.0"),
        ({"crop_fraction": 1.5}, "crop_fraction is 1.5"),
        ({"jitter": 1.0}, "jitter is 1.0: must be a number from 0 to below 1"),
    ],
)
def test_errors_say_what_is_wrong(options, message):
    with pytest.raises(UserError, match=message):
        Rows(SIZES, **options).check(Source("numbers", [0], dict))
