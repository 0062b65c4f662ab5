"""The prior stage: from a caption to the CLIP embedding of a picture of it."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dalle2_jax import checkpoint
from dalle2_jax.diffusion import generate, guide, process, sample, schedule
from dalle2_jax.errors import UserError
from dalle2_jax.nn.clip import cosine
from dalle2_jax.nn.prior import DiffusionPrior
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
    float32,
    load_base,
    make_batches,
    see,
    upon_clip,
)

log = logging.getLogger(__name__)


def network(config: ConfigDict, clip: Mapping[str, Any]) -> dict[str, Any]:
    """DiffusionPrior's arguments: ``config.net`` with the numbers of CLIP's net."""
    return upon_clip(config.net.to_dict(), clip)


def make(config: ConfigDict, load: Load = checkpoint.load) -> Stage:
    """The stage that ``configs/prior.py`` describes."""
    base = load_base(config, load)
    clip = base.clip
    net = network(config, base.model.config["parts"]["clip"]["net"])
    model = DiffusionPrior(**net, dtype=dtype_of(config))
    diffusion = config.diffusion.to_dict()
    table = schedule.make(diffusion["schedule"], diffusion["steps"])
    batches = make_batches(
        config,
        {"clip_image": clip.image_size},
        base.text,
        clip.context_length,
        clip_params=base.clip_params,
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
        z_image = see(clip, frozen["clip"], batch)
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
    if not np.all(model.statistics["z_image_std"] > 0):
        raise UserError(
            f"init_from={where}: z_image_std of its statistics must be above 0 in "
            "every dimension: train its prior again, on different pictures"
        )
    return tuple(jnp.float32(model.statistics[name]) for name in names)


def embedding_statistics(
    clip: Any, params: Any, batches: Any, examples: int
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Mean and standard deviation of z_image, per dimension, over the first examples.

    The diffusion works on (z_image - mean) / std, as Karlo's does; the paper scales
    by the constant 17.2 to the same end.
    """
    encode = jax.jit(lambda p, batch: see(clip, p, batch))
    seen: list[np.ndarray] = []
    while sum(map(len, seen)) < examples:
        seen.append(np.asarray(encode(params, next(batches)), np.float64))
    return mean_and_deviation(np.concatenate(seen))


def mean_and_deviation(
    z: Float[np.ndarray, "n d"],
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Mean and standard deviation of embeddings, per dimension.

    A dimension in which next to nothing varies gets a thousandth of the deviation of
    the others, with a warning, as the prior divides by it.

    Raises:
      UserError: all embeddings are the same, or some are not finite.
    """
    if not np.isfinite(z).all():
        raise UserError(
            f"CLIP's embeddings of the first {len(z)} pictures are not finite: give a "
            "base model that was trained, or dtype=float32"
        )
    mean, std = z.mean(0), z.std(0)
    typical = np.sqrt(np.mean(std**2))
    if typical <= 1e-6 * np.sqrt(np.mean(z**2)):  # what float32 rounds
        raise UserError(
            f"CLIP's embeddings of the first {len(z)} pictures are all the same: the "
            "prior needs different pictures, and a base model that tells them apart"
        )
    least = 1e-3 * typical
    if (std < least).any():
        log.warning(
            "%d of %d dimensions of CLIP's embeddings are the same for the first %d "
            "pictures: the prior takes %.3g for their deviation",
            np.sum(std < least),
            len(std),
            len(z),
            least,
        )
    return jnp.float32(mean), jnp.float32(np.maximum(std, least))


def measure_x0_error(
    config: ConfigDict, examples: int
) -> tuple[checkpoint.Export, Float[np.ndarray, " t"]]:
    """E‖x0 - x̂0‖² / d of a model's prior at each timestep, on the training set.

    For process.analytic_log_variance. The prior has the captions, and no guidance.

    Args:
      config: of the prior's stage; ``init_from`` is the model.
      examples: how many pictures; whole batches are read.

    Returns:
      The model, and the errors, float32.

    Raises:
      UserError: the model has no prior, or none of its statistics.
    """
    base = load_base(config)
    clip, model = base.clip, base.model
    if "prior" not in model.params:
        raise UserError(
            f"the model {config.init_from} has no prior, only "
            f"{', '.join(sorted(model.params))}: train configs/prior.py"
        )
    part = model.config["parts"]["prior"]
    network = DiffusionPrior(**part["net"], dtype=dtype_of(config))
    mean, std = stored_statistics(base.origin, config.init_from)
    diffusion, limit = part["diffusion"], part["sampling"]["clip"]
    table = schedule.make(diffusion["schedule"], diffusion["steps"])
    batches = make_batches(
        config,
        {"clip_image": clip.image_size},
        base.text,
        clip.context_length,
        clip_params=base.clip_params,
    )("train", 0, whole=True)

    @jax.jit
    def errors(params: Any, clip_params: Any, batch: Batch, key: Array) -> Array:
        caption = encode_caption(clip, clip_params, batch["tokens"])
        x0 = (see(clip, clip_params, batch) - mean) / std

        def apply(x_t: Array, t: Array) -> Array:
            conditions = caption.z_text, caption.states, caption.mask
            return network.apply({"params": params}, x_t, t, *conditions)

        denoise = guide.denoiser(
            apply,
            table,
            predict=diffusion["predict"],
            variance=diffusion["variance"],
            transform=None if limit is None else guide.clip_x0(limit),
        )

        def error(i: Array) -> Array:
            eps = jax.random.normal(jax.random.fold_in(key, i), x0.shape)
            x_t = process.q_sample(table, x0, i, eps)
            return jnp.mean((denoise(x_t, i).x0 - x0) ** 2)

        return jax.lax.map(error, jnp.arange(table.steps))

    params = float32(model.params["prior"])
    found = []
    for k in range(-(-examples // config.batch_size)):
        key = jax.random.fold_in(jax.random.key(config.seed), k)
        found.append(np.asarray(errors(params, base.clip_params, next(batches), key)))
    return model, np.mean(found, axis=0)
