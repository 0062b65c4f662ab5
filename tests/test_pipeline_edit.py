"""Edits: what must come back comes back, what is kept is kept, and every refusal."""

import numpy as np
import pytest
from PIL import Image

import dalle2_jax
from dalle2_jax.data import image, shapes
from dalle2_jax.errors import UserError
from dalle2_jax.nn import codes
from dalle2_jax.pipeline import edit, latent

RED, BLUE = "a small red circle", "a large blue star on a black background"
STEPS = {"steps": {"decoder": 20}}


@pytest.fixture(scope="module")
def model(tiny_models):
    return dalle2_jax.load(tiny_models["upsampler"])


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [shapes.render(shapes.sample_scene(rng), 48) for _ in range(2)]


def psnr(a, b):
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 10 * np.log10(255**2 / error)


def same(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


# Inversion


def test_inversion_and_decoding_give_the_picture_back(pictures):
    # The bundled model: at the last step one that is not trained forgets the picture.
    model = dalle2_jax.load().up_to(32)
    base = np.stack([image.square(p, model.decoder.size) for p in pictures])
    quality = [
        psnr(latent.reconstruct(model, pictures, steps={"decoder": steps}), base)
        for steps in (10, 100)
    ]
    assert quality[1] > 30 and quality[1] > quality[0]


def test_the_latent_has_clips_embedding_and_noise(model, pictures):
    z, x_T = latent.invert(model, pictures, **STEPS)
    np.testing.assert_allclose(z, dalle2_jax.encode_image(model, pictures))
    assert x_T.shape == (2, 16, 16, 3)
    one = latent.invert(model, pictures[1], **STEPS)
    np.testing.assert_allclose(one.x_T[0], x_T[1], atol=1e-4)


# Variations


def test_a_variation_at_eta_0_is_the_reconstruction(model, pictures):
    expected = latent.reconstruct(model, pictures[0], size=16, **STEPS)
    varied = edit.variations(model, pictures[0], eta=0.0, num=2, size=16, **STEPS)
    assert same(varied[0], expected[0]) and same(varied[1], expected[0])


def test_variations_differ_the_more_the_larger_eta(model, pictures):
    def distance(eta):
        found = edit.variations(model, pictures[0], eta=eta, num=3, size=16, **STEPS)
        assert len({p.tobytes() for p in found}) == 3
        return np.abs(found.astype(int) - found[:1]).mean()

    assert distance(1.0) > distance(0.2) > 0


# Interpolation


def test_an_interpolation_ends_in_the_reconstructions(model, pictures):
    path = edit.interpolate(model, *pictures, frames=4, **STEPS)
    ends = latent.reconstruct(model, pictures, **STEPS)
    assert path.shape == (4, 32, 32, 3)
    assert same(path[0], ends[0]) and same(path[-1], ends[1])
    shared = edit.interpolate(
        model, *pictures, weights=[0.0, 0.5], shared_noise=True, **STEPS
    )
    assert shared.shape == (2, 32, 32, 3) and not same(shared[0], ends[0])


def test_blends_of_pictures_and_captions(model, pictures):
    both = edit.blend(model, pictures, [RED], [1, 1, 2], num=3)
    assert both.shape == (3, 32, 32, 3) and len({p.tobytes() for p in both}) == 3
    z = edit.embed(model, [RED, BLUE], num=2)
    assert z.shape == (4, 32) and len(np.unique(z, axis=0)) == 4


# PCA


def test_pca_goes_from_the_mean_embedding_to_the_picture(model, pictures):
    z = dalle2_jax.encode_image(model, pictures[0])
    others = np.random.default_rng(1).normal(size=(100, 32)).astype(np.float32)
    table = codes.fit(np.concatenate([z, others]), 32)
    known = model._replace(statistics={"ar_prior": table._asdict()})
    views = edit.pca(known, pictures[0], components=[0, 32], **STEPS)
    ends = latent.decode(model, np.stack([table.mean, z[0]]), **STEPS)
    assert same(views, ends)
    assert len(edit.pca(known, pictures[0], **STEPS)) == 6  # 1, 2, 4, 8, 16, 32


# Text diffs


@pytest.mark.parametrize("direction", ["text", "prior"])
def test_a_text_diff_begins_with_the_reconstruction(model, pictures, direction):
    def diff(theta):
        given = {"theta": theta, "frames": 3, "direction": direction}
        return edit.text_diff(model, pictures[0], RED, BLUE, **given, **STEPS)

    path = diff(1.0)
    assert path.shape == (3, 32, 32, 3)
    assert same(path[0], latent.reconstruct(model, pictures[0], **STEPS)[0])
    assert (path[0] != path[-1]).any()
    assert same(diff([1.0])[0], path[-1])


# Files


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "I;16", "CMYK", "1"])
def test_pictures_of_any_mode(model, mode, tmp_path):
    picture = Image.new("RGB", (20, 30), (200, 30, 90))
    if mode == "I;16":
        picture = Image.fromarray(np.full((30, 20), 40_000, np.uint16))
    else:
        picture = picture.convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(path)
    z = latent.invert(model, str(path), steps={"decoder": 2}).z
    assert np.isfinite(z).all()


def refuse(call, *told):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    for text in told:
        assert text in str(error.value)


def test_what_cannot_be_done_is_told(model, pictures, tmp_path):
    a, b = pictures
    notes = tmp_path / "notes.txt"
    notes.write_text("no picture")
    refuse(lambda: latent.invert(model, str(notes)), "not a picture")
    refuse(lambda: latent.invert(model, str(tmp_path / "none.png")), "no file")
    refuse(lambda: latent.invert(model, np.zeros((4, 4))), "float64: give uint8")
    refuse(
        lambda: edit.variations(model, np.stack(pictures)),
        "picture is 2 pictures: give one",
    )
    refuse(lambda: edit.variations(model, a, eta=1.5), "eta=1.5", "from 0 to 1")
    refuse(lambda: edit.variations(model, a, eta=0.5, noise={"decoder": 0}), "noise")
    refuse(lambda: edit.interpolate(model, a, b, frames=1), "frames=1")
    refuse(lambda: edit.interpolate(model, a, b, weights=[2.0]), "weights=2.0")
    refuse(lambda: edit.text_diff(model, a, RED, BLUE, theta=-1), "theta=-1")
    refuse(lambda: edit.text_diff(model, a, RED, RED), "are the same to CLIP")
    refuse(lambda: edit.text_diff(model, a, "", RED), "empty")
    refuse(lambda: edit.text_diff(model, a, RED, BLUE, direction="up"), "'up'")
    refuse(lambda: edit.pca(model, a), "no principal components", "ar_prior")
    table = codes.fit(np.eye(32, dtype=np.float32), 4)
    known = model._replace(statistics={"ar_prior": table._asdict()})
    refuse(lambda: edit.pca(known, a, components=[5]), "components=5", "0 to 4")
    refuse(lambda: edit.blend(model), "nothing to blend")
    refuse(lambda: edit.blend(model, [a], weights=[1, 2]), "give 1 positive")
    refuse(lambda: latent.decode(model, np.zeros((1, 3))), "[1, 3]", "[n, 32]")
    z = np.zeros((1, 32))
    refuse(lambda: latent.decode(model, z, np.zeros((1, 8, 8, 3))), "[1, 16, 16, 3]")
