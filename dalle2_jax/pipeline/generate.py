"""Text to image: a prior, a decoder, and a cascade of upsamplers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, UInt8

from dalle2_jax.data import image
from dalle2_jax.diffusion import generate, sample, schedule
from dalle2_jax.errors import UserError
from dalle2_jax.nn.clip import Caption
from dalle2_jax.nn.decoder import Context
from dalle2_jax.pipeline.models import Model, Part, require

BATCH = 16  # the most pictures at once on a device

Progress = Callable[[str, int, int], None]  # (stage, pictures done, pictures in all)


def text_to_image(
    model: Model,
    prompts: str | Sequence[str],
    *,
    seed: int = 0,
    num: int = 1,
    size: int | None = None,
    steps: Mapping[str, Any] | None = None,
    guidance: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> UInt8[np.ndarray, "n h w 3"]:
    """Pictures of captions (section 2 of arXiv 2204.06125).

    Args:
      model: from `load`.
      prompts: one caption or several; one that is too long is cut, with a warning.
      seed: picture k of a seed has the same noise in any batch and on any devices.
      num: pictures of each prompt.
      size: their side in pixels, one of ``model.sizes``; by default the largest.
      steps: sampling steps of the networks that shall not have the model's own:
        {"prior": 25, "decoder": 50, "upsampler": (8,)}, with an entry for each
        upsampler used. Each is a number or what else schedule.respace takes.
      guidance: scales of classifier-free guidance, {"prior": 2.0, "decoder": 4.0}; 1 is
        none. Upsamplers have no guidance.
      progress: called as progress(stage, pictures done, pictures in all).

    Returns:
      [len(prompts) · num, size, size, 3]; the pictures of a prompt stand together.

    Raises:
      UserError: an empty prompt, or settings that the model cannot meet.
    """
    require(model, "tokenizer", "clip", "prior", "decoder")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    _check(prompts, num, seed)
    model = _set(_cut(model, size), "steps", steps or {})
    model = _set(model, "guidance", guidance or {})

    length = model.clip.network.context_length
    tokens = model.tokenizer.encode(prompts, length).repeat(num, axis=0)
    empty = model.tokenizer.encode([""], length)
    keys = picture_keys(seed, len(tokens))
    mean, std = jnp.asarray(model.z_image_mean), jnp.asarray(model.z_image_std)

    def some(rows: np.ndarray) -> UInt8[np.ndarray, "b h w 3"]:
        place = NamedSharding(model.devices, PartitionSpec("data"))
        done = int(rows[-1]) + 1

        def tell(stage: str, result: Array) -> Array:
            if progress is not None:
                result.block_until_ready()
                progress(stage, done, len(tokens))
            return result

        key, words = jax.device_put((keys[rows], tokens[rows]), place)
        caption = encode_caption(model.clip, words)
        null = encode_caption(model.clip, jnp.broadcast_to(empty, words.shape))
        z = tell("prior", sample_prior(model.prior, caption, null, key, mean, std))
        x = tell("decoder", sample_decoder(model.decoder, z, caption, null, key))
        for part in model.upsamplers:
            x = tell(f"upsampler {part.size}", sample_upsampler(part, x, key))
        return np.asarray(image.to_uint8(x))

    return in_batches(some, len(tokens), model.devices.size)


def picture_keys(seed: int, count: int) -> Key[Array, " count"]:
    """A key for each picture, which depends on the seed and its number only."""
    return jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.arange(count)
    )


def in_batches(
    some: Callable[[np.ndarray], np.ndarray], count: int, devices: int
) -> np.ndarray:
    """Calls ``some`` with the numbers of the pictures to make, a batch at a time.

    All batches have one size, so that each network is compiled once; where the pictures
    do not fill the last one, the last picture is repeated.
    """
    batch = min(BATCH * devices, -(-count // devices) * devices)
    results = []
    for start in range(0, count, batch):
        rows = np.minimum(np.arange(start, start + batch), count - 1)
        results.append(some(rows))
    return np.concatenate(results)[:count]


# Each network's whole loop is one compiled function. A picture's key is split by
# network, so that a different number of steps in one leaves the others' noise alone.

_PRIOR, _DECODER, _UPSAMPLER = range(3)


def _draw(keys: Key[Array, " b"], network: int, shape: tuple[int, ...]) -> sample.Draw:
    return sample.gaussian(
        jax.vmap(jax.random.fold_in, (0, None))(keys, network), shape
    )


@jax.jit
def encode_caption(clip: Part, tokens: Int[Array, "b l"]) -> Caption:
    """What the prior and the decoder read of captions."""
    return clip.network.apply({"params": clip.params}, tokens, method="encode_caption")


@jax.jit
def sample_prior(
    prior: Part,
    caption: Caption,
    null: Caption,
    keys: Key[Array, " b"],
    mean: Float[Array, " d"],
    std: Float[Array, " d"],
) -> Float[Array, "b d"]:
    """z_image of captions; ``null`` is the empty caption, for guidance."""

    def apply(x_t: Array, t: Array, caption: Caption) -> Array:
        conditions = caption.z_text, caption.states, caption.mask
        return prior.network.apply({"params": prior.params}, x_t, t, *conditions)

    draw = _draw(keys, _PRIOR, mean.shape)
    z = generate.generate(apply, caption, null, draw, prior.diffusion, prior.sampling)
    return z * std + mean


@jax.jit
def sample_decoder(
    decoder: Part,
    z_image: Float[Array, "b d"],
    caption: Caption,
    null: Caption,
    keys: Key[Array, " b"],
) -> Float[Array, "b h w 3"]:
    """Pictures in [-1, 1] of image embeddings and captions."""
    variables = {"params": decoder.params}

    def context(has_image: bool, caption: Caption) -> Context:
        has_image = jnp.full(len(z_image), has_image)
        return decoder.network.apply(
            variables, z_image, has_image, caption, method="context"
        )

    def apply(x_t: Array, t: Array, context: Context) -> Array:
        return decoder.network.apply(variables, x_t, t, context, method="denoise")

    return generate.generate(
        apply,
        context(True, caption),
        context(False, null),
        _draw(keys, _DECODER, (decoder.size, decoder.size, 3)),
        decoder.diffusion,
        decoder.sampling,
    )


@jax.jit
def sample_upsampler(
    upsampler: Part, low: Float[Array, "b h w 3"], keys: Key[Array, " b"]
) -> Float[Array, "b s s 3"]:
    """Pictures of ``upsampler.size`` from those of ``upsampler.low_size``."""
    # Seen as a file would hold it (GLIDE does so), which also clips it.
    low = image.to_float(image.to_uint8(low))
    low = image.resize(low, upsampler.size)

    def apply(x_t: Array, t: Array, low: Array) -> Array:
        x = jnp.concatenate([x_t, low], axis=-1)
        return upsampler.network.apply({"params": upsampler.params}, x, t)

    draw = _draw(keys, _UPSAMPLER + upsampler.size, low.shape[1:])
    settings = upsampler.diffusion, upsampler.sampling
    return generate.generate(apply, low, None, draw, *settings)


# What the caller asks for, checked and put into the model.


def _check(prompts: Sequence[str], num: int, seed: int) -> None:
    if not prompts:
        raise UserError("no prompt: give at least one caption")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"the prompt {prompt!r} is empty: say what to show")
    if num < 1:
        raise UserError(f"num={num}: the number of pictures must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed}: must be from 0 to {2**32 - 1}")


def _cut(model: Model, size: int | None) -> Model:
    """The model without the upsamplers beyond ``size``; checks that the others fit."""
    if size is not None and size not in model.sizes:
        sizes = ", ".join(map(str, model.sizes))
        raise UserError(f"size={size}: this model makes pictures of side {sizes}")
    used = tuple(p for p in model.upsamplers if size is None or p.size <= size)
    side = model.decoder.size
    for part in used:
        if part.low_size != side:
            raise UserError(
                f"the upsampler to {part.size} px takes pictures of {part.low_size} "
                f"px, and what comes before it in {model.path} makes {side} px"
            )
        side = part.size
    return model._replace(upsamplers=used)


def _set(model: Model, setting: str, values: Mapping[str, Any]) -> Model:
    """The model with a sampling setting changed for the networks named."""
    allowed = ("prior", "decoder", "upsampler")[: 3 if setting == "steps" else 2]
    for name in values:
        if name not in allowed:
            raise UserError(f"{setting} for {name!r}: give it for {', '.join(allowed)}")
    for name in ("prior", "decoder"):
        if name in values:
            part = _changed(getattr(model, name), setting, values[name], name)
            model = model._replace(**{name: part})
    if "upsampler" in values:
        each = values["upsampler"]
        each = (
            each if isinstance(each, Sequence) and not isinstance(each, str) else [each]
        )
        if len(each) != len(model.upsamplers):
            raise UserError(
                f"{setting} for {len(each)} upsamplers ({each}): there are "
                f"{len(model.upsamplers)} to run"
            )
        parts = [
            _changed(part, setting, value, "upsampler")
            for part, value in zip(model.upsamplers, each, strict=True)
        ]
        model = model._replace(upsamplers=tuple(parts))
    return model


def _changed(part: Part, setting: str, value: Any, name: str) -> Part:
    if setting == "steps":
        table = schedule.make(part.diffusion["schedule"], part.diffusion["steps"])
        schedule.respace(table, value)  # raises a UserError if it is no choice of steps
    elif not isinstance(value, int | float) or not value >= 0:
        raise UserError(f"guidance of the {name} is {value!r}: must be 0 or more")
    return part.replace(sampling=part.sampling.copy({setting: value}))
