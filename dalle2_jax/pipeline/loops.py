"""Each network's whole sampling loop as one compiled function.

A picture's key is split by network, so that a different number of steps in one leaves
the others' noise alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dalle2_jax.data import image
from dalle2_jax.diffusion import generate, sample, tiles
from dalle2_jax.nn import ar_prior
from dalle2_jax.nn.clip import Caption, cosine
from dalle2_jax.nn.codes import Codes, decode
from dalle2_jax.nn.decoder import Context, with_known
from dalle2_jax.pipeline.models import Model, Part
from dalle2_jax.xla import jit

_PRIOR, _DECODER, _UPSAMPLER = range(3)
_CANDIDATES = 3  # an upsampler's number is larger: its pictures' side is added

Randomness = Key[Array, " b"] | Float[Array, "b steps ..."]
Known = tuple[Float[Array, "1 side side 3"], Float[Array, "1 side side 1"]]


def _draw(randomness: Randomness, network: int, shape: tuple[int, ...]) -> sample.Draw:
    """The noise of a network: replayed, or drawn from each picture's key."""
    if not jax.dtypes.issubdtype(randomness.dtype, jax.dtypes.prng_key):
        return sample.replay(jnp.moveaxis(randomness, 1, 0))
    keys = jax.vmap(jax.random.fold_in, (0, None))(randomness, network)
    return sample.gaussian(keys, shape)


def _best(
    draw: Callable[[Caption, Caption, Randomness], Float[Array, "n d"]],
    caption: Caption,
    null: Caption,
    randomness: Randomness,
    candidates: int,
) -> Float[Array, "b d"]:
    """Of as many embeddings of each caption the one that fits it best (section 2.2).

    That is the one with the larger dot product with z_text, of unit vectors as CLIP
    compares them. The first has the picture's own key, whatever their number.
    """
    if candidates == 1:
        return draw(caption, null, randomness)
    keys = jax.vmap(jax.random.fold_in, (0, None))(randomness, _CANDIDATES)
    others = [
        jax.vmap(jax.random.fold_in, (0, None))(keys, k) for k in range(1, candidates)
    ]
    # A picture's candidates stay together on its device.
    keys = jnp.stack([randomness, *others], axis=1).reshape(-1)
    caption, null = jax.tree.map(
        lambda x: jnp.repeat(x, candidates, axis=0), (caption, null)
    )
    z = draw(caption, null, keys)
    fit = cosine(z, caption.z_text).reshape(-1, candidates)
    z = z.reshape(-1, candidates, z.shape[-1])
    return jnp.take_along_axis(z, fit.argmax(-1)[:, None, None], axis=1)[:, 0]


@jit
def sample_prior(
    prior: Part,
    caption: Caption,
    null: Caption,
    randomness: Randomness,
    mean: Float[Array, " d"],
    std: Float[Array, " d"],
    x0_error: Float[Array, " t"] | None = None,
) -> Float[Array, "b d"]:
    """z_image of captions; ``null`` is the empty caption, for guidance.

    ``randomness`` is a key for each, or the noise itself (see `text_to_image`).
    ``x0_error`` is for the analytic variance: see diffusion.generate.
    """

    def apply(x_t: Array, t: Array, caption: Caption) -> Array:
        conditions = caption.z_text, caption.states, caption.mask
        return prior.network.apply({"params": prior.params}, x_t, t, *conditions)

    def draw(caption: Caption, null: Caption, randomness: Randomness) -> Array:
        noise = _draw(randomness, _PRIOR, mean.shape)
        z = generate.generate(
            apply,
            caption,
            null,
            noise,
            prior.diffusion,
            prior.sampling,
            x0_error=x0_error,
        )
        # p(x_0 | x_1) has a variance, too, which the eye does not see in a picture.
        if prior.sampling["last_std"]:
            steps = generate.levels(prior.diffusion, prior.sampling).steps
            z = z + prior.sampling["last_std"] * noise(steps)
        return z * std + mean

    return _best(draw, caption, null, randomness, prior.sampling["candidates"])


@jit
def sample_ar_prior(
    prior: Part,
    caption: Caption,
    null: Caption,
    keys: Key[Array, " b"],
    codes: Codes,
) -> Float[Array, "b d"]:
    """z_image of captions by the autoregressive prior; a key for each."""

    def draw(caption: Caption, null: Caption, keys: Key[Array, " n"]) -> Array:
        drawn = ar_prior.sample(
            prior.network,
            prior.params,
            caption,
            null,
            jax.vmap(jax.random.fold_in, (0, None))(keys, _PRIOR),
            guidance=prior.sampling["guidance"],
            temperature=prior.sampling["temperature"],
        )
        return decode(codes, drawn, prior.network.buckets)

    return _best(draw, caption, null, keys, prior.sampling["candidates"])


@jit
def sample_decoder(
    decoder: Part,
    z_image: Float[Array, "b d"] | None,
    caption: Caption,
    null: Caption,
    randomness: Randomness,
    start: Float[Array, "b h w 3"] | None = None,
    known: Known | None = None,
) -> Float[Array, "b h w 3"]:
    """Pictures in [-1, 1] of image embeddings (None: without) and captions.

    ``start`` takes the place of x_T, ``known`` is what is to stay of a picture.
    """
    draw = _draw(randomness, _DECODER, (decoder.size, decoder.size, 3))
    return generate.generate(
        *_conditional(decoder, z_image, caption, null, known),
        draw if start is None else sample.start(start, draw),
        decoder.diffusion,
        decoder.sampling,
        known=known,
    )


@jit
def invert_decoder(
    decoder: Part,
    x: Float[Array, "b h w 3"],
    z_image: Float[Array, "b d"],
    caption: Caption,
    null: Caption,
) -> Float[Array, "b h w 3"]:
    """x_T of pictures in [-1, 1]: `sample_decoder` by "ddim" at eta 0 undone."""
    apply, cond, null = _conditional(decoder, z_image, caption, null, None)
    return generate.invert(apply, cond, null, x, decoder.diffusion, decoder.sampling)


def _conditional(
    decoder: Part,
    z_image: Array | None,
    caption: Caption,
    null: Caption,
    known: Known | None,
) -> tuple[generate.Apply, Context, Context]:
    """The decoder as `generate` takes it, with its two conditions."""
    shown = z_image is not None
    z_image = z_image if shown else jnp.zeros_like(caption.z_text)
    variables = {"params": decoder.params}

    def context(has_image: bool, caption: Caption) -> Context:
        has_image = jnp.full(len(z_image), has_image)
        return decoder.network.apply(
            variables, z_image, has_image, caption, method="context"
        )

    def apply(x_t: Array, t: Array, context: Context) -> Array:
        if decoder.network.inpaints:
            x_t = with_known(x_t, known)
        return decoder.network.apply(variables, x_t, t, context, method="denoise")

    return apply, context(shown, caption), context(False, null)


@jit
def sample_upsampler(
    upsampler: Part,
    low: Float[Array, "b h w 3"],
    randomness: Randomness,
    known: Known | None = None,
) -> Float[Array, "b s s 3"]:
    """Pictures of ``upsampler.size`` from those of ``upsampler.low_size``."""
    if upsampler.sampling["round_low"]:  # as a file would hold it; GLIDE does so
        low = image.to_float(image.to_uint8(low))
    low = image.resize(jnp.clip(low, -1, 1), upsampler.size)

    def network(params: Any) -> generate.Apply:
        def apply(x_t: Array, t: Array, low: Array) -> Array:
            x = jnp.concatenate([x_t, low], axis=-1)
            if upsampler.strips is not None:
                x = jax.lax.with_sharding_constraint(x, upsampler.strips)
            return upsampler.network.apply({"params": params}, x, t)

        if upsampler.tile is None:
            return apply
        unit = upsampler.network.unit
        return tiles.tiled(apply, upsampler.tile, upsampler.overlap, unit)

    draw = _draw(randomness, _UPSAMPLER + upsampler.size, low.shape[1:])
    return generate.generate(
        network(upsampler.params),
        low,
        None,
        draw,
        upsampler.diffusion,
        upsampler.sampling,
        last=None if upsampler.last is None else network(upsampler.last),
        known=known,
    )


def sample_embedding(
    model: Model, prior: str, caption: Caption, null: Caption, randomness: Array
) -> Float[Array, "b d"]:
    """z_image of captions by one of the priors."""
    if prior == "autoregressive":
        return sample_ar_prior(model.prior, caption, null, randomness, model.codes)
    mean, std = jnp.asarray(model.z_image_mean), jnp.asarray(model.z_image_std)
    analytic = model.prior.sampling["variance"] == "analytic"
    error = jnp.asarray(model.x0_error) if analytic else None
    return sample_prior(model.prior, caption, null, randomness, mean, std, error)
