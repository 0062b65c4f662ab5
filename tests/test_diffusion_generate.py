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


def sampled(apply, settings, last=None, **options):
    draw = sample.gaussian(jax.random.split(jax.random.key(0), 3), (4,))
    sampling = generate.make_sampling(DIFFUSION, settings)

    @jax.jit
    def loop(sampling):
        arguments = (
            apply,
            COND,
            NULL,
            draw,
            DIFFUSION,
            sampling,
            sampling.begin(draw(0)),
        )
        return generate.generate(*arguments, last=last, **options).x

    return loop(sampling)


def run(last=None, **changes):
    return sampled(apply, [SAMPLING | changes] * 3, last)


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
        ("unipc", lambda d, s, x, draw: sample.unipc(d, s, x)),
    ],
)
def test_a_sampler_by_its_name(name, call):
    np.testing.assert_allclose(run(sampler=name), by_hand(call), rtol=1e-6, atol=1e-7)


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

    found = sampled(follows, [noisy] * 3, x0_error=error)
    table = schedule.respace(schedule.cosine(1000), 5)
    denoise = guide.denoiser(
        lambda x_t, t: follows(x_t, t, COND),
        table,
        predict="x0",
        variance="fixed_small",
        transform=guide.clip_x0(1.0),
    )
    expected = analytic(denoise, table, draw(0), draw)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    as_trained = sampled(follows, [noisy] * 3)
    assert np.abs(found - as_trained).max() > 0.01


def test_each_picture_of_a_batch_has_its_own_settings():
    """They are those of a batch that has them alike, also where steps differ."""

    def follows(x_t, t, cond):
        return cond + 0.3 * jnp.tanh(x_t)

    several = [
        SAMPLING | dict(steps=5, guidance=3.0, clip=0.4),
        SAMPLING | dict(steps=[0, 400, 999], guidance=1.0),
        SAMPLING | dict(steps="ddim8", guidance=2.0, threshold=90.0, clip=0.5),
    ]
    for sampler in ("ddpm", "ddim", "dpm_solver", "unipc"):
        each = [settings | {"sampler": sampler} for settings in several]
        mixed = sampled(follows, each)
        for k, settings in enumerate(each):
            alike = sampled(
                follows, [settings | {"guidance": settings["guidance"]}] * 3
            )
            np.testing.assert_allclose(mixed[k], alike[k], rtol=1e-5, atol=1e-6)
    repeats = [
        SAMPLING | dict(sampler="repaint", steps=4, repeats=r) for r in (1, 2, 3)
    ]
    mixed = sampled(follows, repeats)
    for k, settings in enumerate(repeats):
        np.testing.assert_allclose(mixed[k], sampled(follows, [settings] * 3)[k], 1e-5)


def test_a_last_network_is_taken_at_each_pictures_last_step():
    def last(x_t, t, cond):
        return -cond + 0.0 * x_t

    each = [SAMPLING | dict(steps=n, guidance=1.0) for n in (2, 5, 3)]
    np.testing.assert_allclose(sampled(apply, each, last), -0.6, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver", "unipc", "repaint"])
def test_a_loop_can_be_cut_anywhere(sampler):
    draw = sample.gaussian(jax.random.split(jax.random.key(0), 3), (4,))
    each = [SAMPLING | dict(sampler=sampler, steps=n, repeats=2) for n in (6, 4, 5)]
    sampling = generate.make_sampling(DIFFUSION, each)
    programs = []

    @jax.jit
    def advance(state, start, stop):
        programs.append(None)
        arguments = apply, COND, NULL, draw, DIFFUSION, sampling, state, start, stop
        return generate.generate(*arguments)

    total = int(max(sampling.steps))
    whole = advance(sampling.begin(draw(0)), 0, total)
    state = sampling.begin(draw(0))
    for start, stop in ((0, 1), (1, 4), (4, total)):
        state = advance(state, start, stop)
    np.testing.assert_array_equal(state.x, whole.x)
    assert len(programs) == 1


def test_guidance_within_an_interval_is_one_pass_elsewhere():
    """The passes are counted by the rows that the network is given."""
    rows = []

    def counting(x_t, t, cond):
        jax.debug.callback(lambda t: rows.append((int(t[0]), len(t))), t)
        return cond + 0.0 * x_t

    each = [SAMPLING | dict(sampler="ddim", guidance_interval=(200, 800))] * 3
    sampled(counting, each)
    jax.effects_barrier()
    assert dict(rows) == {999: 3, 749: 6, 500: 6, 250: 6, 0: 3}
    # What has no interval is guided at all steps of the same batch.
    mixed = sampled(apply, [SAMPLING | {"sampler": "ddim"}, *each[:2]])
    np.testing.assert_allclose(mixed[0], 0.8, atol=1e-6)
    np.testing.assert_allclose(mixed[1:], 0.6, atol=1e-6)


def test_a_batch_has_one_sampler():
    with pytest.raises(UserError, match="sampler is .'ddim', 'ddpm'. in one batch"):
        sampled(apply, [SAMPLING, SAMPLING, SAMPLING | {"sampler": "ddim"}])
