"""The diffusion process: what training and sampling compute at one noise level.

    x_i = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps                  (DDPM, eq. 4)

Arrays have the batch first and channels last. `i` indexes the schedule: int32, [b] or a
scalar. What a network predicts ("predict") is one of
  "eps"  the noise,
  "x0"   the data,
  "v"    sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0  (Salimans and Ho 2022).
The log variance of p(x_{i-1} | x_i) ("variance") is
  "fixed_small"    that of the posterior q(x_{i-1} | x_i, x_0),
  "fixed_large"    log beta,
  "learned_range"  predicted between the two, by channels that follow the prediction's.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float, Int

from dalle2_jax.diffusion.schedule import Levels, Schedule, at, expand
from dalle2_jax.errors import UserError

PREDICTS = ("eps", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")

Tables = Schedule | Levels
X = Float[Array, "..."]
Index = Int[Array, "*b"]


def q_sample(schedule: Tables, x0: X, i: Index, eps: X) -> X:
    """Diffuses `x0` to level `i` with the standard normal noise `eps`."""
    signal, noise = _scales(schedule, i, x0)
    return signal * x0 + noise * eps


def target(schedule: Tables, predict: str, x0: X, eps: X, i: Index) -> X:
    """Returns what the network should predict."""
    signal, noise = _scales(schedule, i, x0)
    match predict:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            return signal * eps - noise * x0
    raise _unknown("predict", predict, PREDICTS)


def to_x0(schedule: Tables, predict: str, output: X, x_t: X, i: Index) -> X:
    """Returns the x0 that a prediction at `x_t` implies."""
    signal, noise = _scales(schedule, i, x_t)
    match predict:
        case "eps":
            return (x_t - noise * output) / signal
        case "x0":
            return output
        case "v":
            return signal * x_t - noise * output
    raise _unknown("predict", predict, PREDICTS)


def to_eps(schedule: Tables, predict: str, output: X, x_t: X, i: Index) -> X:
    """Returns the noise that a prediction at `x_t` implies."""
    signal, noise = _scales(schedule, i, x_t)
    match predict:
        case "eps":
            return output
        case "x0":
            return (x_t - signal * output) / noise
        case "v":
            return noise * x_t + signal * output
    raise _unknown("predict", predict, PREDICTS)


def posterior_mean(schedule: Tables, x0: X, x_t: X, i: Index) -> X:
    """Mean of q(x_{i-1} | x_i, x_0) (DDPM, eq. 7)."""
    return at(schedule.coef_x0, i, x_t) * x0 + at(schedule.coef_x_t, i, x_t) * x_t


def split(output: X, variance: str) -> tuple[X, X | None]:
    """Parts the network's output into the prediction and v, None unless learned."""
    match variance:
        case "fixed_small" | "fixed_large":
            return output, None
        case "learned_range":
            prediction, v = jnp.split(output, 2, axis=-1)
            return prediction, v
    raise _unknown("variance", variance, VARIANCES)


def log_variance(
    schedule: Tables, variance: str, v: X | None, x_t: X, i: Index
) -> Float[Array, "..."]:
    """Log variance of p(x_{i-1} | x_i), of a shape that broadcasts over `x_t`.

    At i = 0 the posterior has no variance, and that of i = 1 stands in for it.
    """
    small = at(schedule.posterior_log_variance, i, x_t)
    match variance:
        case "fixed_small":
            return small
        case "fixed_large":
            return jnp.where(expand(i, x_t) == 0, small, at(schedule.log_betas, i, x_t))
        case "learned_range":
            # Nichol and Dhariwal 2021, eq. 15, with v in [-1, 1] (not enforced).
            fraction = (v + 1) / 2
            most = at(schedule.log_betas, i, x_t)
            return fraction * most + (1 - fraction) * small
    raise _unknown("variance", variance, VARIANCES)


def analytic_log_variance(
    schedule: Tables,
    x0_error: Float[Array, "*b n"],
    limit: float | int | None | Float[Array, "b 1"] = None,
) -> Float[Array, "*b n"]:
    """Log of the variance of p(x_{i-1} | x_i) that fits the data best, at each level.

    Analytic-DPM (Bao et al. 2022, arXiv 2201.06503), theorem 1, for DDPM's posterior:
    its variance, and that of its mean for all x_0 that x_i leaves open. Theirs is
    E‖x_0 - x̂_0‖² / d = (1 - alpha_bar) / alpha_bar · (1 - E‖ε̂‖² / d), which for a
    network that isn't perfect is the error that it makes (arXiv 2206.07309, section 3).

    Args:
      x0_error: E‖x_0 - x̂_0‖² / d at each level of `schedule`. It is clipped to what it
        can be for any data, and for data within ±`limit` (theorem 2).
    """
    most = jnp.asarray(schedule.most_x0_error, jnp.float32)
    if limit is not None:
        most = jnp.minimum(most, jnp.square(jnp.float32(limit)))
    error = jnp.clip(x0_error, 0, most)
    of_x0 = jnp.square(jnp.asarray(schedule.coef_x0, jnp.float32))  # posterior_mean's
    variance = jnp.asarray(schedule.posterior_variance, jnp.float32) + of_x0 * error
    return jnp.log(jnp.maximum(variance, 1e-20))


def loss(
    schedule: Schedule,
    output: X,
    x0: X,
    x_t: X,
    eps: X,
    i: Int[Array, " b"],
    *,
    predict: str,
    variance: str,
    min_snr_gamma: float | int | None = None,
    snr_power: float | int | None = None,
) -> Float[Array, " b"]:
    """The training loss of each example, float32.

    The mean squared error of the target and, where the variance is learned, the
    variational bound in bits per dimension, times steps / 1000 and with no gradient to
    the prediction: L_hybrid (Nichol and Dhariwal 2021, eq. 16) as guided-diffusion
    scales it.

    Args:
      schedule: the one that `i` indexes.
      output: of the network at `x_t`, [b, ..., c], or [b, ..., 2c] with learned range.
      x0: data, [b, ..., c], in [-1, 1] with learned range (8-bit images).
      x_t: `q_sample(schedule, x0, i, eps)`.
      eps: standard normal noise.
      i: level of each example.
      min_snr_gamma: caps the squared error's weight, which in terms of x0 is the
        signal-to-noise ratio, at this value (Hang et al. 2023; 5 is theirs).
      snr_power: of the signal-to-noise ratio in that weight, 1 if it alone is None;
        0.5 is about one over the error, so that no level outweighs the others. It is
        P2's (Choi et al. 2022) with k = 0 and gamma = 1 - snr_power. With neither of
        the two there are no weights.

    Raises:
      UserError: `predict` or `variance` is unknown.
      ValueError: the output's channels don't fit `variance`.
    """
    prediction, v = split(output.astype(jnp.float32), variance)
    if prediction.shape != x_t.shape:
        raise ValueError(
            f"the network predicts {prediction.shape} for x_t {x_t.shape} with variance"
            f" {variance!r}; only learned_range takes twice the channels"
        )
    error = _mean(jnp.square(prediction - target(schedule, predict, x0, eps, i)))
    if min_snr_gamma is not None or snr_power is not None:
        weight = _snr_weight(schedule, predict, snr_power, min_snr_gamma)
        error *= at(weight, i, error)
    if v is None:
        return error
    frozen = to_x0(schedule, predict, jax.lax.stop_gradient(prediction), x_t, i)
    bound = variational_bound(schedule, frozen, v, x0, x_t, i)
    return error + bound * (schedule.steps / 1000)


def variational_bound(
    schedule: Schedule, predicted_x0: X, v: X, x0: X, x_t: X, i: Int[Array, " b"]
) -> Float[Array, " b"]:
    """The term of the variational bound at level `i`, in bits per dimension.

    KL(q(x_{i-1} | x_i, x_0) ‖ p(x_{i-1} | x_i)), and -log p(x_0 | x_1) at i = 0, where
    p is a normal integrated over the bins of 8-bit values (DDPM, eqs. 5 and 13).
    """
    mean = posterior_mean(schedule, predicted_x0, x_t, i)
    log_var = log_variance(schedule, "learned_range", v, x_t, i)
    true_mean = posterior_mean(schedule, x0, x_t, i)
    true_log_var = log_variance(schedule, "fixed_small", None, x_t, i)
    difference = true_log_var - log_var
    kl = 0.5 * (
        jnp.exp(difference)
        - 1
        - difference
        + jnp.square(true_mean - mean) * jnp.exp(-log_var)
    )
    nll = -_log_likelihood(x0, mean, 0.5 * log_var)
    return jnp.where(i == 0, _mean(nll), _mean(kl)) / math.log(2)


def _log_likelihood(x: X, mean: X, log_sigma: X) -> X:
    """log P(bin of x) under a normal, for 8-bit values mapped to [-1, 1].

    The outermost bins reach to infinity. Tails are mirrored to the left, where the
    logarithm of the normal's distribution function keeps its precision.
    """
    width, sigma = 1 / 255, jnp.exp(log_sigma)
    off = jnp.abs(x - mean)
    upper = log_ndtr((width - off) / sigma)
    lower = log_ndtr((-width - off) / sigma)
    inner = upper + jnp.log(-jnp.expm1(lower - upper))
    outer = log_ndtr((width - jnp.sign(x) * (x - mean)) / sigma)
    return jnp.where(jnp.abs(x) > 0.999, outer, inner)


def _snr_weight(
    schedule: Schedule,
    predict: str,
    power: float | int | None,
    most: float | int | None,
) -> Float[np.ndarray, " n"]:
    """Weights that make the squared error that of x0 times min(SNR^power, most)."""
    snr = schedule.snr
    of_x0 = {"eps": snr, "x0": 1, "v": snr + 1}
    weight = snr if power is None else snr**power
    return np.minimum(weight, np.inf if most is None else most) / of_x0[predict]


def _scales(schedule: Tables, i: Index, x: X) -> tuple[X, X]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar), to broadcast over `x`."""
    return at(schedule.signal, i, x), at(schedule.noise, i, x)


def _mean(x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    return x.mean(axis=range(1, x.ndim))


def _unknown(name: str, value: str, allowed: tuple[str, ...]) -> UserError:
    return UserError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")
