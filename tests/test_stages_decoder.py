"""What the decoder is told in training."""

import jax
import jax.numpy as jnp
import pytest

from tests.tiny import make_stage


@pytest.mark.parametrize(
    ("drop", "key"), [("drop_image", "clip_image"), ("drop_caption", "tokens")]
)
def test_a_dropped_condition_does_not_matter(drop, key, tiny_models):
    """Only what is kept changes the loss."""
    rates = {"drop_image": 0.0, "drop_caption": 0.0}

    def change(**dropped):
        stage = make_stage("decoder", tiny_models["clip"], **(rates | dropped))
        # The output is zero at first, whatever goes in: any other params will do.
        params = jax.tree.map(lambda x: x + 0.02, stage.init(jax.random.key(0)))
        batch = jax.tree.map(jnp.asarray, next(stage.batches("train", 0)))
        other = batch | {key: batch[key][::-1]}
        loss = jax.jit(stage.loss)
        a, b = (
            loss(params, stage.frozen, x, jax.random.key(1))[0] for x in (batch, other)
        )
        return abs(float(a - b))

    assert change() > 1e-7
    assert change(**{drop: 1.0}) == 0.0
