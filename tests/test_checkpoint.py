"""Exported models and a run's checkpoints: what goes in comes out, or a clear error."""

import hashlib
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dalle2_jax import checkpoint
from dalle2_jax.errors import UserError


class Tokenizer:
    def save(self, folder):
        folder.mkdir()
        (folder / "vocab.json").write_text("{}")


class FullDisk:
    def save(self, folder):
        raise OSError(28, "No space left on device")


PARAMS = {
    "clip": {
        "text": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T},
        "scale": np.float32(2.5),
    },
    "prior": {"query": jnp.array([1.1, -2.2], jnp.bfloat16)},
}
CONFIG = {"parts": {"clip": {"net": {"width": 3}}, "prior": {}}}
STATISTICS = {"z_image": {"mean": np.zeros(4, np.float32)}}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    checkpoint.export(
        path,
        params=PARAMS,
        config=CONFIG,
        tokenizer=Tokenizer(),
        statistics=STATISTICS,
    )
    return path


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# Models


def test_an_export_comes_back_as_it_was(model):
    loaded = checkpoint.load(model)
    assert loaded.config == {**CONFIG, "format": 1}
    assert_equal(loaded.params, jax.device_get(PARAMS))
    assert loaded.params["prior"]["query"].dtype == ml_dtypes.bfloat16
    assert loaded.params["clip"]["scale"].shape == ()
    assert_equal(loaded.statistics, STATISTICS)
    assert (loaded.tokenizer_dir / "vocab.json").exists()
    names = {path.name for path in model.iterdir()}
    assert names == {
        "config.json",
        "clip.safetensors",
        "prior.safetensors",
        "statistics.safetensors",
        "tokenizer",
    }


def test_a_model_without_tokenizer_and_statistics(tmp_path):
    config = {"parts": {"clip": {}}}
    checkpoint.export(tmp_path / "a" / "b", params={"clip": {}}, config=config)
    loaded = checkpoint.load(str(tmp_path / "a" / "b"))
    assert loaded.tokenizer_dir is None
    assert loaded.statistics == {} and loaded.params == {"clip": {}}


def test_copy(model, tmp_path):
    for _ in range(2):
        checkpoint.copy(model, tmp_path / "copy" / "model")
        loaded = checkpoint.load(tmp_path / "copy" / "model")
        assert_equal(loaded.params, checkpoint.load(model).params)
        assert (loaded.tokenizer_dir / "vocab.json").exists()
    with pytest.raises(UserError, match="cannot write the model .*nowhere"):
        checkpoint.copy(tmp_path / "nowhere", tmp_path / "other")


def test_copy_in_half_precision(model, tmp_path):
    checkpoint.copy(model, tmp_path / "half", dtype="float16")
    before, after = checkpoint.load(model), checkpoint.load(tmp_path / "half")
    for part, params in before.params.items():
        for a, b in zip(
            jax.tree.leaves(params), jax.tree.leaves(after.params[part]), strict=True
        ):
            assert b.dtype == np.float16
            np.testing.assert_allclose(a, b, rtol=1e-3)
    jax.tree.map(np.testing.assert_array_equal, before.statistics, after.statistics)


def test_a_path_with_a_tilde(model, monkeypatch):
    monkeypatch.setenv("HOME", str(model.parent))
    checkpoint.copy("~/model", "~/copy")
    for path in ("~/model", "~/copy"):
        assert_equal(checkpoint.load(path).params, jax.device_get(PARAMS))
    with pytest.raises(UserError, match="~nobody-here/model: .*write the path without"):
        checkpoint.load("~nobody-here/model")


@pytest.mark.parametrize("name", ["bytes \udcff", "zero \0"])
def test_a_path_that_is_no_text(tmp_path, name):
    for attempt in (
        lambda: checkpoint.load(tmp_path / name),
        lambda: checkpoint.export(tmp_path / name, params={}, config={"parts": {}}),
    ):
        with pytest.raises(UserError, match="is no path of UTF-8 text: rename") as e:
            attempt()
        str(e.value).encode()


def test_an_export_replaces_a_model_as_a_whole(model):
    config = {"parts": {"clip": {}}}
    checkpoint.export(model, params={"clip": PARAMS["clip"]}, config=config)
    assert {path.name for path in model.iterdir()} == {
        "config.json",
        "clip.safetensors",
    }
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_an_export_that_fails_leaves_the_model_that_was_there(model):
    with pytest.raises(UserError, match="cannot write the model .*No space left"):
        checkpoint.export(model, params={}, config={"parts": {}}, tokenizer=FullDisk())
    assert_equal(checkpoint.load(model).params, jax.device_get(PARAMS))
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_an_export_replaces_nothing_but_a_model(tmp_path):
    (tmp_path / "thesis.tex").touch()
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(UserError, match="exists and is not a model"):
            checkpoint.export(path, params={}, config={"parts": {}})
    assert (tmp_path / "thesis.tex").exists()


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("config.json", None, "is not a model: it has no config.json"),
        ("config.json", 20, "config.json is not valid JSON"),
        ("prior.safetensors", None, "prior.safetensors is missing: copy or export"),
        ("clip.safetensors", 0, "clip.safetensors is truncated or damaged"),
        ("clip.safetensors", 99, "clip.safetensors is truncated or damaged"),
        ("clip.safetensors", -1, "clip.safetensors is truncated or damaged"),
        (
            "statistics.safetensors",
            -1,
            "statistics.safetensors is truncated .*: copy or",
        ),
    ],
)
def test_a_model_that_cannot_be_read(model, name, size, message):
    if size is None:
        (model / name).unlink()
    else:
        truncate(model / name, size)
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "must hold a JSON object"),
        ("[" * 10**5, "is not valid JSON: more than 100 levels deep"),
        ("{}", "is not the config of a model"),
        ("3", "must hold a JSON object"),
        ('{"format": 1, "parts": 3}', "is not the config of a model"),
    ],
)
def test_a_config_of_something_else(model, text, message):
    (model / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"config.json {message}"):
        checkpoint.load(model)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(tmp_path, value):
    kernel = np.full((2, 3), 1, ml_dtypes.bfloat16)
    kernel[1, 2] = value
    params, config = {"clip": {"text": {"kernel": kernel}}}, {"parts": {"clip": {}}}
    checkpoint.export(tmp_path / "model", params=params, config=config)
    message = "clip.safetensors: text/kernel holds NaN or infinity"
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path / "model")


def test_a_model_of_a_later_format(model):
    (model / "config.json").write_text(json.dumps({"format": 2, "parts": {}}))
    with pytest.raises(UserError, match="format 2, .* reads format 1: update"):
        checkpoint.load(model)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a model"):
        checkpoint.load(tmp_path / "nowhere")


def test_check_lists_every_name_that_does_not_fit():
    shape = jax.ShapeDtypeStruct
    want = {
        "a": {"kernel": shape((2, 3), jnp.float32), "bias": shape((3,), jnp.float32)}
    }
    have = {"a": {"kernel": np.zeros((2, 4))}, "b": np.zeros(1)}
    message = (
        "clip.safetensors does not fit this config: missing: a/bias; unexpected: b; "
        "wrong shape: a/kernel (2, 4) instead of (2, 3)"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        checkpoint.check(have, want, "clip.safetensors")
    checkpoint.check(want, want, "the same")


def test_check_lists_no_more_than_can_be_read():
    with pytest.raises(UserError, match="missing: 0, 1, 2, 3, 4, 5, 6, 7 and 92 more$"):
        checkpoint.check([], [np.zeros(1)] * 100, "model")


def test_fingerprints_tell_names_shapes_and_values():
    tree = {"b": {"kernel": np.ones((2, 3), np.float32)}, "a": np.float32(2)}
    prints = [
        checkpoint.fingerprint(tree),
        checkpoint.fingerprint({"a": tree["a"], "b": tree["b"]}),
        checkpoint.fingerprint(jax.tree.map(np.float16, tree)),
        checkpoint.fingerprint({**tree, "a": np.float32(2.001)}),
        checkpoint.fingerprint({**tree, "b": {"kernel": np.ones((3, 2))}}),
        checkpoint.fingerprint({"b": tree["b"], "c": tree["a"]}),
    ]
    assert prints[0] == prints[1] == prints[2] and len(set(prints)) == 4


def test_checksums_of_an_export_are_those_of_its_files(model, tmp_path):
    checkpoint.copy(model, tmp_path / "half", dtype="float16")
    for folder in (model, tmp_path / "half"):
        stored = json.loads((folder / "config.json").read_text())["sha256"]
        files = {p for p in folder.rglob("*") if p.is_file()} - {folder / "config.json"}
        assert {folder / name for name in stored} == files
        for name, digest in stored.items():
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            assert digest == found
    assert checkpoint.load(model, only=("prior",)).params.keys() == {"prior"}
    (model / "clip.safetensors").unlink()  # is not looked at
    assert checkpoint.load(model, only=("prior",)).params.keys() == {"prior"}


def test_a_model_of_before_checksums_is_read(model):
    config = json.loads((model / "config.json").read_text())
    del config["sha256"]
    (model / "config.json").write_text(json.dumps(config))
    assert_equal(checkpoint.load(model).params, jax.device_get(PARAMS))
