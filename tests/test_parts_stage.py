"""What holds for every stage: it learns, and the model it exports can be used."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

from dalle2_jax import checkpoint
from dalle2_jax.diffusion import schedule
from dalle2_jax.errors import UserError
from dalle2_jax.parts import stage as shared
from tests.tiny import make_stage

NAMES = ("clip", "prior", "ar_prior", "decoder", "upsampler")


def test_dropped_captions_become_the_empty_one():
    tokens, empty = jnp.arange(6).reshape(3, 2), jnp.asarray([9, 9])
    dropped = shared.drop_caption(tokens, empty, jnp.asarray([False, True, False]))
    np.testing.assert_array_equal(dropped, [[0, 1], [9, 9], [4, 5]])


@pytest.mark.parametrize(
    "stage, values, what",
    [
        ("clip", {"net.text_heads": 4}, "vision_heads has 2"),
        ("prior", {}, "heads has 2"),
        ("decoder", {"net.text_encoder.heads": 4}, "level 1 has 2"),
    ],
)
def test_heads_that_can_not_be_split(stage, values, what):
    with pytest.raises(UserError, match=f"mesh.tensor=4 must divide .*: {what}"):
        make_stage(stage, **values, **{"mesh.tensor": 4})


def test_the_timesteps_of_a_batch_are_spread_evenly():
    """Eight of them: one in each eighth of the schedule, from a start by chance."""
    table, firsts = schedule.make("cosine", 1000), []
    settings = dict(predict="x0", variance="fixed_small")
    settings |= dict(min_snr_gamma=None, snr_power=None, logit_normal=None)
    for seed in range(20):
        seen = []

        def apply(x, t, seen=seen):
            seen.append(np.sort(np.asarray(t)))
            return jnp.zeros_like(x)

        x0 = jnp.zeros((8, 2))
        shared.denoising_loss(apply, table, x0, jax.random.key(seed), settings)
        np.testing.assert_allclose(np.diff(seen[0]), 125, atol=1)
        firsts.append(seen[0][0])
    assert min(firsts) < 30 and max(firsts) > 95


def test_timesteps_with_a_normal_logit():
    """Theirs is scipy's distribution function, to within the even spread of a batch."""
    table, seen = schedule.make("cosine", 1000), []
    settings = dict(predict="x0", variance="fixed_small")
    settings |= dict(min_snr_gamma=None, snr_power=None, logit_normal=(0.8, 1.0))

    def apply(x, t):
        seen.append(np.asarray(t))
        return jnp.zeros_like(x)

    x0 = jnp.zeros((4000, 2))
    shared.denoising_loss(apply, table, x0, jax.random.key(0), settings)
    for t in (100, 300, 500, 700, 900):
        expected = stats.norm(0.8, 1).cdf(special.logit(t / 1000))
        np.testing.assert_allclose((seen[0] < t).mean(), expected, atol=1 / 4000)
    assert 0 <= seen[0].min() and seen[0].max() <= 999


@pytest.mark.parametrize("name", NAMES)
def test_loss_falls_on_one_batch(name, tiny_models):
    """A few steps of Adam on one batch and one draw of the noise."""
    if name == "clip":  # whose pictures differ in all, and not in one attribute
        stage = make_stage(name, **{"data.shapes.contrast": 1})
    else:
        stage = make_stage(name, tiny_models["clip"])
    params = jax.jit(stage.init)(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, next(stage.batches("train", 0)))
    if stage.compares:  # takes all micro-batches of a step, here one
        batch = jax.tree.map(lambda x: x[None], batch)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def update(params, state):
        loss, grads = jax.value_and_grad(stage.loss, has_aux=True)(
            params, stage.frozen, batch, jax.random.key(1)
        )
        updates, state = optimizer.update(grads, state)
        return loss[0], optax.apply_updates(params, updates), state

    first, params, state = update(params, optimizer.init(params))
    for _ in range(10):
        last, params, state = update(params, state)
    assert last < 0.9 * first


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_one_number_for_each_example(name, tiny_models):
    stage = make_stage(name, None if name == "clip" else tiny_models["clip"])
    params = jax.jit(stage.init)(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, next(stage.batches("heldout", 0)))
    arguments = params, stage.frozen, batch, jax.random.key(1)
    metrics = jax.jit(stage.metrics)(*arguments)
    assert {v.shape for v in metrics.values()} == {(8,)}
    for value in jax.jit(stage.preview)(*arguments).values():
        assert value.ndim in (0, 4)
        assert value.ndim == 0 or value.dtype == jnp.uint8


def test_a_model_grows_part_by_part(tiny_models):
    model = checkpoint.load(tiny_models["upsampler"])
    assert set(model.params) == {"clip", "prior", "decoder", "upsampler_32"}
    assert set(model.config["parts"]) == set(model.params)
    assert model.config["parts"]["upsampler_32"]["low_size"] == 16
    # What an earlier stage trained has come along unchanged.
    before = checkpoint.load(tiny_models["clip"]).params["clip"]
    jax.tree.map(np.testing.assert_array_equal, model.params["clip"], before)


def test_a_stage_needs_a_base_with_clip(tmp_path, tiny_models):
    with pytest.raises(UserError, match="needs a model with a trained CLIP"):
        make_stage("prior", None)
    checkpoint.export(tmp_path / "m", params={}, config={"parts": {}})
    with pytest.raises(UserError, match="has no CLIP"):
        make_stage("decoder", tmp_path / "m")
    with pytest.raises(UserError, match="config.dtype is 'float16'"):
        make_stage("clip", None, dtype="float16")
    with pytest.raises(UserError, match="data.source is 'imagenet': must be one of"):
        make_stage("clip", None, **{"data.source": "imagenet"})
