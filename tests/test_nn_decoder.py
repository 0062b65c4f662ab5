"""The decoder against Karlo's in diffusers, and how it takes its conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.convert import karlo_names as convert
from dalle2_jax.convert import table
from dalle2_jax.nn.clip import Caption
from dalle2_jax.nn.decoder import Decoder
from dalle2_jax.nn.unet import UNet
from tests.golden import peer

KARLO = dict(
    unet=dict(
        channels=4,
        multipliers=(1, 2, 3),
        blocks=1,
        in_channels=3,
        out_channels=6,
        attention_levels=(1, 2),
        head_channels=4,
        groups=2,
    ),
    clip_dim=10,
    context_length=5,
    text_width=10,
    context_width=12,
)

# Reads captions with a text transformer of its own, as the paper's.
EOT = 9
PAPER = dict(
    unet=dict(
        channels=4,
        multipliers=(1,),
        blocks=1,
        in_channels=3,
        out_channels=3,
        attention_levels=(0,),
        head_channels=4,
        groups=2,
        dropout=0.5,
    ),
    clip_dim=10,
    context_length=6,
    text_width=7,
    context_width=8,
    text_encoder=dict(
        vocab_size=10, context_length=6, width=8, layers=1, heads=2, eot=EOT
    ),
)


# Karlo's.


@pytest.fixture(scope="module")
def karlo():
    """Params, arguments and the peer's outputs; the first picture has no z_image."""
    weights, inputs, outputs = peer.unpack(peer.load("decoder"))
    names = convert.decoder_table(UNet(**KARLO["unet"]))
    params = peer.params(names, Decoder(**KARLO), weights)
    mask = inputs["text_mask"]
    caption = Caption(
        jnp.zeros(mask.shape, jnp.int32),
        inputs["prompt_embeds"],
        inputs["text_encoder_hidden_states"],
        mask,
    )
    arguments = (
        inputs["sample"].transpose(0, 2, 3, 1),
        inputs["timestep"],
        jnp.repeat(inputs["image_embeddings"], 2, axis=0),
        jnp.array([False, True]),
        caption,
    )
    return params, arguments, outputs


@jax.jit
def karlo_context(params, z_image, has_image, caption):
    arguments = z_image, has_image, caption
    return Decoder(**KARLO).apply({"params": params}, *arguments, method="context")


def test_the_context_is_as_diffusers_was(karlo):
    params, (_, _, *conditions), outputs = karlo
    peer.assert_fits(Decoder(**KARLO), params)
    context = karlo_context(params, *conditions)
    peer.assert_close(context.tokens, outputs["context"], 1e-5)
    peer.assert_close(context.vector, outputs["vector"], 1e-5)
    assert context.mask.sum(-1).tolist() == [4 + 2, 4 + 4]
    assert context.mask[:, :4].all()


def test_the_decoder_answers_as_diffusers_did(karlo):
    params, arguments, outputs = karlo
    answer = jax.jit(Decoder(**KARLO).apply)({"params": params}, *arguments)
    peer.assert_close(answer, outputs["sample"].transpose(0, 2, 3, 1), 1e-5)


def test_without_an_image_the_embedding_is_not_read(karlo):
    params, (_, _, z_image, has_image, caption), _ = karlo
    context = karlo_context(params, z_image, has_image, caption)
    other = karlo_context(params, z_image + 1, has_image, caption)
    for a, b in [(context.vector, other.vector), (context.tokens, other.tokens)]:
        np.testing.assert_array_equal(a[0], b[0])
        assert (a[1] != b[1]).any()


def test_the_null_embedding_is_learned(karlo):
    params, (_, _, z_image, _, caption), _ = karlo
    null = jnp.broadcast_to(params["null_z_image"], z_image.shape)
    absent = karlo_context(params, z_image, jnp.zeros(2, bool), caption)
    present = karlo_context(params, null, jnp.ones(2, bool), caption)
    np.testing.assert_array_equal(absent.vector, present.vector)
    np.testing.assert_array_equal(absent.tokens, present.tokens)


def test_karlos_decoder_has_its_parameter_count():
    karlo = Decoder(
        unet=dict(
            channels=320,
            multipliers=(1, 2, 3, 4),
            blocks=3,
            in_channels=3,
            out_channels=6,
            attention_levels=(1, 2, 3),
        ),
        clip_dim=768,
        context_length=77,
        text_width=768,
        context_width=1536,
    )
    params = table.abstract(karlo)
    assert peer.size(params.pop("net")) == 885_439_686
    assert peer.size(params) == 7_878_400


# The paper's.


@pytest.fixture(scope="module")
def paper():
    """Params, and arguments that differ in the second caption's last word only."""
    model = Decoder(**PAPER)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape) / 3, s.dtype),
        table.abstract(model),
    )

    def normal(*shape):
        return jnp.asarray(np.repeat(rng.normal(size=(1, *shape)), 2, axis=0))

    tokens = jnp.array([[1, 2, 3, EOT, EOT, EOT], [1, 2, 4, EOT, EOT, EOT]])
    mask = jnp.arange(6) < jnp.array([[4], [4]])
    caption = Caption(tokens, normal(10), normal(6, 7), mask)
    return params, (
        normal(4, 4, 3),
        jnp.ones(2),
        normal(10),
        jnp.ones(2, bool),
        caption,
    )


@jax.jit
def paper_answer(params, *arguments):
    """The answer and the context that it was given."""
    variables = {"params": params}
    context = Decoder(**PAPER).apply(variables, *arguments[2:], method="context")
    return Decoder(**PAPER).apply(variables, *arguments), context


def test_the_text_encoder_reads_both_ways(paper):
    params, arguments = paper
    _, context = paper_answer(params, *arguments)
    image_tokens, text_tokens = jnp.split(context.tokens, [4], axis=1)
    np.testing.assert_array_equal(image_tokens[0], image_tokens[1])
    # No causal mask: the last word changes every state, and what is pooled of them.
    assert (jnp.abs(text_tokens[0] - text_tokens[1]).max(-1) > 1e-4).all()
    assert jnp.abs(context.vector[0] - context.vector[1]).max() > 1e-4
    assert context.mask.all()


def test_the_text_encoder_does_not_see_what_follows_the_caption(paper):
    params, (*others, caption) = paper
    answer, _ = paper_answer(params, *others, caption)
    garbled = caption._replace(tokens=caption.tokens.at[:, 4:].set(5))
    np.testing.assert_array_equal(paper_answer(params, *others, garbled)[0], answer)


def test_with_a_text_encoder_clips_states_are_not_read(paper):
    params, (*others, caption) = paper
    answer, _ = paper_answer(params, *others, caption)
    deaf = caption._replace(z_text=0 * caption.z_text, states=0 * caption.states)
    np.testing.assert_array_equal(paper_answer(params, *others, deaf)[0], answer)


def test_image_and_caption_matter(paper):
    params, (x_t, t, z_image, has_image, caption) = paper
    answer, _ = paper_answer(params, x_t, t, z_image, has_image, caption)
    assert answer.shape == (2, 4, 4, 3)
    assert answer.dtype == jnp.float32
    assert jnp.abs(answer[0] - answer[1]).max() > 1e-4  # the captions differ
    for other in [(z_image + 1, has_image), (z_image, ~has_image)]:
        changed, _ = paper_answer(params, x_t, t, *other, caption)
        assert (jnp.abs(changed - answer).max((1, 2, 3)) > 1e-4).all()


def test_dropout_is_for_training(paper):
    params, arguments = paper

    @jax.jit
    def train(key):
        variables, rngs = {"params": params}, {"dropout": key}
        return Decoder(**PAPER).apply(variables, *arguments, train=True, rngs=rngs)

    one, other = train(jax.random.key(0)), train(jax.random.key(1))
    assert (one != other).any()
    np.testing.assert_array_equal(train(jax.random.key(0)), one)
    assert (one != paper_answer(params, *arguments)[0]).any()


def test_bfloat16_is_for_activations_only(paper):
    params, arguments = paper
    model = Decoder(**PAPER, dtype=jnp.bfloat16)
    peer.assert_fits(model, params)
    exact, _ = paper_answer(params, *arguments)
    rough = jax.jit(model.apply)({"params": params}, *arguments)
    peer.assert_close(rough, exact, 0.1)
    assert (rough != exact).any()
