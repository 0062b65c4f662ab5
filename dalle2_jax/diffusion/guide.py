"""Denoisers: made from a network, and steered by wrapping."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dalle2_jax.diffusion.process import log_variance, split, to_x0
from dalle2_jax.diffusion.sample import Denoiser, Prediction
from dalle2_jax.diffusion.schedule import Schedule

X = Float[Array, "b ..."]
Network = Callable[[X, Int[Array, " b"]], X]  # (x_t, timesteps) -> output
Transform = Callable[[X], X]


def classifier_free(
    apply: Callable[[X, Int[Array, " b"], Any], X],
    cond: Any,
    null: Any,
    scale: float | int | Float[Array, "..."],
    channels: int | None = None,
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

    Returns:
      (x_t, timesteps) -> output. Both passes are one batch of 2b, mixed in float32.
    """
    if isinstance(scale, int | float) and scale == 1:
        return lambda x_t, t: apply(x_t, t, cond)
    pairs = jax.tree.map(
        lambda c, n: _interleave(c, jnp.broadcast_to(n, c.shape)), cond, null
    )

    def network(x_t, t):
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

    return network


def denoiser(
    network: Network,
    schedule: Schedule,
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
        t = jnp.full(len(x_t), jnp.asarray(schedule.timesteps)[i])
        prediction, v = split(network(x_t, t).astype(jnp.float32), variance)
        x0 = to_x0(schedule, predict, prediction, x_t, i)
        if transform is not None:
            x0 = transform(x0)
        return Prediction(x0, log_variance(schedule, variance, v, x_t, i))

    return denoise


def change_last(denoise: Denoiser, last: Denoiser) -> Denoiser:
    """Leaves the last step, to the data, to another denoiser."""
    return lambda x_t, i: jax.lax.cond(i == 0, last, denoise, x_t, i)


def set_log_variance(denoise: Denoiser, log_variance: Float[Array, " n"]) -> Denoiser:
    """Puts another log variance at each level in the place of the denoiser's."""
    return lambda x_t, i: denoise(x_t, i)._replace(log_variance=log_variance[i])


def clip_x0(limit: float | int) -> Transform:
    """Clips x0 to [-limit, limit]."""
    return lambda x0: jnp.clip(x0, -limit, limit)


def dynamic_threshold(percentile: float | int, floor: float | int = 1.0) -> Transform:
    """Imagen's dynamic thresholding (Saharia et al. 2022, section 2.3).

    Clips each example at the given percentile (0 … 100) of its |x0| and scales it back
    to [-floor, floor], the range of the data. What lies within the range is kept.
    """

    def transform(x0):
        inner = tuple(range(1, x0.ndim))
        s = jnp.percentile(jnp.abs(x0), percentile, axis=inner, keepdims=True)
        s = jnp.maximum(s, floor)
        return jnp.clip(x0, -s, s) * (floor / s)

    return transform


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
