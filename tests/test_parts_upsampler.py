"""What the upsampler is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.errors import UserError
from tests.tiny import make_stage


def test_the_low_resolution_picture():
    """Crops of half the side; what is finer than the small picture's pixels is gone."""
    stage = make_stage("upsampler")
    batch = next(stage.batches("train", 0))
    assert batch["image"].shape == (8, 16, 16, 3)  # half of 32

    y, x = np.indices((16, 16))
    board = np.where((x + y) % 2, 255, 0).astype(np.uint8)
    halves = np.where(x < 8, 255, 0).astype(np.uint8)
    pictures = np.stack([board, halves])[..., None].repeat(3, axis=-1)
    params = jax.jit(stage.init)(jax.random.key(0))
    batch = {"image": jnp.asarray(pictures)}
    shown = jax.jit(stage.preview)(params, {}, batch, jax.random.key(1))
    low = np.asarray(shown["low"], int)
    assert low.shape == (2, 16, 16, 3)
    assert np.abs(low[0] - 127).max() < 12
    assert low[1, :, :4].min() > 245 and low[1, :, 12:].max() < 10
    edge = low[1, 8, 4:12, 0]
    assert (np.diff(edge) <= 0).all() and 60 < edge[3] < 220


def test_half_of_the_low_resolution_pictures_are_blurred():
    """The others are as sampling gives them: a sharp edge stays sharp."""
    halves = np.where(np.arange(16) < 8, 255, 0).astype(np.uint8)
    pictures = np.broadcast_to(halves[None, None, :, None], (16, 16, 16, 3))

    def slopes(chance):
        stage = make_stage("upsampler", **{"blur.chance": chance})
        params = jax.jit(stage.init)(jax.random.key(0))
        batch = {"image": jnp.asarray(pictures)}
        low = jax.jit(stage.preview)(params, {}, batch, jax.random.key(2))["low"]
        row = np.asarray(low, int)[:, 8, :, 0]
        return (row[:, 7] - row[:, 8]).tolist()

    [sharp], [blurred] = set(slopes(0.0)), set(slopes(1.0))
    assert sharp > 1.3 * blurred
    some = slopes(0.5)
    assert set(some) == {sharp, blurred} and 4 <= some.count(sharp) <= 12


def test_bsr_degrades_on_the_host():
    """The low-resolution picture comes with the batch; the network sees it resized."""
    stage = make_stage("upsampler", degrade="bsr")
    batch = next(stage.batches("train", 0))
    assert batch["image"].shape == (8, 16, 16, 3)
    assert batch["low"].shape == (8, 8, 8, 3)
    again = next(make_stage("upsampler", degrade="bsr").batches("train", 0))
    np.testing.assert_array_equal(batch["low"], again["low"])
    for name, value in {"noise": (200, 200), "jpeg": (5, 5)}.items():
        other = make_stage("upsampler", degrade="bsr", **{f"bsr.{name}": value})
        other = next(other.batches("train", 0))
        np.testing.assert_array_equal(batch["image"], other["image"])
        assert (batch["low"] != other["low"]).any()

    params = jax.jit(stage.init)(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, batch)
    shown = jax.jit(stage.preview)(params, {}, batch, jax.random.key(1))
    small = np.asarray(batch["low"], int)
    back = np.asarray(shown["low"], int).reshape(8, 8, 2, 8, 2, 3).mean((2, 4))
    assert np.abs(back - small).mean() < 2
    # A new network's last layer is 0: what it sees matters to the gradient alone.
    grad = jax.jit(jax.grad(lambda p, b: stage.loss(p, {}, b, jax.random.key(2))[0]))
    one, other = (grad(params, b) for b in (batch, batch | {"low": 255 - batch["low"]}))
    assert (one["conv_out"]["kernel"] != other["conv_out"]["kernel"]).any()


def test_an_unknown_degradation_is_refused():
    with pytest.raises(UserError, match="degrade is 'jpeg': must be one of blur, bsr"):
        make_stage("upsampler", degrade="jpeg")
