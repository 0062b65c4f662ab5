"""The decoder: from a CLIP image embedding and a caption to a small picture."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from dalle2_jax import rules
from dalle2_jax.data import image
from dalle2_jax.diffusion import generate, sample, schedule
from dalle2_jax.errors import UserError
from dalle2_jax.nn import build
from dalle2_jax.nn.clip import Caption
from dalle2_jax.nn.decoder import Context, Decoder, with_known
from dalle2_jax.nn.unet import UNet
from dalle2_jax.parts import part
from dalle2_jax.parts.component import (
    DECODER,
    Component,
    Inputs,
    Known,
    Randomness,
    count_steps,
    make_component,
    make_sampling,
    noise_of,
)
from dalle2_jax.parts.finetune import start_params
from dalle2_jax.parts.part import Part, Sampler
from dalle2_jax.parts.stage import (
    DIFFUSION,
    TRANSFORMER,
    UNET,
    Batch,
    Load,
    Stage,
    add_part,
    check_side,
    check_unet,
    check_width,
    denoising_loss,
    drop_caption,
    dtype_of,
    encode_caption,
    load_base,
    make_batches,
    see,
    upon_clip,
)
from dalle2_jax.runtime import jit


def arguments(config: ConfigDict, clip: Mapping[str, Any] | None) -> dict[str, Any]:
    """Decoder's arguments: ``config.net`` with the numbers of CLIP's net."""
    net = upon_clip(config.net.to_dict(), clip)
    if net["text_encoder"] is not None:
        words = {k: clip[k] for k in ("vocab_size", "context_length", "eot")}
        net["text_encoder"] = {**net["text_encoder"], **words}
    return net


def context(
    network: Decoder,
    params: Any,
    z_image: Float[Array, "b d"],
    has_image: Bool[Array, " b"],
    caption: Caption,
) -> Context:
    """What conditions the network: an image embedding, where there is one, and text."""
    return network.apply(
        {"params": params}, z_image, has_image, caption, method="context"
    )


def conditioned(
    network: Decoder, params: Any, known: Known | None = None, **options: Any
) -> generate.Apply:
    """The network as (x_t, timesteps, Context) -> output.

    ``known`` is shown to a network that was trained to inpaint; `options` are as of
    its `apply`.
    """

    def apply(x_t: Array, t: Array, context: Context) -> Array:
        if network.inpaints:
            x_t = with_known(x_t, known)
        return network.apply(
            {"params": params}, x_t, t, context, method="denoise", **options
        )

    return apply


# Sampling


class Prepared(NamedTuple):
    """What a loop of the decoder needs in each step."""

    cond: Context
    null: Context
    randomness: Randomness | None
    known: Known | None


@jit
def begin(
    decoder: Component, sampling: generate.Sampling, inputs: Inputs
) -> tuple[Prepared, sample.State]:
    """Makes both contexts, and x_T unless it is given; see part.Sampler."""
    z_image, caption = inputs.z_image, inputs.caption
    shown = jnp.full(len(caption.z_text), z_image is not None)
    if z_image is None:
        z_image = jnp.zeros_like(caption.z_text)
    net, params = decoder.network, decoder.params
    cond = context(net, params, z_image, shown, caption)
    null = context(net, params, z_image, jnp.zeros_like(shown), inputs.null)
    start = inputs.start
    if start is None:
        start = _noise(decoder, inputs.randomness)(0)
    prepared = Prepared(cond, null, inputs.randomness, inputs.known)
    return prepared, sampling.begin(start)


@jit
def advance(
    decoder: Component,
    sampling: generate.Sampling,
    prepared: Prepared,
    state: sample.State,
    start: Any,
    stop: Any,
) -> sample.State:
    """Takes steps; see part.Sampler."""
    return generate.generate(
        conditioned(decoder.network, decoder.params, prepared.known),
        prepared.cond,
        prepared.null,
        _noise(decoder, prepared.randomness),
        decoder.diffusion,
        sampling,
        state,
        start,
        stop,
        known=prepared.known,
    )


@jit
def advance_inversion(
    decoder: Component,
    sampling: generate.Sampling,
    prepared: Prepared,
    state: sample.State,
    start: Any,
    stop: Any,
) -> sample.State:
    """Takes steps from pictures, given to `begin` as start, to their x_T."""
    return generate.invert(
        conditioned(decoder.network, decoder.params),
        prepared.cond,
        prepared.null,
        decoder.diffusion,
        sampling,
        state,
        start,
        stop,
    )


def finish(
    decoder: Component,
    sampling: generate.Sampling,
    prepared: Prepared,
    state: sample.State,
) -> Float[Array, "b h w 3"]:
    """The pictures, in [-1, 1]; see part.Sampler."""
    return state.x


def _noise(decoder: Component, randomness: Randomness) -> sample.Draw:
    return noise_of(randomness, DECODER, (decoder.size, decoder.size, 3))


# Training


def random_masks(key: Array, count: int, size: int) -> Float[Array, "n s s 1"]:
    """What a decoder that learns to inpaint is to paint: 1 in a random rectangle.

    In a quarter of the masks it is all, so that the decoder still paints from nothing.
    """
    key_all, key_corners = jax.random.split(key)
    corners = jax.random.uniform(key_corners, (count, 2, 2), maxval=size)
    low, high = jnp.floor(corners.min(1)), jnp.ceil(corners.max(1))
    places = jnp.arange(size)
    inside = (places >= low[..., None]) & (places < high[..., None])  # [n, 2, s]
    masks = inside[:, 0, :, None] & inside[:, 1, None, :]
    whole = jax.random.bernoulli(key_all, 0.25, (count, 1, 1))
    return (masks | whole).astype(jnp.float32)[..., None]


def make_stage(config: ConfigDict, load: Load) -> Stage:
    """The stage that ``configs/decoder.py`` describes."""
    base = load_base(config, load)
    clip = base.clip
    net = arguments(config, base.model.config["parts"]["clip"]["net"])
    model = build.build(Decoder, net, None, "config.net", dtype_of(config))
    diffusion = config.diffusion.to_dict()
    table = schedule.make(diffusion["schedule"], diffusion["steps"])
    size = config.size
    sizes = {"image": size, "clip_image": clip.image_size}
    section = {
        "net": net,
        "diffusion": diffusion,
        "sampling": config.sampling.to_dict(),
        "size": size,
    }

    def init(key: Array) -> Any:
        return model.init(key, *model.example())["params"]

    def losses(
        params: Any,
        frozen: Any,
        batch: Batch,
        tokens: Array,
        has_image: Array,
        key: Array,
        train: bool,
    ) -> Array:
        caption = encode_caption(clip, frozen["clip"], tokens)
        z_image = see(clip, frozen["clip"], batch)
        key, key_dropout = jax.random.split(key)
        key_masks = jax.random.fold_in(key_dropout, 1)
        x0 = image.to_float(batch["image"])

        known = None
        if model.inpaints:
            known = x0, random_masks(key_masks, len(x0), size)
        rngs = {"dropout": key_dropout}
        apply = conditioned(model, params, known, train=train, rngs=rngs)
        cond = context(model, params, z_image, has_image, caption)
        return denoising_loss(
            lambda x_t, t: apply(x_t, t, cond), table, x0, key, diffusion
        )

    def loss(params: Any, frozen: Any, batch: Batch, key: Array):
        key, key_caption, key_image = jax.random.split(key, 3)
        tokens = batch["tokens"]
        b = tokens.shape[:1]
        # Section 2.1: each condition is dropped on its own, for guidance.
        drop = jax.random.bernoulli(key_caption, config.drop_caption, b)
        has_image = ~jax.random.bernoulli(key_image, config.drop_image, b)
        tokens = drop_caption(tokens, base.empty, drop)
        return losses(params, frozen, batch, tokens, has_image, key, True).mean(), {}

    def metrics(params: Any, frozen: Any, batch: Batch, key: Array):
        tokens = batch["tokens"]
        has_image = jnp.ones(tokens.shape[:1], bool)
        return {"loss": losses(params, frozen, batch, tokens, has_image, key, False)}

    def preview(params: Any, frozen: Any, batch: Batch, key: Array):
        shown = jax.tree.map(lambda x: x[:16], dict(batch))
        tokens = shown["tokens"]
        nothing = jnp.broadcast_to(base.empty, tokens.shape)
        x = part.sample(
            SAMPLER,
            make_component(model, section, params),
            [section["sampling"]] * len(tokens),
            Inputs(
                caption=encode_caption(clip, frozen["clip"], tokens),
                null=encode_caption(clip, frozen["clip"], nothing),
                z_image=see(clip, frozen["clip"], shown),
                randomness=jax.random.split(key, len(tokens)),
            ),
        )
        return {"true": shown["image"], "sampled": image.to_uint8(x)}

    def export(params: Any) -> dict[str, Any]:
        return add_part(base.model, "decoder", section, params, base.text)

    return Stage(
        name="decoder",
        frozen={"clip": base.clip_params},
        init=init,
        loss=loss,
        metrics=metrics,
        preview=preview,
        batches=make_batches(
            config, sizes, base.text, clip.context_length, clip_params=base.clip_params
        ),
        export=export,
        start=start_params(config, base.origin, "decoder", Decoder, net, init),
    )


def check(config: ConfigDict) -> None:
    """Checks what the decoder's config must agree on."""
    if config.net.text_encoder is not None:
        text = config.net.text_encoder.to_dict()
        rules.check(text, TRANSFORMER, "config.net.text_encoder")
        check_width(text, "config.net.text_encoder")
    if config.data.crop_fraction != 1:
        raise UserError(
            f"config.data.crop_fraction is {config.data.crop_fraction}: the decoder "
            "makes whole pictures, it must be 1"
        )
    network = UNet(**config.net.unet)
    check_unet(network, "config.net.unet")
    check_side(config.size, network, "config.size")


RULES = {
    "net": {"unet": UNET, "context_width": rules.COUNT, "image_tokens": rules.COUNT},
    "diffusion": DIFFUSION,
    "drop_image": rules.CHANCE,
    "drop_caption": rules.CHANCE,
}
SAMPLER = Sampler(
    {},
    ("steps", "guidance", "guidance_interval", "sampler"),
    make_sampling,
    count_steps,
    begin,
    advance,
    finish,
)
PART = Part(
    "decoder",
    Decoder,
    arguments,
    make_stage,
    most_left=0.5,
    rules=RULES,
    check=check,
    makes="picture",
    sides=("size",),
    sampler=SAMPLER,
)
