"""The space in which the prior works."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dalle2_jax import checkpoint, parts
from dalle2_jax.errors import UserError
from dalle2_jax.nn.prior import DiffusionPrior
from dalle2_jax.parts import prior
from dalle2_jax.parts import stage as shared
from tests.tiny import make_stage


def test_statistics_are_those_of_the_embeddings(tiny_models):
    statistics = checkpoint.load(tiny_models["prior"]).statistics
    stage = make_stage("prior", tiny_models["clip"])
    np.testing.assert_array_equal(stage.frozen["mean"], statistics["z_image_mean"])
    batches = stage.batches("train", 0)
    base = shared.load_base(
        ConfigDict(
            {
                "base": str(tiny_models["clip"]),
                "init_from": "",
                "dtype": "float32",
                "mesh": {"tensor": 1},
            }
        ),
        parts.load,
    )
    pictures = np.concatenate([next(batches)["clip_image"] for _ in range(8)])
    pictures = jnp.float32(pictures / 127.5 - 1)
    z = shared.encode_image(base.clip, base.clip_params, pictures)
    np.testing.assert_allclose(statistics["z_image_mean"], z.mean(0), atol=1e-5)
    np.testing.assert_allclose(statistics["z_image_std"], z.std(0), rtol=1e-3)


def test_a_dimension_in_which_nothing_varies(caplog):
    z = np.random.default_rng(0).normal(2.0, 0.5, (64, 6))
    z[:, 2] = 7.0
    mean, std = prior.mean_and_deviation(z)
    typical = np.sqrt(np.mean(z.std(0) ** 2))
    np.testing.assert_allclose(std[2], 1e-3 * typical, rtol=1e-5)
    rest = np.arange(6) != 2
    np.testing.assert_allclose(std[rest], z.std(0)[rest], rtol=1e-5)
    np.testing.assert_allclose(mean, z.mean(0), rtol=1e-5)
    assert "1 of 6 dimensions of CLIP's embeddings are the same" in caplog.text


@pytest.mark.parametrize(
    "z, message",
    [
        (np.ones((8, 4)), "the first 8 pictures are all the same: the prior needs dif"),
        (np.full((8, 4), np.nan), "embeddings of the first 8 pictures are not finite"),
    ],
)
def test_embeddings_that_no_prior_can_learn(z, message):
    with pytest.raises(UserError, match=message):
        prior.mean_and_deviation(z)


def test_a_model_whose_statistics_have_a_zero():
    statistics = {"z_image_mean": np.zeros(3), "z_image_std": np.float32([1, 0, 1])}
    model = checkpoint.Export({}, {}, None, statistics)
    with pytest.raises(UserError, match="init_from=a: z_image_std .* must be above 0"):
        prior.stored_statistics(model, "a", DiffusionPrior(3, 4, 4, 8, 1, 1))
