"""Loading by path and by name: every format, the hub's cache, dtypes, and refusals."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dalle2_jax
from dalle2_jax import checkpoint, hub
from dalle2_jax.errors import UserError
from tests.golden import peer


@pytest.fixture(scope="module")
def karlo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("karlo")
    peer.write_pipeline(folder, "text_to_image")
    return folder


def leaves(model):
    return jax.tree.leaves((model.clip, model.prior, model.decoder, model.upsamplers))


def test_a_pipeline_of_diffusers(karlo):
    model = dalle2_jax.load(karlo)
    assert model.sizes == (8, 16) and model.statistics["z_image_mean"].shape == (16,)
    assert model.upsamplers[0].last is not None
    assert {x.dtype for x in leaves(model)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_params_and_activations_in_half_precision(karlo, dtype):
    model = dalle2_jax.load(karlo, dtype=dtype)
    assert {x.dtype for x in leaves(model)} == {jnp.dtype(dtype)}
    assert model.decoder.network.dtype == dtype
    whole = dalle2_jax.encode_text(dalle2_jax.load(karlo), "ab")
    half = dalle2_jax.encode_text(model, "ab")
    assert half.dtype == np.float32
    assert 0 < np.abs(half - whole).max() < 0.1 * np.abs(whole).max()


def test_offloaded_params_stay_on_the_host_and_give_the_same(karlo):
    model = dalle2_jax.load(karlo, offload=True)
    assert all(isinstance(x, np.ndarray) for x in leaves(model))
    here = dalle2_jax.load(karlo)
    assert all(isinstance(x, jax.Array) for x in leaves(here))
    steps = {"prior": 2, "decoder": 2, "upsampler": (2,)}
    np.testing.assert_array_equal(
        dalle2_jax.text_to_image(model, "ab", steps=steps),
        dalle2_jax.text_to_image(here, "ab", steps=steps),
    )


def test_no_more_than_one_param_is_read_ahead(karlo, monkeypatch):
    """Each is placed before the next is read."""
    from dalle2_jax.convert import weights

    order = []
    find = weights.find

    def watched(folder):
        found = find(folder)

        def read(name):
            order.append("read")
            return found.read(name)

        return found._replace(read=read)

    monkeypatch.setattr(weights, "find", watched)
    hub.karlo.read(karlo, lambda x: order.append("placed"), only=("upsampler_16",))
    assert order == ["read", "placed"] * 120


def cache(root: Path, name: str, folder: Path) -> None:
    """Lays a folder out as the hub's cache does."""
    home = root / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, home / "snapshots" / ("0" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)


def test_a_name_on_the_hub_from_its_cache(karlo, tmp_path, monkeypatch):
    import huggingface_hub

    cache(tmp_path, "someone/tiny-karlo", karlo)
    download = huggingface_hub.snapshot_download

    def offline(name, **options):
        return download(name, cache_dir=tmp_path, local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert dalle2_jax.load("someone/tiny-karlo").sizes == (8, 16)
    assert dalle2_jax.load_clip("someone/tiny-karlo").path == "someone/tiny-karlo"
    with pytest.raises(
        UserError, match="someone/other is no directory here, and can't"
    ):
        dalle2_jax.load("someone/other")


def test_what_is_fetched(monkeypatch, tmp_path):
    """Safetensors, and pickles only where there is nothing else."""
    import huggingface_hub

    files = {"a/model.safetensors", "a/model.fp16.safetensors", "a/model.bin"}
    calls = []

    def download(name, allow_patterns, ignore_patterns):
        calls.append(allow_patterns)
        chosen = huggingface_hub.utils.filter_repo_objects(
            sorted(files),
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        )
        for file in chosen:
            path = tmp_path / file
            path.parent.mkdir(exist_ok=True)
            path.touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.find("some/model")
    assert [p.name for p in tmp_path.glob("a/*")] == ["model.safetensors"]
    shutil.rmtree(tmp_path / "a")
    files.remove("a/model.safetensors")
    hub.find("some/model")
    assert [p.name for p in tmp_path.glob("a/*")] == ["model.bin"]
    assert len(calls) == 3


def test_the_cache_is_not_asked_for_what_is_a_path(tmp_path):
    for path in (tmp_path, "nowhere", "./no/where", "/a/b/c"):
        assert hub.find(path) == Path(path)
    assert hub.find("bundled") == checkpoint.BUNDLED


def test_refusals(karlo, tmp_path):
    with pytest.raises(UserError, match="dtype='int8': must be one of float32"):
        dalle2_jax.load(dtype="int8")
    with pytest.raises(UserError, match="is not a model: it has no config.json"):
        dalle2_jax.load(tmp_path)
    checkpoint.export(tmp_path / "none", params={}, config={"parts": {}})
    with pytest.raises(UserError, match="has no clip"):
        dalle2_jax.load_clip(tmp_path / "none")
