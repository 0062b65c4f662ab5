"""Samplers: from noise to data with a denoiser, and from data back to its noise.

A sampler knows a denoiser and the noise levels. What steers it (guidance, clipping,
known pixels) is wrapped around the denoiser, in `guide`. Each is a step, `ddpm_step`
and so on, which `run` takes again and again in one loop that can stand inside a `jit`
and whose length is data: examples of one batch may have different levels, and one whose
steps are done stays as it is while the others go on. `run` from one step to another and
then on is `run` from the first to the last: for progress, previews and cancelling.
`ddpm` and so on are whole loops.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dalle2_jax.diffusion.process import Tables, posterior_mean, to_eps
from dalle2_jax.diffusion.schedule import at, expand

X = Float[Array, "b ..."]
Index = Int[Array, "*b"]
Count = Int[Array | np.ndarray, "*b"] | int


class Prediction(NamedTuple):
    """What is known about x_i: the expected data, and p(x_{i-1} | x_i)'s spread."""

    x0: X
    log_variance: Float[Array, "..."]  # broadcasts over x0


class State(NamedTuple):
    """Between two steps.

    Attributes:
      x: x_i.
      x0: the data that the last step expected.
      past: what "unipc" remembers: x_i and x0 before the last step. () for the others.
    """

    x: X
    x0: X
    past: tuple[X, X] | tuple[()] = ()


Denoiser = Callable[[X, Index], Prediction]
Draw = Callable[[Int[Array, ""] | int], X]
Step = Callable[[State, Int[Array, ""]], State]  # step k = 0, 1, ... of a sampler


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


def begin(x: X, remember: bool = False) -> State:
    """The state before the first step, at x_T (or, for `invert_step`, at the data).

    `remember` makes room for what `unipc_step` needs.
    """
    x = x.astype(jnp.float32)
    zeros = jnp.zeros_like(x)
    return State(x, zeros, (zeros, zeros) if remember else ())


def run(
    step: Step,
    state: State,
    count: Count,
    start: Int[Array, ""] | int = 0,
    stop: Int[Array, ""] | int | None = None,
) -> State:
    """Takes the steps from `start` up to `stop`, which is not taken.

    Args:
      count: how many steps each example takes in all, [b] or one number for all; after
        them it stays as it is.
      stop: by default the largest count.
    """

    def body(k, state):
        after = step(state, jnp.int32(k))
        if jnp.ndim(count) == 0:
            return after
        return jax.tree.map(
            lambda new, old: jnp.where(expand(k < count, new), new, old), after, state
        )

    if stop is None:
        stop = jnp.max(jnp.asarray(count))
    return jax.lax.fori_loop(start, stop, body, state)


def ddpm(denoise: Denoiser, schedule: Tables, x: X, draw: Draw) -> X:
    """Ancestral sampling (DDPM, algorithm 2).

    Args:
      denoise: gives x0 and the variance of each step.
      schedule: the levels to visit, n of them.
      x: x_T, `draw(0)` for a fresh sample.
      draw: noise for steps 1 … n-1; the last step adds none.

    Returns:
      Samples of x0, float32.
    """
    return run(ddpm_step(denoise, schedule, draw), begin(x), schedule.steps).x


def ddpm_step(denoise: Denoiser, schedule: Tables, draw: Draw) -> Step:
    """One step of `ddpm`."""

    def step(state, k):
        i, x = _level(schedule, k), state.x
        x0, log_variance = denoise(x, i)
        mean = posterior_mean(schedule, x0, x, i)
        noisy = mean + jnp.exp(0.5 * log_variance) * draw(k + 1)
        return State(jnp.where(expand(i > 0, x), noisy, mean), x0)

    return step


def ddim(
    denoise: Denoiser,
    schedule: Tables,
    x: X,
    draw: Draw | None = None,
    eta: float | int | Float[Array, "*b"] = 0.0,
) -> X:
    """DDIM (Song et al. 2020, eq. 12): deterministic at eta 0, as noisy as DDPM at 1.

    Takes and returns what `ddpm` does; `draw` may be left out at eta 0. Where an eta
    above 1 asks for more noise than the level holds, all of its noise is fresh.
    """
    if draw is None and eta != 0:
        raise ValueError(f"eta is {eta}: its noise must come from somewhere; pass draw")
    return run(ddim_step(denoise, schedule, draw, eta), begin(x), schedule.steps).x


def ddim_step(
    denoise: Denoiser,
    schedule: Tables,
    draw: Draw | None,
    eta: float | int | Float[Array, "*b"],
) -> Step:
    """One step of `ddim`; `eta` is one number for all or one for each example."""

    def step(state, k):
        i, x = _level(schedule, k), state.x
        x0 = denoise(x, i).x0
        noise = to_eps(schedule, "x0", x0, x, i)
        if draw is not None:
            # Of x_{i-1}'s noise, eta² (1 - ddim_kept) is fresh (eq. 16).
            part = expand(jnp.square(jnp.float32(eta)), x)
            kept = jnp.maximum(1 - part + part * at(schedule.ddim_kept, i, x), 0)
            fresh = jnp.minimum(part * at(schedule.ddim_fresh, i, x), 1)
            noise = jnp.sqrt(kept) * noise + jnp.sqrt(fresh) * draw(k + 1)
        signal = at(schedule.signal_prev, i, x)
        return State(signal * x0 + at(schedule.noise_prev, i, x) * noise, x0)

    return step


def repaint(
    denoise: Denoiser, schedule: Tables, x: X, draw: Draw, repeats: Count = 1
) -> X:
    """`ddpm` with every step but the last taken several times (RePaint, algorithm 1).

    In between, noise takes x_{i-1} back to x_i, so that what is free has the time to
    agree with what `guide.keep_known` holds (Lugmayr et al. 2022, arXiv 2201.09865).

    Takes and returns what `ddpm` does; `draw` gives 2 · repeats pieces of noise for
    each step.
    """
    if isinstance(repeats, int) and repeats < 1:
        raise ValueError(f"repeats is {repeats}; a step is taken at least once")
    step = repaint_step(denoise, schedule, draw, repeats)
    return run(step, begin(x), repaint_count(schedule, repeats)).x


def repaint_count(schedule: Tables, repeats: Count) -> Count:
    """How many steps `repaint` takes."""
    return (schedule.steps - 1) * repeats + 1


def repaint_step(
    denoise: Denoiser, schedule: Tables, draw: Draw, repeats: Count
) -> Step:
    """One step of `repaint`: every `repeats`-th leads on, the others back again."""

    def step(state, k):
        i, x = _level(schedule, k // repeats), state.x
        x0, log_variance = denoise(x, i)
        mean = posterior_mean(schedule, x0, x, i)
        before = mean + jnp.exp(0.5 * log_variance) * draw(1 + 2 * k)
        again = at(schedule.step_signal, i, x) * before
        again += at(schedule.step_noise, i, x) * draw(2 + 2 * k)
        x = jnp.where(expand(k % repeats == repeats - 1, x), before, again)
        return State(jnp.where(expand(i > 0, x), x, x0), x0)

    return step


def invert(denoise: Denoiser, schedule: Tables, x: X) -> X:
    """The x_T from which `ddim` at eta 0 makes the data `x`, as nearly as steps allow.

    Undoes the steps of `ddim` from the last to the first. Step i went along the noise
    that is predicted at x_i, which we don't know yet; what is predicted for level i at
    x_{i-1} takes its place (DDIM, section 4.3; Dhariwal and Nichol 2021, appendix F).
    """
    return run(invert_step(denoise, schedule), begin(x), schedule.steps).x


def invert_step(denoise: Denoiser, schedule: Tables) -> Step:
    """One step of `invert`."""

    def step(state, k):
        i, x = _within(schedule, k), state.x
        predicted = denoise(x, i).x0
        eps = to_eps(schedule, "x0", predicted, x, i)
        x0 = x - at(schedule.noise_prev, i, x) * eps
        x0 = x0 / at(schedule.signal_prev, i, x)
        noisy = at(schedule.signal, i, x) * x0 + at(schedule.noise, i, x) * eps
        return State(noisy, predicted)

    return step


def dpm_solver(denoise: Denoiser, schedule: Tables, x: X) -> X:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), deterministic and second-order.

    Takes and returns what `ddim` does at eta 0. Some steps are first-order, see
    Schedule.solver_slope.
    """
    return run(dpm_solver_step(denoise, schedule), begin(x), schedule.steps).x


def dpm_solver_step(denoise: Denoiser, schedule: Tables) -> Step:
    """One step of `dpm_solver`."""

    def step(state, k):
        i, x = _level(schedule, k), state.x
        x0 = denoise(x, i).x0
        ahead = x0 + at(schedule.solver_slope, i, x) * (x0 - state.x0)
        x = at(schedule.solver_x, i, x) * x + at(schedule.solver_x0, i, x) * ahead
        return State(x, x0)

    return step


def unipc(denoise: Denoiser, schedule: Tables, x: X) -> X:
    """UniPC of order 2 (Zhao et al. 2023, arXiv 2302.04867), deterministic.

    `dpm_solver`, each of whose steps is corrected by what the next one predicts anyway.
    Takes and returns what `dpm_solver` does.
    """
    step = unipc_step(denoise, schedule)
    return run(step, begin(x, remember=True), schedule.steps).x


def unipc_step(denoise: Denoiser, schedule: Tables) -> Step:
    """One step of `unipc`."""

    def step(state, k):
        i, (x_before, x0_before) = _level(schedule, k), state.past
        x = state.x
        x0 = denoise(x, i).x0
        change = at(schedule.corrector_past, i, x) * (x0_before - state.x0)
        change += at(schedule.corrector_here, i, x) * (x0 - state.x0)
        corrected = at(schedule.corrector_x, i, x) * x_before
        corrected += at(schedule.corrector_x0, i, x) * (state.x0 + change)
        x = jnp.where(k > 0, corrected, x)
        ahead = x0 + at(schedule.solver_slope, i, x) * (x0 - state.x0)
        following = at(schedule.solver_x, i, x) * x
        following += at(schedule.solver_x0, i, x) * ahead
        return State(following, x0, (x, state.x0))

    return step


def _level(schedule: Tables, k: Int[Array, "..."]) -> Int[Array, "..."]:
    """The level at which step k begins: the noisiest first; 0 for one that is done."""
    return jnp.maximum(schedule.steps - 1 - k, 0)


def _within(schedule: Tables, k: Int[Array, "..."]) -> Int[Array, "..."]:
    """Level k, or the last for an example that has fewer."""
    return jnp.minimum(k, schedule.steps - 1)
