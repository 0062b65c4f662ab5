"""Tiles: what they cover, that they blend without a trace, and every refusal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import tiles
from dalle2_jax.errors import UserError
from dalle2_jax.nn.unet import UNet

SIZES = [
    (128, 64, 16, 4),
    (96, 32, 8, 8),
    (40, 32, 0, 8),
    (64, 24, 12, 2),
    (50, 9, 5, 1),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_the_weights_of_a_pixel_add_up_to_one(sizes):
    side, tile, overlap, unit = sizes
    starts, weights = tiles.windows(*sizes)
    total = np.zeros(side)
    for start, row in zip(starts, weights, strict=True):
        total[start : start + tile] += row
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert weights.min() >= 0
    assert starts[0] == 0 and starts[-1] == side - tile
    assert (np.diff(starts) > 0).all() and (starts % unit == 0).all()
    assert (np.diff(starts) <= tile - overlap).all()
    # What is nearest to another tile's middle does not count.
    if overlap >= 8:
        assert (weights[1:, : overlap // 4] == 0).all()
        assert (weights[:-1, -(overlap // 4) :] == 0).all()


def arrays(side, *channels, b=2):
    rng = np.random.default_rng(side)
    return [
        jnp.asarray(rng.normal(size=(b, side, side, c)), jnp.float32) for c in channels
    ]


def convolution(radius, channels):
    """A network that sees as far as `radius`, knows timesteps and a second picture."""
    side = 2 * radius + 1
    kernel = np.random.default_rng(0).normal(size=(side, side, 6, channels))

    def apply(x_t, t, cond):
        x = jnp.concatenate([x_t, cond], axis=-1)
        y = jax.lax.conv_general_dilated(
            x,
            jnp.float32(kernel),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.tanh(y / 10) * t[:, None, None, None]

    return apply


@pytest.mark.parametrize(
    ("sizes", "channels"), [((32, 16, 8), 3), ((28, 12, 4), 6), ((20, 16, 8), 3)]
)
def test_a_network_that_sees_less_than_the_margin_is_the_same_to_rounding(
    sizes, channels
):
    side, tile, overlap = sizes
    x_t, cond = arrays(side, 3, 3)
    t = jnp.array([1.0, 2.0])

    def error(radius):
        apply = convolution(radius, channels)
        tiled = jax.jit(tiles.tiled(apply, tile, overlap, 4))(x_t, t, cond)
        assert tiled.shape == (2, side, side, channels)
        return np.abs(tiled - jax.jit(apply)(x_t, t, cond)).max()

    assert error(overlap // 4) < 1e-5
    assert error(overlap // 2 + 1) > 1e-2


def test_a_picture_of_one_tile_is_not_cut():
    x_t, cond = arrays(16, 3, 3)
    apply = convolution(9, 3)
    t = jnp.ones(2)
    whole = apply(x_t, t, cond)
    for tile in (16, 32):
        tiled = tiles.tiled(apply, tile, 8, 8)(x_t, t, cond)
        np.testing.assert_array_equal(tiled, whole)


def test_more_overlap_is_nearer_to_the_whole():
    """A U-Net with its norms: what is left is what they see of one tile alone."""
    network = UNet(8, (1, 2), 1, 6, 3, groups=4)
    params = network.init(jax.random.key(0), *network.example())["params"]
    rng = np.random.default_rng(0)  # its last layers begin as zeros
    params = jax.tree.map(
        lambda x: x + jnp.float32(0.2 * rng.normal(size=x.shape)), params
    )

    @jax.jit
    def apply(x_t, t, cond):
        return network.apply({"params": params}, jnp.concatenate([x_t, cond], -1), t)

    x_t, cond = arrays(48, 3, 3, b=1)
    t = jnp.zeros(1)
    whole = np.asarray(apply(x_t, t, cond))

    def error(overlap):
        tiled = jax.jit(tiles.tiled(apply, 32, overlap, network.unit))
        return np.abs(np.asarray(tiled(x_t, t, cond)) - whole).mean() / whole.std()

    assert error(16) < error(2) < 0.3
    assert error(16) < 0.15


def test_memory_is_that_of_a_tile():
    wide = convolution(1, 64)

    def apply(x_t, t, cond):
        return wide(x_t, t, cond)[..., ::22]

    x_t = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)

    def temporary(apply):
        compiled = jax.jit(apply).lower(x_t, t, x_t).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(apply) > 4 * 64 * 256**2
    assert temporary(tiles.tiled(apply, 64, 16, 1)) < temporary(apply) / 4


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (40, 8, "tile=40: must be a multiple of 16"),
        (0, 0, "tile=0: must be a multiple of 16"),
        (64, 64, "overlap=64 of tiles of 64 px: must be from 0 to 48"),
        (64, 49, "overlap=49 .*: must be from 0 to 48"),
        (64, -1, "overlap=-1"),
    ],
)
def test_tiles_that_cannot_be_are_refused(tile, overlap, message):
    with pytest.raises(UserError, match=message):
        tiles.check(tile, overlap, 16)
