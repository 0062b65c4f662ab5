"""Loading a model: what it holds, and what is wrong with what can't be loaded."""

import json
import shutil

import numpy as np
import pytest

import dalle2_jax
from dalle2_jax import checkpoint
from dalle2_jax.errors import UserError


def test_parts_with_their_settings(tiny_models):
    model = dalle2_jax.load(tiny_models["upsampler"])
    assert model.decoder.size == 16 and model.upsamplers[0].low_size == 16
    assert model.sampling["prior"]["steps"] == 4
    assert model.decoder.diffusion["predict"] == "x0"
    on_disk = checkpoint.load(tiny_models["upsampler"]).params["decoder"]
    kernel = model.decoder.params["net"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(kernel, on_disk["net"]["conv_in"]["kernel"])
    assert kernel.sharding.is_fully_replicated


def test_several_models_are_put_together(tiny_models):
    model = dalle2_jax.load(tiny_models["prior"], tiny_models["upsampler"])
    assert model.sizes == (16, 32) and model.prior is not None
    model = dalle2_jax.load(tiny_models["clip"])
    assert model.sizes == () and model.prior is None


def test_the_bundled_model_is_whole():
    model = dalle2_jax.load()
    assert model.path == "bundled"
    assert model.sizes == (32, 128)


def broken(tiny_models, tmp_path):
    return shutil.copytree(tiny_models["upsampler"], tmp_path / "model")


def test_a_truncated_file_is_named(tiny_models, tmp_path):
    path = broken(tiny_models, tmp_path)
    file = path / "decoder.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="decoder.safetensors is truncated"):
        dalle2_jax.load(path)


def test_weights_that_do_not_fit_are_listed(tiny_models, tmp_path):
    path = broken(tiny_models, tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["parts"]["prior"]["net"]["width"] = 64
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="wrong shape: .*ln_out"):
        dalle2_jax.load(path)


def test_a_directory_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match="is not a model"):
        dalle2_jax.load(tmp_path)
