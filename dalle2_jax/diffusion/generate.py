"""A sample from a conditional network, by the settings that go with it.

The settings are two sections of a config. `diffusion` says how the network was trained:
schedule, steps, predict, variance, min_snr_gamma, snr_power, logit_normal. `sampling`
says how to run it:

    sampler    "ddpm", "ddim", "dpm_solver", or "repaint" with its own `repeats`
    steps      how many, or which (see schedule.respace)
    guidance   scale of classifier-free guidance; 1 for none
    eta        noise of "ddim", 0 to 1
    clip       limit of the predicted |x0|, or None
    threshold  percentile of dynamic thresholding above that limit, or None

An upsampler's settings say also, for who calls `generate`:

    round_low  whether the low-resolution picture is rounded to 8 bits

and a prior's:

    variance    "analytic" for `generate` with x0_error, or None for that of `diffusion`
    last_std    deviation of noise that is added to x0 in the end; 0 for none
    candidates  embeddings for each picture, of which the one that fits best is kept
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Float

from dalle2_jax.diffusion import guide, process, sample, schedule
from dalle2_jax.errors import UserError

SAMPLERS = ("ddpm", "ddim", "dpm_solver", "repaint")


Apply = Callable[[Array, Array, Any], Array]


def generate(
    apply: Apply,
    cond: Any,
    null: Any,
    draw: sample.Draw,
    diffusion: Mapping[str, Any],
    sampling: Mapping[str, Any],
    last: Apply | None = None,
    known: tuple[Array, Array] | None = None,
    x0_error: Float[Array, " t"] | None = None,
) -> Float[Array, "b ..."]:
    """Samples x0, one for each entry of the condition.

    Args:
      apply: the network, (x_t, timesteps, condition) -> output.
      cond: the condition, a pytree of [b, ...].
      null: the same without the condition, for guidance.
      draw: the noise; draw(0) is x_T.
      diffusion, sampling: see the module.
      last: the network of the last step, where it has one of its own.
      known: (x0, mask) that broadcast over the samples: what is to stay where the mask
        is 0.
      x0_error: mean squared error of the network's x0 at each timestep in training; if
        given, "ddpm" has the analytic variance in place of the one in `diffusion`.

    Raises:
      UserError: the sampler is unknown.
    """
    table = levels(diffusion, sampling)
    x = draw(0)
    channels = x.shape[-1]
    denoise = denoiser(apply, cond, null, diffusion, sampling, channels)
    if last is not None:
        last_denoise = denoiser(last, cond, null, diffusion, sampling, channels)
        denoise = guide.change_last(denoise, last_denoise)
    if x0_error is not None:
        denoise = guide.set_log_variance(
            denoise,
            process.analytic_log_variance(
                table, x0_error[table.timesteps], sampling["clip"]
            ),
        )
    if known is not None:
        denoise = guide.keep_known(denoise, *known)
    match sampling["sampler"]:
        case "ddpm":
            return sample.ddpm(denoise, table, x, draw)
        case "ddim":
            return sample.ddim(denoise, table, x, draw, sampling["eta"])
        case "dpm_solver":
            return sample.dpm_solver(denoise, table, x)
        case "repaint":
            return sample.repaint(denoise, table, x, draw, sampling["repeats"])
    raise UserError(
        f"sampler is {sampling['sampler']!r}: must be one of {', '.join(SAMPLERS)}"
    )


def invert(
    apply: Apply,
    cond: Any,
    null: Any,
    x: Float[Array, "b ..."],
    diffusion: Mapping[str, Any],
    sampling: Mapping[str, Any],
) -> Float[Array, "b ..."]:
    """The x_T from which "ddim" at eta 0 makes x; arguments are those of `generate`."""
    denoise = denoiser(apply, cond, null, diffusion, sampling, x.shape[-1])
    return sample.invert(denoise, levels(diffusion, sampling), x)


def levels(
    diffusion: Mapping[str, Any], sampling: Mapping[str, Any]
) -> schedule.Schedule:
    """The schedule of the sampling steps."""
    table = schedule.make(diffusion["schedule"], diffusion["steps"])
    return schedule.respace(table, sampling["steps"])


def denoiser(
    apply: Apply,
    cond: Any,
    null: Any,
    diffusion: Mapping[str, Any],
    sampling: Mapping[str, Any],
    channels: int,
) -> sample.Denoiser:
    """The network as a denoiser of x with so many channels, guided and clipped."""
    return guide.denoiser(
        guide.classifier_free(
            apply, cond, null, sampling["guidance"], channels=channels
        ),
        levels(diffusion, sampling),
        predict=diffusion["predict"],
        variance=diffusion["variance"],
        transform=_transform(sampling["clip"], sampling["threshold"]),
    )


def _transform(clip: float | None, threshold: float | None) -> guide.Transform | None:
    if clip is None:
        return None
    if threshold is None:
        return guide.clip_x0(clip)
    return guide.dynamic_threshold(threshold, clip)
