"""What the decoder is told in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.parts.decoder import random_masks
from tests.tiny import make_stage


@pytest.mark.parametrize(
    ("drop", "key"), [("drop_image", "clip_image"), ("drop_caption", "tokens")]
)
def test_a_dropped_condition_does_not_matter(drop, key, tiny_models):
    """Only what is kept changes the loss."""
    rates = {"drop_image": 0.0, "drop_caption": 0.0}

    def change(**dropped):
        stage = make_stage("decoder", tiny_models["clip"], **(rates | dropped))
        # The output is zero at first, whatever goes in: any other params will do.
        params = jax.tree.map(
            lambda x: x + 0.02, jax.jit(stage.init)(jax.random.key(0))
        )
        batch = jax.tree.map(jnp.asarray, next(stage.batches("train", 0)))
        other = batch | {key: batch[key][::-1]}
        loss = jax.jit(stage.loss)
        a, b = (
            loss(params, stage.frozen, x, jax.random.key(1))[0] for x in (batch, other)
        )
        return abs(float(a - b))

    assert change() > 1e-7
    assert change(**{drop: 1.0}) == 0.0


def test_masks_are_rectangles_or_all():
    masks = np.asarray(random_masks(jax.random.key(0), 2000, 16))[..., 0]
    assert set(np.unique(masks)) == {0.0, 1.0}
    rows, columns = masks.max(2), masks.max(1)
    np.testing.assert_array_equal(masks, rows[:, :, None] * columns[:, None])
    assert (np.abs(np.diff(rows, axis=1)).sum(1) <= 2).all()  # in one piece
    assert 0.22 < masks.all((1, 2)).mean() < 0.3  # a quarter, and large rectangles
    assert masks.any((1, 2)).mean() > 0.95


def test_a_decoder_that_inpaints_trains_and_is_shown_the_rest(tiny_models):
    given = {"net.unet.in_channels": 7, "drop_image": 0.0, "drop_caption": 0.0}
    stage = make_stage("decoder", tiny_models["clip"], **given)
    params = jax.tree.map(lambda x: x + 0.02, jax.jit(stage.init)(jax.random.key(0)))
    assert params["net"]["conv_in"]["kernel"].shape[2] == 7
    batch = jax.tree.map(jnp.asarray, next(stage.batches("train", 0)))
    loss = jax.jit(jax.grad(lambda p: stage.loss(p, *rest)[0]))
    rest = stage.frozen, batch, jax.random.key(1)
    kernel = loss(params)["net"]["conv_in"]["kernel"]
    assert (jnp.abs(kernel).sum((0, 1, 3)) > 0).all()  # all seven are read
    preview = stage.preview(params, stage.frozen, batch, jax.random.key(2))
    assert preview["sampled"].shape == batch["image"].shape
