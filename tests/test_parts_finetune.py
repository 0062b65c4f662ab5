"""Fine-tuning: what a run starts from, what it trains, and what it leaves alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from configs import clip, upsampler
from dalle2_jax import checkpoint, parts
from dalle2_jax.data import tokenizer
from dalle2_jax.errors import UserError
from dalle2_jax.nn.clip import CLIP
from dalle2_jax.parts.finetune import start_params
from dalle2_jax.train import loop, mesh, update
from tests.tiny import make_stage

PARTS = {
    "clip": "clip",
    "prior": "prior",
    "ar_prior": "ar_prior",
    "decoder": "decoder",
    "upsampler": "upsampler_32",
}


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="session")
def converted(tiny_models, tmp_path_factory):
    """A model with a part that no stage trains, and statistics that no data has."""
    directory = tmp_path_factory.mktemp("converted") / "model"
    stage = make_stage("ar_prior", tiny_models["upsampler"])
    model = stage.export(jax.jit(stage.init)(jax.random.key(0)))
    parts = model["config"]["parts"]
    fixed = {"z_image_mean": np.arange(32.0), "z_image_std": np.arange(1, 33.0)}
    fixed = {name: value.astype(np.float32) for name, value in fixed.items()}
    checkpoint.export(
        directory,
        params={
            **model["params"],
            "upsampler_32_last": jax.tree.map(
                lambda x: np.asarray(x, np.float16), model["params"]["upsampler_32"]
            ),
        },
        config={"parts": {**parts, "upsampler_32_last": parts["upsampler_32"]}},
        tokenizer=model["tokenizer"],
        statistics={**model["statistics"], **fixed},
    )
    return directory


def finetune(workdir, init_from, **values):
    """Trains the tiny upsampler; its state and the exported model."""
    config = upsampler.get_config("tiny")
    config.init_from = str(init_from)
    values = {"eval_every": 0, "preview_every": 0, "batch_size": 8, **values}
    config.update_from_flattened_dict(values)
    stage = parts.make_stage(config)
    batches = [lambda i, s=s: stage.batches(s, i) for s in ("train", "heldout")]
    state = loop.train(stage, config, *batches, workdir)
    return jax.device_get(state), checkpoint.load(workdir / "model")


@pytest.mark.parametrize("name", PARTS)
def test_a_stage_starts_from_its_part(name, converted):
    stage = make_stage(name, init_from=str(converted))
    model = checkpoint.load(converted)
    assert stage.name == PARTS[name]
    assert_equal(stage.start, model.params[stage.name])
    exported = stage.export(stage.start)
    assert_equal(exported["params"], model.params)
    assert_equal(exported["statistics"], model.statistics)
    assert exported["config"]["parts"].keys() == model.config["parts"].keys()
    assert exported["tokenizer"].encode(["a red circle"], 24).tolist() == (
        tokenizer.load(model.tokenizer_dir).encode(["a red circle"], 24).tolist()
    )


def test_the_prior_keeps_the_statistics_it_was_trained_with(converted):
    stage = make_stage("prior", init_from=str(converted))
    np.testing.assert_array_equal(stage.frozen["mean"], np.arange(32))
    np.testing.assert_array_equal(stage.frozen["std"], np.arange(1, 33))


def test_the_base_may_be_another_model(converted, tiny_models):
    stage = make_stage("decoder", tiny_models["clip"], init_from=str(converted))
    assert_equal(stage.start, checkpoint.load(converted).params["decoder"])
    assert set(stage.export(stage.start)["params"]) == {"clip", "decoder"}


def test_a_run_begins_with_the_model_and_gives_it_back(converted):
    stage = make_stage("upsampler", init_from=str(converted))
    config = upsampler.get_config("tiny")
    state = update.make_step(stage, config, mesh.make(), optax.sgd(1.0)).begin()
    before = checkpoint.load(converted)
    for params in (state.params, state.ema):
        assert_equal(params, before.params["upsampler_32"])
    assert_equal(stage.export(jax.device_get(state.ema))["params"], before.params)


@pytest.mark.parametrize(
    "values, told",
    [
        ({"text_eps": 1e-3}, "text_eps 1e-05 instead of 0.001"),
        ({"vision_activation": "relu"}, "vision_activation gelu instead of relu"),
        ({"vision_activation": "gelu", "text_mlp_width": 128}, None),  # as without
    ],
)
def test_arguments_that_configs_leave_out_are_compared(converted, values, told):
    model = checkpoint.load(converted)
    net = model.config["parts"]["clip"]["net"]
    config = {"parts": {"clip": {"net": {**net, **values}}}}

    def start():
        return start_params(
            clip.get_config("tiny"),
            model._replace(config=config),
            "clip",
            CLIP,
            net,
            lambda key: jax.tree.map(jnp.asarray, model.params["clip"]),
        )

    if told is None:
        assert_equal(start(), model.params["clip"])
        return
    with pytest.raises(UserError, match=f"the config has {told}: change it back"):
        start()


def test_only_what_is_trainable_changes(converted, tmp_path):
    """With params in bfloat16, so that nothing frozen may be rounded on the way."""
    options = {"trainable": "mid_|conv_out", "param_dtype": "bfloat16"}
    state, model = finetune(tmp_path, converted, steps=2, **options)
    params, before = model.params, checkpoint.load(converted).params
    found = flatten_dict(params.pop("upsampler_32"), sep="/")
    expected = flatten_dict(before.pop("upsampler_32"), sep="/")
    assert_equal(params, before)
    assert found.keys() == expected.keys()
    for path in found:
        trained = re.search("mid_|conv_out", path) is not None
        assert np.array_equal(found[path], expected[path]) != trained, path

    assert set(state.params) == {"mid_res_0", "mid_res_1", "conv_out"}
    dtypes = [{x.dtype for x in jax.tree.leaves(t)} for t in (state.params, state.ema)]
    assert dtypes == [{jnp.dtype("bfloat16")}, {jnp.dtype("float32")}]
    moments = {x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim}
    assert moments == {jnp.dtype("float32")}


def test_a_fine_tuning_run_resumes_exactly(converted, tmp_path):
    options = {
        "trainable": "up_",
        "param_dtype": "bfloat16",
        "optim.name": "adafactor",
        "optim.schedule": "constant",
    }
    whole, _ = finetune(tmp_path / "whole", converted, steps=4, **options)
    finetune(tmp_path / "parts", converted, steps=2, **options)
    resumed, _ = finetune(tmp_path / "parts", converted, steps=4, **options)
    assert_equal(resumed, whole)


def test_params_in_bfloat16_give_nearly_the_same_loss(converted):
    losses = []
    for dtype in ("float32", "bfloat16"):
        stage = make_stage("prior", init_from=str(converted), param_dtype=dtype)
        batch = jax.tree.map(jnp.asarray, next(stage.batches("train", 0)))
        loss = jax.jit(stage.loss)
        losses.append(loss(stage.start, stage.frozen, batch, jax.random.key(0))[0])
        held = {x.dtype for x in jax.tree.leaves(stage.frozen["clip"])}
        assert held == {jnp.dtype(dtype)}
        assert stage.frozen["std"].dtype == jnp.float32
    np.testing.assert_allclose(*losses, rtol=0.02)


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("decoder", {"init_from": "clip"}, "has no decoder, only clip: give a model"),
        ("prior", {"net.width": 64}, "the prior of init_from=.* wrong shape: .*64"),
        ("prior", {"net.heads": 4}, "another net: the config has heads 4 instead of 2"),
        ("clip", {"net.activation": "quick_gelu"}, "activation quick_gelu instead of"),
        ("prior", {"trainable": "blok"}, "'blok' is in no param's path: .*ln_out"),
        ("prior", {"trainable": "("}, "is no regular expression: missing"),
        ("prior", {"param_dtype": "float16"}, "param_dtype is 'float16': must be"),
        (
            "upsampler",
            {"init_from": "", "trainable": "up_"},
            "freeze params drawn at random: give .*init_from=DIR",
        ),
    ],
)
def test_what_cannot_be(name, values, message, converted, tiny_models):
    values = {"init_from": str(converted), **values}
    values["init_from"] = str(tiny_models.get(values["init_from"], values["init_from"]))
    with pytest.raises(UserError, match=message) as error:
        make_stage(name, **values)
    assert "\n" not in str(error.value)


def test_a_model_without_statistics_or_tokenizer(converted, tmp_path):
    model = checkpoint.load(converted)
    text = tokenizer.load(model.tokenizer_dir)
    for name, saved in (("prior", text), ("clip", None)):
        checkpoint.export(
            tmp_path / name, params=model.params, config=model.config, tokenizer=saved
        )
    with pytest.raises(UserError, match="no z_image_mean and no z_image_std, without"):
        make_stage("prior", init_from=str(tmp_path / "prior"))
    with pytest.raises(UserError, match="no statistics of an ar_prior, without which"):
        make_stage("ar_prior", init_from=str(tmp_path / "prior"))
    with pytest.raises(UserError, match="has no tokenizer: give .*tokenizer.path=DIR"):
        make_stage("clip", init_from=str(tmp_path / "clip"))
