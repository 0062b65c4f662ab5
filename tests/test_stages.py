"""What holds for every stage: it learns, and the model it exports can be used."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import logsumexp

from configs import clip, decoder, prior, upsampler
from dalle2_jax import checkpoint, stages
from dalle2_jax.errors import UserError
from dalle2_jax.stages import clip as clip_stage
from dalle2_jax.stages import stage as shared

CONFIGS = {"clip": clip, "prior": prior, "decoder": decoder, "upsampler": upsampler}


def make(name, base, **values):
    config = CONFIGS[name].get_config("tiny")
    config.base = str(base or "")
    config.batch_size = 8
    config.update_from_flattened_dict(values)
    return stages.MAKE[name](config)


def test_contrastive_loss_against_numpy():
    rng = np.random.default_rng(0)
    z_image, z_text = rng.normal(size=(2, 6, 5))
    tokens = np.arange(6)[:, None]
    losses, _ = clip_stage.contrastive_loss(
        *map(jnp.float32, (z_image, z_text, 7.0)), jnp.asarray(tokens)
    )
    unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z_image, z_text)]
    logits = 7 * unit[0] @ unit[1].T
    rows = logsumexp(logits, axis=1) - np.diag(logits)
    columns = logsumexp(logits, axis=0) - np.diag(logits)
    np.testing.assert_allclose(losses, (rows + columns) / 2, rtol=1e-5)


def test_equal_captions_are_no_negatives():
    z = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), jnp.float32)
    tokens = jnp.asarray([[1], [2], [3], [1]])
    losses, _ = clip_stage.contrastive_loss(z, z, jnp.float32(3.0), tokens)
    first, _ = clip_stage.contrastive_loss(z[:3], z[:3], jnp.float32(3.0), tokens[:3])
    # Example 0 has examples 1 and 2 as its negatives in both.
    np.testing.assert_allclose(losses[0], first[0], rtol=1e-5)
    assert losses[1] > first[1]


def test_dropped_captions_become_the_empty_one():
    tokens, empty = jnp.arange(6).reshape(3, 2), jnp.asarray([9, 9])
    dropped = shared.drop_caption(tokens, empty, jnp.asarray([False, True, False]))
    np.testing.assert_array_equal(dropped, [[0, 1], [9, 9], [4, 5]])


def test_statistics_are_those_of_the_embeddings(tiny_models):
    statistics = checkpoint.load(tiny_models["prior"]).statistics
    stage = make("prior", tiny_models["clip"])
    np.testing.assert_array_equal(stage.frozen["mean"], statistics["z_image_mean"])
    batches = stage.batches("train", 0)
    net = checkpoint.load(tiny_models["clip"])
    module = shared.clip_module(net, jnp.dtype("float32"))
    pictures = np.concatenate([next(batches)["clip_image"] for _ in range(8)])
    z = shared.encode_image(
        module, net.params["clip"], jnp.float32(pictures / 127.5 - 1)
    )
    np.testing.assert_allclose(statistics["z_image_mean"], z.mean(0), atol=1e-5)
    np.testing.assert_allclose(statistics["z_image_std"], z.std(0), rtol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_falls_on_one_batch(name, tiny_models):
    """A few steps of Adam on one batch and one draw of the noise."""
    stage = make(name, None if name == "clip" else tiny_models["clip"])
    params = stage.init(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, next(stage.batches("train", 0)))
    value = jax.jit(
        jax.value_and_grad(
            lambda p: stage.loss(p, stage.frozen, batch, jax.random.key(1))[0]
        )
    )
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)
    first, _ = value(params)
    for _ in range(10):
        _, grads = value(params)
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
    assert value(params)[0] < 0.9 * first


@pytest.mark.parametrize("name", CONFIGS)
def test_metrics_are_one_number_for_each_example(name, tiny_models):
    stage = make(name, None if name == "clip" else tiny_models["clip"])
    params = stage.init(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, next(stage.batches("heldout", 0)))
    metrics = stage.metrics(params, stage.frozen, batch, jax.random.key(1))
    assert {v.shape for v in metrics.values()} == {(8,)}
    for value in stage.preview(params, stage.frozen, batch, jax.random.key(2)).values():
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
        make("prior", None)
    checkpoint.export(tmp_path / "m", params={}, config={"parts": {}})
    with pytest.raises(UserError, match="has no CLIP"):
        make("decoder", tmp_path / "m")
    with pytest.raises(UserError, match="dtype='float16'"):
        make("clip", None, dtype="float16")
    with pytest.raises(UserError, match='"imagenet"'):
        make("clip", None, **{"data.source": "imagenet"}).batches("train", 0)
