"""Settings by name lead to the samplers they name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import generate, guide, process, sample, schedule
from dalle2_jax.errors import UserError

DIFFUSION = dict(schedule="cosine", steps=1000, predict="x0", variance="fixed_small")
SAMPLING = dict(
    sampler="ddpm", steps=5, guidance=3.0, eta=0.5, clip=1.0, threshold=None
)
COND, NULL = jnp.full((3, 4), 0.6), jnp.full((3, 4), 0.5)


def apply(x_t, t, cond):
    """A network whose guided prediction, 0.5 + 3 · 0.1, stays within the clip."""
    return cond + 0.0 * x_t + 1e-5 * t[:, None]


def run(last=None, **changes):
    draw = sample.gaussian(jax.random.split(jax.random.key(0), 3), (4,))
    settings = SAMPLING | changes
    return generate.generate(apply, COND, NULL, draw, DIFFUSION, settings, last)


def by_hand(call):
    draw = sample.gaussian(jax.random.split(jax.random.key(0), 3), (4,))
    table = schedule.respace(schedule.cosine(1000), 5)
    denoise = guide.denoiser(
        guide.classifier_free(apply, COND, NULL, 3.0),
        table,
        predict="x0",
        variance="fixed_small",
        transform=guide.clip_x0(1.0),
    )
    return call(denoise, table, draw(0), draw)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("ddpm", sample.ddpm),
        ("ddim", lambda d, s, x, draw: sample.ddim(d, s, x, draw, 0.5)),
        ("dpm_solver", lambda d, s, x, draw: sample.dpm_solver(d, s, x)),
    ],
)
def test_a_sampler_by_its_name(name, call):
    np.testing.assert_array_equal(run(sampler=name), by_hand(call))


def test_guidance_and_clipping():
    # The last step's x0 is the guided one: null + scale · (cond - null).
    np.testing.assert_allclose(run(), 0.8, atol=1e-6)
    np.testing.assert_allclose(run(guidance=1.0), 0.6, atol=1e-6)
    np.testing.assert_allclose(run(guidance=30.0), 1.0, atol=1e-6)
    np.testing.assert_allclose(run(guidance=30.0, clip=None), 3.5, atol=1e-6)
    # Imagen's threshold at the 100th percentile scales the largest value to the limit.
    thresholded = run(guidance=30.0, threshold=100.0)
    np.testing.assert_allclose(thresholded, 1.0, atol=1e-6)


def test_the_last_step_may_have_a_network_of_its_own():
    """It alone decides the outcome, from what the other one left."""
    seen = []

    def last(x_t, t, cond):
        jax.debug.callback(lambda t: seen.append(t), t)
        return -cond + 0.0 * x_t

    np.testing.assert_allclose(run(last), -0.8, atol=1e-6)
    jax.effects_barrier()
    assert [set(t) for t in np.asarray(seen).tolist()] == [{0}]


def test_an_unknown_sampler_is_refused():
    with pytest.raises(UserError, match="'euler': must be one of ddpm, ddim"):
        run(sampler="euler")


def test_measured_errors_make_the_variance_analytic():
    """They count the timesteps in training, whatever steps are visited."""
    error = jnp.linspace(0.1, 1.0, 1000)

    def analytic(denoise, table, x, draw):
        found = process.analytic_log_variance(table, error[table.timesteps], 1.0)
        return sample.ddpm(guide.set_log_variance(denoise, found), table, x, draw)

    draw = sample.gaussian(jax.random.split(jax.random.key(0), 3), (4,))
    noisy = dict(SAMPLING, guidance=1.0)

    def follows(x_t, t, cond):
        return 0.5 * x_t

    found = generate.generate(
        follows, COND, NULL, draw, DIFFUSION, noisy, x0_error=error
    )
    table = schedule.respace(schedule.cosine(1000), 5)
    denoise = guide.denoiser(
        lambda x_t, t: follows(x_t, t, COND),
        table,
        predict="x0",
        variance="fixed_small",
        transform=guide.clip_x0(1.0),
    )
    expected = analytic(denoise, table, draw(0), draw)
    np.testing.assert_array_equal(found, expected)
    as_trained = generate.generate(follows, COND, NULL, draw, DIFFUSION, noisy)
    assert np.abs(found - as_trained).max() > 0.01
