"""Denoisers: made from a network, and steered by wrapping."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dalle2_jax.diffusion.process import Tables, log_variance, split, to_x0
from dalle2_jax.diffusion.sample import Denoiser, Prediction
from dalle2_jax.diffusion.schedule import at, expand, pick

X = Float[Array, "b ..."]
Network = Callable[[X, Int[Array, " b"]], X]  # (x_t, timesteps) -> output
Transform = Callable[[X], X]
Setting = float | int | Float[Array, "*b"]  # one for all, or one for each example


def classifier_free(
    apply: Callable[[X, Int[Array, " b"], Any], X],
    cond: Any,
    null: Any,
    scale: Setting,
    channels: int | None = None,
    interval: tuple[Setting, Setting] | None = None,
) -> Network:
    """Classifier-free guidance (Ho and Salimans 2022).

    Args:
      apply: the network, (x_t, timesteps, condition) -> output.
      cond: the condition, a pytree of [b, ...].
      null: the same with the condition left out; leaves broadcast against `cond`'s.
      scale: 1 is no guidance, 0 no condition; a number for all or one for each [b].
        The number 1 saves the second pass.
      channels: how many of the output's first channels to guide (None: all). The
        others, a learned variance, are those given the condition.
      interval: the least and the largest timestep with guidance (Kynkäänniemi et al.
        2024, arXiv 2404.07724); outside of it the scale is 1. A step at which no
        example has guidance is one pass. None is all timesteps.

    Returns:
      (x_t, timesteps) -> output. Both passes are one batch of 2b, mixed in float32.
    """

    def one_pass(x_t, t):
        return apply(x_t, t, cond)

    if isinstance(scale, int | float) and scale == 1:
        return one_pass
    pairs = jax.tree.map(
        lambda c, n: _interleave(c, jnp.broadcast_to(n, c.shape)), cond, null
    )

    def two_passes(x_t, t, scale):
        output = apply(_interleave(x_t, x_t), _interleave(t, t), pairs)
        output = output.astype(jnp.float32).reshape(-1, 2, *output.shape[1:])
        with_cond, without = output[:, 0], output[:, 1]
        weight = jnp.reshape(scale, (-1,) + (1,) * (x_t.ndim - 1))
        guided = without + weight * (with_cond - without)
        if channels is None:
            return guided
        return jnp.concatenate(
            [guided[..., :channels], with_cond[..., channels:]], axis=-1
        )

    def network(x_t, t):
        if interval is None:
            return two_passes(x_t, t, scale)
        inside = (interval[0] <= t) & (t <= interval[1])
        return jax.lax.cond(
            jnp.any(inside),
            lambda: two_passes(x_t, t, jnp.where(inside, scale, 1.0)),
            lambda: one_pass(x_t, t).astype(jnp.float32),
        )

    return network


def denoiser(
    network: Network,
    schedule: Tables,
    *,
    predict: str,
    variance: str,
    transform: Transform | None = None,
) -> Denoiser:
    """Makes a denoiser for `schedule` of a network that knows timesteps.

    `predict` and `variance` are what the network was trained for, see `process`;
    the denoiser raises UserError where they are unknown. `transform` is applied to each
    predicted x0, from which samplers go on.
    """

    def denoise(x_t, i):
        t = jnp.broadcast_to(pick(jnp.asarray(schedule.timesteps), i), x_t.shape[:1])
        prediction, v = split(network(x_t, t).astype(jnp.float32), variance)
        x0 = to_x0(schedule, predict, prediction, x_t, i)
        if transform is not None:
            x0 = transform(x0)
        return Prediction(x0, log_variance(schedule, variance, v, x_t, i))

    return denoise


def change_last(denoise: Denoiser, last: Denoiser) -> Denoiser:
    """Leaves the last step, to the data, to another denoiser.

    Only where some examples of a batch are at their last step and others aren't, both
    are run.
    """

    def some(x_t, i):
        first = jnp.reshape(i == 0, (-1,) + (1,) * (x_t.ndim - 1))
        return jax.tree.map(
            lambda a, b: jnp.where(first, a, b), last(x_t, i), denoise(x_t, i)
        )

    def changed(x_t, i):
        if jnp.ndim(i) == 0:
            return jax.lax.cond(i == 0, last, denoise, x_t, i)
        count = jnp.any(i == 0) + 0 + jnp.all(i == 0)
        return jax.lax.switch(count, (denoise, some, last), x_t, i)

    return changed


def set_log_variance(denoise: Denoiser, log_variance: Float[Array, "*b n"]) -> Denoiser:
    """Puts another log variance at each level in the place of the denoiser's."""
    return lambda x_t, i: denoise(x_t, i)._replace(
        log_variance=at(log_variance, i, x_t)
    )


def clip_x0(limit: Setting) -> Transform:
    """Clips x0 to [-limit, limit]."""

    def transform(x0):
        most = expand(limit, x0)
        return jnp.clip(x0, -most, most)

    return transform


def dynamic_threshold(percentile: Setting, floor: Setting = 1.0) -> Transform:
    """Imagen's dynamic thresholding (Saharia et al. 2022, section 2.3).

    Clips each example at the given percentile (0 … 100) of its |x0| and scales it back
    to [-floor, floor], the range of the data. What lies within the range is kept.
    """

    def transform(x0):
        flat = jnp.abs(x0).reshape(len(x0), -1)
        percentiles = jnp.broadcast_to(jnp.float32(percentile), x0.shape[:1])
        s = jax.vmap(jnp.percentile)(flat, percentiles)
        least = expand(floor, x0)
        s = jnp.maximum(expand(s, x0), least)
        return jnp.clip(x0, -s, s) * (least / s)

    return transform


def limit_x0(limit: Float[Array, " b"], percentile: Float[Array, " b"]) -> Transform:
    """`clip_x0`, or `dynamic_threshold` for examples whose percentile is finite.

    A limit of infinity leaves an example as it is.
    """
    dynamic = jnp.isfinite(percentile)
    clip = clip_x0(limit)

    def some(x0):
        percentiles, limits = (jnp.where(dynamic, x, 1) for x in (percentile, limit))
        thresholded = dynamic_threshold(percentiles, limits)(x0)
        return jnp.where(expand(dynamic, x0), thresholded, clip(x0))

    return lambda x0: jax.lax.cond(jnp.any(dynamic), some, clip, x0)


def keep_known(denoise: Denoiser, known: X, mask: Float[Array, "..."]) -> Denoiser:
    """Holds x0 to `known` where `mask` is 0, and leaves it free where it is 1."""

    def held(x_t, i):
        prediction = denoise(x_t, i)
        x0 = mask * prediction.x0 + (1 - mask) * known
        return prediction._replace(x0=x0)

    return held


def _interleave(a: Array, b: Array) -> Array:
    """[a0, b0, a1, b1, …]: pairs stay together on their device of a sharded batch."""
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
