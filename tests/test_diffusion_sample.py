"""Samplers against gaussian data, whose denoiser and solution are known exactly.

For x0 ~ N(m, s²) the expected x0 is affine in x_t, and so every sampler is an affine
map of the noise that it is given. `moments` reads that map off: it feeds each unit of
noise alone, all in one batch, and has the samples' mean and variance without a draw.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import guide, process, sample, schedule

FULL = schedule.cosine(1000)
M, S = 0.3, 0.7


def oracle(table, variance="fixed_small", mean=M, std=S):
    """The ideal denoiser. variance "exact": that of the true p(x_{i-1} | x_i)."""
    alpha_bar = table.alpha_bar
    gain = np.sqrt(alpha_bar) * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
    left = std**2 * (1 - gain * np.sqrt(alpha_bar))  # Var[x0 | x_t]
    of_x0 = np.sqrt(table.alpha_bar_prev) * table.betas / (1 - alpha_bar)
    exact = np.log(table.posterior_variance + of_x0**2 * left)

    def denoise(x_t, i):
        signal = schedule.at(np.sqrt(alpha_bar), i, x_t)
        x0 = mean + schedule.at(gain, i, x_t) * (x_t - signal * mean)
        if variance == "exact":
            return sample.Prediction(x0, schedule.at(exact, i, x_t))
        log_variance = process.log_variance(table, variance, None, x_t, i)
        return sample.Prediction(x0, log_variance)

    return denoise


def flow(table, x_T, mean=M, std=S):
    """Where the probability flow takes x_T: the data of the same quantile."""
    alpha_bar = table.alpha_bar[-1]
    spread = np.sqrt(alpha_bar * std**2 + 1 - alpha_bar)
    return mean + std * (x_T - np.sqrt(alpha_bar) * mean) / spread


def flow_back(table, x0, mean=M, std=S):
    alpha_bar = table.alpha_bar[-1]
    spread = np.sqrt(alpha_bar * std**2 + 1 - alpha_bar)
    return np.sqrt(alpha_bar) * mean + spread * (x0 - mean) / std


def moments(table, run):
    """Mean and variance of the samples of `run(x, draw)`."""
    units = jnp.eye(table.steps + 1, table.steps)  # the last picture gets no noise
    draw = sample.replay(units.T[:, :, None])
    x = run(draw(0), draw)[:, 0]
    return float(x[-1]), float(jnp.sum(jnp.square(x[:-1] - x[-1])))


def noise(*shape):
    """A draw of numbers that need no key."""
    values = np.random.default_rng(0).normal(size=shape)
    return sample.replay(jnp.asarray(values, jnp.float32))


def quantiles():
    return jnp.linspace(-2, 2, 9)[:, None]


def errors(run, exact, counts, **data):
    tables = [schedule.respace(FULL, n) for n in counts]
    x = quantiles()
    return [
        float(jnp.abs(run(oracle(t, **data), t, x) - exact(t, x, **data)).max())
        for t in tables
    ]


def order(errors, counts):
    return np.log(errors[0] / errors[-1]) / np.log(counts[-1] / counts[0])


@pytest.mark.parametrize("n", [3, 10, 100])
def test_ddpm_with_the_true_variance_is_exact_at_any_number_of_steps(n):
    table = schedule.respace(FULL, n)
    denoise = oracle(table, "exact")
    mean, variance = moments(table, lambda x, d: sample.ddpm(denoise, table, x, d))
    # x_T is N(0, 1) and not N(5e-5 m, …); the last step returns a mean.
    np.testing.assert_allclose(mean, M, atol=1e-4)
    np.testing.assert_allclose(variance, S**2, rtol=2e-4)


@pytest.mark.parametrize("variance, sign", [("fixed_small", -1), ("fixed_large", 1)])
def test_ddpm_variances_bracket_the_data(variance, sign):
    found = []
    for n in [25, 100]:
        table = schedule.respace(FULL, n)
        denoise = oracle(table, variance)
        mean, spread = moments(
            table,
            lambda x, d, denoise=denoise, table=table: sample.ddpm(
                denoise, table, x, d
            ),
        )
        np.testing.assert_allclose(mean, M, atol=1e-4)
        found.append(sign * (spread - S**2))
    assert 0 < found[1] < found[0] / 2
    assert found[1] < 0.1 * S**2


def test_ddpm_draws_have_these_moments():
    table = schedule.respace(FULL, 20)
    draw = sample.gaussian(jax.random.split(jax.random.key(0), 100), (10, 20))
    run = jax.jit(lambda x: sample.ddpm(oracle(table, "exact"), table, x, draw))
    x = run(draw(0))
    assert abs(x.mean() - M) < 4 * S / np.sqrt(x.size)
    assert abs(x.std() - S) < 4 * S / np.sqrt(2 * x.size)


@pytest.mark.parametrize("n", [2, 7, 50])
def test_ddim_at_eta_1_is_ddpm(n):
    table = schedule.respace(FULL, n)
    draw = noise(n, 4, 5)
    np.testing.assert_allclose(
        sample.ddim(oracle(table), table, draw(0), draw, eta=1.0),
        sample.ddpm(oracle(table), table, draw(0), draw),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0, 2.0])
def test_ddim_has_the_datas_moments_at_any_eta(eta):
    table = schedule.respace(FULL, 250)
    denoise = oracle(table)
    mean, variance = moments(table, lambda x, d: sample.ddim(denoise, table, x, d, eta))
    np.testing.assert_allclose(mean, M, atol=1e-4)
    np.testing.assert_allclose(variance, S**2, rtol=0.1)


def test_more_eta_is_more_fresh_noise():
    table = schedule.respace(FULL, 50)
    draw = noise(50, 64, 1)
    x = draw(0)

    @jax.jit
    def run(eta):
        return sample.ddim(oracle(table), table, x, draw, eta)

    kept = [np.corrcoef(x[:, 0], run(eta)[:, 0])[0, 1] for eta in (0.0, 0.5, 1.0)]
    assert kept[0] > 0.999
    assert kept[0] > kept[1] > kept[2]


def test_noise_without_a_source():
    with pytest.raises(ValueError, match="eta is 0.5: .* pass draw"):
        sample.ddim(oracle(FULL), FULL, quantiles(), eta=0.5)


def test_ddim_follows_the_flow_at_first_order():
    counts = [20, 40, 80, 160]
    found = errors(sample.ddim, flow, counts)
    assert 0.9 < order(found, counts) < 1.1
    assert found[-1] < 0.02


def test_dpm_solver_follows_the_flow_at_second_order():
    counts = [20, 40, 80, 160]
    found = errors(sample.dpm_solver, flow, counts, std=1.0)
    assert 1.8 < order(found, counts) < 2.5
    assert found[-1] < 3e-4


@pytest.mark.parametrize("std", [0.1, 0.7, 1.5])
def test_dpm_solver_is_nearer_than_ddim(std):
    counts = [5, 10, 15, 20, 40, 80]
    ours = errors(sample.dpm_solver, flow, counts, std=std)
    ddims = errors(sample.ddim, flow, counts, std=std)
    assert (np.array(ours) < ddims).all()
    assert ours[-1] < ddims[-1] / 3


def test_invert_follows_the_flow_back():
    def run(denoise, table, x):
        return sample.invert(denoise, table, flow(table, x))

    counts = [40, 80, 160, 320]
    found = errors(run, lambda table, x, **_: x, counts)
    assert 0.8 < order(found, counts) < 1.1
    assert found[-1] < 0.02
    table = schedule.respace(FULL, 320)
    x0 = quantiles()
    np.testing.assert_allclose(
        sample.invert(oracle(table), table, x0), flow_back(table, x0), atol=0.02
    )


def test_round_trip_closes_with_more_steps():
    def there_and_back(denoise, table, x):
        return sample.ddim(denoise, table, sample.invert(denoise, table, x))

    counts = [40, 80, 160, 320]
    found = errors(there_and_back, lambda table, x, **_: x, counts)
    assert 0.8 < order(found, counts) < 1.2
    assert found[-1] < 0.02
    # Few steps are enough for normalised data.
    found = errors(there_and_back, lambda table, x, **_: x, [25], mean=0.0, std=1.0)
    assert found[0] < 0.02


def test_round_trip_is_the_identity_where_the_noise_is_one_constant():
    table = schedule.respace(FULL, 25)
    eps = jnp.array([[0.3], [-1.2]])

    def denoise(x_t, i):
        x0 = process.to_x0(table, "eps", jnp.broadcast_to(eps, x_t.shape), x_t, i)
        return sample.Prediction(x0, jnp.zeros(()))

    x0 = jnp.array([[0.5], [-0.8]])
    x_T = sample.invert(denoise, table, x0)
    np.testing.assert_allclose(
        x_T, process.q_sample(table, x0, jnp.int32(24), eps), rtol=1e-4
    )
    # x_T holds x0 times 5e-5, in float32.
    np.testing.assert_allclose(
        sample.ddim(denoise, table, x_T), x0, atol=2e-7 / np.sqrt(table.alpha_bar[-1])
    )


SAMPLERS = {
    "ddpm": sample.ddpm,
    "ddim": lambda denoise, table, x, draw: sample.ddim(denoise, table, x, draw, 0.5),
    "dpm_solver": lambda denoise, table, x, _: sample.dpm_solver(denoise, table, x),
    "unipc": lambda denoise, table, x, _: sample.unipc(denoise, table, x),
    "invert": lambda denoise, table, x, _: sample.invert(denoise, table, x),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spec", [1, 2, 3, [500], [10, 20]])
def test_few_steps(name, spec):
    table = schedule.respace(FULL, spec)
    draw = noise(table.steps, 2, 3)
    x = SAMPLERS[name](oracle(table), table, draw(0), draw)
    assert x.shape == (2, 3)
    assert jnp.isfinite(x).all()
    if table.steps == 1 and name != "invert":
        expected = oracle(table)(draw(0), jnp.int32(0)).x0
        np.testing.assert_allclose(x, expected, rtol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_program_in_float32(name):
    table = schedule.respace(FULL, 6)
    keys = jax.random.split(jax.random.key(0), 2)
    calls = []

    def denoise(x_t, i):
        calls.append((x_t.dtype, i.shape))
        return oracle(table)(x_t, i)

    def run(keys, x):
        return SAMPLERS[name](denoise, table, x, sample.gaussian(keys, (3,)))

    x = jnp.ones((2, 3), jnp.bfloat16)
    compiled = jax.jit(run)(keys, x)
    assert calls == [(jnp.float32, ())]  # traced once: the loop is a scan
    assert compiled.dtype == jnp.float32
    with jax.disable_jit():
        np.testing.assert_allclose(compiled, run(keys, x), rtol=1e-5, atol=1e-6)


def test_picture_k_is_the_same_in_any_batch():
    table = schedule.respace(FULL, 5)
    keys = jax.random.split(jax.random.key(3), 5)

    def run(keys):
        draw = sample.gaussian(keys, (4, 4, 3))
        return sample.ddpm(oracle(table), table, draw(0), draw)

    run = jax.jit(run)
    together = run(keys)
    np.testing.assert_array_equal(run(keys[::-1]), together[::-1])
    # A program for another batch size may round differently.
    apart = jnp.concatenate([run(keys[k : k + 1]) for k in range(5)])
    np.testing.assert_allclose(apart, together, rtol=1e-5, atol=1e-6)


def test_noise_is_the_same_in_any_batch():
    keys = jax.random.split(jax.random.key(3), 5)
    together = sample.gaussian(keys, (4, 4, 3))
    apart = sample.gaussian(keys[3:4], (4, 4, 3))
    for k in (0, 7):
        np.testing.assert_array_equal(together(k)[3], apart(k)[0])
    assert (together(0) != together(7)).all()


def test_draws_are_independent_normals():
    draw = sample.gaussian(jax.random.split(jax.random.key(0), 50), (20, 20))
    drawn = np.stack([draw(k) for k in range(3)])
    assert drawn.dtype == np.float32
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() - 1) < 0.02
    correlations = np.corrcoef(drawn.reshape(150, 400)) - np.eye(150)
    assert np.abs(correlations).max() < 0.3


def test_replay_repeats_a_run():
    table = schedule.respace(FULL, 5)
    draw = sample.gaussian(jax.random.split(jax.random.key(0), 2), (3,))
    recorded = sample.replay(jnp.stack([draw(k) for k in range(5)]))
    np.testing.assert_array_equal(recorded(3), draw(3))
    np.testing.assert_allclose(
        sample.ddpm(oracle(table), table, recorded(0), recorded),
        sample.ddpm(oracle(table), table, draw(0), draw),
        rtol=1e-5,
    )


def path(run, table, denoise, x):
    """The x_t of each level, the noisiest first, and the sample."""
    visited = []

    def watched(x_t, i):
        visited.append(np.asarray(x_t))
        return denoise(x_t, i)

    with jax.disable_jit():
        visited.append(np.asarray(run(watched, table, x)))
    return np.stack(visited)


def prediction(x, t):
    """Any function of x and t will do as a network, in numpy."""
    return np.sin(2 * x + t / 300) + 0.5 * x


def learned(x, t):
    return np.cos(3 * x - t / 200)


NOISE = np.random.default_rng(0).normal(size=(25, 2, 4, 4, 3))


def our_path(run, table, predict, variance, limit):
    def denoise(x_t, i):
        x, t = np.asarray(x_t, np.float64), int(table.timesteps[i])
        output = jnp.asarray(prediction(x, t), jnp.float32)
        v = jnp.asarray(learned(x, t), jnp.float32)
        x0 = process.to_x0(table, predict, output, x_t, i).clip(-limit, limit)
        return sample.Prediction(x0, process.log_variance(table, variance, v, x_t, i))

    return path(run, table, denoise, jnp.asarray(NOISE[0], jnp.float32))


def their_path(scheduler, timesteps, step, variance="fixed"):
    """Runs a scheduler of diffusers in float64 on the same network and noise."""
    import torch

    exact = torch.from_numpy(FULL.alpha_bar.copy())
    scheduler.alphas_cumprod = exact
    scheduler.betas = torch.from_numpy(FULL.betas)
    scheduler.alphas = 1 - scheduler.betas
    x = NOISE[0]
    visited = [x]
    for k, t in enumerate(timesteps):
        output = prediction(x, t)
        if variance == "learned_range":
            output = np.concatenate([output, learned(x, t)], axis=-1)
        before = timesteps[k + 1] if k + 1 < len(timesteps) else None
        noise = NOISE[min(k + 1, len(NOISE) - 1)]
        # Channels second, as learned ranges are split there.
        tensors = [torch.from_numpy(np.moveaxis(a, -1, 1)) for a in (output, x, noise)]
        x = np.moveaxis(step(int(t), before, *tensors).numpy(), 1, -1)
        visited.append(x)
    return np.stack(visited)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n", [7, 25])
@pytest.mark.parametrize(
    "predict, variance, limit",
    [
        ("x0", "fixed_small", 5.0),
        ("x0", "fixed_small", 0.7),
        ("eps", "fixed_small", 1.0),
        ("eps", "learned_range", 1.0),
    ],
)
def test_ddpm_is_karlos_scheduler(monkeypatch, predict, variance, limit, n):
    unclip = pytest.importorskip("diffusers.schedulers.scheduling_unclip")
    scheduler = unclip.UnCLIPScheduler(
        variance_type={"fixed_small": "fixed_small_log"}.get(variance, variance),
        prediction_type={"x0": "sample", "eps": "epsilon"}[predict],
        clip_sample_range=limit,
    )
    scheduler.variance_type = scheduler.config.variance_type

    def step(t, before, output, x, noise):
        monkeypatch.setattr(unclip, "randn_tensor", lambda *_, **__: noise)
        before = None if before is None else int(before)
        return scheduler.step(output, t, x, prev_timestep=before).prev_sample

    table = schedule.respace(FULL, n)
    draw = sample.replay(jnp.asarray(NOISE, jnp.float32))
    ours = our_path(
        lambda *args: sample.ddpm(*args, draw), table, predict, variance, limit
    )
    theirs = their_path(scheduler, table.timesteps[::-1], step, variance)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_ddim_is_diffusers(predict, eta):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type={"x0": "sample", "eps": "epsilon", "v": "v_prediction"}[
            predict
        ],
        clip_sample_range=0.8,
    )
    scheduler.set_timesteps(25)
    table = schedule.respace(FULL, "ddim25")
    np.testing.assert_array_equal(scheduler.timesteps, table.timesteps[::-1])

    def step(t, _, output, x, noise):
        return scheduler.step(
            output, t, x, eta, use_clipped_model_output=True, variance_noise=noise
        ).prev_sample

    draw = sample.replay(jnp.asarray(NOISE, jnp.float32))
    ours = our_path(
        lambda *args: sample.ddim(*args, draw, eta), table, predict, "fixed_small", 0.8
    )
    theirs = their_path(scheduler, table.timesteps[::-1], step)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_dpm_solver_is_diffusers_but_for_the_step_before_last(predict):
    diffusers = pytest.importorskip("diffusers")
    import torch

    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type={"x0": "sample", "eps": "epsilon", "v": "v_prediction"}[
            predict
        ],
        final_sigmas_type="zero",
    )
    table = schedule.respace(FULL, 25)
    scheduler.set_timesteps(timesteps=table.timesteps[::-1].tolist())
    sigmas = np.append(np.sqrt(1 / table.alpha_bar[::-1] - 1), 0)
    scheduler.sigmas = torch.from_numpy(sigmas)

    def step(t, _, output, x, noise):
        return scheduler.step(output, t, x).prev_sample

    ours = our_path(sample.dpm_solver, table, predict, "fixed_small", np.inf)
    theirs = their_path(scheduler, table.timesteps[::-1], step)
    np.testing.assert_allclose(ours[:-2], theirs[:-2], rtol=1e-3, atol=1e-3)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_unipc_is_diffusers_but_for_the_step_before_last(predict):
    """There theirs is of second order; ours is of the first, as for dpm_solver."""
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    scheduler = diffusers.UniPCMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type={"x0": "sample", "eps": "epsilon", "v": "v_prediction"}[
            predict
        ],
        final_sigmas_type="zero",
    )
    table = schedule.respace(FULL, 25)
    scheduler.set_timesteps(25)
    scheduler.timesteps = torch.from_numpy(table.timesteps[::-1].copy())
    sigmas = np.append(np.sqrt(1 / table.alpha_bar[::-1] - 1), 0)
    scheduler.sigmas = torch.from_numpy(sigmas)

    def step(t, _, output, x, noise):
        return scheduler.step(output, t, x).prev_sample

    ours = our_path(sample.unipc, table, predict, "fixed_small", np.inf)
    theirs = their_path(scheduler, table.timesteps[::-1], step)
    np.testing.assert_allclose(ours[:-2], theirs[:-2], rtol=1e-3, atol=1e-3)


def mixture_denoiser(table):
    """The ideal denoiser of data in three narrow heaps."""
    means, stds = jnp.asarray([-0.5, 0.2, 0.8]), jnp.asarray([0.03, 0.05, 0.02])
    weights = jnp.asarray([0.3, 0.4, 0.3])

    def denoise(x_t, i):
        a = schedule.at(table.signal, i, x_t)
        variance = (a * stds) ** 2 + schedule.at(table.noise, i, x_t) ** 2
        off = x_t - a * means
        likelihood = jnp.log(weights) - (jnp.log(variance) + off**2 / variance) / 2
        x0 = means + a * stds**2 / variance * off
        x0 = (jax.nn.softmax(likelihood, -1) * x0).sum(-1, keepdims=True)
        return sample.Prediction(x0, jnp.zeros(()))

    return denoise


@pytest.mark.parametrize("steps", [5, 7, 10])
def test_unipc_is_nearer_than_dpm_solver_in_few_steps(steps):
    x = jnp.linspace(-2.2, 2.2, 101)[:, None]
    exact = sample.ddim(mixture_denoiser(FULL), FULL, x)
    table = schedule.respace(FULL, steps)
    unipc, dpm = (
        float(jnp.abs(run(mixture_denoiser(table), table, x) - exact).mean())
        for run in (sample.unipc, sample.dpm_solver)
    )
    assert unipc < 0.99 * dpm
    table = schedule.respace(FULL, steps)
    gauss = [errors(run, flow, [steps])[0] for run in (sample.unipc, sample.dpm_solver)]
    assert gauss[0] < 0.8 * gauss[1]


@pytest.mark.parametrize("steps", [3, 10])
def test_analytic_variance_gives_the_datas_own_in_few_steps(steps):
    """Where the posterior's, which leaves x_0 out, makes samples too much alike."""
    table = schedule.respace(FULL, steps)
    left = S**2 * (1 - table.alpha_bar) / (table.alpha_bar * S**2 + 1 - table.alpha_bar)
    log_variance = process.analytic_log_variance(table, jnp.float32(left))
    denoise = guide.set_log_variance(oracle(table), log_variance)
    mean, variance = moments(
        table, lambda x, draw: sample.ddpm(denoise, table, x, draw)
    )
    # The last step, which adds no noise, lacks what its x_0 leaves open.
    expected = S**2 - left[0]
    np.testing.assert_allclose([mean, variance], [M, expected], rtol=2e-3)
    small = oracle(table)
    _, less = moments(table, lambda x, draw: sample.ddpm(small, table, x, draw))
    assert less < 0.95 * variance


def test_repaint_agrees_with_what_is_known():
    """Of two correlated numbers the first is known: the other's mean is then rho · it.

    The denoiser knows the Gaussian, but not what is known; with more repeats the two
    agree better (RePaint, section 4.2).
    """
    rho, known = 0.9, 1.5
    table = schedule.respace(schedule.make("cosine"), 20)
    covariance = jnp.array([[1.0, rho], [rho, 1.0]])

    def denoise(x, i):
        a = jnp.asarray(table.alpha_bar, jnp.float32)[i]
        gain = (
            jnp.sqrt(a)
            * covariance
            @ jnp.linalg.inv(a * covariance + (1 - a) * jnp.eye(2))
        )
        variance = jnp.asarray(table.posterior_log_variance, jnp.float32)[i]
        return sample.Prediction(x @ gain.T, variance)

    held = guide.keep_known(denoise, jnp.array([known, 0.0]), jnp.array([0.0, 1.0]))
    draw = sample.gaussian(jax.random.split(jax.random.key(0), 2000), (2,))
    errors = []
    for repeats in (1, 8):
        x = sample.repaint(held, table, draw(0), draw, repeats)
        np.testing.assert_array_equal(x[:, 0], np.float32(known))
        errors.append(abs(float(x[:, 1].mean()) - rho * known))
    assert errors[1] < 0.1 and errors[1] < errors[0] / 2


def test_repaint_once_is_ancestral_sampling_but_for_its_noise():
    table = schedule.respace(schedule.make("cosine"), 5)

    def denoise(x, i):
        return sample.Prediction(0.5 * x, jnp.float32(-1e9))  # no noise

    x = jnp.ones((2, 3))
    draw = sample.replay(jnp.zeros((20, 2, 3)))
    expected = sample.ddpm(denoise, table, x, draw)
    np.testing.assert_allclose(sample.repaint(denoise, table, x, draw), expected)
