"""CLIP's towers against transformers', and what the text tower looks at."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.convert.openai_clip import clip_table
from dalle2_jax.nn import abstract
from dalle2_jax.nn.clip import CLIP, cosine
from tests.golden import peer

EOT = 39
TINY = dict(
    embed_dim=12,
    image_size=12,
    patch_size=4,
    vision_width=24,
    vision_layers=2,
    vision_heads=2,
    vocab_size=40,
    context_length=10,
    text_width=16,
    text_layers=2,
    text_heads=2,
    eot=EOT,
)


@partial(jax.jit, static_argnames=("activation", "remat", "dtype"))
def both(params, image, tokens, activation="gelu", remat=False, dtype=jnp.float32):
    """Every output of a tiny CLIP."""
    model = CLIP(**TINY, activation=activation, remat=remat, dtype=dtype)
    variables = {"params": params}
    caption = model.apply(variables, tokens, method="encode_caption")
    return *model.apply(variables, image, tokens), caption


def assert_answers_as(arrays, activation):
    weights, inputs, outputs = peer.unpack(arrays)
    params = peer.params(clip_table(CLIP(**TINY)), CLIP(**TINY), weights)
    peer.assert_fits(CLIP(**TINY), params)
    z_image, z_text, temperature, caption = both(
        params,
        inputs["image"].transpose(0, 2, 3, 1),
        inputs["tokens"],
        activation=activation,
    )
    peer.assert_close(z_image, outputs["image_embeds"], 1e-5)
    peer.assert_close(z_text, outputs["text_embeds"], 1e-5)
    peer.assert_close(caption.z_text, outputs["text_embeds"], 1e-5)
    peer.assert_close(caption.states, outputs["last_hidden_state"], 1e-5)
    peer.assert_close(temperature, jnp.exp(weights["logit_scale"]), 1e-5)


def test_answers_as_transformers_did():
    assert_answers_as(peer.load("clip"), "quick_gelu")


def test_the_activation_matters():
    with pytest.raises(AssertionError, match="relative error"):
        assert_answers_as(peer.load("clip"), "gelu")


@pytest.mark.parity
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_answers_as_transformers(activation):
    from tests.golden import make

    assert_answers_as(make.clip(activation), activation)


@pytest.fixture(scope="module")
def params():
    weights, *_ = peer.unpack(peer.load("clip"))
    return peer.params(clip_table(CLIP(**TINY)), CLIP(**TINY), weights)


IMAGE = jnp.linspace(-2, 2, 12 * 12 * 3).reshape(1, 12, 12, 3)


def padded(*tokens):
    """The ids, ended and padded as the tokenizer does."""
    padding = [EOT] * (TINY["context_length"] - len(tokens))
    return jnp.asarray([[*tokens, *padding]])


def test_later_tokens_do_not_change_earlier_states(params):
    *_, one = both(params, IMAGE, padded(1, 2, 3, 4))
    *_, other = both(params, IMAGE, padded(1, 2, 7, 8, 9))
    one, other = one.states[0], other.states[0]
    np.testing.assert_array_equal(one[:2], other[:2])
    assert (jnp.abs(one[2:] - other[2:]).max(-1) > 1e-3).all()


def test_the_text_embedding_is_read_at_the_first_end_of_text(params):
    tokens = padded(1, 2, 3)
    *_, caption = both(params, IMAGE, tokens)
    assert caption.mask.tolist() == [[True] * 4 + [False] * 6]
    projection = params["text"]["projection"]["kernel"]
    pooled = caption.states[:, 3] @ projection
    np.testing.assert_allclose(caption.z_text, pooled, atol=1e-5)
    # What stands after the end of the text is never looked at.
    *_, other = both(params, IMAGE, tokens.at[:, 4:].set(5))
    np.testing.assert_array_equal(other.z_text, caption.z_text)


def test_the_temperature_is_clipped_at_100(params):
    hot = params | {"logit_scale": jnp.float32(10)}
    _, _, temperature, _ = both(hot, IMAGE, padded(1))
    np.testing.assert_allclose(temperature, 100, rtol=1e-6)


def test_the_temperature_starts_at_1_over_007():
    model = CLIP(**TINY)

    @jax.jit
    def start(key):
        return jnp.exp(model.init(key, *model.example())["params"]["logit_scale"])

    np.testing.assert_allclose(start(jax.random.key(0)), 1 / 0.07, rtol=1e-6)


def test_bfloat16_is_for_activations_only(params):
    peer.assert_fits(CLIP(**TINY, dtype=jnp.bfloat16), params)
    exact = both(params, IMAGE, padded(1, 2, 3))
    rough = both(params, IMAGE, padded(1, 2, 3), dtype=jnp.bfloat16)
    assert rough[-1].states.dtype == jnp.bfloat16
    for a, b in zip(rough[:2], exact[:2], strict=True):
        peer.assert_close(a, b, 0.03)
        assert (a != b).any()


def test_remat_is_in_both_towers(params):
    def blocks(remat):
        arguments = params, IMAGE, padded(1)
        jaxpr = jax.make_jaxpr(partial(both, remat=remat))(*arguments)
        return str(jaxpr).count("policy=")

    assert blocks(remat=False) == 0
    # encode_caption reads the text a second time.
    assert blocks(remat=True) == TINY["vision_layers"] + 2 * TINY["text_layers"]


@pytest.mark.parity
def test_the_stem_is_torchs_convolutions():
    torch = pytest.importorskip("torch")
    options = TINY | dict(image_size=32, patch_size=8, vision_stem=(4, 6))
    model = CLIP(**options)
    image, tokens = model.example()
    image = jax.random.normal(jax.random.key(0), image.shape)
    params = model.init(jax.random.key(1), image, tokens)["params"]
    _, state = model.apply(
        {"params": params},
        image,
        method="encode_image",
        capture_intermediates=lambda module, _: module.name == "patch_embedding",
    )
    (embedded,) = state["intermediates"]["vision"]["patch_embedding"]["__call__"]

    def weights(name, bias=True):
        layer = params["vision"][name]
        kernel = np.array(layer["kernel"]).transpose(3, 2, 0, 1)
        yield torch.from_numpy(kernel)
        yield torch.from_numpy(np.array(layer["bias"])) if bias else None

    functional = torch.nn.functional
    x = torch.from_numpy(np.array(image).transpose(0, 3, 1, 2))
    for i in range(2):
        # "SAME" pads an even side at its end.
        x = functional.pad(x, (0, 1, 0, 1))
        x = functional.conv2d(x, *weights(f"stem_{i}"), stride=2)
        x = functional.gelu(functional.group_norm(x, 1))
    x = functional.conv2d(x, *weights("patch_embedding", bias=False), stride=2)
    expected = x.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(embedded, expected, rtol=1e-5, atol=1e-5)


def test_cosine():
    a, b = jnp.asarray([[1.0, 0.0], [2.0, 2.0]]), jnp.asarray([[0.0, 3.0], [1.0, 1.0]])
    np.testing.assert_allclose(cosine(a, b), [0.0, 1.0], atol=1e-6)


def test_each_tower_has_its_own_activation_and_epsilon(params):
    """What is given for one changes nothing of the other."""

    def embeddings(**values):
        apply = jax.jit(CLIP(**TINY, **values).apply)
        return apply({"params": params}, IMAGE, padded(1, 2, 3))[:2]

    before = embeddings()
    for values, same in (
        ({"vision_activation": "relu", "text_eps": 0.0}, [False, False]),
        ({"activation": "gelu_new", "vision_activation": "gelu"}, [True, False]),
        ({"vision_eps": 0.1}, [False, True]),
    ):
        after = embeddings(**values)
        assert [
            bool((a == b).all()) for a, b in zip(after, before, strict=True)
        ] == same


def test_one_tower_alone(params):
    text = {
        k: v for k, v in TINY.items() if not k.startswith(("image", "patch", "vis"))
    }
    vision = {k: v for k, v in TINY.items() if k not in text or k == "embed_dim"}
    whole = both(params, IMAGE, padded(1, 2))
    for at, arguments, given, kept in (
        (0, vision, (IMAGE, None), "vision"),
        (1, text, (None, padded(1, 2)), "text"),
    ):
        network = CLIP(**arguments)
        assert abstract(network).keys() == {kept}
        found = jax.jit(network.apply)({"params": {kept: params[kept]}}, *given)
        np.testing.assert_allclose(found[at], whole[at], rtol=1e-5, atol=1e-6)
        assert found[1 - at] is None and found[2] is None
