"""Guidance, thresholding and known pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dalle2_jax.diffusion import guide, process, sample, schedule
from dalle2_jax.errors import UserError

TABLE = schedule.respace(schedule.cosine(1000), 10)
B = 3
COND = {"z": jnp.linspace(-1, 1, B * 2).reshape(B, 2), "mask": jnp.ones((B, 4), bool)}
NULL = {"z": jnp.zeros((1, 2)), "mask": jnp.zeros((1, 4), bool)}


def normal(seed, *shape):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


X = normal(0, B, 4, 4, 3)
T = jnp.array([10, 20, 30])


def network(x_t, t, cond):
    """Six channels that depend on everything, each picture by itself."""
    z = cond["z"].sum(-1) * cond["mask"].sum(-1) + t / 100
    z = z.reshape(-1, 1, 1, 1)
    return jnp.concatenate([x_t * jnp.cos(z), jnp.sin(x_t + z)], axis=-1)


def outputs():
    null = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), NULL, COND)
    return network(X, T, COND), network(X, T, null)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, jnp.float32(1), 4, jnp.float32(8)])
def test_guidance_is_linear_in_the_scale(scale):
    found = guide.classifier_free(network, COND, NULL, scale)(X, T)
    cond, null = outputs()
    np.testing.assert_allclose(found, null + scale * (cond - null), atol=1e-5)


def test_each_picture_has_its_scale():
    scale = jnp.array([0.0, 1.0, 3.0])
    found = guide.classifier_free(network, COND, NULL, scale)(X, T)
    cond, null = outputs()
    np.testing.assert_allclose(found[0], null[0], atol=1e-6)
    np.testing.assert_allclose(found[1], cond[1], atol=1e-6)
    np.testing.assert_allclose(found[2], 3 * cond[2] - 2 * null[2], atol=1e-5)


def test_learned_variance_is_not_guided():
    found = guide.classifier_free(network, COND, NULL, 4.0, channels=3)(X, T)
    cond, null = outputs()
    np.testing.assert_allclose(
        found[..., :3], (null + 4 * (cond - null))[..., :3], atol=1e-5
    )
    np.testing.assert_array_equal(found[..., 3:], cond[..., 3:])


@pytest.mark.parametrize("scale, batches", [(1.0, [B]), (1, [B]), (2.0, [2 * B])])
def test_no_second_pass_without_guidance(scale, batches):
    seen = []

    def watched(x_t, t, cond):
        assert len(t) == len(x_t) == len(cond["z"])
        seen.append(len(x_t))
        return network(x_t, t, cond)

    guide.classifier_free(watched, COND, NULL, scale)(X, T)
    assert seen == batches


def test_conditions_may_lack_parts():
    found = guide.classifier_free(
        lambda x, t, cond: x + cond[0].reshape(-1, 1, 1, 1),
        (jnp.ones(B), None),
        (jnp.zeros(B), None),
        3.0,
    )(X, T)
    np.testing.assert_allclose(found, X + 3, rtol=1e-6)


def test_guidance_of_embeddings_in_bfloat16():
    z = normal(1, B, 5)
    found = guide.classifier_free(
        lambda x, t, cond: (x * cond).astype(jnp.bfloat16),
        jnp.ones((B, 1)),
        jnp.zeros((B, 1)),
        4.0,
    )(z, T)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 4 * z, rtol=1e-2)


def test_a_sharded_batch_stays_where_it_is():
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    along = NamedSharding(mesh, PartitionSpec("data"))
    b = 2 * devices

    def run(x, t, cond):
        null = jax.tree.map(jnp.zeros_like, cond)
        return guide.classifier_free(network, cond, null, 3.0, channels=3)(x, t)

    cond = {"z": jnp.ones((b, 2)), "mask": jnp.ones((b, 4), bool)}
    arguments = jax.device_put((normal(0, b, 4, 4, 3), jnp.arange(b), cond), along)
    program = jax.jit(run).lower(*arguments).compile()
    assert program.output_shardings.is_equivalent_to(along, ndim=4)
    for collective in ("all-gather", "all-to-all", "permute", "all-reduce"):
        assert collective not in program.as_text()


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_denoiser_tells_the_timestep_and_converts(predict):
    told = []

    def watched(x_t, t):
        told.append(t)
        return jnp.sin(x_t)

    denoise = guide.denoiser(watched, TABLE, predict=predict, variance="fixed_small")
    for i in (0, 4, 9):
        x0, log_variance = denoise(X, jnp.int32(i))
        assert told.pop().tolist() == [TABLE.timesteps[i]] * B
        np.testing.assert_allclose(
            x0, process.to_x0(TABLE, predict, jnp.sin(X), X, jnp.int32(i)), rtol=1e-6
        )
        np.testing.assert_allclose(
            log_variance.item(), TABLE.posterior_log_variance[i], rtol=1e-6
        )


def test_denoiser_with_a_learned_variance():
    def learned(x_t, t):
        wide = jnp.concatenate([jnp.zeros_like(x_t), jnp.cos(x_t)], axis=-1)
        return wide.astype(jnp.bfloat16)

    denoise = guide.denoiser(
        learned, TABLE, predict="eps", variance="learned_range", transform=jnp.tanh
    )
    x0, log_variance = denoise(X, jnp.int32(5))
    assert x0.dtype == log_variance.dtype == jnp.float32
    np.testing.assert_allclose(x0, jnp.tanh(X / np.sqrt(TABLE.alpha_bar[5])), atol=1e-6)
    v = jnp.cos(X).astype(jnp.bfloat16).astype(jnp.float32)
    low, high = TABLE.posterior_log_variance[5], np.log(TABLE.betas[5])
    np.testing.assert_allclose(
        log_variance, low + (v + 1) / 2 * (high - low), rtol=1e-5
    )


def test_denoiser_names_a_mistake():
    settings = [("x", "fixed_small", "predict is 'x'"), ("x0", "big", "variance is")]
    for predict, variance, message in settings:
        denoise = guide.denoiser(
            lambda x, t: x, TABLE, predict=predict, variance=variance
        )
        with pytest.raises(UserError, match=message):
            denoise(X, jnp.int32(0))


def test_clip_x0():
    np.testing.assert_array_equal(guide.clip_x0(0.5)(X), np.clip(X, -0.5, 0.5))


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.5, 100.0])
@pytest.mark.parametrize("floor", [1.0, 2.0])
def test_dynamic_threshold(percentile, floor):
    x0 = X * jnp.array([0.1, 1.0, 5.0]).reshape(-1, 1, 1, 1)
    found = guide.dynamic_threshold(percentile, floor)(x0)
    for one, x in zip(found, np.asarray(x0), strict=True):
        s = max(np.percentile(np.abs(x), percentile), floor)
        np.testing.assert_allclose(one, np.clip(x, -s, s) / s * floor, rtol=1e-5)
    assert jnp.abs(found).max() <= floor * (1 + 1e-6)
    np.testing.assert_allclose(found[0], x0[0], rtol=1e-6)  # lies within the range


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver"])
def test_known_pixels_are_kept(name):
    known = normal(1, B, 4, 4, 3)
    mask = jnp.zeros((B, 4, 4, 1)).at[:, :2].set(1)
    free = guide.denoiser(
        lambda x, t: jnp.tanh(x), TABLE, predict="x0", variance="fixed_small"
    )
    denoise = guide.keep_known(free, known, mask)
    draw = sample.replay(normal(2, TABLE.steps, B, 4, 4, 3))
    run = {
        "ddpm": lambda: sample.ddpm(denoise, TABLE, draw(0), draw),
        "ddim": lambda: sample.ddim(denoise, TABLE, draw(0), draw, 0.5),
        "dpm_solver": lambda: sample.dpm_solver(denoise, TABLE, draw(0)),
    }[name]
    x = jax.jit(run)()
    np.testing.assert_allclose(x[:, 2:], known[:, 2:], rtol=1e-6)
    assert (jnp.abs(x[:, :2] - known[:, :2]) > 1e-3).all()
    # The variance is the network's business still.
    prediction = denoise(draw(0), jnp.int32(4))
    np.testing.assert_array_equal(
        prediction.log_variance, free(draw(0), jnp.int32(4)).log_variance
    )


def test_guided_sampling_from_end_to_end_in_one_program():
    # Two classes, N(±1, 0.1²): the ideal network of each, and of their mixture.
    labels = jnp.array([1.0, -1.0, 1.0, -1.0])
    alpha_bar = jnp.asarray(schedule.cosine(1000).alpha_bar, jnp.float32)

    def ideal(x_t, t, label):
        a = jnp.sqrt(alpha_bar[t])[:, None]
        total = a**2 * 0.01 + 1 - a**2
        mean = jnp.where(label[:, None] == 0, jnp.tanh(a * x_t / total), label[:, None])
        return mean + a * 0.01 / total * (x_t - a * mean)

    @jax.jit
    def run(keys):
        guided = guide.classifier_free(ideal, labels, jnp.zeros(4), 2.0)
        denoise = guide.denoiser(
            guided,
            TABLE,
            predict="x0",
            variance="fixed_small",
            transform=guide.clip_x0(1.5),
        )
        draw = sample.gaussian(keys, (50,))
        return sample.ddpm(denoise, TABLE, draw(0), draw)

    x = run(jax.random.split(jax.random.key(0), 4))
    assert (x * labels[:, None] > 0.7).all()
