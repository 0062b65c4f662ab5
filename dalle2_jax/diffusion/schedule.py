"""Noise schedules and the choice of the steps that a sampler visits.

A schedule is a list of noise levels, index 0 the least noisy. Its tables are float64
numpy arrays: the last level of the cosine schedule keeps 2.4e-9 of the signal, and
1 - alpha_bar of the first is 4e-5, of which float32 would lose three digits. `at` turns
entries into float32 where arithmetic begins.

A `Schedule` is made of constants: close over it under `jit`. `Levels` are the same
tables of several schedules as float32 arguments of a compiled program, so that another
number of steps is other data and not another program. The formulas of `process` and
`sample` read either.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dalle2_jax.errors import UserError

Table = Float[np.ndarray, " n"]
Entries = Float[Array | np.ndarray, " n"] | Float[Array | np.ndarray, "b n"]


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
    def signal(self) -> Table:
        """sqrt(alpha_bar), the factor of x_0 in x_i."""
        return np.sqrt(self.alpha_bar)

    @property
    def noise(self) -> Table:
        """sqrt(1 - alpha_bar), the standard deviation of the noise in x_i."""
        return np.sqrt(1 - self.alpha_bar)

    @property
    def signal_prev(self) -> Table:
        """`signal` one step nearer to the data."""
        return np.sqrt(self.alpha_bar_prev)

    @property
    def noise_prev(self) -> Table:
        """`noise` one step nearer to the data."""
        return np.sqrt(1 - self.alpha_bar_prev)

    @property
    def step_signal(self) -> Table:
        """sqrt(1 - beta), the factor of x_{i-1} in x_i."""
        return np.sqrt(1 - self.betas)

    @property
    def step_noise(self) -> Table:
        """sqrt(beta), the standard deviation of the noise that a step adds."""
        return np.sqrt(self.betas)

    @property
    def coef_x0(self) -> Table:
        """Factor of x_0 in the mean of q(x_{i-1} | x_i, x_0) (DDPM, eq. 7)."""
        return self.signal_prev * self.betas / (1 - self.alpha_bar)

    @property
    def coef_x_t(self) -> Table:
        """Factor of x_i in the mean of q(x_{i-1} | x_i, x_0) (DDPM, eq. 7)."""
        return self.step_signal * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)

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

    @property
    def log_betas(self) -> Table:
        """log beta, the largest log variance of a step."""
        return np.log(self.betas)

    @property
    def most_x0_error(self) -> Table:
        """(1 - alpha_bar) / alpha_bar, the largest E‖x_0 - x̂_0‖² / d for any data."""
        return 1 / self.snr

    @property
    def ddim_kept(self) -> Table:
        """Part of x_{i-1}'s noise variance that DDIM at eta 1 keeps (DDIM, eq. 16).

        At the noisiest level it is some 1e-8, which float32 holds as a ratio and not as
        a difference.
        """
        return self.snr * (1 - self.alpha_bar_prev) / self.alpha_bar_prev

    @property
    def ddim_fresh(self) -> Table:
        """The other part: fresh noise at eta 1."""
        return 1 - self.ddim_kept

    @property
    def solver_x(self) -> Table:
        """Factor of x_i in a step of DPM-Solver++ (Lu et al. 2022, algorithm 2)."""
        return self.noise_prev / self.noise

    @property
    def solver_x0(self) -> Table:
        """Factor of the data in that step: -alpha (exp(-h) - 1)."""
        return self.signal_prev - self.signal * self.solver_x

    @property
    def solver_slope(self) -> Table:
        """1 / (2 r), by which that step extrapolates; 0 where it is first-order.

        The first step is first-order because it has no past. So are the last two: the
        last is infinitely long in log SNR, and the one before it is so long that
        extrapolating overshoots.
        """
        h = -np.diff(np.log(self.signal / self.noise))  # h[j]: level j + 1 to j
        slope = np.zeros(self.steps)
        slope[2:-1] = h[1:-1] / (2 * h[2:])
        return slope

    @property
    def corrector_x(self) -> Table:
        """`solver_x` of the step that led to each level; none led to the noisiest."""
        return np.append(self.solver_x[1:], 0)

    @property
    def corrector_x0(self) -> Table:
        """`solver_x0` of the step that led to each level."""
        return np.append(self.solver_x0[1:], 0)

    @property
    def corrector_past(self) -> Table:
        """Weight of the data two steps before in UniPC's corrector: `_corrector`."""
        return self._corrector[0]

    @property
    def corrector_here(self) -> Table:
        """Weight of the data at the level itself in UniPC's corrector."""
        return self._corrector[1]

    @property
    def _corrector(self) -> tuple[Table, Table]:
        """Weights of UniC-p with B(h) = exp(h) - 1 (Zhao et al. 2023, section 3.2).

        Of the differences from the data one step before. p = 2, but p = 1 after the
        first step and at the last level, where the predictor is first-order, too.
        """
        past, here = np.zeros(self.steps), np.full(self.steps, 0.5)
        log_snr = np.log(self.signal / self.noise)
        for i in range(1, self.steps - 2):
            h = log_snr[i] - log_snr[i + 1]
            r = (log_snr[i + 2] - log_snr[i + 1]) / h
            phi = 1 / -h - 1 / np.expm1(-h)
            right = [phi, (phi / -h - 0.5 / np.expm1(-h)) * 2]
            past[i], here[i] = np.linalg.solve([[1, 1], [r, 1]], right)
            past[i] /= r
        return past, here


class Levels(NamedTuple):
    """The tables of b schedules, for one compiled program; see `stack`.

    steps: how many levels each has, [b].
    timesteps and the others: as of Schedule; [b, n], n at least the largest of steps.
    """

    steps: Int[Array, " b"]
    timesteps: Int[Array, "b n"]
    signal: Float[Array, "b n"]
    noise: Float[Array, "b n"]
    signal_prev: Float[Array, "b n"]
    noise_prev: Float[Array, "b n"]
    step_signal: Float[Array, "b n"]
    step_noise: Float[Array, "b n"]
    coef_x0: Float[Array, "b n"]
    coef_x_t: Float[Array, "b n"]
    posterior_variance: Float[Array, "b n"]
    posterior_log_variance: Float[Array, "b n"]
    log_betas: Float[Array, "b n"]
    most_x0_error: Float[Array, "b n"]
    ddim_kept: Float[Array, "b n"]
    ddim_fresh: Float[Array, "b n"]
    solver_x: Float[Array, "b n"]
    solver_x0: Float[Array, "b n"]
    solver_slope: Float[Array, "b n"]
    corrector_x: Float[Array, "b n"]
    corrector_x0: Float[Array, "b n"]
    corrector_past: Float[Array, "b n"]
    corrector_here: Float[Array, "b n"]


def stack(schedules: Sequence[Schedule], length: int) -> Levels:
    """Returns the tables of schedules, each padded to `length` by its last entry.

    The tables are computed in float64 and rounded once. They are numpy arrays.
    """
    rows = [
        _padded(schedule.timesteps.tobytes(), schedule.alpha_bar.tobytes(), length)
        for schedule in schedules
    ]
    return Levels(*(np.stack(column) for column in zip(*rows, strict=True)))


@functools.lru_cache(maxsize=256)
def _padded(timesteps: bytes, alpha_bar: bytes, length: int) -> Levels:
    """One row of `stack`."""
    schedule = Schedule(
        np.frombuffer(timesteps, np.int32), np.frombuffer(alpha_bar, np.float64)
    )
    padding = (0, length - schedule.steps)

    def row(name: str) -> np.ndarray:
        table = np.asarray(getattr(schedule, name))
        dtype = np.int32 if name == "timesteps" else np.float32
        return np.pad(table, padding, mode="edge").astype(dtype)

    return Levels(np.int32(schedule.steps), *map(row, Levels._fields[1:]))


def at(
    table: Entries, i: Int[Array | np.ndarray, "*b"] | int, x: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns the entries `table[i]` in float32, shaped to broadcast over `x`.

    `i` is a scalar, or one index for each example on the first axis of `x`, and so is
    the table: one for all [n], or one for each [b, n].
    """
    return expand(pick(jnp.asarray(table, jnp.float32), i), x)


def pick(table: Array, i: Int[Array | np.ndarray, "*b"] | int) -> Array:
    """Returns `table[i]`, of one table for all [n] or one for each example [b, n]."""
    if table.ndim == 1:
        return table[i]
    i = jnp.broadcast_to(i, table.shape[:1])
    return jnp.take_along_axis(table, i[:, None], axis=1)[:, 0]


def expand(value: Array | float | int, x: Float[Array, "..."]) -> Array:
    """Shapes a number for all, or one for each example, to broadcast over `x`."""
    return jnp.reshape(value, jnp.shape(value) + (1,) * (x.ndim - jnp.ndim(value)))


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


@functools.cache
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
