"""The diffusion prior against diffusers' PriorTransformer, and what it looks at."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.convert import karlo_names, table
from dalle2_jax.nn.prior import DiffusionPrior
from tests.golden import peer

TINY = dict(clip_dim=16, context_length=7, text_width=16, width=24, layers=2, heads=2)


@partial(jax.jit, static_argnames=("remat", "dtype"))
def predict(params, *arguments, remat=False, dtype=jnp.float32):
    model = DiffusionPrior(**TINY, remat=remat, dtype=dtype)
    return model.apply({"params": params}, *arguments)


@pytest.fixture(scope="module")
def golden():
    weights, inputs, outputs = peer.unpack(peer.load("prior"))
    arguments = [
        inputs["hidden_states"],
        inputs["timestep"],
        inputs["proj_embedding"],
        inputs["encoder_hidden_states"],
        inputs["attention_mask"],
    ]
    return weights, arguments, outputs["predicted_image_embedding"]


@pytest.fixture(scope="module")
def params(golden):
    return peer.params(
        karlo_names.prior_table(layers=2),
        DiffusionPrior(**TINY),
        golden[0],
        leading=karlo_names.PRIOR_LEADING,
        ignore=karlo_names.PRIOR_STATISTICS,
    )


def test_answers_as_diffusers_did(golden, params):
    _, arguments, expected = golden
    peer.assert_fits(DiffusionPrior(**TINY), params)
    peer.assert_close(predict(params, *arguments), expected, 1e-5)


@pytest.mark.parametrize("argument", range(5))
def test_every_condition_matters(golden, params, argument):
    _, arguments, expected = golden
    changed = list(arguments)
    changed[argument] = jnp.roll(changed[argument], 1, axis=0)
    difference = jnp.abs(predict(params, *changed) - expected).max(-1)
    assert (difference > 1e-2).all()


def test_padding_is_not_seen(golden, params):
    _, (x_t, t, z_text, states, mask), expected = golden
    noise = jax.random.normal(jax.random.key(0), states.shape)
    garbled = jnp.where(mask[..., None], states, 10 * noise)
    again = predict(params, x_t, t, z_text, garbled, mask)
    np.testing.assert_array_equal(again, predict(params, x_t, t, z_text, states, mask))
    assert not mask.all()


def test_captions_do_not_see_each_other(golden, params):
    _, arguments, expected = golden
    alone = predict(params, *(x[1:2] for x in arguments))
    np.testing.assert_allclose(alone[0], expected[1], atol=1e-5)


def test_bfloat16_is_for_activations_only(golden, params):
    _, arguments, expected = golden
    peer.assert_fits(DiffusionPrior(**TINY, dtype=jnp.bfloat16), params)
    rough = predict(params, *arguments, dtype=jnp.bfloat16)
    peer.assert_close(rough, expected, 0.05)
    assert (rough != expected).any()


def test_remat_is_in_every_block(golden, params):
    def blocks(remat):
        jaxpr = jax.make_jaxpr(partial(predict, remat=remat))(params, *golden[1])
        return str(jaxpr).count("policy=")

    assert blocks(remat=False) == 0
    assert blocks(remat=True) == TINY["layers"]


def test_karlos_prior_has_its_parameter_count():
    options = dict(
        clip_dim=768, context_length=77, text_width=768, width=2048, layers=20, heads=32
    )
    assert peer.size(table.abstract(DiffusionPrior(**options))) == 1_022_028_544


@pytest.mark.parity
def test_karlos_prior_is_diffusers_default():
    import torch
    from diffusers import PriorTransformer

    with torch.device("meta"):
        parameters = dict(PriorTransformer().named_parameters())
    del parameters["clip_mean"], parameters["clip_std"]
    assert sum(x.numel() for x in parameters.values()) == 1_022_028_544
