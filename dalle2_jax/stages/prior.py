"""The prior stage: from a caption to the CLIP embedding of a picture of it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dalle2_jax import checkpoint
from dalle2_jax.data import image
from dalle2_jax.diffusion import generate, sample, schedule
from dalle2_jax.errors import UserError
from dalle2_jax.nn.clip import cosine
from dalle2_jax.nn.prior import DiffusionPrior
from dalle2_jax.stages.finetune import start_params
from dalle2_jax.stages.stage import (
    Batch,
    Stage,
    add_part,
    denoising_loss,
    drop_caption,
    dtype_of,
    encode_caption,
    encode_image,
    load_base,
    make_batches,
)


def network(config: ConfigDict, clip: Mapping[str, Any]) -> dict[str, Any]:
    """DiffusionPrior's arguments: ``config.net`` with the numbers of CLIP's net."""
    return {
        **config.net,
        "clip_dim": clip["embed_dim"],
        "context_length": clip["context_length"],
        "text_width": clip["text_width"],
    }


def make(config: ConfigDict) -> Stage:
    """The stage that ``configs/prior.py`` describes."""
    base = load_base(config)
    clip = base.clip
    net = network(config, base.model.config["parts"]["clip"]["net"])
    model = DiffusionPrior(**net, dtype=dtype_of(config))
    diffusion = config.diffusion.to_dict()
    table = schedule.make(diffusion["schedule"], diffusion["steps"])
    batches = make_batches(
        config, {"clip_image": clip.image_size}, base.text, clip.context_length
    )
    if base.origin is not None:
        mean, std = stored_statistics(base.origin, config.init_from)
    else:
        mean, std = embedding_statistics(
            clip,
            base.clip_params,
            batches("train", 0, whole=True),
            config.statistics_examples,
        )
    frozen = {"clip": base.clip_params, "mean": mean, "std": std}

    def denoise(params: Any, caption: Any, x_t: Array, t: Array) -> Array:
        conditions = caption.z_text, caption.states, caption.mask
        return model.apply({"params": params}, x_t, t, *conditions)

    def init(key: Array) -> Any:
        return model.init(key, *model.example())["params"]

    def clean(frozen: Any, batch: Batch) -> Float[Array, "b d"]:
        pictures = image.to_float(batch["clip_image"])
        z_image = encode_image(clip, frozen["clip"], pictures)
        return (z_image - frozen["mean"]) / frozen["std"]

    def losses(params: Any, frozen: Any, batch: Batch, tokens: Array, key: Array):
        caption = encode_caption(clip, frozen["clip"], tokens)
        return denoising_loss(
            lambda x_t, t: denoise(params, caption, x_t, t),
            table,
            clean(frozen, batch),
            key,
            diffusion,
        )

    def loss(params: Any, frozen: Any, batch: Batch, key: Array):
        key, key_drop = jax.random.split(key)
        tokens = batch["tokens"]
        drop = jax.random.bernoulli(key_drop, config.drop_caption, tokens.shape[:1])
        tokens = drop_caption(tokens, base.empty, drop)
        return losses(params, frozen, batch, tokens, key).mean(), {}

    def metrics(params: Any, frozen: Any, batch: Batch, key: Array):
        return {"loss": losses(params, frozen, batch, batch["tokens"], key)}

    def preview(params: Any, frozen: Any, batch: Batch, key: Array):
        tokens = batch["tokens"]
        nothing = jnp.broadcast_to(base.empty, tokens.shape)
        shape = tokens.shape[0], clip.embed_dim
        z = generate.generate(
            lambda x_t, t, caption: denoise(params, caption, x_t, t),
            encode_caption(clip, frozen["clip"], tokens),
            encode_caption(clip, frozen["clip"], nothing),
            sample.gaussian(jax.random.split(key, shape[0]), shape[1:]),
            diffusion,
            config.sampling.to_dict(),
        )
        return {"cosine_to_true": cosine(z, clean(frozen, batch)).mean()}

    def export(params: Any) -> dict[str, Any]:
        part = {
            "net": net,
            "diffusion": diffusion,
            "sampling": config.sampling.to_dict(),
        }
        statistics = {"z_image_mean": np.asarray(mean), "z_image_std": np.asarray(std)}
        return add_part(base.model, "prior", part, params, base.text, statistics)

    return Stage(
        name="prior",
        frozen=frozen,
        init=init,
        loss=loss,
        metrics=metrics,
        preview=preview,
        batches=batches,
        export=export,
        start=start_params(config, base.origin, "prior", net, init),
    )


def stored_statistics(
    model: checkpoint.Export, where: str
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Mean and standard deviation of z_image that a model's prior works with."""
    names = "z_image_mean", "z_image_std"
    missing = [name for name in names if name not in model.statistics]
    if missing:
        raise UserError(
            f"init_from={where} has no {' and no '.join(missing)}, without which its "
            "prior can't be read: convert or export the model again"
        )
    return tuple(jnp.float32(model.statistics[name]) for name in names)


def embedding_statistics(
    clip: Any, params: Any, batches: Any, examples: int
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Mean and standard deviation of z_image, per dimension, over the first examples.

    The diffusion works on (z_image - mean) / std, as Karlo's does; the paper scales
    by the constant 17.2 to the same end.
    """
    encode = jax.jit(lambda p, x: encode_image(clip, p, image.to_float(x)))
    seen: list[np.ndarray] = []
    while sum(map(len, seen)) < examples:
        seen.append(np.asarray(encode(params, next(batches)["clip_image"]), np.float64))
    z = np.concatenate(seen)
    return jnp.float32(z.mean(0)), jnp.float32(z.std(0))
