"""Conversions, losses and their weights against formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from dalle2_jax.diffusion import process, schedule
from dalle2_jax.errors import UserError

FULL = schedule.cosine(1000)
TEN = schedule.respace(FULL, 10)
LEVELS = np.array([0, 1, 10, 300, 700, 998, 999])
PREDICTS = ["eps", "x0", "v"]
SHAPE = (len(LEVELS), 4, 4, 3)


def normal(seed, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape)


def images(seed, shape=SHAPE):
    """8-bit values mapped to [-1, 1], the extremes among them."""
    pixels = np.random.default_rng(seed).integers(0, 256, shape)
    pixels[:, 0, 0], pixels[:, 0, 1] = 0, 255
    return pixels / 127.5 - 1


def f32(x):
    return jnp.asarray(x, jnp.float32)


def scales(table, i):
    alpha_bar = table.alpha_bar[i][:, None, None, None]
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def diffused(table, i, x0, eps):
    signal, noise = scales(table, i)
    return signal * x0 + noise * eps


def targets(table, i, x0, eps):
    signal, noise = scales(table, i)
    return {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}


def test_q_sample():
    x0, eps = normal(0), normal(1)
    x_t = process.q_sample(FULL, f32(x0), jnp.asarray(LEVELS), f32(eps))
    np.testing.assert_allclose(x_t, diffused(FULL, LEVELS, x0, eps), atol=1e-6)


@pytest.mark.parametrize("predict", PREDICTS)
def test_conversions(predict):
    x0, eps, i = normal(0), normal(1), jnp.asarray(LEVELS)
    x_t = diffused(FULL, LEVELS, x0, eps)
    output = targets(FULL, LEVELS, x0, eps)[predict]
    found = process.target(FULL, predict, f32(x0), f32(eps), i)
    np.testing.assert_allclose(found, output, atol=1e-6)
    # float32 inputs are off by 1e-7, and the division enlarges that.
    signal, noise = scales(FULL, LEVELS)
    found = process.to_x0(FULL, predict, f32(output), f32(x_t), i)
    assert (np.abs(found - x0) < 1e-6 / (signal if predict == "eps" else 1)).all()
    found = process.to_eps(FULL, predict, f32(output), f32(x_t), i)
    assert (np.abs(found - eps) < 1e-6 / (noise if predict == "x0" else 1)).all()


def test_noise_survives_the_detour_over_x0():
    # Samplers get x0 and go on with the noise that it implies, at any level.
    x_t, eps, i = f32(normal(0)), f32(normal(1)), jnp.asarray(LEVELS)
    x0 = process.to_x0(FULL, "eps", eps, x_t, i)
    np.testing.assert_allclose(
        process.to_eps(FULL, "x0", x0, x_t, i), eps, rtol=1e-4, atol=2e-5
    )


def test_posterior_mean_is_that_of_two_normals():
    x0, x_t, i = normal(0), normal(1), np.arange(1, 8)
    found = process.posterior_mean(TEN, f32(x0), f32(x_t), jnp.asarray(i))
    # q(x_i | x_{i-1}) as a likelihood of x_{i-1}, times the prior q(x_{i-1} | x_0).
    beta = TEN.betas[i][:, None, None, None]
    before = TEN.alpha_bar[i - 1][:, None, None, None]
    likelihood, prior = (1 - beta) / beta, 1 / (1 - before)
    mean = likelihood * x_t / np.sqrt(1 - beta) + prior * np.sqrt(before) * x0
    np.testing.assert_allclose(found, mean / (likelihood + prior), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("table", [FULL, TEN], ids=["full", "respaced"])
def test_last_posterior_is_x0(table):
    x0, x_t = f32(normal(0)), f32(normal(1))
    np.testing.assert_allclose(
        process.posterior_mean(table, x0, x_t, jnp.int32(0)), x0, rtol=1e-6
    )


def test_log_variances():
    x, i = f32(normal(0)), jnp.arange(7)
    small = process.log_variance(TEN, "fixed_small", None, x, i)
    large = process.log_variance(TEN, "fixed_large", None, x, i)
    beta = np.log(TEN.betas[:7])
    assert small.shape == large.shape == (7, 1, 1, 1)
    posterior = TEN.posterior_variance[[1, 1, 2, 3, 4, 5, 6]]
    np.testing.assert_allclose(small.ravel(), np.log(posterior), rtol=1e-6)
    np.testing.assert_allclose(large.ravel()[1:], beta[1:], rtol=1e-6)
    assert large[0] == small[0]

    def learned(v):
        return process.log_variance(TEN, "learned_range", jnp.full_like(x, v), x, i)

    np.testing.assert_allclose(learned(-1), jnp.broadcast_to(small, x.shape), rtol=1e-6)
    np.testing.assert_allclose(learned(1)[:, 0, 0, 0], beta, rtol=1e-6)
    np.testing.assert_allclose(
        learned(0)[:, 0, 0, 0], (small.ravel() + beta) / 2, rtol=1e-6
    )


def compute_loss(output, x0, eps, i, table=FULL, **settings):
    x_t = diffused(table, i, x0, eps)
    return process.loss(
        table, f32(output), f32(x0), f32(x_t), f32(eps), jnp.asarray(i), **settings
    )


@pytest.mark.parametrize("predict", PREDICTS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_loss_is_the_mean_squared_error(predict, variance):
    output, x0, eps = normal(2), normal(0), normal(1)
    found = compute_loss(output, x0, eps, LEVELS, predict=predict, variance=variance)
    error = np.square(output - targets(FULL, LEVELS, x0, eps)[predict])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, error.mean((1, 2, 3)), rtol=1e-5)


def test_loss_of_embeddings():
    x0, eps = normal(0, (7, 16)), normal(1, (7, 16))
    x_t = process.q_sample(FULL, f32(x0), jnp.asarray(LEVELS), f32(eps))
    output = f32(x0).astype(jnp.bfloat16)
    settings = dict(predict="x0", variance="fixed_small")
    found = process.loss(
        FULL, output, f32(x0), x_t, f32(eps), jnp.asarray(LEVELS), **settings
    )
    assert found.shape == (7,)
    assert found.dtype == jnp.float32
    assert found.max() < 1e-4


@pytest.mark.parametrize("predict", PREDICTS)
@pytest.mark.parametrize("power, most", [(None, 5.0), (0.5, None), (0.5, 2.5)])
def test_the_error_of_x0_is_weighed_by_the_snr(predict, power, most):
    # Whatever is predicted: min(snr, 5) (Hang et al. 2023), P2's snr / (k + snr)^gamma
    # (Choi et al. 2022) with k = 0, or both.
    x0, eps = normal(0), normal(1)
    i = np.array([1, 10, 200, 300, 500, 700, 900])
    signal, noise = scales(FULL, i)
    x_t = diffused(FULL, i, x0, eps)
    error = 0.1 * normal(3)
    output = targets(FULL, i, x0 + error, (x_t - signal * (x0 + error)) / noise)[
        predict
    ]
    found = compute_loss(
        output,
        x0,
        eps,
        i,
        predict=predict,
        variance="fixed_small",
        min_snr_gamma=most,
        snr_power=power,
    )
    snr = FULL.alpha_bar[i] / (1 - FULL.alpha_bar[i])
    gamma = 0 if power is None else 1 - power
    weight = np.minimum(snr / snr**gamma, most or np.inf)
    np.testing.assert_allclose(
        found, weight * np.square(error).mean((1, 2, 3)), rtol=1e-3
    )


def reference_bound(table, x0_hat, v, x0, x_t, i):
    """The bound at level i > 0 or 0 in bits/dim, float64: quadrature, and scipy."""
    alpha_bar = table.alpha_bar[i]
    before = table.alpha_bar[i - 1] if i else 1.0
    beta = 1 - alpha_bar / before

    def mean(x0):
        of_x0 = np.sqrt(before) * beta / (1 - alpha_bar)
        return of_x0 * x0 + np.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar) * x_t

    j = max(i, 1)
    least = np.log(
        (1 - table.alpha_bar[j - 1])
        / (1 - table.alpha_bar[j])
        * (1 - table.alpha_bar[j] / table.alpha_bar[j - 1])
    )
    sigma = np.exp(0.5 * ((v + 1) / 2 * np.log(beta) + (1 - v) / 2 * least))
    if i == 0:
        upper = np.where(x0 == 1, np.inf, x0 + 1 / 255 - mean(x0_hat)) / sigma
        lower = np.where(x0 == -1, -np.inf, x0 - 1 / 255 - mean(x0_hat)) / sigma
        # Towards +inf the distribution function is 1 to the last digit: mirror.
        mirrored = lower > 0
        upper, lower = (
            np.where(mirrored, -lower, upper),
            np.where(mirrored, -upper, lower),
        )
        nats = -np.log(special.ndtr(upper) - special.ndtr(lower))
    else:
        # E_q[log q - log p]; the integrand is quadratic, so that 5 nodes are exact.
        z, weights = np.polynomial.hermite_e.hermegauss(5)
        true_sigma = np.exp(0.5 * least)
        x = mean(x0)[..., None] + true_sigma * z
        log_q = -0.5 * z**2 - np.log(true_sigma)
        off = (x - mean(x0_hat)[..., None]) / sigma[..., None]
        log_p = -0.5 * off**2 - np.log(sigma)[..., None]
        nats = ((log_q - log_p) * weights).sum(-1) / weights.sum()
    return nats.mean() / np.log(2)


@pytest.mark.parametrize("table", [FULL, TEN], ids=["full", "respaced"])
@pytest.mark.parametrize("off", [0.0, 0.002, 0.02])
def test_variational_bound(table, off):
    i = np.array([0, 0, 1, 2, 4, table.steps - 2, table.steps - 1])
    x0, v = images(0), np.tanh(normal(1))
    x_t = diffused(table, i, x0, normal(2))
    x0_hat = x0 + off * normal(3)
    found = process.variational_bound(
        table, f32(x0_hat), f32(v), f32(x0), f32(x_t), jnp.asarray(i)
    )
    expected = [
        reference_bound(table, *arrays)
        for arrays in zip(x0_hat, v, x0, x_t, i, strict=True)
    ]
    # float32 means agree to 1e-7, which sigma = 0.005 makes 1e-5 of a bit.
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_bound_is_zero_for_the_true_posterior():
    i = np.array([1, 5, 50, 500, 900, 998, 999])
    x0 = images(0)
    x_t = diffused(FULL, i, x0, normal(1))
    v = -np.ones(SHAPE)
    found = process.variational_bound(
        FULL, f32(x0), f32(v), f32(x0), f32(x_t), jnp.asarray(i)
    )
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_bins_make_a_distribution():
    values = f32(np.arange(256) / 127.5 - 1)
    for mean, sigma in [(0.3, 0.005), (-0.998, 0.1), (1.2, 0.01)]:
        log_p = process._log_likelihood(values, f32(mean), f32(np.log(sigma)))
        np.testing.assert_allclose(jnp.exp(log_p).sum(), 1, rtol=1e-5)


def test_far_off_bins_stay_finite():
    off = f32([0.5, 1.9])
    value, gradient = jax.value_and_grad(
        lambda s: process._log_likelihood(f32([-0.5, 0.95]), off - 1, s).sum()
    )(f32(np.log(0.005)))
    assert np.isfinite(value)
    assert np.isfinite(gradient)


@pytest.mark.parametrize("predict, table", [("eps", FULL), ("x0", TEN), ("v", FULL)])
def test_hybrid_loss(predict, table):
    i = np.array([0, 1, 2, 3, 5, 7, 9])
    x0, eps = images(0), normal(1)
    prediction = targets(table, i, x0, eps)[predict] + 0.01 * normal(2)
    v = np.tanh(normal(3))
    x_t = diffused(table, i, x0, eps)
    settings = dict(table=table, predict=predict)

    def hybrid(prediction, v):
        output = jnp.concatenate([prediction, v], axis=-1)
        return compute_loss(output, x0, eps, i, variance="learned_range", **settings)

    def simple(prediction):
        return compute_loss(prediction, x0, eps, i, variance="fixed_small", **settings)

    def bound(v):
        index = jnp.asarray(i)
        x0_hat = process.to_x0(table, predict, f32(prediction), f32(x_t), index)
        terms = process.variational_bound(table, x0_hat, v, f32(x0), f32(x_t), index)
        return terms * table.steps / 1000

    prediction, v = f32(prediction), f32(v)
    np.testing.assert_allclose(
        hybrid(prediction, v), simple(prediction) + bound(v), rtol=1e-5
    )
    # The bound trains the variance and leaves the prediction alone.
    to_prediction, to_v = jax.grad(lambda p, v: hybrid(p, v).sum(), argnums=(0, 1))(
        prediction, v
    )
    np.testing.assert_allclose(
        to_prediction, jax.grad(lambda p: simple(p).sum())(prediction), rtol=1e-6
    )
    np.testing.assert_allclose(
        to_v, jax.grad(lambda v: bound(v).sum())(v), rtol=1e-4, atol=1e-7
    )
    assert (jnp.abs(to_v).max((1, 2, 3)) > 0).all()


def test_an_untrained_networks_loss_is_finite():
    i = np.arange(0, 1000, 13)
    shape = (len(i), 2, 2, 3)
    x0, eps = images(0, shape), normal(1, shape)
    output = np.concatenate([3 * normal(2, shape), 3 * normal(3, shape)], axis=-1)

    def total(output):
        terms = compute_loss(
            output, x0, eps, i, predict="eps", variance="learned_range"
        )
        return terms.sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(f32(output))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_mistakes_are_named():
    x0, eps, wide = normal(0), normal(1), normal(2, (*SHAPE[:-1], 6))

    def attempt(output, predict="eps", variance="fixed_small"):
        return compute_loss(output, x0, eps, LEVELS, predict=predict, variance=variance)

    with pytest.raises(UserError, match="predict is 'noise'; choose one of eps, x0, v"):
        attempt(x0, predict="noise")
    with pytest.raises(UserError, match="variance is 'learned'; choose one of fixed"):
        attempt(x0, variance="learned")
    with pytest.raises(ValueError, match="only learned_range takes twice"):
        attempt(wide)
    with pytest.raises(ValueError, match="only learned_range takes twice"):
        attempt(normal(2, (*SHAPE[:-1], 4)), variance="learned_range")


@pytest.mark.parametrize("table", [TEN, FULL], ids=["ten steps", "full"])
@pytest.mark.parametrize("std", [0.2, 1.0, 3.0])
def test_analytic_variance_is_the_reverse_process_of_gaussian_data(table, std):
    """x_{i-1} given x_i is normal then; its variance by conditioning the pair."""
    of_x = table.alpha_bar * std**2 + 1 - table.alpha_bar  # Var x_i
    of_x_prev = table.alpha_bar_prev * std**2 + 1 - table.alpha_bar_prev
    together = np.sqrt(1 - table.betas) * of_x_prev  # Cov(x_{i-1}, x_i)
    expected = of_x_prev - together**2 / of_x
    left = std**2 * (1 - table.alpha_bar) / of_x  # Var x_0 given x_i
    found = process.analytic_log_variance(table, f32(left))
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-4)
    # Theirs is written with the noise: (1 - alpha_bar) / alpha_bar · (1 - E eps_hat²).
    eps_hat = (1 - table.alpha_bar) / of_x  # the mean square of E[eps | x_i]
    theirs = (1 - eps_hat) / table.snr
    np.testing.assert_allclose(left, theirs, rtol=1e-6)


def test_analytic_variance_has_bounds():
    """Theorem 2: for any data, and for bounded data."""
    none = np.exp(process.analytic_log_variance(TEN, f32(np.full(10, -1.0))))
    np.testing.assert_allclose(none[1:], TEN.posterior_variance[1:], rtol=1e-5)
    any_data = np.exp(process.analytic_log_variance(TEN, f32(np.full(10, 1e12))))
    # The bound of theorem 2: λ² + (√(β̄_n / α_n) - √(β̄_{n-1} - λ²))².
    rest = np.sqrt(1 - TEN.alpha_bar_prev - TEN.posterior_variance)
    most = (np.sqrt((1 - TEN.alpha_bar) / (1 - TEN.betas)) - rest) ** 2
    np.testing.assert_allclose(any_data, TEN.posterior_variance + most, rtol=1e-4)
    bounded = np.exp(process.analytic_log_variance(TEN, f32(np.full(10, 1e12)), 2.0))
    of_x0 = np.sqrt(TEN.alpha_bar_prev) * TEN.betas / (1 - TEN.alpha_bar)
    expected = TEN.posterior_variance + of_x0**2 * np.minimum(4.0, 1 / TEN.snr)
    np.testing.assert_allclose(bounded, expected, rtol=1e-4)
