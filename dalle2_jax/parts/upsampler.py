"""The upsamplers: a picture at several times its side (64→256, 256→1024)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dalle2_jax import rules
from dalle2_jax.data import degrade, image, tokenizer
from dalle2_jax.diffusion import generate, sample, schedule, tiles
from dalle2_jax.errors import UserError
from dalle2_jax.nn import build
from dalle2_jax.nn.unet import UNet
from dalle2_jax.parts import part
from dalle2_jax.parts.component import (
    UPSAMPLER,
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
    UNET,
    Batch,
    Load,
    Stage,
    add_part,
    check_side,
    check_unet,
    denoising_loss,
    dtype_of,
    load_models,
    make_batches,
)
from dalle2_jax.runtime import jit


def arguments(config: ConfigDict, clip: Mapping[str, Any] | None) -> dict[str, Any]:
    """UNet's arguments: ``config.net``."""
    return config.net.to_dict()


def conditioned(
    network: UNet, params: Any, strips: NamedSharding | None = None, **options: Any
) -> generate.Apply:
    """The network as (x_t, timesteps, low) -> output.

    ``low`` are the low-resolution pictures at the size of x_t, ``strips`` as of
    Component, and `options` as of the network's `apply`.
    """

    def apply(x_t: Array, t: Array, low: Array) -> Array:
        x = jnp.concatenate([x_t, low], axis=-1)
        if strips is not None:
            x = jax.lax.with_sharding_constraint(x, strips)
        return network.apply({"params": params}, x, t, **options)

    return apply


# Sampling


class Prepared(NamedTuple):
    """What a loop of the upsampler needs in each step."""

    low: Float[Array, "b s s 3"]
    randomness: Randomness
    known: Known | None


@jit
def begin(
    upsampler: Component, sampling: generate.Sampling, inputs: Inputs
) -> tuple[Prepared, sample.State]:
    """Resizes the low-resolution pictures, and draws x_T; see part.Sampler."""
    low = inputs.low
    rounded = image.to_float(image.to_uint8(low))  # as a file would hold it, as GLIDE
    low = jnp.where(sampling.round_low[:, None, None, None], rounded, low)
    low = image.resize(jnp.clip(low, -1, 1), upsampler.size)
    draw = _noise(upsampler, inputs.randomness)
    return Prepared(low, inputs.randomness, inputs.known), sampling.begin(draw(0))


@jit
def advance(
    upsampler: Component,
    sampling: generate.Sampling,
    prepared: Prepared,
    state: sample.State,
    start: Any,
    stop: Any,
) -> sample.State:
    """Takes steps; see part.Sampler."""

    def network(params: Any) -> generate.Apply:
        apply = conditioned(upsampler.network, params, upsampler.strips)
        if upsampler.tile is None:
            return apply
        unit = upsampler.network.unit
        return tiles.tiled(apply, upsampler.tile, upsampler.overlap, unit)

    return generate.generate(
        network(upsampler.params),
        prepared.low,
        None,
        _noise(upsampler, prepared.randomness),
        upsampler.diffusion,
        sampling,
        state,
        start,
        stop,
        last=None if upsampler.last is None else network(upsampler.last),
        known=prepared.known,
    )


def finish(
    upsampler: Component,
    sampling: generate.Sampling,
    prepared: Prepared,
    state: sample.State,
) -> Float[Array, "b s s 3"]:
    """The pictures, in [-1, 1]; see part.Sampler."""
    return state.x


def _noise(upsampler: Component, randomness: Randomness) -> sample.Draw:
    size = upsampler.size
    return noise_of(randomness, UPSAMPLER + size, (size, size, 3))


# Training


def make_stage(config: ConfigDict, load: Load) -> Stage:
    """The stage that ``configs/upsampler.py`` describes.

    No text, no guidance: the low-resolution picture, resized, is concatenated to the
    noised one (section 2.1). Trained on crops, run at full size.
    """
    base, origin = load_models(config, load)
    net = arguments(config, None)
    model = build.build(UNet, net, None, "config.net", dtype_of(config))
    diffusion = config.diffusion.to_dict()
    table = schedule.make(diffusion["schedule"], diffusion["steps"])
    size, low_size = config.size, config.low_size
    name = PART.component_name(config)
    blur, bsr = config.blur.to_dict(), _bsr(config)
    chance = blur.pop("chance")
    section = {
        "net": net,
        "diffusion": diffusion,
        "sampling": config.sampling.to_dict(),
        "size": size,
        "low_size": low_size,
    }

    def see(
        batch: Batch, key: Array
    ) -> tuple[Float[Array, "b s s 3"], Float[Array, "b l l 3"]]:
        """x0, and the low-resolution picture.

        Some are blurred, and some not, as none are in sampling (CDM, arXiv 2106.15282).
        """
        x0 = image.to_float(batch["image"])
        side = x0.shape[1]
        if bsr is None:
            low = image.resize(x0, side * low_size // size)
            blurred = jax.random.bernoulli(key, chance, (len(low), 1, 1, 1))
            low = jnp.where(blurred, image.gaussian_blur(low, **blur), low)
        else:
            low = image.to_float(batch["low"])
        return x0, low

    def init(key: Array) -> Any:
        return model.init(key, *model.example())["params"]

    def losses(params: Any, batch: Batch, key: Array, train: bool) -> Array:
        key, key_low, key_dropout = jax.random.split(key, 3)
        x0, low = see(batch, key_low)
        low = image.resize(low, x0.shape[1])
        rngs = {"dropout": key_dropout}
        apply = conditioned(model, params, train=train, rngs=rngs)
        return denoising_loss(
            lambda x_t, t: apply(x_t, t, low), table, x0, key, diffusion
        )

    def loss(params: Any, frozen: Any, batch: Batch, key: Array):
        return losses(params, batch, key, True).mean(), {}

    def metrics(params: Any, frozen: Any, batch: Batch, key: Array):
        return {"loss": losses(params, batch, key, False)}

    def preview(params: Any, frozen: Any, batch: Batch, key: Array):
        shown = jax.tree.map(lambda x: x[:16], batch)
        key, key_low = jax.random.split(key)
        x0, low = see(shown, key_low)
        side = x0.shape[1]  # of a crop
        x = part.sample(
            SAMPLER,
            make_component(model, {**section, "size": side}, params),
            [section["sampling"]] * len(low),
            Inputs(low=low, randomness=jax.random.split(key, len(low))),
        )
        return {
            "low": image.to_uint8(image.resize(low, side)),
            "sampled": image.to_uint8(x),
            "true": shown["image"],
        }

    def export(params: Any) -> dict[str, Any]:
        has_text = base is not None and base.tokenizer_dir is not None
        text = tokenizer.load(base.tokenizer_dir) if has_text else None
        return add_part(base, name, section, params, text)

    return Stage(
        name=name,
        frozen={},
        init=init,
        loss=loss,
        metrics=metrics,
        preview=preview,
        batches=make_batches(config, {"image": size}, degrade=bsr),
        export=export,
        start=start_params(config, origin, name, UNet, net, init),
    )


def _bsr(config: ConfigDict) -> Callable[..., np.ndarray] | None:
    """What degrades pictures on the host, or None: they are blurred on the device."""
    if config.degrade == "blur":
        return None
    side = _low_side(config)
    return partial(degrade.bsr, size=side, **config.bsr)


def _side(config: ConfigDict) -> int:
    """The side of the crops that are trained on."""
    return round(config.size * config.data.crop_fraction)


def _low_side(config: ConfigDict) -> int:
    """And of what they are made of."""
    return _side(config) * config.low_size // config.size


def check(config: ConfigDict) -> None:
    """Checks what an upsampler's config must agree on."""
    if config.low_size >= config.size or config.size % config.low_size:
        raise UserError(
            f"config.low_size is {config.low_size}: must be below size={config.size}, "
            "and divide it"
        )
    network = UNet(**config.net)
    check_unet(network, "config.net")
    check_side(config.size, network, "config.size")
    check_side(_side(config), network, "config.size times data.crop_fraction")
    if config.degrade == "blur" and _low_side(config) <= config.blur.kernel // 2:
        raise UserError(
            f"config.blur.kernel is {config.blur.kernel}: too large for pictures of "
            f"{_low_side(config)} px"
        )


RULES = {
    "net": UNET,
    "diffusion": DIFFUSION,
    "degrade": rules.one_of("blur", "bsr"),
    "blur": {
        "chance": rules.CHANCE,
        "kernel": rules.whole(1, 99),
        "sigma": rules.number(0.01, 100),
    },
    "bsr": degrade.RULES,
}


SAMPLER = Sampler(
    {"round_low": rules.one_of(True, False)},
    ("steps", "sampler"),
    make_sampling,
    count_steps,
    begin,
    advance,
    finish,
)
PART = Part(
    "upsampler",
    UNet,
    arguments,
    make_stage,
    most_left=0.5,
    rules=RULES,
    check=check,
    makes="picture",
    sides=("size", "low_size"),
    sampler=SAMPLER,
    several=True,
)
