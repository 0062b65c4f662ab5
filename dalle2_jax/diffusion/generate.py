"""A sample from a conditional network, by the settings that go with it.

The settings are two sections of a config. `diffusion` says how the network was trained:
schedule, steps, predict, variance, min_snr_gamma, snr_power, logit_normal. `sampling`
says how to run it:

    sampler    "ddpm", "ddim", "dpm_solver", "unipc", or "repaint" (with `repeats`)
    steps      how many, or which (see schedule.respace)
    guidance   scale of classifier-free guidance; 1 for none
    guidance_interval  least and largest timestep with guidance, or None for all
    eta        noise of "ddim", 0 to 1
    clip       limit of the predicted |x0|, or None
    threshold  percentile of dynamic thresholding above that limit, or None

An upsampler's settings say also, for who calls `generate`:

    round_low  whether the low-resolution picture is rounded to 8 bits

and a prior's:

    variance    "analytic" for `generate` with x0_error, or None for that of `diffusion`
    last_std    deviation of noise that is added to x0 in the end; 0 for none
    candidates  embeddings for each picture, of which the one that fits best is kept

`Sampling` holds the settings of a batch as `generate` reads them: as arrays, so that
another value is no other program.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dalle2_jax.diffusion import guide, process, sample, schedule
from dalle2_jax.errors import UserError

SAMPLERS = ("ddpm", "ddim", "dpm_solver", "unipc", "repaint")
# What configs of earlier versions leave out.
DEFAULTS = {"guidance_interval": None}

Apply = Callable[[Array, Array, Any], Array]

static = functools.partial(flax.struct.field, pytree_node=False)


@flax.struct.dataclass
class Sampling:
    """The settings of each example of a batch, as data, [b]; see `make_sampling`.

    Attributes:
      levels: the schedule of the sampling steps, padded to all steps of training.
      guidance, eta, last_std: as of the module.
      interval: guidance_interval, [b, 2].
      clip: infinite for none.
      threshold: NaN for none.
      repeats: of "repaint"; 1 for the others.
      round_low: of an upsampler; False for the others.
      candidates: of a prior, the same for all; 1 for the others.
      sampler: one for all.
      passes: "one" where no example is guided, "two" where some are, "interval" where
        some are at some timesteps.
    """

    # Not annotated with shapes: the leaves of a pytree may be anything.
    levels: Any
    guidance: Any
    interval: Any
    eta: Any
    clip: Any
    threshold: Any
    repeats: Any
    last_std: Any
    round_low: Any
    candidates: int = static()
    sampler: str = static()
    passes: str = static()

    def begin(self, x: Float[Array, "b ..."]) -> sample.State:
        """The state before the first step, at x_T."""
        return sample.begin(x, remember=self.sampler == "unipc")

    @property
    def steps(self) -> Int[Array | np.ndarray, " b"]:
        """How many steps each example takes."""
        if self.sampler == "repaint":
            return sample.repaint_count(self.levels, self.repeats)
        return self.levels.steps


def make_sampling(
    diffusion: Mapping[str, Any], settings: Sequence[Mapping[str, Any]]
) -> Sampling:
    """Returns the settings of a batch, those of each example given; numpy arrays.

    Raises:
      UserError: a sampler or a step does not exist, or there are several samplers.
    """
    settings = [DEFAULTS | dict(each) for each in settings]
    sampler = _same(settings, "sampler", "ddpm")
    if sampler not in SAMPLERS:
        raise UserError(f"sampler is {sampler!r}: must be one of {', '.join(SAMPLERS)}")
    guided = [each for each in settings if each["guidance"] != 1]
    within = [each for each in guided if each["guidance_interval"] is not None]

    def column(key: str, none: Any = None, dtype: Any = np.float32) -> np.ndarray:
        """The values of a setting, with ``none`` in the place of None."""
        values = [each.get(key) for each in settings]
        return np.asarray([none if v is None else v for v in values], dtype)

    return Sampling(
        levels=schedule.stack(
            [levels(diffusion, each) for each in settings], diffusion["steps"]
        ),
        guidance=column("guidance"),
        interval=column("guidance_interval", (-1, np.inf)),
        eta=column("eta"),
        clip=column("clip", np.inf),
        threshold=np.where(
            column("clip", np.inf) < np.inf,
            column("threshold", np.nan),
            np.float32("nan"),
        ),
        repeats=column("repeats", 1, np.int32),
        last_std=column("last_std", 0),
        round_low=column("round_low", False, bool),
        candidates=_same(settings, "candidates", 1),
        sampler=sampler,
        passes="interval" if within else "two" if guided else "one",
    )


def _same(settings: Sequence[Mapping[str, Any]], key: str, default: Any) -> Any:
    """The value that a setting has for all examples of a batch."""
    values = {each.get(key, default) for each in settings}
    if len(values) > 1:
        raise UserError(f"{key} is {sorted(values)} in one batch: it must be the same")
    return values.pop()


def levels(
    diffusion: Mapping[str, Any], sampling: Mapping[str, Any]
) -> schedule.Schedule:
    """The schedule of the sampling steps."""
    table = schedule.make(diffusion["schedule"], diffusion["steps"])
    return schedule.respace(table, sampling["steps"])


def generate(
    apply: Apply,
    cond: Any,
    null: Any,
    draw: sample.Draw,
    diffusion: Mapping[str, Any],
    sampling: Sampling,
    state: sample.State,
    start: Int[Array, ""] | int = 0,
    stop: Int[Array, ""] | int | None = None,
    *,
    last: Apply | None = None,
    known: tuple[Array, Array] | None = None,
    x0_error: Float[Array, " t"] | None = None,
) -> sample.State:
    """Takes the steps from `start` up to `stop` towards samples of x0.

    Args:
      apply: the network, (x_t, timesteps, condition) -> output.
      cond: the condition, a pytree of [b, ...].
      null: the same without the condition, for guidance.
      draw: the noise.
      diffusion: see the module.
      sampling: the settings of each example.
      state: sampling.begin(x_T), or what the steps before left.
      start, stop: by default all steps.
      last: the network of the last step, where it has one of its own.
      known: (x0, mask) that broadcast over the samples: what is to stay where the mask
        is 0.
      x0_error: mean squared error of the network's x0 at each timestep in training; if
        given, "ddpm" has the analytic variance in place of the one in `diffusion`.

    Returns:
      The state; its x, after all steps, is the sample.
    """
    sampling = jax.tree.map(jnp.asarray, sampling)
    tables, channels = sampling.levels, state.x.shape[-1]
    denoise = denoiser(apply, cond, null, diffusion, sampling, channels)
    if last is not None:
        last_denoise = denoiser(last, cond, null, diffusion, sampling, channels)
        denoise = guide.change_last(denoise, last_denoise)
    if x0_error is not None:
        error = jnp.asarray(x0_error)[tables.timesteps]
        log_variance = process.analytic_log_variance(
            tables, error, sampling.clip[:, None]
        )
        denoise = guide.set_log_variance(denoise, log_variance)
    if known is not None:
        denoise = guide.keep_known(denoise, *known)
    match sampling.sampler:
        case "ddpm":
            step = sample.ddpm_step(denoise, tables, draw)
        case "ddim":
            step = sample.ddim_step(denoise, tables, draw, sampling.eta)
        case "dpm_solver":
            step = sample.dpm_solver_step(denoise, tables)
        case "unipc":
            step = sample.unipc_step(denoise, tables)
        case "repaint":
            step = sample.repaint_step(denoise, tables, draw, sampling.repeats)
    return sample.run(step, state, sampling.steps, start, stop)


def invert(
    apply: Apply,
    cond: Any,
    null: Any,
    diffusion: Mapping[str, Any],
    sampling: Sampling,
    state: sample.State,
    start: Int[Array, ""] | int = 0,
    stop: Int[Array, ""] | int | None = None,
) -> sample.State:
    """Takes steps towards the x_T from which "ddim" at eta 0 makes state.x.

    Arguments are those of `generate`.
    """
    sampling = jax.tree.map(jnp.asarray, sampling)
    channels = state.x.shape[-1]
    denoise = denoiser(apply, cond, null, diffusion, sampling, channels)
    step = sample.invert_step(denoise, sampling.levels)
    return sample.run(step, state, sampling.levels.steps, start, stop)


def denoiser(
    apply: Apply,
    cond: Any,
    null: Any,
    diffusion: Mapping[str, Any],
    sampling: Sampling,
    channels: int,
) -> sample.Denoiser:
    """The network as a denoiser of x with so many channels, guided and clipped."""
    low, high = sampling.interval.T
    return guide.denoiser(
        guide.classifier_free(
            apply,
            cond,
            null,
            1 if sampling.passes == "one" else sampling.guidance,
            channels=channels,
            interval=(low, high) if sampling.passes == "interval" else None,
        ),
        sampling.levels,
        predict=diffusion["predict"],
        variance=diffusion["variance"],
        transform=guide.limit_x0(sampling.clip, sampling.threshold),
    )
