"""The layers against flax's, diffusers' and plain float64 arithmetic."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.nn import layers


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# The timestep.

TIMESTEPS = jnp.array([0, 1, 42, 999])


def test_timestep_embedding_is_cosines_then_sines():
    embedding = layers.timestep_embedding(TIMESTEPS, 6)
    frequencies = 10_000.0 ** -np.array([0, 1 / 3, 2 / 3])
    angles = np.asarray(TIMESTEPS, np.float64)[:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    assert embedding.dtype == jnp.float32
    np.testing.assert_allclose(embedding, expected, atol=1e-4)


def test_timestep_embedding_of_odd_width_ends_in_zero():
    odd = layers.timestep_embedding(TIMESTEPS, 7)
    even = layers.timestep_embedding(TIMESTEPS, 6)
    np.testing.assert_array_equal(odd, jnp.pad(even, ((0, 0), (0, 1))))


def test_timestep_embedding_takes_fractions_and_other_periods():
    halves = layers.timestep_embedding(TIMESTEPS / 2, 4, max_period=16.0)
    angles = [21, 21 / 4]
    expected = [math.cos(x) for x in angles] + [math.sin(x) for x in angles]
    np.testing.assert_allclose(halves[2], expected, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("width", [320, 7])
def test_timestep_embedding_is_diffusers(width):
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    t = np.arange(0, 1000, 37)
    theirs = get_timestep_embedding(
        torch.tensor(t), width, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    ours = layers.timestep_embedding(jnp.asarray(t), width)
    # A frequency's last bit, times 999.
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-4)


# Normalisation.


@pytest.mark.parametrize("shape", [(5,), (2, 3, 8)])
def test_layer_norm_is_flaxs(shape):
    x = 3 + 2 * normal(0, *shape)
    c = shape[-1]
    params = {"params": {"scale": normal(1, c), "bias": normal(2, c)}}
    ours = jax.jit(layers.LayerNorm().apply)(params, x)
    peer = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)
    theirs = jax.jit(peer.apply)(params, x)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("mean, tolerance", [(3, 1e-5), (100, 3e-3)])
def test_group_norm_is_flaxs(mean, tolerance):
    """Far from zero, where the mean of squares is a rough measure, nearly so."""
    x = mean + 2 * normal(0, 2, 4, 5, 12)
    params = {"params": {"scale": normal(1, 12), "bias": normal(2, 12)}}
    ours = jax.jit(layers.GroupNorm(groups=3).apply)(params, x)
    peer = nn.GroupNorm(3, epsilon=1e-5, use_fast_variance=False)
    theirs = jax.jit(peer.apply)(params, x)
    np.testing.assert_allclose(ours, theirs, atol=tolerance)


def test_group_norm_is_modulated_after_its_own_scale():
    x, scale, shift = normal(0, 2, 3, 3, 4), normal(1, 2, 4), normal(2, 2, 4)
    params = {"params": {"scale": normal(3, 4), "bias": normal(4, 4)}}
    norm = jax.jit(layers.GroupNorm(groups=2).apply)
    plain = np.asarray(norm(params, x))
    expected = plain * (1 + np.asarray(scale)[:, None, None])
    expected += np.asarray(shift)[:, None, None]
    np.testing.assert_allclose(norm(params, x, scale, shift), expected, atol=1e-5)


def test_group_norm_of_a_constant_is_its_bias():
    params = {"params": {"scale": jnp.ones(4), "bias": jnp.arange(4.0)}}
    x = jnp.ones((1, 2, 2, 4))
    y = jax.jit(layers.GroupNorm(groups=2).apply)(params, x)
    np.testing.assert_allclose(y[0, 0, 0], jnp.arange(4.0), atol=1e-4)


@pytest.mark.parametrize("norm", [layers.LayerNorm(), layers.GroupNorm(groups=2)])
def test_norms_compute_in_float32_and_keep_the_dtype(norm):
    x = 100 + normal(0, 1, 8, 8, 4)
    x = x.astype(jnp.bfloat16)
    params = norm.init(jax.random.key(0), x)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    half = jax.jit(norm.apply)(params, x)
    assert half.dtype == jnp.bfloat16
    exact = jax.jit(norm.apply)(params, x.astype(jnp.float32))
    np.testing.assert_array_equal(half, exact.astype(jnp.bfloat16))


# Attention.


def softmax_attention(q, k, v, mask):
    """In float64, a head and a query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.empty(q.shape)
    for b, i, h in np.ndindex(q.shape[:3]):
        logits = k[b, :, h] @ q[b, i, h] / math.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max()) * mask[b, h, i]
        out[b, i, h] = weights @ v[b, :, h] / weights.sum()
    return out


MASKS = {
    "none": None,
    "keys": jnp.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], bool)[:, None, None],
    "causal": jnp.tril(jnp.ones((4, 5), bool))[None, None],
    "full": jax.random.bernoulli(jax.random.key(9), 0.5, (2, 3, 4, 5))
    | (jnp.arange(5) == 0),
}


@pytest.mark.parametrize("name", MASKS)
def test_attention(name):
    q, k, v = normal(0, 2, 4, 3, 8), normal(1, 2, 5, 3, 8), normal(2, 2, 5, 3, 8)
    mask = MASKS[name]
    everything = np.broadcast_to(True if mask is None else mask, (2, 3, 4, 5))
    expected = softmax_attention(q, k, v, everything)
    actual = jax.jit(layers.attention)(q, k, v, mask)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("name", MASKS)
def test_attention_head_by_head_is_the_same(name, monkeypatch):
    """On a CPU, with its gradient; the tests' other sequences are too short for it."""
    arrays = normal(0, 2, 4, 3, 8), normal(1, 2, 5, 3, 8), normal(2, 2, 5, 3, 8)

    def outcomes():
        def total(*arrays):
            return (layers.attention(*arrays, MASKS[name]) ** 2).sum()

        both = jax.value_and_grad(total, argnums=(0, 1, 2))
        return str(jax.make_jaxpr(both)(*arrays)), jax.jit(both)(*arrays)

    program, expected = outcomes()
    assert "scan" not in program
    monkeypatch.setattr(layers, "_LONG", 1)
    monkeypatch.setattr(layers, "_on_one_cpu", lambda: True)
    program, actual = outcomes()
    assert "scan" in program
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        actual,
        expected,
    )


SEEN = jnp.array([3, 5], jnp.int32)


def test_attention_to_the_first_keys():
    q, k, v = normal(0, 2, 4, 3, 8), normal(1, 2, 5, 3, 8), normal(2, 2, 5, 3, 8)
    mask = (jnp.arange(5) < SEEN[:, None])[:, None, None]
    expected = softmax_attention(q, k, v, np.broadcast_to(mask, (2, 3, 4, 5)))
    actual = jax.jit(layers.attention)(q, k, v, seen=SEEN)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("queries", [4, 3])
@pytest.mark.parametrize("name", [*MASKS, "seen"])
def test_attention_as_cudnn_wants_it(name, queries, monkeypatch):
    """Its gradient is only for even numbers of positions, its masks are full."""
    q, k, v = (
        normal(i, 2, n, 3, 8, dtype=jnp.bfloat16) for i, n in enumerate([queries, 5, 5])
    )
    mask = MASKS.get(name)
    if mask is not None:
        mask = mask[:, :, :queries]
    seen = SEEN if name == "seen" else None
    expected = layers.attention(q, k, v, mask, seen)
    xla = jax.nn.dot_product_attention

    def cudnn(q, k, v, *, mask, key_value_seq_lengths, implementation):
        assert implementation == "cudnn"
        assert q.shape[1] % 2 == k.shape[1] % 2 == 0
        assert mask is None or mask.shape == (2, 3, q.shape[1], k.shape[1])
        return xla(q, k, v, mask=mask, key_value_seq_lengths=key_value_seq_lengths)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    actual = layers.attention(q, k, v, mask, seen)
    assert actual.shape == q.shape
    np.testing.assert_allclose(*(np.float32(x) for x in (actual, expected)), atol=0.02)


def test_attention_in_bfloat16_has_a_float32_softmax():
    q = k = v = normal(0, 1, 4, 1, 8, dtype=jnp.bfloat16)
    assert layers.attention(q, k, v).dtype == jnp.bfloat16
    program = str(jax.make_jaxpr(layers.attention)(q, k, v))
    assert re.findall(r":(\w+)\[1,1,4,4\] = exp ", program) == ["f32"]


def test_what_is_masked_has_no_gradient():
    q, k, v = normal(0, 1, 4, 1, 8), normal(1, 1, 5, 1, 8), normal(2, 1, 5, 1, 8)
    mask = jnp.arange(5) < 3

    def total(k, v):
        return layers.attention(q, k, v, mask[None, None, None]).sum()

    for gradient in map(np.asarray, jax.jit(jax.grad(total, argnums=(0, 1)))(k, v)):
        assert (gradient[:, 3:] == 0).all()
        assert (gradient[:, :3] != 0).any()


def test_causal_mask():
    assert layers.causal_mask(3)[0, 0].tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_text_mask_ends_with_the_first_end_of_text():
    tokens = jnp.array(
        [
            [7, 1, 2, 9, 9, 9],  # padded with the end-of-text token, as OpenAI does
            [7, 1, 2, 9, 0, 0],  # padded with another token
            [7, 1, 2, 3, 4, 9],
            [9, 9, 9, 9, 9, 9],
        ]
    )
    lengths = layers.text_mask(tokens, eot=9).sum(-1)
    assert lengths.tolist() == [4, 4, 6, 1]


# Products, activations, the transformer, resampling.


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_the_gradient_of_a_product(shape, platform, monkeypatch):
    def choose(*args, default, **branches):
        return branches.get(platform, default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    x, kernel, g = normal(0, *shape, 4), normal(1, 4, 2, 5), normal(2, *shape, 2, 5)
    y, gradient = jax.vjp(layers.product, x, kernel)
    x, kernel, g = (np.asarray(a, np.float64) for a in (x, kernel, g))
    expected = [
        np.einsum("...c,cnd->...nd", x, kernel),
        np.einsum("...nd,cnd->...c", g, kernel),
        np.einsum("bc,bnd->cnd", x.reshape(-1, 4), g.reshape(-1, 2, 5)),
    ]
    for found, right in zip([y, *gradient(jnp.float32(g))], expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("gelu", lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
        ("quick_gelu", lambda x: x / (1 + math.exp(-1.702 * x))),
        ("silu", lambda x: x / (1 + math.exp(-x))),
    ],
)
def test_activations(name, expected):
    x = np.linspace(-5, 5, 21)
    y = layers.ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, [expected(v) for v in x], atol=1e-6)


def test_remat_changes_neither_output_nor_gradient():
    x, mask = normal(0, 2, 3, 8), layers.causal_mask(3)

    @jax.jit
    def outcomes(params):
        def loss(params, remat):
            model = layers.Transformer(1, 2, remat=remat)
            return (model.apply(params, x, mask) ** 2).sum()

        value = jax.value_and_grad(loss)
        return value(params, False), value(params, True)

    shapes = jax.eval_shape(layers.Transformer(1, 2).init, jax.random.key(0), x)
    params = jax.tree.map(lambda s: normal(s.size, *s.shape) / 3, shapes)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        *outcomes(params),
    )


def test_upsample_repeats_and_downsample_averages():
    x = jnp.arange(2 * 2 * 3 * 2.0).reshape(2, 2, 3, 2)
    up = layers.upsample(x)
    np.testing.assert_array_equal(up, np.repeat(np.repeat(x, 2, axis=1), 2, axis=2))
    np.testing.assert_array_equal(layers.downsample(up), x)
    corner = layers.downsample(up[:, 1:3, 1:3])  # one pixel of each of four
    np.testing.assert_allclose(corner[:, 0, 0], x[:, :2, :2].mean((1, 2)))


def test_patches_hold_their_pixels_row_by_row():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    patches = layers.to_patches(x, 2)
    np.testing.assert_array_equal(patches[1, 1, 2], x[1, 2:, 4:].ravel())
    np.testing.assert_array_equal(layers.from_patches(patches, 2), x)
