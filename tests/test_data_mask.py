"""Masks: what is selected by luminance, by alpha, and what could mean either."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dalle2_jax.data import image, mask
from dalle2_jax.errors import UserError

SHAPE = 6, 8
PLACE = slice(1, 4), slice(2, 5)
SELECTED = np.zeros(SHAPE, bool)
SELECTED[PLACE] = True
PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (*SHAPE, 3)).astype(np.uint8)
)


def erased(alpha, picture=PICTURE, keep_colours=True):
    """A picture with the place erased, whose colours editors may keep."""
    picture = picture.convert("RGBA")
    picture.putalpha(Image.fromarray(np.where(SELECTED, alpha, 255).astype(np.uint8)))
    if not keep_colours:
        picture.paste((0, 0, 0, alpha), (2, 1, 5, 4))
    return picture


def strokes(colour):
    """A layer with the place painted in one colour."""
    layer = Image.new("RGBA", SHAPE[::-1], (0, 0, 0, 0))
    layer.paste((*colour, 255), (2, 1, 5, 4))
    return layer


def read(source, mode=None, picture=PICTURE):
    return mask.read_mask(source, picture, mode)


WHITE = np.where(SELECTED, 200, 100).astype(np.uint8)


@pytest.mark.parametrize(
    "source",
    [
        WHITE,
        jnp.asarray(WHITE),
        WHITE[..., None].repeat(3, -1),
        SELECTED,
        WHITE / 255,
        np.float32(SELECTED),
        Image.fromarray(WHITE),
        Image.fromarray(WHITE).convert("RGBA"),
        Image.fromarray(WHITE).quantize(),
        Image.fromarray(np.float32(WHITE)),
    ],
)
@pytest.mark.parametrize("mode", [None, "luminance"])
def test_a_mask_without_alpha_selects_what_is_white(source, mode):
    np.testing.assert_array_equal(read(source, mode), SELECTED)


@pytest.mark.parametrize("alpha", [0, 128, 240])
@pytest.mark.parametrize("keep_colours", [True, False])
@pytest.mark.parametrize("mode", [None, "alpha"])
def test_the_picture_with_a_part_erased_selects_that_part(alpha, keep_colours, mode):
    source = erased(alpha, keep_colours=keep_colours)
    np.testing.assert_array_equal(read(source, mode), SELECTED)
    np.testing.assert_array_equal(read(np.asarray(source), mode), SELECTED)
    np.testing.assert_array_equal(read(None, mode, picture=source), SELECTED)


def test_the_picture_with_a_part_erased_has_any_mode():
    grey = PICTURE.convert("L")
    few = PICTURE.quantize(8)
    few.putdata(np.asarray(few).clip(0, 6).flatten())
    full = few.convert("RGB")
    few.paste(7, (2, 1, 5, 4))
    file = io.BytesIO()
    few.save(file, "PNG", transparency=7)
    for source, picture in (
        (erased(0, grey).convert("LA"), grey),
        (erased(0).convert("RGBa"), PICTURE),
        (file.getvalue(), full),
    ):
        np.testing.assert_array_equal(read(source, picture=picture), SELECTED)


def test_the_picture_may_be_a_jpeg_and_the_mask_not():
    smooth = Image.linear_gradient("L").resize(SHAPE[::-1]).convert("RGB")
    file = io.BytesIO()
    smooth.save(file, "JPEG", quality=40)
    found = read(erased(0, smooth), picture=file.getvalue())
    np.testing.assert_array_equal(found, SELECTED)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (255, 0, 0)])
@pytest.mark.parametrize("picture", [PICTURE, Image.new("RGB", SHAPE[::-1], "white")])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_strokes_could_mean_either(colour, picture, mode):
    if mode == "PA":
        colour = (0, 0, 0)  # as Pillow converts to PA
    layer = strokes(colour).convert(mode)
    with pytest.raises(UserError, match='="alpha" .*="luminance"'):
        read(layer, picture=picture)
    np.testing.assert_array_equal(read(layer, "alpha", picture), ~SELECTED)
    white = colour == (255, 255, 255)
    expected = SELECTED if white else np.zeros(SHAPE, bool)
    np.testing.assert_array_equal(read(layer, "luminance", picture), expected)


def test_a_picture_of_one_colour_with_a_part_erased_could_mean_either():
    white = Image.new("RGB", SHAPE[::-1], "white")
    with pytest.raises(UserError, match='="alpha" .*="luminance"'):
        read(erased(0, white), picture=white)


@pytest.mark.parametrize(
    ("source", "mode", "message"),
    [
        (WHITE, "white", "mask_mode='white'"),
        (WHITE, "alpha", "has no alpha"),
        (PICTURE, "alpha", "opaque all over"),
        (Image.new("RGBA", SHAPE[::-1], (0, 0, 0, 1)), "alpha", "transparent all over"),
        (None, None, "no mask"),
        (255.0 * SELECTED, None, "floats from 0 to 1"),
        (np.full(SHAPE, np.nan), None, "floats from 0 to 1"),
        (SELECTED.astype(int), None, "dtype int64"),
        (WHITE[1:], None, "8 × 5 pixels, the picture 8 × 6"),
        (PICTURE.resize((3, 3)), None, "3 × 3 pixels, the picture 8 × 6"),
        (b"", None, "not a picture"),
    ],
)
def test_refusals(source, mode, message):
    with pytest.raises(UserError, match=message):
        read(source, mode)


def test_no_mask_of_a_picture_that_is_transparent_all_over_is_told():
    picture = PICTURE.convert("RGBA")
    picture.putalpha(120)
    with pytest.raises(UserError, match="no mask"):
        read(None, picture=picture)


def test_a_smaller_mask_has_every_pixel_that_it_touches():
    one = np.zeros((8, 12), bool)  # its middle square is columns 2 to 10
    one[3, 4] = True
    expected = np.zeros((4, 4), bool)
    expected[1, 1] = True
    np.testing.assert_array_equal(mask.square_mask(one, 4), expected)
    assert mask.square_mask(one, 3).sum() == 2  # its column is cut at 8/3


def test_what_is_erased_does_not_blend_into_what_stays():
    picture = Image.new("RGBA", (64, 64), (60, 60, 60, 255))
    picture.paste((0, 0, 0, 0), (16, 16, 48, 48))
    selected = mask.read_mask(None, picture)
    kept = ~mask.square_mask(selected, 20)
    known = mask.known_square(picture, selected, 20)[kept].astype(int)
    assert abs(known - 60).max() <= 2 and len(known) > 200
    on_white = image.square(picture, 20)[kept].astype(int)
    assert abs(on_white - 60).max() >= 10
    nothing = np.zeros((6, 8), bool)
    np.testing.assert_array_equal(
        mask.known_square(PICTURE, nothing, 4), image.square(PICTURE, 4)
    )
