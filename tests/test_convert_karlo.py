"""Karlo's folders: read, sampled like diffusers, written back, and refused."""

import json
import pickle
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dalle2_jax
from configs import decoder
from dalle2_jax import checkpoint
from dalle2_jax.commands import run
from dalle2_jax.commands.train import train
from dalle2_jax.convert import karlo, weights
from dalle2_jax.errors import UserError
from tests.golden import peer

KINDS = ("text_to_image", "variations")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Both kinds of pipeline's folder, as diffusers saves them."""
    root = tmp_path_factory.mktemp("karlo")
    for name in KINDS:
        peer.write_pipeline(root / name, name)
    return root


def noise_of(arrays, *parts):
    noise = {name: arrays[f"inputs/{name}"] for name in parts}
    steps = {name: len(array) for name, array in noise.items()}
    return {
        "noise": noise | {"upsampler": (arrays["inputs/upsampler"],)},
        "steps": steps | {"upsampler": (len(arrays["inputs/upsampler"]),)},
    }


def assert_same_pictures(ours, theirs):
    assert ours.dtype == np.uint8 and ours.shape == theirs.shape
    difference = np.abs(ours.astype(int) - np.round(theirs * 255))
    assert np.mean(difference <= 1) >= 0.999, difference.max()


def test_text_to_image_is_as_diffusers(folders):
    arrays = peer.load("pipeline")
    model = dalle2_jax.load(folders / "text_to_image")
    assert model.sizes == (8, 16)
    ours = dalle2_jax.text_to_image(
        model, ["a red circle", "ab"], **noise_of(arrays, "prior", "decoder")
    )
    assert_same_pictures(ours, arrays["outputs/text_to_image"])


def test_variations_are_as_diffusers(folders):
    arrays = peer.load("pipeline")
    model = dalle2_jax.load(folders / "variations")
    ours = dalle2_jax.variations(
        model, arrays["inputs/picture"], num=2, **noise_of(arrays, "decoder")
    )
    assert_same_pictures(ours, arrays["outputs/variations"])


def assert_same_model(a, b):
    assert a.config["parts"] == b.config["parts"]
    for x, y in ((a.params, b.params), (a.statistics, b.statistics)):
        jax.tree.map(np.testing.assert_array_equal, x, y)
        assert jax.tree.map(lambda v: v.dtype, x) == jax.tree.map(lambda v: v.dtype, y)


@pytest.mark.parametrize("kind", KINDS)
def test_to_diffusers_and_back_is_exact(folders, tmp_path, kind):
    model = karlo.read(folders / kind)
    karlo.write(model, tmp_path / "there")
    assert_same_model(karlo.read(tmp_path / "there"), model)
    written = {path.name for path in (tmp_path / "there").iterdir()}
    assert written == {path.name for path in (folders / kind).iterdir()}
    for path in (folders / kind).rglob("*.safetensors"):
        ours = load_file(tmp_path / "there" / path.relative_to(folders / kind))
        theirs = load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_the_command_goes_both_ways(folders, tmp_path):
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    sources = [str(folders / kind) for kind in KINDS]
    run("convert", [*sources, ours, "--dtype", "bfloat16"])
    model = checkpoint.load(ours)
    assert set(model.params) == {
        "clip",
        "prior",
        "decoder",
        "upsampler_16",
        "upsampler_16_last",
    }
    assert "vision" in model.params["clip"]  # of the second, beside the first's prior
    assert model.params["prior"]["query"].dtype == jax.numpy.bfloat16
    run("convert", ["--to-diffusers", ours, theirs])
    back = karlo.read(theirs)
    for one in (model, back):  # diffusers has no place for it
        del one.params["clip"]["logit_scale"]
    assert_same_model(back, model)


def test_a_second_source_without_image_tower_does_not_take_the_firsts(folders):
    models = [karlo.read(folders / kind) for kind in reversed(KINDS)]
    assert "vision" in checkpoint.merge(models).params["clip"]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_runs_what_is_written(folders, tmp_path, monkeypatch, kind):
    pipelines = pytest.importorskip("diffusers.pipelines")
    from diffusers.pipelines.deprecated import unclip

    from tests.golden import make

    # Where diffusers looks for the class of text_proj, and 0.42 no longer has it.
    monkeypatch.setattr(pipelines, "unclip", unclip, raising=False)
    model = karlo.read(folders / kind, weights.caster("float32"))
    karlo.write(model, tmp_path / "there")
    made = {
        "text_to_image": unclip.UnCLIPPipeline,
        "variations": unclip.UnCLIPImageVariationPipeline,
    }[kind].from_pretrained(tmp_path / "there")
    arrays = peer.load("pipeline")
    ours = make.run(kind, made, peer.below(arrays, "inputs/"))
    # The first step divides by the signal that is left, 1/20,000: rounding shows.
    np.testing.assert_allclose(ours, arrays[f"outputs/{kind}"], atol=1e-4)


@pytest.mark.slow
def test_what_is_fine_tuned_here_goes_to_diffusers(folders, tmp_path):
    """Both folders as one model, its decoder trained a step by the row `karlo`."""
    run("convert", [str(folders / kind) for kind in KINDS] + [str(tmp_path / "ours")])
    config = decoder.get_config("karlo")
    config.init_from = str(tmp_path / "ours")
    config.update_from_flattened_dict(
        {
            "size": 8,
            "batch_size": 8,
            "steps": 1,
            "dtype": "float32",
            "eval_every": 0,
            "preview_every": 0,
            "optim.warmup": 0,
            "net.context_width": 12,
            "net.unet.channels": 8,
            "net.unet.multipliers": (1, 2),
            "net.unet.blocks": 1,
            "net.unet.attention_levels": (1,),
            "net.unet.head_channels": 8,
            "net.unet.groups": 4,
        }
    )
    assert train(config, tmp_path / "run")
    tuned = checkpoint.load(tmp_path / "run" / "model")
    run(
        "convert",
        ["--to-diffusers", str(tmp_path / "run/model"), str(tmp_path / "there")],
    )
    back = karlo.read(tmp_path / "there")
    for name, before in checkpoint.load(tmp_path / "ours").params.items():
        before = jax.tree.map(np.float32, before)
        after = jax.tree.map(np.float32, back.params[name])
        trained = jax.tree.map(np.float32, tuned.params[name])
        jax.tree.map(np.testing.assert_array_equal, after, trained)
        same = jax.tree.map(np.array_equal, after, before)
        assert all(jax.tree.leaves(same)) == (name != "decoder")


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(path, change):
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)


WEIGHTS = "decoder/diffusion_pytorch_model.safetensors"


def truncate(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def corrupt(folder):
    path = folder / WEIGHTS
    path.write_bytes(b"\xff" * 50 + path.read_bytes()[50:])


def rename(arrays):
    arrays["conv_out.weights"] = arrays.pop("conv_out.weight")


def reshape(arrays):
    arrays["conv_in.bias"] = arrays["conv_in.bias"][:-1]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: shutil.rmtree(f / "prior"), "has no prior, which its model_index"),
        (
            lambda f: (f / WEIGHTS).unlink(),
            "decoder has no weights: none of model, diffusion_pytorch_model",
        ),
        (
            lambda f: change_weights(f / WEIGHTS, rename),
            "missing: decoder.conv_out.weight; unexpected: decoder.conv_out.weights",
        ),
        (
            lambda f: change_weights(f / WEIGHTS, reshape),
            r"wrong shape: decoder.conv_in.bias \(7,\) instead of \(8,\)",
        ),
        (
            lambda f: change_weights(
                f / WEIGHTS.replace("decoder", "prior"), lambda a: a.pop("clip_std")
            ),
            "prior/diffusion_pytorch_model.safetensors lacks clip_std",
        ),
        (truncate, f"{WEIGHTS} is truncated or damaged"),
        (corrupt, f"{WEIGHTS} is truncated or damaged"),
        (
            lambda f: (f / "decoder/config.json").write_text("{"),
            "decoder/config.json is not valid JSON",
        ),
        (
            lambda f: change_json(f / "decoder/config.json", act_fn="relu"),
            "decoder/config.json: act_fn is 'relu': must be 'silu'",
        ),
        (
            lambda f: change_json(
                f / "prior_scheduler/scheduler_config.json", prediction_type="v"
            ),
            "scheduler_config.json: prediction_type 'v' is not known",
        ),
        (
            lambda f: change_json(
                f / "prior_scheduler/scheduler_config.json",
                prediction_type="fixed_small_log",
            ),
            "scheduler_config.json: prediction_type 'fixed_small_log' is not known",
        ),
        (
            lambda f: change_json(f / "model_index.json", _class_name="Flux"),
            "is for 'Flux': must be 'UnCLIPPipeline'",
        ),
        (
            lambda f: (f / "text_proj/config.json").write_text("{}"),
            "text_proj/config.json lacks the key clip_embeddings_dim",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_a_line(
    folders, tmp_path, damage, message
):
    folder = shutil.copytree(folders / "text_to_image", tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        karlo.read(folder)
    assert "\n" not in str(error.value)


class Malicious:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parity
def test_a_pickle_with_code_in_it_is_not_run(folders, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(folders / "text_to_image", tmp_path / "model")
    (folder / WEIGHTS).unlink()
    path = (folder / WEIGHTS).with_suffix(".bin")
    path.write_bytes(pickle.dumps({"conv_in.weight": Malicious()}))
    with pytest.raises(UserError, match=r"model.bin is damaged, or holds more than"):
        karlo.read(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("decoder", {"text_encoder": {"width": 8}}, "decoder.text_encoder is"),
        ("upsampler_16", {"patch_size": 2}, "upsampler.patch_size is 2: .* need 1"),
        ("prior", {"activation": "silu"}, "prior.activation is 'silu'"),
    ],
)
def test_models_of_another_shape_are_not_written(
    folders, tmp_path, part, change, message
):
    model = karlo.read(folders / "text_to_image")
    model.config["parts"][part]["net"].update(change)
    with pytest.raises(UserError, match=message):
        karlo.write(model, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_models_sampled_otherwise_are_not_written(folders, tmp_path):
    model = karlo.read(folders / "text_to_image")
    model.config["parts"]["decoder"]["sampling"]["clip"] = None
    with pytest.raises(UserError, match="whether decoder clips is False: .* need True"):
        karlo.write(model, tmp_path / "there")


def test_models_that_lack_a_part_are_not_written(folders, tmp_path):
    model = karlo.read(folders / "text_to_image")
    parts = model.config["parts"]
    with pytest.raises(UserError, match="has no decoder"):
        lacking = {k: v for k, v in parts.items() if k != "decoder"}
        karlo.write(model._replace(config={"parts": lacking}), tmp_path / "there")
    with pytest.raises(UserError, match="neither a prior nor CLIP's image tower"):
        lacking = {k: v for k, v in parts.items() if k != "prior"}
        karlo.write(model._replace(config={"parts": lacking}), tmp_path / "there")
    with pytest.raises(UserError, match="is not empty"):
        karlo.write(model, folders)
