"""The U-Net against diffusers', and how its parts behave."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.convert import karlo_names, table
from dalle2_jax.nn.decoder import Decoder
from dalle2_jax.nn.layers import from_patches, to_patches
from dalle2_jax.nn.unet import UNet
from tests.golden import peer

TINY = dict(channels=4, multipliers=(1, 2, 3), head_channels=4, groups=2)
DECODER = TINY | dict(blocks=1, in_channels=3, out_channels=6, attention_levels=(1, 2))
UPSAMPLER = TINY | dict(blocks=2, in_channels=6, out_channels=3, scale_shift=False)


@partial(jax.jit, static_argnames=("remat", "dtype"))
def decode(params, *arguments, remat=False, dtype=jnp.float32):
    model = UNet(**DECODER, remat=remat, dtype=dtype)
    return model.apply({"params": params}, *arguments)


@jax.jit
def enlarge(params, *arguments):
    return UNet(**UPSAMPLER).apply({"params": params}, *arguments)


def channels_last(x):
    return x.transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def decoder():
    """Params, arguments and output of Karlo's decoder's U-Net."""
    weights, inputs, outputs = peer.unpack(peer.load("decoder"))
    whole = Decoder(DECODER, 10, context_length=5, text_width=10, context_width=12)
    names = karlo_names.decoder_table(UNet(**DECODER))
    params = peer.params(names, whole, weights)["net"]
    mask = jnp.pad(inputs["text_mask"], ((0, 0), (4, 0)), constant_values=True)
    arguments = [
        channels_last(inputs["sample"]),
        inputs["timestep"],
        outputs["vector"],
        outputs["context"],
        mask,
    ]
    return params, arguments, channels_last(outputs["sample"])


@pytest.fixture(scope="module")
def upsampler():
    """Params, arguments and output of Karlo's super-resolution network."""
    weights, inputs, outputs = peer.unpack(peer.load("upsampler"))
    model = UNet(**UPSAMPLER)
    params = peer.params(karlo_names.unet_table(model), model, weights)
    arguments = [channels_last(inputs["sample"]), inputs["timestep"]]
    return params, arguments, channels_last(outputs["sample"])


def test_the_decoders_answers_as_diffusers_did(decoder):
    params, arguments, expected = decoder
    peer.assert_close(decode(params, *arguments), expected, 1e-5)


def test_the_upsamplers_answers_as_diffusers_did(upsampler):
    params, arguments, expected = upsampler
    peer.assert_fits(UNet(**UPSAMPLER), params)
    peer.assert_close(enlarge(params, *arguments), expected, 1e-5)


@pytest.mark.parametrize("argument", range(5))
def test_every_condition_matters(decoder, argument):
    params, arguments, expected = decoder
    changed = list(arguments)
    changed[argument] = jnp.roll(changed[argument], 1, axis=0)
    difference = jnp.abs(decode(params, *changed) - expected).max((1, 2, 3))
    assert (difference > 1e-3).all()


def test_the_masked_context_is_not_seen(decoder):
    params, (x, t, vector, context, mask), _ = decoder
    garbled = jnp.where(mask[..., None], context, 100.0)
    np.testing.assert_array_equal(
        decode(params, x, t, vector, garbled, mask),
        decode(params, x, t, vector, context, mask),
    )


def test_other_sides_than_it_was_trained_at(upsampler):
    params, (x, t), _ = upsampler
    wide = jnp.concatenate([x, x, x], axis=2)
    assert jax.eval_shape(enlarge, params, wide, t).shape == (2, 8, 24, 3)


def test_every_residual_branch_and_the_output_start_at_zero():
    model = UNet(
        channels=4,
        multipliers=(1,),
        blocks=1,
        in_channels=3,
        out_channels=6,
        attention_levels=(0,),
        head_channels=4,
        groups=2,
    )

    @jax.jit
    def zeros(key):
        params = model.init(key, *model.example())["params"]
        blocks = [block for name, block in params.items() if "_" in name]
        return (
            params["conv_out"],
            [block["conv_2"] for block in blocks if "conv_2" in block],
            [block["out"] for block in blocks if "out" in block],
        )

    output, convolutions, projections = zeros(jax.random.key(0))
    assert (len(convolutions), len(projections)) == (5, 4)
    for x in jax.tree.leaves([output, convolutions, projections]):
        np.testing.assert_array_equal(x, jnp.zeros_like(x))


def test_bfloat16_is_for_activations_only(decoder):
    params, arguments, _ = decoder
    run = partial(decode, dtype=jnp.bfloat16)
    assert jax.eval_shape(run, params, *arguments).dtype == jnp.float32
    program = str(jax.make_jaxpr(run)(params, *arguments))
    dtypes = re.findall(r":(\w+)\[[\d,]+\] = conv_general", program)
    assert dtypes and set(dtypes) == {"bf16"}


def test_remat_changes_neither_output_nor_gradient():
    tiny = dict(
        channels=4,
        multipliers=(1,),
        blocks=1,
        in_channels=3,
        out_channels=3,
        groups=2,
    )
    rng = np.random.default_rng(0)

    def normal(shape):
        return jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)

    x, t = normal((1, 4, 4, 3)), jnp.ones(1)
    params = jax.tree.map(lambda s: normal(s.shape), table.abstract(UNet(**tiny)))

    @jax.jit
    def outcomes(params):
        def loss(params, remat):
            y = UNet(**tiny, remat=remat).apply({"params": params}, x, t)
            return (y**2).sum()

        value = jax.value_and_grad(loss)
        return value(params, False), value(params, True)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        *outcomes(params),
    )


def test_remat_is_in_every_block(decoder):
    params, arguments, _ = decoder

    def blocks(remat):
        jaxpr = jax.make_jaxpr(partial(decode, remat=remat))(params, *arguments)
        return str(jaxpr).count("policy=")

    assert blocks(remat=False) == 0
    rest = {"time_in", "time_out", "conv_in", "norm_out", "conv_out"}
    assert blocks(remat=True) == len(params.keys() - rest)


def test_karlos_upsampler_has_its_parameter_count():
    options = dict(channels=320, multipliers=(1, 2, 3, 4), blocks=3)
    model = UNet(**options, in_channels=6, out_channels=3, scale_shift=False)
    assert peer.size(table.abstract(model)) == 691_579_523


def test_patches_are_the_channels_of_a_smaller_picture():
    """With patches the network is the one that takes and gives such channels."""
    x, t = jax.random.normal(jax.random.key(0), (2, 16, 16, 3)), jnp.array([3.0, 700.0])
    options = TINY | dict(blocks=1)
    patched = UNet(**options, in_channels=3, out_channels=6, patch_size=2)
    plain = UNet(**options, in_channels=12, out_channels=24)
    shapes = table.abstract(patched)
    assert shapes == table.abstract(plain)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: rng.normal(scale=0.25, size=s.shape).astype(np.float32), shapes
    )
    y = jax.jit(patched.apply)({"params": params}, x, t)
    assert y.shape == (2, 16, 16, 6)
    expected = jax.jit(plain.apply)({"params": params}, to_patches(x, 2), t)
    np.testing.assert_array_equal(y, from_patches(expected, 2))
    assert y.std() > 0.1
