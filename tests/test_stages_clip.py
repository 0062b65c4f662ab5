"""CLIP's loss against numpy."""

import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from dalle2_jax.stages import clip as clip_stage


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


def test_the_similarity_picture_is_bright_on_the_diagonal():
    picture = clip_stage.similarity_picture(jnp.eye(4))
    assert picture.shape == (1, 48, 48, 3)
    assert picture[0, 5, 5, 0] >= 254 and picture[0, 5, 40, 0] == 0
