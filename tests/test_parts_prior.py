"""The space in which the prior works."""

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dalle2_jax import checkpoint
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
        )
    )
    pictures = np.concatenate([next(batches)["clip_image"] for _ in range(8)])
    pictures = jnp.float32(pictures / 127.5 - 1)
    z = shared.encode_image(base.clip, base.clip_params, pictures)
    np.testing.assert_allclose(statistics["z_image_mean"], z.mean(0), atol=1e-5)
    np.testing.assert_allclose(statistics["z_image_std"], z.std(0), rtol=1e-3)
