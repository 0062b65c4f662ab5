"""CLIP's loss against numpy."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.special import logsumexp

from dalle2_jax.errors import UserError
from dalle2_jax.parts import clip as clip_stage
from dalle2_jax.train import mesh as meshes
from tests.tiny import make_stage


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


def examples(b, d=5):
    """Embeddings, temperature and captions, of which some are the same."""
    rng = np.random.default_rng(2)
    z_image, z_text = rng.normal(size=(2, b, d))
    tokens = rng.integers(b // 2, size=(b, 1)) * np.array([1, 3])
    return z_image, z_text, np.float64(7.0), tokens


def plain_loss(*arguments):
    return clip_stage.contrastive_loss(*arguments)[0]


def weighted(loss, weights):
    """A scalar of losses that has every one of them in its gradient, and they all."""
    return jax.jit(
        jax.value_and_grad(lambda *x: jnp.sum(loss(*x) * weights), argnums=(0, 1, 2))
    )


@pytest.mark.parametrize(
    "chunk, shape", [(8, None), (2, (8, 1, 1)), (1, (2, 4, 1)), (4, (2, 2, 2))]
)
def test_a_chunked_loss_is_the_plain_one_and_has_its_gradient(chunk, shape):
    weights = np.linspace(1, 2, 32)
    grid = meshes.make(*shape) if shape else None
    with jax.enable_x64(True):
        arguments = tuple(map(jnp.asarray, examples(32)))
        expected = weighted(plain_loss, weights)(*arguments)
        with jax.set_mesh(grid) if grid else contextlib.nullcontext():
            if grid:
                names = "z_image", "z_text", "temperature", "tokens"
                batch = dict(zip(names, examples(32), strict=True))
                temperature = batch.pop("temperature")
                z_image, z_text, tokens = meshes.put_batch(batch, grid).values()
                arguments = z_image, z_text, temperature, tokens
            found = weighted(
                lambda *x: clip_stage.chunked_contrastive_loss(*x, chunk)[0], weights
            )(*arguments)
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_chunked_loss_says_what_is_nearest():
    arguments = tuple(map(jnp.float32, examples(32)[:3]))
    tokens = jnp.asarray(examples(32)[3])
    _, logits = clip_stage.contrastive_loss(*arguments, tokens)
    _, text, picture = clip_stage.chunked_contrastive_loss(*arguments, tokens, 8)
    captions = np.asarray(tokens[:, 0])
    np.testing.assert_array_equal(text, captions[logits.argmax(1)] == captions)
    np.testing.assert_array_equal(picture, captions[logits.argmax(0)] == captions)
    assert 0 < text.sum() < 32


def test_a_chunk_that_does_not_divide():
    with jax.set_mesh(meshes.make()):
        arguments = tuple(map(jnp.asarray, examples(32)))
        with pytest.raises(UserError, match="loss_chunk=3 must divide the 4 rows"):
            clip_stage.chunked_contrastive_loss(*arguments, 3)


def test_a_chunked_loss_takes_less_memory():
    """Beside 4 MiB of logits, [1024, 1024]; a chunk's are 64 KiB."""
    shapes = jax.eval_shape(lambda: tuple(map(jnp.float32, examples(1024)[:3])))
    tokens = jax.ShapeDtypeStruct((1024, 2), jnp.int32)

    def temporary(loss):
        compiled = weighted(loss, 1.0).lower(*shapes, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunked = temporary(lambda *x: clip_stage.chunked_contrastive_loss(*x, 16)[0])
    assert temporary(plain_loss) > 2**23 and chunked < 2**20


@pytest.mark.parametrize("chunk", [0, 2])
def test_micro_batches_see_each_others_negatives(chunk):
    """The gradient is that of the whole batch, though it is embedded in parts."""
    stage = make_stage("clip", loss_chunk=chunk)
    assert stage.compares
    params = stage.init(jax.random.key(0))
    batch = next(stage.batches("train", 0))

    @jax.jit
    def gradient(batch):
        loss = jax.value_and_grad(stage.loss, has_aux=True)
        return loss(params, {}, batch, jax.random.key(1))

    whole = gradient({name: x[None] for name, x in batch.items()})
    parts = gradient({n: x.reshape(4, 2, *x.shape[1:]) for n, x in batch.items()})
    for a, b in zip(*map(jax.tree.leaves, (parts, whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
    alone = make_stage("clip").loss(
        params,
        {},
        {name: jnp.asarray(x[None, :2]) for name, x in batch.items()},
        jax.random.key(1),
    )
    assert alone[0] < whole[0][0] - 0.1  # has fewer negatives


def test_the_similarity_picture_is_bright_on_the_diagonal():
    picture = clip_stage.similarity_picture(jnp.eye(4))
    assert picture.shape == (1, 48, 48, 3)
    assert picture[0, 5, 5, 0] >= 254 and picture[0, 5, 40, 0] == 0


def test_a_batch_of_one_has_nothing_to_compare():
    with pytest.raises(UserError, match="batch_size=1: CLIP .* alone is always 0"):
        make_stage("clip", batch_size=1)


def test_captions_that_are_all_the_same(tmp_path):
    for name in "abcd":
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a photo")
    data = {"data.source": "folder", "data.path": str(tmp_path)}
    with pytest.raises(UserError, match="captions are all 'a photo': CLIP learns"):
        make_stage("clip", **data, **{"data.folder.holdout": 0.0})
