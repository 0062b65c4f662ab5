"""The command that measures a prior's errors: what it writes, and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dalle2_jax
from configs import prior as configs_prior
from dalle2_jax import checkpoint, parts
from dalle2_jax.commands import run
from dalle2_jax.errors import UserError
from dalle2_jax.parts import prior
from tests.tiny import make_stage

CONFIG = "--config=configs/prior.py:tiny"


def tiny_config(model):
    config = configs_prior.get_config("tiny")
    config.init_from, config.base, config.batch_size = str(model), "", 8
    return config


@pytest.fixture(scope="module")
def error(tiny_models):
    return prior.measure_x0_error(
        tiny_config(tiny_models["upsampler"]), 16, parts.load
    )[1]


def test_the_errors_are_those_of_the_training_loss(tiny_models, error):
    """The prior predicts x0, and its loss is the mean over timesteps."""
    stage = make_stage("prior", init_from=str(tiny_models["upsampler"]))
    loss = jax.jit(lambda p, f, b, k: stage.metrics(p, f, b, k)["loss"])
    batches = stage.batches("train", 0)
    losses = [
        loss(stage.start, stage.frozen, jax.tree.map(jnp.asarray, next(batches)), key)
        for key in jax.random.split(jax.random.key(0), 24)
    ]
    assert error.shape == (1000,) and error.dtype == np.float32
    assert (error > 0).all()
    np.testing.assert_allclose(error.mean(), np.mean(losses), rtol=0.15)


def test_the_model_is_sampled_with_them(tiny_models, error, tmp_path):
    model = checkpoint.load(tiny_models["upsampler"])
    parts = model.config["parts"]
    parts["prior"]["sampling"]["variance"] = "analytic"

    def write(name, statistics):
        checkpoint.export(
            tmp_path / name,
            params=model.params,
            config={"parts": parts},
            tokenizer=dalle2_jax.load(tiny_models["upsampler"]).tokenizer,
            statistics=statistics,
        )
        return dalle2_jax.load(tmp_path / name)

    measured = write("with", {**model.statistics, "prior_x0_error": error})
    before = dalle2_jax.load(tiny_models["upsampler"])
    pictures = [
        dalle2_jax.text_to_image(m, "a red circle", size=16) for m in (before, measured)
    ]
    assert pictures[0].tobytes() != pictures[1].tobytes()
    with pytest.raises(UserError, match="hasn't been measured: run dalle2 analytic"):
        dalle2_jax.text_to_image(write("without", model.statistics), "a red circle")


def test_the_command(tiny_models, error, tmp_path, capfd):
    given = [f"--model={tiny_models['upsampler']}", f"--out={tmp_path / 'out'}"]
    run("analytic", [*given, CONFIG, "--config.batch_size=8", "--examples=16"])
    assert "at 500" in capfd.readouterr().out
    before, after = (
        checkpoint.load(path) for path in (tiny_models["upsampler"], tmp_path / "out")
    )
    np.testing.assert_allclose(after.statistics["prior_x0_error"], error, rtol=1e-3)
    assert after.config["parts"]["prior"]["sampling"]["variance"] == "analytic"
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert dalle2_jax.load(tmp_path / "out").statistics["prior_x0_error"].shape == (
        1000,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=o", CONFIG], "no --model"),
        (["--model=m", CONFIG], "no --out"),
        (["--model=m", "--out=o"], "no --config"),
        (["--model=m", "--out=o", CONFIG, "--examples=0"], "--examples=0"),
        (["--model=m", "--out=o", CONFIG], "m is not a model"),
    ],
)
def test_what_it_refuses(arguments, message, capfd):
    with pytest.raises(SystemExit) as stop:
        run("analytic", arguments)
    err = capfd.readouterr().err
    assert stop.value.code == 2 and message in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_model_without_a_prior(tiny_models):
    with pytest.raises(UserError, match="has no prior, only clip"):
        prior.measure_x0_error(tiny_config(tiny_models["clip"]), 8, parts.load)
