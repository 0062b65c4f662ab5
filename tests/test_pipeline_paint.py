"""Painting: what is known stays to the bit, and every refusal."""

import jax
import numpy as np
import pytest
from PIL import Image

import dalle2_jax
from dalle2_jax.data import image, shapes
from dalle2_jax.pipeline import generate, paint
from tests.test_pipeline_edit import RED, psnr, refuse


@pytest.fixture(scope="module")
def model(tiny_models):
    return dalle2_jax.load(tiny_models["upsampler"])


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [shapes.render(shapes.sample_scene(rng), 48) for _ in range(2)]


def test_what_the_mask_leaves_stays_to_the_bit(model, pictures):
    picture = image.square(pictures[0], 32)
    mask = np.zeros((32, 32), bool)
    mask[8:20, 10:30] = True
    painted = paint.inpaint(model, picture, mask, RED, num=2)
    assert painted.shape == (2, 32, 32, 3)
    for one in painted:
        np.testing.assert_array_equal(one[~mask], picture[~mask])
        assert (one[mask] != picture[mask]).mean() > 0.5
    assert (painted[0] != painted[1]).any()


def test_what_is_transparent_is_painted(model, pictures, monkeypatch):
    known = []

    def cascade(model, request, progress):
        known.append([np.asarray(x)[0] for x in request.known])
        return np.zeros((1, 16, 16, 3), np.uint8)

    monkeypatch.setattr(generate, "cascade", cascade)
    mask = np.zeros((48, 48), bool)
    mask[12:30, 12:36] = True
    erased = np.dstack([pictures[0], np.where(mask, 0, 255).astype(np.uint8)])
    for picture, source, mode in (
        (pictures[0], mask, None),
        (pictures[0], erased, None),
        (pictures[0], Image.fromarray(erased), "alpha"),
        (erased, None, None),
    ):
        paint.inpaint(model, picture, source, RED, size=16, mask_mode=mode)
    assert known[0][1].sum() == 6 * 8
    for picture, selected in known[1:]:
        np.testing.assert_array_equal(selected, known[0][1])
        far = np.ones((16, 16), bool)
        far[2:12, 2:14] = False  # of what bicubic resizing blends with what is erased
        np.testing.assert_array_equal(picture[far], known[0][0][far])


def test_a_decoder_trained_to_inpaint_is_shown_what_stays(model, pictures):
    network = model.decoder.network
    unet = dict(network.unet) | {"in_channels": 7}
    network = network.clone(unet=unet)
    params = network.init(jax.random.key(0), *network.example())["params"]
    rng = np.random.default_rng(0)  # its last layer begins as zeros
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), params)
    params = jax.tree.map(np.float32, params)
    trained = model.decoder.replace(network=network, params=params)
    assert network.inpaints
    trained = model.replace(decoder=trained)
    mask = np.zeros((48, 48), np.uint8)
    mask[:, 24:] = 255
    left, right = (paint.inpaint(trained, p, mask, RED, size=16) for p in pictures)
    assert (left != right)[:, :, 8:].any()  # the net's own noise is the same
    assert dalle2_jax.text_to_image(trained, RED).shape == (1, 32, 32, 3)


def test_outpainting_keeps_the_picture_and_paints_around_it(model):
    picture = np.full((24, 36, 3), 77, np.uint8)
    painted = paint.outpaint(model, picture, RED, extend=1.0, place=(0, 1))[0]
    rows, columns = slice(32 - round(24 * 32 / 72), 32), slice(0, 16)
    assert (painted[rows, columns] == 77).all()
    rest = np.ones((32, 32), bool)
    rest[rows, columns] = False
    assert (painted[rest] != 77).mean() > 0.9


def test_img2img_keeps_the_more_the_less_it_may_change(model, pictures):
    base = image.square(pictures[0], 16)

    def kept(strength):
        found = paint.img2img(model, pictures[0], RED, strength=strength, size=16)
        return psnr(found[0], base)

    few = {"steps": {"decoder": 4}}
    assert paint.img2img(model, pictures[0], RED, num=2, **few).shape == (2, 32, 32, 3)
    assert kept(0.25) > kept(1.0)


def test_what_cannot_be_painted_is_told(model, pictures):
    a = pictures[0]
    white = np.ones((48, 48), bool)
    refuse(lambda: paint.img2img(model, a, RED, strength=0), "strength=0")
    refuse(lambda: paint.inpaint(model, a, ~white, RED), "selects nothing")
    refuse(lambda: paint.inpaint(model, a, white[:9], RED), "48 × 9", "48 × 48")
    refuse(lambda: paint.inpaint(model, a, 2.0 * white, RED), "bool, uint8")
    refuse(lambda: paint.inpaint(model, a, None, RED), "no mask")
    refuse(lambda: paint.inpaint(model, a, white, RED, repeats=0), "repeats=0")
    refuse(lambda: paint.outpaint(model, a, RED, extend=0), "extend=0")
    refuse(
        lambda: paint.outpaint(model, a, RED, place=(2, 0)),
        "place=2: must be from 0 to 1",
    )
