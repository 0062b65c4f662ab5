"""The autoregressive prior: what it looks at, and what is drawn from it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.nn import ar_prior
from dalle2_jax.nn.ar_prior import ARPrior
from dalle2_jax.nn.clip import Caption

TINY = dict(
    clip_dim=16,
    context_length=7,
    text_width=12,
    width=24,
    layers=2,
    heads=2,
    components=5,
    buckets=11,
    dot_products=6,
)
NETWORK = ARPrior(**TINY)
B = 4


@pytest.fixture(scope="module")
def params():
    """Far from the start, where all logits are nearly the same."""
    drawn = jax.jit(NETWORK.init)(jax.random.key(0), *NETWORK.example())["params"]
    return jax.tree.map(lambda x: 4 * x, drawn)


@pytest.fixture(scope="module")
def captions():
    def caption(seed):
        rng = np.random.default_rng(seed)
        normal = partial(rng.normal, size=(B, 7, 12))
        mask = jnp.arange(7) < jnp.asarray([3, 7, 5, 4])[:, None]
        tokens = jnp.zeros((B, 7), jnp.int32)
        z_text = jnp.float32(rng.normal(size=(B, 16)))
        return Caption(tokens, z_text, jnp.float32(normal()), mask)

    return caption(0), caption(1)


@partial(jax.jit, static_argnames=("dtype", "remat"))
def logits(params, codes, dot_product, caption, dtype=jnp.float32, remat=False):
    network = ARPrior(**TINY, dtype=dtype, remat=remat)
    conditions = caption.z_text, caption.states, caption.mask
    return network.apply({"params": params}, codes, dot_product, *conditions)


@partial(jax.jit, static_argnames="guided")
def _draw(params, caption, null, draw, guided):
    shown = ar_prior.pair(caption, null) if guided else caption
    draw = draw if guided else draw._replace(guidance=None)
    state = ar_prior.begin(NETWORK, params, shown, draw.keys)
    for i in range(NETWORK.components - 1):
        state = ar_prior.step(NETWORK, params, shown.mask, state, jnp.int32(i), draw)
    return ar_prior.draw_code(state, NETWORK.components - 1, draw)


def draw(params, caption, null, keys, guidance=1.0, temperature=1.0):
    several = [jnp.full(len(keys), x, jnp.float32) for x in (temperature, guidance)]
    return _draw(params, caption, null, ar_prior.Draw(keys, *several), guidance != 1)


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(2)
    codes = jnp.asarray(rng.integers(0, 11, (B, 5)), jnp.int32)
    return codes, jnp.asarray([0, 5, 2, 3], jnp.int32)


def test_a_code_sees_those_before_it_and_no_other(params, captions, given):
    codes, dot_product = given
    before = logits(params, codes, dot_product, captions[0])
    assert before.shape == (B, 5, 11) and before.dtype == jnp.float32
    for i in range(5):
        changed = codes.at[:, i].set((codes[:, i] + 1) % 11)
        difference = jnp.abs(
            logits(params, changed, dot_product, captions[0]) - before
        ).max((0, 2))
        np.testing.assert_array_equal(difference[: i + 1], 0)
        assert (difference[i + 1 :] > 1e-3).all()


def test_every_condition_matters_and_padding_does_not(params, captions, given):
    codes, dot_product = given
    caption = captions[0]
    before = logits(params, codes, dot_product, caption)
    for other in (
        (codes, (dot_product + 1) % 6, caption),
        (codes, dot_product, caption._replace(z_text=captions[1].z_text)),
        (codes, dot_product, caption._replace(states=captions[1].states)),
    ):
        difference = jnp.abs(logits(params, *other) - before).max((1, 2))
        assert (difference > 1e-3).all()
    states = jnp.where(caption.mask[..., None], caption.states, 50.0)
    again = logits(params, codes, dot_product, caption._replace(states=states))
    np.testing.assert_array_equal(again, before)


def test_cached_steps_give_the_same_logits(params, captions, given):
    codes, dot_product = given
    caption = captions[0]
    expected = logits(params, codes, dot_product, caption)
    variables = {"params": params}
    found, caches = NETWORK.apply(
        variables,
        dot_product,
        caption.z_text,
        caption.states,
        caption.mask,
        method="start",
    )
    np.testing.assert_allclose(found, expected[:, 0], atol=1e-4)
    for i in range(1, 5):
        found, caches = NETWORK.apply(
            variables,
            codes[:, i - 1],
            jnp.int32(i),
            caption.mask,
            caches,
            method="step",
        )
        np.testing.assert_allclose(found, expected[:, i], atol=1e-4)


def uncached(params, caption, null, keys, guidance, temperature):
    """The codes by the whole network for each of them, one example at a time."""
    drawn = []
    for b, key in enumerate(keys):
        conditions = jax.tree.map(lambda x, b=b: x[b : b + 1], (caption, null))
        u = jax.random.uniform(jax.random.fold_in(key, 5))
        dot_product = jnp.asarray([3 + int(3 * u)], jnp.int32)  # the upper 3 of 6
        codes = np.zeros((1, 5), np.int32)
        for i in range(5):
            each = [logits(params, codes, dot_product, c) for c in conditions]
            mixed = (1 - guidance) * each[1][0, i] + guidance * each[0][0, i]
            if temperature == 0:
                codes[0, i] = mixed.argmax()
            else:
                key_i = jax.random.fold_in(key, i)
                codes[0, i] = jax.random.categorical(key_i, mixed / temperature)
        drawn.append(codes[0])
    return np.stack(drawn)


@pytest.mark.parametrize(
    ("guidance", "temperature"), [(1.0, 1.0), (3.0, 0.7), (0.0, 1.0), (2, 0)]
)
def test_sampling_is_the_uncached_network_code_for_code(
    params, captions, guidance, temperature
):
    keys = jax.random.split(jax.random.key(3), B)
    codes = draw(params, *captions, keys, guidance=guidance, temperature=temperature)
    assert codes.dtype == jnp.int32
    expected = uncached(params, *captions, keys, guidance, temperature)
    np.testing.assert_array_equal(codes, expected)


def test_guidance_of_one_is_the_caption_alone_and_of_none_the_null(params, captions):
    keys = jax.random.split(jax.random.key(4), B)
    caption, null = captions
    alone = draw(params, caption, null, keys)
    np.testing.assert_array_equal(draw(params, caption, caption, keys), alone)
    # 1 as a number of another kind takes both passes.
    both = draw(params, caption, null, keys, guidance=1 + 1e-7)
    np.testing.assert_array_equal(both, alone)
    unguided = draw(params, null, caption, keys)
    np.testing.assert_array_equal(
        draw(params, caption, null, keys, guidance=0), unguided
    )


def test_an_embeddings_codes_hang_on_its_own_key_only(params, captions):
    keys = jax.random.split(jax.random.key(5), B)
    together = draw(params, *captions, keys, guidance=2.0)
    for b in range(B):
        alone = draw(
            params,
            *jax.tree.map(lambda x, b=b: x[b : b + 1], captions),
            keys[b : b + 1],
            guidance=2.0,
        )
        np.testing.assert_array_equal(alone[0], together[b])
    other = draw(params, *captions, keys[::-1], guidance=2.0)
    assert (other != together).any()


def test_codes_are_drawn_as_often_as_their_logits_say(params, captions):
    """The first code of many, over the upper half of the dot products."""
    n = 4000
    caption = jax.tree.map(lambda x: jnp.repeat(x[:1], n, 0), captions[0])
    keys = jax.random.split(jax.random.key(6), n)
    codes = draw(params, caption, caption, keys)
    one = jax.tree.map(lambda x: x[:3], caption)
    dots = jnp.asarray([3, 4, 5], jnp.int32)
    each = logits(params, jnp.zeros((3, 5), jnp.int32), dots, one)[:, 0]
    expected = jax.nn.softmax(each).mean(0)
    found = np.bincount(codes[:, 0], minlength=11) / n
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / n))


def test_bfloat16_and_remat(params, captions, given):
    exact = logits(params, *given, captions[0])
    rough = logits(params, *given, captions[0], dtype=jnp.bfloat16)
    scale = jnp.abs(exact).max()
    assert 0 < jnp.abs(rough - exact).max() < 0.1 * scale
    again = logits(params, *given, captions[0], remat=True)
    np.testing.assert_allclose(again, exact, atol=1e-4 * scale)
