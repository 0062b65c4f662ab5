"""The decoder stage: from a CLIP image embedding and a caption to a small picture."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dalle2_jax import checkpoint
from dalle2_jax.data import image
from dalle2_jax.diffusion import generate, sample, schedule
from dalle2_jax.nn.decoder import Decoder, with_known
from dalle2_jax.stages.finetune import start_params
from dalle2_jax.stages.stage import (
    Batch,
    Load,
    Stage,
    add_part,
    denoising_loss,
    drop_caption,
    dtype_of,
    encode_caption,
    load_base,
    make_batches,
    see,
    upon_clip,
)


def network(config: ConfigDict, clip: Mapping[str, Any]) -> dict[str, Any]:
    """Decoder's arguments: ``config.net`` with the numbers of CLIP's net."""
    net = upon_clip(config.net.to_dict(), clip)
    if net["text_encoder"] is not None:
        words = {k: clip[k] for k in ("vocab_size", "context_length", "eot")}
        net["text_encoder"] = {**net["text_encoder"], **words}
    return net


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


def make(config: ConfigDict, load: Load = checkpoint.load) -> Stage:
    """The stage that ``configs/decoder.py`` describes."""
    base = load_base(config, load)
    clip = base.clip
    net = network(config, base.model.config["parts"]["clip"]["net"])
    model = Decoder(**net, dtype=dtype_of(config))
    diffusion = config.diffusion.to_dict()
    table = schedule.make(diffusion["schedule"], diffusion["steps"])
    size = config.size
    sizes = {"image": size, "clip_image": clip.image_size}

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

        def denoise(x_t: Array, t: Array) -> Array:
            if model.inpaints:
                x_t = with_known(x_t, (x0, random_masks(key_masks, len(x0), size)))
            return model.apply(
                {"params": params},
                x_t,
                t,
                z_image,
                has_image,
                caption,
                train,
                rngs={"dropout": key_dropout},
            )

        return denoising_loss(denoise, table, x0, key, diffusion)

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
        tokens, z_image = shown["tokens"], see(clip, frozen["clip"], shown)
        b = len(tokens)

        def context(has_image: bool, tokens: Array) -> Any:
            caption = encode_caption(clip, frozen["clip"], tokens)
            has = jnp.full(b, has_image)
            variables = {"params": params}
            return model.apply(variables, z_image, has, caption, method="context")

        def denoise(x_t: Array, t: Array, context: Any) -> Array:
            if model.inpaints:
                x_t = with_known(x_t, None)
            return model.apply({"params": params}, x_t, t, context, method="denoise")

        x = generate.generate(
            denoise,
            context(True, tokens),
            context(False, jnp.broadcast_to(base.empty, tokens.shape)),
            sample.gaussian(jax.random.split(key, b), (size, size, 3)),
            diffusion,
            config.sampling.to_dict(),
        )
        return {"true": shown["image"], "sampled": image.to_uint8(x)}

    def export(params: Any) -> dict[str, Any]:
        part = {
            "net": net,
            "diffusion": diffusion,
            "sampling": config.sampling.to_dict(),
            "size": size,
        }
        return add_part(base.model, "decoder", part, params, base.text)

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
        start=start_params(config, base.origin, "decoder", net, init),
    )
