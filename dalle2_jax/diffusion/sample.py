"""Samplers: from noise to data with a denoiser, and from data back to its noise.

A sampler knows a denoiser and a schedule. What steers it (guidance, clipping, known
pixels) is wrapped around the denoiser, in `guide`. Each is one `lax.scan` over the
schedule's levels and can stand inside a `jit`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dalle2_jax.diffusion.process import posterior_mean, to_eps
from dalle2_jax.diffusion.schedule import Schedule, at

X = Float[Array, "b ..."]


class Prediction(NamedTuple):
    """What is known about x_i: the expected data, and p(x_{i-1} | x_i)'s spread."""

    x0: X
    log_variance: Float[Array, "..."]  # broadcasts over x0


Denoiser = Callable[[X, Int[Array, ""]], Prediction]
Draw = Callable[[Int[Array, ""] | int], X]


def gaussian(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Draw:
    """Noise for pictures of `shape`, each from its own key.

    `draw(0)` is x_T, `draw(k)` the noise that step k = 1 … n-1 adds; all are standard
    normal, [b, *shape]. A picture's noise does not depend on its neighbours.
    """
    return lambda k: jax.vmap(
        lambda key: jax.random.normal(jax.random.fold_in(key, k), shape)
    )(keys)


def replay(noise: Float[Array, "steps b ..."]) -> Draw:
    """Noise that was drawn before, `noise[k]` for draw k."""
    return lambda k: noise[k]


def start(x: X, draw: Draw) -> Draw:
    """The noise of `draw`, but for x_T, which is `x`."""
    return lambda k: x if isinstance(k, int) and k == 0 else draw(k)


def ddpm(denoise: Denoiser, schedule: Schedule, x: X, draw: Draw) -> X:
    """Ancestral sampling (DDPM, algorithm 2).

    Args:
      denoise: gives x0 and the variance of each step.
      schedule: the levels to visit, n of them.
      x: x_T, `draw(0)` for a fresh sample.
      draw: noise for steps 1 … n-1; the last step adds none.

    Returns:
      Samples of x0, float32.
    """

    def step(x, i):
        x0, log_variance = denoise(x, i)
        mean = posterior_mean(schedule, x0, x, i)
        noise = draw(schedule.steps - i)
        return jnp.where(i > 0, mean + jnp.exp(0.5 * log_variance) * noise, mean)

    return _scan(step, x, _descending(schedule))


def ddim(
    denoise: Denoiser,
    schedule: Schedule,
    x: X,
    draw: Draw | None = None,
    eta: float | int | Float[Array, ""] = 0.0,
) -> X:
    """DDIM (Song et al. 2020, eq. 12): deterministic at eta 0, as noisy as DDPM at 1.

    Takes and returns what `ddpm` does; `draw` may be left out at eta 0. Where an eta
    above 1 asks for more noise than the level holds, all of its noise is fresh.
    """
    if draw is None and eta != 0:
        raise ValueError(f"eta is {eta}: its noise must come from somewhere; pass draw")

    # Of x_{i-1}'s noise, eta² (1 - ratio) is fresh (eq. 16). Where there is most, the
    # rest at eta 1 is some 1e-8, which float32 keeps as a ratio, not as a difference.
    ratio = schedule.snr * (1 - schedule.alpha_bar_prev) / schedule.alpha_bar_prev

    def step(x, i):
        x0 = denoise(x, i).x0
        noise = to_eps(schedule, "x0", x0, x, i)
        if draw is not None:
            kept = jnp.maximum(1 - eta**2 + eta**2 * at(ratio, i, x), 0)
            fresh = jnp.minimum(eta**2 * at(1 - ratio, i, x), 1)
            z = draw(schedule.steps - i)
            noise = jnp.sqrt(kept) * noise + jnp.sqrt(fresh) * z
        signal = at(np.sqrt(schedule.alpha_bar_prev), i, x)
        return signal * x0 + at(np.sqrt(1 - schedule.alpha_bar_prev), i, x) * noise

    return _scan(step, x, _descending(schedule))


def repaint(
    denoise: Denoiser, schedule: Schedule, x: X, draw: Draw, repeats: int = 1
) -> X:
    """`ddpm` with every step but the last taken several times (RePaint, algorithm 1).

    In between, noise takes x_{i-1} back to x_i, so that what is free has the time to
    agree with what `guide.keep_known` holds (Lugmayr et al. 2022, arXiv 2201.09865).

    Takes and returns what `ddpm` does; `draw` gives 2 · repeats pieces of noise for
    each step.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; a step is taken at least once")

    def step(x, i):
        def once(x, k):
            x0, log_variance = denoise(x, i)
            mean = posterior_mean(schedule, x0, x, i)
            before = mean + jnp.exp(0.5 * log_variance) * draw(k)
            beta = at(schedule.betas, i, x)
            again = jnp.sqrt(1 - beta) * before + jnp.sqrt(beta) * draw(k + 1)
            return again, before

        first = 1 + 2 * repeats * (schedule.steps - 1 - i)
        return jax.lax.scan(once, x, first + 2 * jnp.arange(repeats))[1][-1]

    x = _scan(step, x, _descending(schedule)[:-1])
    return denoise(x, jnp.int32(0)).x0


def invert(denoise: Denoiser, schedule: Schedule, x: X) -> X:
    """The x_T from which `ddim` at eta 0 makes the data `x`, as nearly as steps allow.

    Undoes the steps of `ddim` from the last to the first. Step i went along the noise
    that is predicted at x_i, which we don't know yet; what is predicted for level i at
    x_{i-1} takes its place (DDIM, section 4.3; Dhariwal and Nichol 2021, appendix F).
    """

    def step(x, i):
        eps = to_eps(schedule, "x0", denoise(x, i).x0, x, i)
        noise = at(np.sqrt(1 - schedule.alpha_bar_prev), i, x)
        x0 = (x - noise * eps) / at(np.sqrt(schedule.alpha_bar_prev), i, x)
        signal = at(np.sqrt(schedule.alpha_bar), i, x)
        return signal * x0 + at(np.sqrt(1 - schedule.alpha_bar), i, x) * eps

    return _scan(step, x, jnp.arange(schedule.steps))


def dpm_solver(denoise: Denoiser, schedule: Schedule, x: X) -> X:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), deterministic and second-order.

    Takes and returns what `ddim` does at eta 0. The first step and the last two are
    first-order: the first has no past; the last is infinitely long in log SNR, and the
    one before it so long that extrapolating from its past overshoots.
    """
    signal, noise = np.sqrt(schedule.alpha_bar), np.sqrt(1 - schedule.alpha_bar)
    signal_prev = np.sqrt(schedule.alpha_bar_prev)
    of_x = np.sqrt(1 - schedule.alpha_bar_prev) / noise
    of_x0 = signal_prev - signal * of_x  # -alpha (exp(-h) - 1)
    h = -np.diff(np.log(signal / noise))  # h[j] of the step from level j + 1 to j
    slope = np.zeros(schedule.steps)
    slope[2:-1] = h[1:-1] / (2 * h[2:])  # 1 / (2 r)

    def step(state, i):
        x, before = state
        x0 = denoise(x, i).x0
        ahead = x0 + at(slope, i, x) * (x0 - before)
        return at(of_x, i, x) * x + at(of_x0, i, x) * ahead, x0

    return _scan(step, (x, jnp.zeros_like(x)), _descending(schedule))[0]


def _descending(schedule: Schedule) -> Int[Array, " n"]:
    return jnp.arange(schedule.steps)[::-1]


def _scan(step, x, levels):
    x = jax.tree.map(jnp.float32, x)
    return jax.lax.scan(lambda x, i: (step(x, i), None), x, levels)[0]
