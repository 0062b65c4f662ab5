"""Noise schedules and the choice of the steps that a sampler visits.

A schedule is a list of noise levels, index 0 the least noisy. Its tables are float64
numpy arrays: the last level of the cosine schedule keeps 2.4e-9 of the signal, and
1 - alpha_bar of the first is 4e-5, of which float32 would lose three digits. `at` turns
entries into float32 where arithmetic begins. Close over a schedule under `jit`; it is
made of constants, not of arguments.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dalle2_jax.errors import UserError

Table = Float[np.ndarray, " n"]


class Schedule(NamedTuple):
    """Noise levels of a discrete diffusion process, index i = 0 … n-1.

    Two tables say everything; the rest follows from them, for respaced levels too.

    timesteps: what the network is told at each level, int32, strictly increasing.
    alpha_bar: the part of the signal's variance that is left, strictly decreasing.
    """

    timesteps: Int[np.ndarray, " n"]
    alpha_bar: Table

    @property
    def steps(self) -> int:
        """The number of levels (`len` of a NamedTuple counts its fields)."""
        return len(self.timesteps)

    @property
    def alpha_bar_prev(self) -> Table:
        """alpha_bar one step nearer to the data, which itself is at 1."""
        return np.append(1.0, self.alpha_bar[:-1])

    @property
    def betas(self) -> Table:
        """Variance of the noise that each step adds."""
        return 1 - self.alpha_bar / self.alpha_bar_prev

    @property
    def snr(self) -> Table:
        """Signal-to-noise ratio."""
        return self.alpha_bar / (1 - self.alpha_bar)

    @property
    def posterior_variance(self) -> Table:
        """Variance of q(x_{i-1} | x_i, x_0), 0 at i = 0 (DDPM, eq. 7)."""
        return self.betas * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)

    @property
    def posterior_log_variance(self) -> Table:
        """Its logarithm, with the entry of i = 1 in place of log 0 at i = 0."""
        # A single level has no second entry; its beta bounds the variance from above.
        first = self.posterior_variance[1] if self.steps > 1 else self.betas[0]
        return np.log(np.append(first, self.posterior_variance[1:]))


def at(
    table: Table, i: Int[Array, "*b"], x: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns the entries `table[i]` in float32, shaped to broadcast over `x`.

    `i` is a scalar, or one index for each example on the first axis of `x`.
    """
    entries = jnp.asarray(table, jnp.float32)[i]
    return entries.reshape(entries.shape + (1,) * (x.ndim - entries.ndim))


def cosine(steps: int = 1000) -> Schedule:
    """The cosine schedule (Nichol and Dhariwal 2021, eq. 17), "squaredcos_cap_v2"."""
    _check_steps(steps, least=1)
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return _from_betas(np.minimum(1 - f[1:] / f[:-1], 0.999))


def linear(steps: int = 1000) -> Schedule:
    """DDPM's linear schedule, its betas scaled for any steps to end equally noisy."""
    _check_steps(steps, least=21)  # At 20 the last beta is 1: no signal is left.
    scale = 1000 / steps
    return _from_betas(np.linspace(scale * 1e-4, scale * 2e-2, steps))


def make(name: str, steps: int = 1000) -> Schedule:
    """Returns the schedule called `name`: "cosine" or "linear"."""
    makers = {"cosine": cosine, "linear": linear}
    if name not in makers:
        raise UserError(f"schedule is {name!r}; choose one of {', '.join(makers)}")
    return makers[name](steps)


def respace(schedule: Schedule, spec: int | str | Sequence[int]) -> Schedule:
    """Returns the schedule that visits only some of the levels of `schedule`.

    The network is told the same timesteps, and the betas follow from the alpha_bar that
    are left (Nichol and Dhariwal 2021, eq. 19).

    Args:
      schedule: n levels.
      spec: which of them.
        25 or "25": that many, evenly from the first to the last (as Karlo does).
        "10,10,3,2,2": n is cut into as many equal sections, and each gives that many.
        "ddim25": that many, by the smallest integer stride from 0 that gives them.
        "fast27": GLIDE's 27 steps for its upsampler.
        [0, 10, 999]: these indices, which are the timesteps where `schedule` is full.

    Raises:
      UserError: the spec can't be read, or asks for levels that do not exist.
    """
    kept = _indices(schedule.steps, spec)
    return Schedule(schedule.timesteps[kept], schedule.alpha_bar[kept])


def _check_steps(steps: int, least: int) -> None:
    if steps < least:
        raise UserError(f"the schedule has {steps} steps; it needs at least {least}")


def _from_betas(betas: Table) -> Schedule:
    return Schedule(np.arange(len(betas), dtype=np.int32), np.cumprod(1 - betas))


def _indices(n: int, spec: int | str | Sequence[int]) -> Int[np.ndarray, " kept"]:
    if isinstance(spec, str):
        return _parse(n, spec)
    if isinstance(spec, int):
        # A single step has to start where sampling does, at pure noise.
        return np.array([n - 1]) if spec == 1 else _spread(n, spec)
    kept = np.asarray(spec)
    if kept.dtype.kind != "i" or (np.diff(kept, prepend=-1, append=n) <= 0).any():
        raise UserError(
            f"steps are {list(spec)}; give integers that increase within 0 … {n - 1}"
        )
    return kept


def _parse(n: int, spec: str) -> Int[np.ndarray, " kept"]:
    if spec == "fast27":
        kept = _parse(n, "10,10,3,2,2")
        kept[-1] = n - 3  # "Help reduce DDIM artifacts from noisiest timesteps" (GLIDE)
        return kept
    if re.fullmatch(r"ddim\d+", spec):
        return _strided(n, int(spec.removeprefix("ddim")))
    if not re.fullmatch(r"\d+(,\d+)*", spec):
        raise UserError(
            f'steps are {spec!r}; write a count, "10,10,3,2,2", "ddim25" or "fast27"'
        )
    counts = [int(count) for count in spec.split(",")]
    if len(counts) == 1:
        return _indices(n, counts[0])
    sections = np.array_split(np.arange(n), len(counts))
    taken = [s[_spread(len(s), c)] for s, c in zip(sections, counts, strict=True)]
    return np.concatenate(taken)


def _spread(n: int, count: int) -> Int[np.ndarray, " count"]:
    """`count` of n indices from the first to the last, halves rounded to even."""
    if not 1 <= count <= n:
        raise UserError(f"{count} steps out of {n}; take at least 1 and at most {n}")
    return np.round(np.arange(count) * ((n - 1) / max(count - 1, 1))).astype(int)


def _strided(n: int, count: int) -> Int[np.ndarray, " count"]:
    for stride in range(1, n + 1):
        if len(range(0, n, stride)) == count:
            return np.arange(0, n, stride)
    raise UserError(f'no stride takes {count} steps out of {n}; try "{count}"')
