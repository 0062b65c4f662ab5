"""A stage that learns, and some that don't."""

import itertools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dalle2_jax.checks import learning
from dalle2_jax.train import mesh as meshes
from tests.linear import linear, make_batches

WIDTH = 32


def overfit(steps=40, stage=None, **optim):
    stage = stage or linear(WIDTH)
    config = ConfigDict(dict(seed=0, ema_decay=0.9))
    options = dict(name="adamw", learning_rate=0.03, schedule="cosine", warmup=500)
    config.optim = ConfigDict({**options, **optim})
    mesh = meshes.make()
    batch = learning.fixed_batch(make_batches(width=WIDTH)(0), 32)
    with jax.set_mesh(mesh):
        frozen = meshes.put(stage.frozen, mesh)
        found = learning.overfit(stage, config, mesh, frozen, batch, steps)
    return found, learning.judge("decoder", found, starts=True)


def test_the_batch_is_that_of_training():
    batches = make_batches(width=WIDTH)
    batch = learning.fixed_batch(batches(0), 24)
    one, two = itertools.islice(batches(0), 2)
    np.testing.assert_array_equal(batch["x"], np.concatenate([one["x"], two["x"][:8]]))


def test_a_stage_that_learns():
    found, (loss, params) = overfit()
    assert found.steps == 40 and found.untouched == []
    assert found.before == pytest.approx(2, rel=0.2)  # of two random matrices
    assert found.after < 0.3 * found.before  # in spite of warmup=500
    assert (loss.level, params.level) == ("ok", "ok")
    assert f"from {found.before:.4g} to {found.after:.4g} in 40 steps" in loss.found


def test_a_learning_rate_of_0():
    found, (loss, _) = overfit(steps=10, learning_rate=0.0)
    assert found.after == found.before and loss.level == "problem"
    assert "nothing is learnt" in loss.remedy


def test_a_learning_rate_that_is_too_high():
    found, (loss, _) = overfit(steps=10, learning_rate=30.0)
    assert found.after > found.before and loss.level == "problem"
    assert loss.remedy == "lower optim.learning_rate"


def test_a_loss_that_is_not_finite():
    stage = linear(WIDTH)

    def loss(params, frozen, batch, key):
        value, extra = stage.loss(params, frozen, batch, key)
        return jax.numpy.where(value < 1.5, jax.numpy.nan, value), extra

    found, (finding,) = overfit(stage=stage._replace(loss=loss))
    assert 0 < found.steps < 40 and finding.level == "problem"
    assert f"not finite at step {found.steps + 1}" in finding.found


def test_params_without_a_gradient():
    stage = linear(WIDTH)

    def init(key):
        return {**stage.init(key), "unused": {"kernel": jax.numpy.ones((2, 2))}}

    # What decays changes, and is not trained for that.
    found, (loss, params) = overfit(stage=stage._replace(init=init), weight_decay=0.1)
    assert found.untouched == ["unused/kernel"]
    assert loss.level == "ok" and params.level == "warning"
    assert params.found == "no step had a gradient of unused/kernel"


@pytest.mark.parametrize(
    ("starts", "after", "level"),
    [
        (True, 0.4, "ok"),
        (True, 0.9, "warning"),
        (True, 0.99, "problem"),
        (False, 0.9, "ok"),
        (False, 0.99, "ok"),
        (False, 1.0, "problem"),
        (False, 1.2, "problem"),
    ],
)
def test_the_criterion(starts, after, level):
    found = learning.Overfit(10, 10, 1.0, after, 1.0, [])
    assert learning.judge("prior", found, starts)[0].level == level
