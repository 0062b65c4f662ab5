"""Loading by path and by name: every format, the hub's cache, dtypes, and refusals."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

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

    def watched(folder, variant):
        found = find(folder, variant)

        def read(name):
            order.append("read")
            return found.read(name)

        return found._replace(read=read)

    monkeypatch.setattr(weights, "find", watched)
    hub.karlo.read(karlo, lambda x: order.append("placed"), only=("upsampler_16",))
    assert order == ["read", "placed"] * 120


class Hub:
    """Stands in for the hub: repositories are folders of a folder."""

    def __init__(self, root, monkeypatch):
        import huggingface_hub

        self.root, self.online, self.fetched = root, True, root.parent / "fetched"
        monkeypatch.setattr(huggingface_hub, "list_repo_files", self.list_repo_files)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def list_repo_files(self, name):
        if not self.online:
            raise OSError("no network")
        folder = self.root / name
        if not folder.exists():
            raise OSError("404 Client Error\nRepository Not Found")
        return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]

    def download(
        self, name, allow_patterns, ignore_patterns=(), local_files_only=False
    ):
        from huggingface_hub.utils import filter_repo_objects

        here = self.fetched / name
        if local_files_only:
            if not here.exists():
                raise OSError("nothing in the cache")
            return str(here)
        files = sorted(self.list_repo_files(name))
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (here / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / name / file, here / file)
        return str(here)


@pytest.fixture
def remote(tmp_path, monkeypatch):
    return Hub(tmp_path / "hub", monkeypatch)


def test_a_name_on_the_hub(karlo, remote):
    shutil.copytree(karlo, remote.root / "someone/tiny-karlo")
    assert dalle2_jax.load("someone/tiny-karlo").sizes == (8, 16)
    remote.online = False  # from the cache
    assert dalle2_jax.load_clip("someone/tiny-karlo").path == "someone/tiny-karlo"
    message = "someone/other is no directory here, and can't .*no network"
    with pytest.raises(UserError, match=message):
        dalle2_jax.load("someone/other")
    remote.online = True
    with pytest.raises(UserError, match="404 Client Error\\): check the name"):
        dalle2_jax.load("someone/other")


def test_each_part_has_its_weights_whatever_their_format(karlo, remote):
    """Half precision only, several files, and beside them what is not to be fetched."""
    repository = shutil.copytree(karlo, remote.root / "some/karlo")
    names = ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16")
    for part, variants in {"prior": names[1:], "decoder": names}.items():
        whole = repository / part / f"{names[0]}.safetensors"
        arrays = load_file(whole)
        whole.unlink()
        for variant in variants:
            half = variant.endswith("16")
            cast = {k: v.astype(np.float16) if half else v for k, v in arrays.items()}
            save_file(cast, repository / part / f"{variant}.safetensors")
    for junk in (
        "decoder/diffusion_pytorch_model.bin",
        "karlo.safetensors",
        ".cache/model.safetensors",
        "text_encoder/flax_model.msgpack",
    ):
        path = repository / junk
        path.parent.mkdir(exist_ok=True)
        path.touch()
    model = dalle2_jax.load("some/karlo")
    want, have = leaves(dalle2_jax.load(karlo)), leaves(model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), want, have)
    there = {str(p.relative_to(remote.fetched)) for p in remote.fetched.rglob("*.*")}
    assert {name for name in there if "safetensors" in name or ".bin" in name} == {
        "some/karlo/text_encoder/model.safetensors",
        "some/karlo/prior/diffusion_pytorch_model.fp16.safetensors",
        *(
            f"some/karlo/{part}/diffusion_pytorch_model.safetensors"
            for part in ("decoder", "text_proj", "super_res_first", "super_res_last")
        ),
    }
    dalle2_jax.load("some/karlo", variant="fp16")
    assert (
        remote.fetched / "some/karlo/decoder/diffusion_pytorch_model.fp16.safetensors"
    ).exists()
    for path in ("some/karlo", repository):
        with pytest.raises(UserError, match="of the variant 'fp8': it has fp16"):
            dalle2_jax.load(path, variant="fp8")


def test_a_model_of_this_package_on_the_hub(karlo, remote):
    hub.karlo.write(hub.karlo.read(karlo), remote.root / "some/export")
    assert dalle2_jax.load("some/export").sizes == (8, 16)


def test_what_is_fetched():
    """Of each folder one choice, and of several kinds no copy."""
    folder = {
        "pickles alone": ["pytorch_model.bin", "tf_model.h5"],
        "shards": [
            "pytorch_model.bin.index.json",
            "pytorch_model-00001-of-00002.bin",
            "pytorch_model-00002-of-00002.bin",
            "pytorch_model.fp16.bin",
        ],
        "both": ["model.safetensors", "pytorch_model.bin", "open_clip_model.bin"],
        "both, with another": ["model.safetensors", "open_clip_model.safetensors"],
        "ours": ["clip.safetensors", "prior.safetensors", "statistics.safetensors"],
    }
    wanted = {
        "pickles alone": ["pytorch_model.bin"],
        "shards": folder["shards"][:3],
        "both": ["model.safetensors"],
        "both, with another": ["model.safetensors"],
        "ours": folder["ours"],
    }
    for name, files in folder.items():
        found = hub.needed(["config.json", "README.md", "vocab.json", *files])
        assert sorted(found) == sorted(["config.json", "vocab.json", *wanted[name]])


def test_the_cache_is_not_asked_for_what_is_a_path(tmp_path):
    for path in (tmp_path, "nowhere", "./no/where", "/a/b/c"):
        assert hub.find(path) == Path(path)
    assert hub.find("bundled") == checkpoint.BUNDLED


def test_refusals(karlo, tmp_path):
    with pytest.raises(UserError, match="cannot use the path xxx.*File name too long"):
        dalle2_jax.load("x" * 5000)
    with pytest.raises(UserError, match="dtype='int8': must be one of float32"):
        dalle2_jax.load(dtype="int8")
    with pytest.raises(UserError, match="is not a model: it has no config.json"):
        dalle2_jax.load(tmp_path)
    checkpoint.export(tmp_path / "none", params={}, config={"parts": {}})
    with pytest.raises(UserError, match="has no clip"):
        dalle2_jax.load_clip(tmp_path / "none")
