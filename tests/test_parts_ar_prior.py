"""What the codes are made of, what is shown in training, and that it can be learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dalle2_jax import parts
from dalle2_jax.nn import codes
from dalle2_jax.parts import ar_prior
from dalle2_jax.parts import stage as shared
from tests.tiny import make_stage


def read(model, batches, count=8):
    """z_image and z_text of the first batches, CLIP's own way."""
    keys = {"base": str(model), "init_from": "", "dtype": "float32"}
    keys["mesh"] = {"tensor": 1}
    base = shared.load_base(ConfigDict(keys), parts.load)
    found = [next(batches) for _ in range(count)]
    pictures = jnp.float32(np.concatenate([b["clip_image"] for b in found]) / 127.5 - 1)
    tokens = jnp.asarray(np.concatenate([b["tokens"] for b in found]))
    z_image = shared.encode_image(base.clip, base.clip_params, pictures)
    z_text = shared.encode_caption(base.clip, base.clip_params, tokens).z_text
    return z_image, z_text


def test_tables_are_those_of_the_embeddings(tiny_models):
    stage = make_stage("ar_prior", tiny_models["clip"])
    found = read(tiny_models["clip"], stage.batches("train", 0))
    z_image, z_text = map(np.asarray, found)
    table, edges = stage.frozen["codes"], stage.frozen["dot_products"]
    np.testing.assert_allclose(table.mean, z_image.mean(0), atol=1e-5)
    _, s, _ = np.linalg.svd(np.float64(z_image - z_image.mean(0)))
    x = (z_image - table.mean) @ table.axes
    np.testing.assert_allclose(np.sqrt((x**2).sum(0)), s[:8], rtol=1e-2)
    a, b = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (z_image, z_text))
    counts = np.histogram((a * b).sum(-1), [-1, *edges, 1])[0]
    np.testing.assert_array_equal(counts, 8)  # 64 examples in 8 quantiles


def test_dropped_captions_are_the_empty_one():
    def caption(value):
        return ar_prior.Caption(
            jnp.full((3, 2), value),
            jnp.full((3, 4), 1.0 * value),
            jnp.full((3, 2, 5), 1.0 * value),
            jnp.full((3, 2), bool(value)),
        )

    drop = jnp.asarray([True, False, True])
    shown = ar_prior.drop_caption(caption(1), caption(0), drop)
    for leaf in shown:
        kept = leaf.reshape(3, -1).astype(bool)
        np.testing.assert_array_equal(kept.all(1), ~drop)
        np.testing.assert_array_equal(kept.any(1), ~drop)


def test_what_is_dropped_does_not_matter(tiny_models):
    """All but the dot product: one of a single quantile tells nothing."""

    def change(drop):
        values = {"drop_caption": drop, "net.dot_products": 1}
        stage = make_stage("ar_prior", tiny_models["clip"], **values)
        params = jax.jit(stage.init)(jax.random.key(0))
        batch = jax.tree.map(jnp.asarray, next(stage.batches("train", 0)))
        other = batch | {"tokens": batch["tokens"][::-1]}
        loss = jax.jit(stage.loss)
        a, b = (
            loss(params, stage.frozen, x, jax.random.key(1))[0] for x in (batch, other)
        )
        return abs(float(a - b))

    assert change(0.0) > 1e-6
    assert change(1.0) == 0.0


def test_a_batch_is_learnt_by_heart(tiny_models):
    """Then the codes drawn for its captions are its pictures' own."""
    values = {"drop_caption": 0.0, "sampling.guidance": 1.0, "sampling.temperature": 0}
    values |= {"net.components": 4, "net.dot_products": 1}
    stage = make_stage("ar_prior", tiny_models["clip"], **values)
    batch = jax.tree.map(jnp.asarray, next(stage.batches("train", 0)))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(state, _):
            params, moments = state
            grads = jax.grad(
                lambda p: stage.loss(p, stage.frozen, batch, jax.random.key(1))[0]
            )(params)
            updates, moments = optimizer.update(grads, moments)
            return (optax.apply_updates(params, updates), moments), None

        state = params, optimizer.init(params)
        return jax.lax.scan(step, state, None, 150)[0][0]

    params = train(jax.jit(stage.init)(jax.random.key(0)))
    metrics = stage.metrics(params, stage.frozen, batch, jax.random.key(2))
    assert metrics["loss"].max() < 0.05
    z_image, _ = read(tiny_models["clip"], stage.batches("train", 0), 1)
    table = stage.frozen["codes"]
    best = codes.decode(table, codes.encode(table, z_image, 16), 16)
    best = ar_prior.centred_cosine(stage.frozen, best, z_image)
    np.testing.assert_allclose(metrics["cosine"], best, atol=1e-5)
    preview = stage.preview(params, stage.frozen, batch, jax.random.key(3))
    np.testing.assert_allclose(preview["cosine_to_true"], best.mean(), atol=1e-5)


def test_an_untrained_prior_is_as_good_as_chance(tiny_models):
    stage = make_stage("ar_prior", tiny_models["clip"])
    params = jax.jit(stage.init)(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, next(stage.batches("heldout", 0)))
    loss = stage.metrics(params, stage.frozen, batch, jax.random.key(1))["loss"]
    np.testing.assert_allclose(loss.mean(), np.log(16), rtol=0.2)
