"""The command that measures a prior's errors: what it writes, and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dalle2_jax
from configs import prior as configs_prior
from dalle2_jax import analytic, checkpoint
from dalle2_jax.errors import UserError
from dalle2_jax.pipeline import generate
from dalle2_jax.stages import prior
from tests.tiny import make_stage


def tiny_config(model):
    config = configs_prior.get_config("tiny")
    config.init_from, config.base, config.batch_size = str(model), "", 8
    return config


@pytest.fixture(scope="module")
def error(tiny_models):
    return prior.measure_x0_error(tiny_config(tiny_models["upsampler"]), 16)[1]


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
    with pytest.raises(UserError, match="hasn't been measured: .*dalle2_jax.analytic"):
        dalle2_jax.text_to_image(write("without", model.statistics), "a red circle")


def test_the_command(tiny_models, error, tmp_path, monkeypatch, capsys):
    config = tiny_config("")
    values = {
        "MODEL": str(tiny_models["upsampler"]),
        "OUT": str(tmp_path / "out"),
        "CONFIG": config,
        "EXAMPLES": 16,
    }
    for name, value in values.items():
        holder = type("Flag", (), {"value": value})
        monkeypatch.setattr(analytic, name, holder)
    monkeypatch.setattr("dalle2_jax.train.cache.use_compilation_cache", lambda: None)
    analytic.main()
    assert "at 500" in capsys.readouterr().out
    before, after = (
        checkpoint.load(path) for path in (tiny_models["upsampler"], tmp_path / "out")
    )
    np.testing.assert_array_equal(after.statistics["prior_x0_error"], error)
    assert after.config["parts"]["prior"]["sampling"]["variance"] == "analytic"
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert generate.require(dalle2_jax.load(tmp_path / "out"), "prior") is None

    for name, value, message in (
        ("MODEL", "", "no --model"),
        ("OUT", "", "no --out"),
        ("CONFIG", None, "no --config"),
        ("EXAMPLES", 0, "--examples=0"),
    ):
        with monkeypatch.context() as m:
            m.setattr(analytic, name, type("Flag", (), {"value": value}))
            with pytest.raises(UserError, match=message):
                analytic.main()


def test_a_model_without_a_prior(tiny_models):
    with pytest.raises(UserError, match="has no prior, only clip"):
        prior.measure_x0_error(tiny_config(tiny_models["clip"]), 8)
