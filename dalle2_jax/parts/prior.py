"""The diffusion prior: from a caption to the CLIP embedding of a picture of it."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dalle2_jax import checkpoint, rules
from dalle2_jax.diffusion import generate, guide, process, sample, schedule
from dalle2_jax.errors import UserError
from dalle2_jax.nn import build
from dalle2_jax.nn.clip import Caption, cosine
from dalle2_jax.nn.prior import DiffusionPrior
from dalle2_jax.parts import part
from dalle2_jax.parts.component import (
    CANDIDATES,
    PRIOR,
    Component,
    Inputs,
    Randomness,
    count_steps,
    fold,
    make_component,
    make_sampling,
    noise_of,
)
from dalle2_jax.parts.finetune import start_params
from dalle2_jax.parts.part import Part, Sampler
from dalle2_jax.parts.stage import (
    DIFFUSION,
    TRANSFORMER,
    Batch,
    Load,
    Stage,
    add_part,
    check_statistics,
    check_width,
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
from dalle2_jax.runtime import jit

log = logging.getLogger(__name__)


def arguments(config: ConfigDict, clip: Mapping[str, Any] | None) -> dict[str, Any]:
    """DiffusionPrior's arguments: ``config.net`` with the numbers of CLIP's net."""
    return upon_clip(config.net.to_dict(), clip)


def conditioned(network: DiffusionPrior, params: Any) -> generate.Apply:
    """The network as (x_t, timesteps, Caption) -> output."""

    def apply(x_t: Array, t: Array, caption: Caption) -> Array:
        conditions = caption.z_text, caption.states, caption.mask
        return network.apply({"params": params}, x_t, t, *conditions)

    return apply


# Sampling


def repeat_candidates(
    caption: Caption, null: Caption, randomness: Randomness, candidates: int
) -> tuple[Caption, Caption, Any]:
    """The conditions of b pictures as often as each has candidates, side by side.

    The first candidate has the picture's own key, whatever their number.
    """
    if candidates == 1:
        return caption, null, randomness
    keys = fold(randomness, CANDIDATES)
    others = [fold(keys, k) for k in range(1, candidates)]
    # A picture's candidates stay together on its device.
    keys = jnp.stack([randomness, *others], axis=1).reshape(-1)
    caption, null = jax.tree.map(
        lambda x: jnp.repeat(x, candidates, axis=0), (caption, null)
    )
    return caption, null, keys


def choose_best(
    z: Float[Array, "n d"], z_text: Float[Array, "n d"], candidates: int
) -> Float[Array, "b d"]:
    """Of each picture's candidates the one that fits its caption best (section 2.2).

    That is the one with the larger dot product with z_text, of unit vectors as CLIP
    compares them.
    """
    if candidates == 1:
        return z
    fit = cosine(z, z_text).reshape(-1, candidates)
    z = z.reshape(-1, candidates, z.shape[-1])
    return jnp.take_along_axis(z, fit.argmax(-1)[:, None, None], axis=1)[:, 0]


@jit
def begin(
    prior: Component, sampling: generate.Sampling, inputs: Inputs
) -> tuple[Inputs, sample.State]:
    """Draws x_T of each picture's candidates; see part.Sampler."""
    caption, null, randomness = repeat_candidates(
        inputs.caption, inputs.null, inputs.randomness, sampling.candidates
    )
    prepared = inputs.replace(caption=caption, null=null, randomness=randomness)
    draw = noise_of(randomness, PRIOR, inputs.mean.shape)
    return prepared, sampling.begin(draw(0))


@jit
def advance(
    prior: Component,
    sampling: generate.Sampling,
    prepared: Inputs,
    state: sample.State,
    start: Any,
    stop: Any,
) -> sample.State:
    """Takes steps; see part.Sampler."""
    count = sampling.candidates
    each = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), sampling)
    return generate.generate(
        conditioned(prior.network, prior.params),
        prepared.caption,
        prepared.null,
        noise_of(prepared.randomness, PRIOR, prepared.mean.shape),
        prior.diffusion,
        each,
        state,
        start,
        stop,
        x0_error=prepared.x0_error,
    )


@jit
def finish(
    prior: Component,
    sampling: generate.Sampling,
    prepared: Inputs,
    state: sample.State,
) -> Float[Array, "b d"]:
    """z_image of each picture: its best candidate; see part.Sampler."""
    count = sampling.candidates
    steps, std = (
        jnp.repeat(jnp.asarray(x), count) for x in (sampling.steps, sampling.last_std)
    )
    # p(x_0 | x_1) has a variance, too, which the eye does not see in a picture.
    z = jax.lax.cond(
        jnp.any(std > 0),
        lambda z: z + std[:, None] * last_noise(prepared, steps),
        lambda z: z,
        state.x,
    )
    z = z * prepared.std + prepared.mean
    return choose_best(z, prepared.caption.z_text, count)


def last_noise(prepared: Inputs, steps: Array) -> Float[Array, "n d"]:
    """The noise of each candidate after its last step."""
    keys, d = prepared.randomness, prepared.mean.shape
    if not jax.dtypes.issubdtype(keys.dtype, jax.dtypes.prng_key):
        return jnp.zeros((len(keys), *d))  # replayed noise has none after the last step
    keys = jax.vmap(jax.random.fold_in)(fold(keys, PRIOR), steps)
    return jax.vmap(lambda key: jax.random.normal(key, d))(keys)


# Training


def make_stage(config: ConfigDict, load: Load) -> Stage:
    """The stage that ``configs/prior.py`` describes."""
    base = load_base(config, load)
    clip = base.clip
    net = arguments(config, base.model.config["parts"]["clip"]["net"])
    model = build.build(DiffusionPrior, net, None, "config.net", dtype_of(config))
    diffusion = config.diffusion.to_dict()
    table = schedule.make(diffusion["schedule"], diffusion["steps"])
    section = {
        "net": net,
        "diffusion": diffusion,
        "sampling": config.sampling.to_dict(),
    }
    batches = make_batches(
        config,
        {"clip_image": clip.image_size},
        base.text,
        clip.context_length,
        clip_params=base.clip_params,
    )
    if base.origin is not None:
        mean, std = stored_statistics(base.origin, config.init_from, model)
    else:
        mean, std = embedding_statistics(
            clip,
            base.clip_params,
            batches("train", 0, whole=True),
            config.statistics_examples,
        )
    frozen = {"clip": base.clip_params, "mean": mean, "std": std}

    def init(key: Array) -> Any:
        return model.init(key, *model.example())["params"]

    def clean(frozen: Any, batch: Batch) -> Float[Array, "b d"]:
        z_image = see(clip, frozen["clip"], batch)
        return (z_image - frozen["mean"]) / frozen["std"]

    def losses(params: Any, frozen: Any, batch: Batch, tokens: Array, key: Array):
        caption = encode_caption(clip, frozen["clip"], tokens)
        return denoising_loss(
            lambda x_t, t: conditioned(model, params)(x_t, t, caption),
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
        z = part.sample(
            SAMPLER,
            make_component(model, section, params),
            [section["sampling"]] * len(tokens),
            Inputs(
                caption=encode_caption(clip, frozen["clip"], tokens),
                null=encode_caption(clip, frozen["clip"], nothing),
                randomness=jax.random.split(key, len(tokens)),
                mean=frozen["mean"],
                std=frozen["std"],
            ),
        )
        z = (z - frozen["mean"]) / frozen["std"]
        return {"cosine_to_true": cosine(z, clean(frozen, batch)).mean()}

    def export(params: Any) -> dict[str, Any]:
        statistics = {"z_image_mean": np.asarray(mean), "z_image_std": np.asarray(std)}
        return add_part(base.model, "prior", section, params, base.text, statistics)

    return Stage(
        name="prior",
        frozen=frozen,
        init=init,
        loss=loss,
        metrics=metrics,
        preview=preview,
        batches=batches,
        export=export,
        start=start_params(config, base.origin, "prior", DiffusionPrior, net, init),
    )


def stored_statistics(
    model: checkpoint.Export, where: str, network: DiffusionPrior
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Mean and standard deviation of z_image that a model's prior works with."""
    names = "z_image_mean", "z_image_std"
    missing = [name for name in names if name not in model.statistics]
    if missing:
        raise UserError(
            f"init_from={where} has no {' and no '.join(missing)}, without which its "
            "prior can't be read: convert or export the model again"
        )
    check_statistics(model.statistics, zero_statistics(network), f"init_from={where}")
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
    config: ConfigDict, examples: int, load: Load
) -> tuple[checkpoint.Export, Float[np.ndarray, " t"]]:
    """E‖x0 - x̂0‖² / d of a model's prior at each timestep, on the training set.

    For process.analytic_log_variance. The prior has the captions, and no guidance.

    Args:
      config: of the prior's stage; ``init_from`` is the model.
      examples: how many pictures; whole batches are read.
      load: reads the model.

    Returns:
      The model, and the errors, float32.

    Raises:
      UserError: the model has no prior, or none of its statistics.
    """
    base = load_base(config, load)
    clip, model = base.clip, base.model
    if "prior" not in model.params:
        raise UserError(
            f"the model {config.init_from} has no prior, only "
            f"{', '.join(sorted(model.params))}: train configs/prior.py"
        )
    section = model.config["parts"]["prior"]
    network = DiffusionPrior(**section["net"], dtype=dtype_of(config))
    mean, std = stored_statistics(base.origin, config.init_from, network)
    diffusion, limit = section["diffusion"], section["sampling"]["clip"]
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

        denoise = guide.denoiser(
            lambda x_t, t: conditioned(network, params)(x_t, t, caption),
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


def read_statistics(
    statistics: Mapping[str, Any], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """Mean and deviation of z_image, and the errors if the variance is analytic."""
    analytic = sampling["variance"] == "analytic"
    return {
        "mean": jnp.asarray(statistics["z_image_mean"]),
        "std": jnp.asarray(statistics["z_image_std"]),
        "x0_error": jnp.asarray(statistics["prior_x0_error"]) if analytic else None,
    }


def zero_statistics(network: DiffusionPrior) -> dict[str, Any]:
    """Statistics of the embeddings: a mean of 0, and a deviation of 1 to divide by."""
    zeros = np.zeros(network.clip_dim, np.float32)
    return {"z_image_mean": zeros, "z_image_std": zeros + 1}


SAMPLING = {
    "candidates": rules.whole(1, 1000),
    "variance": rules.one_of(None, "analytic"),
    "last_std": rules.number(0, 100),
}
RULES = {
    "net": TRANSFORMER,
    "drop_caption": rules.CHANCE,
    "statistics_examples": rules.whole(1, 100_000_000),
    "diffusion": DIFFUSION,
}
SAMPLER = Sampler(
    SAMPLING,
    ("steps", "guidance", "guidance_interval", "sampler"),
    make_sampling,
    count_steps,
    begin,
    advance,
    finish,
)
PART = Part(
    "prior",
    DiffusionPrior,
    arguments,
    make_stage,
    most_left=0.5,
    rules=RULES,
    check=lambda config: check_width(config.net.to_dict(), "config.net"),
    makes="embedding",
    sampler=SAMPLER,
    read_statistics=read_statistics,
    zero_statistics=zero_statistics,
)
