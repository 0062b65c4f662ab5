"""Programs of devices that need not be there: that they are those which run."""

import importlib

import jax
import pytest

import dalle2_jax
from configs import clip as configs_clip
from dalle2_jax import checkpoint, parts, runtime
from dalle2_jax.errors import UserError
from dalle2_jax.planning import blueprint
from dalle2_jax.train import loop, update
from dalle2_jax.train import mesh as meshes

STAGES = ("clip", "prior", "ar_prior", "decoder", "upsampler")
CLIP = parts.clip.arguments(configs_clip.get_config("tiny"), None)


def tiny(stage, **values):
    config = importlib.import_module(f"configs.{stage}").get_config("tiny")
    config.update_from_flattened_dict(values)
    return config


@pytest.mark.parametrize("stage, base", [("upsampler", ""), ("prior", "bundled")])
def test_the_training_step_is_the_loops(stage, base, tmp_path, monkeypatch):
    config = tiny(stage, steps=1, batch_size=16, accumulate=2)
    config.update(dict(eval_every=0, preview_every=0))
    config.mesh.fsdp = 2
    config.base = base
    jit_update = update.jit_update

    class Lowered(BaseException):
        """In place of running the step: its program."""

    class Spy:
        def __init__(self, *made):
            self.made = made

        def __call__(self, *arguments):
            raise AssertionError("the step is traced before it is run")

        def trace(self, *arguments):
            raise Lowered(jit_update(*self.made).trace(*arguments).lower().as_text())

    monkeypatch.setattr(update, "jit_update", Spy)
    trained = parts.make_stage(config)
    with pytest.raises(Lowered) as lowered:
        loop.train(
            trained,
            config,
            lambda step: trained.batches("train", step),
            lambda step: trained.batches("heldout", step),
            tmp_path,
        )
    monkeypatch.undo()
    clip = checkpoint.load(checkpoint.BUNDLED).config["parts"]["clip"]["net"]
    mesh = meshes.make(**config.mesh)
    program = blueprint.train(config, clip, mesh, runtime.compiler_options())
    assert program.traced.lower().as_text() == str(lowered.value)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_training_step(stage):
    config = tiny(stage, batch_size=32, accumulate=2)
    config.mesh.fsdp = 4
    program = blueprint.train(config, CLIP, meshes.make(**config.mesh), {})
    state, _, batch = program.arguments
    assert (program.examples, program.repeats) == (32, 2)
    for x in batch.values():
        assert x.shape[:2] == (2, 16) and x.sharding.shard_shape(x.shape)[1] == 2
    config.mesh.tensor = 2
    batch = blueprint.train(config, CLIP, meshes.make(**config.mesh), {}).arguments[2]
    assert {x.sharding.shard_shape(x.shape)[1] for x in batch.values()} == {4}
    assert jax.tree.structure(state.ema) == jax.tree.structure(program.params)


def leaves(tree):
    return [x for x in jax.tree.leaves(tree) if x.ndim]


def test_the_paper_takes_no_memory():
    """A billion params, in moments: nothing is drawn, and nothing is computed."""
    config = importlib.import_module("configs.upsampler").get_config("paper_256")
    model = blueprint.hollow(config, None, "")
    params = jax.tree.leaves(model.params)
    assert sum(x.size for x in params) == 691_579_523
    assert max(x.base.size if x.base is not None else x.size for x in params) == 1


@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_stage_but_clip_samples(stage):
    config = tiny(stage)
    program = blueprint.sample(config, CLIP, meshes.make(fsdp=2), {}, 16)
    assert program.examples == 16
    steps = {"prior": 4, "ar_prior": 7, "decoder": 4, "upsampler": 3}
    assert program.repeats == steps[stage]
    (out,) = jax.tree.leaves(program.traced.out_info)
    side = {"decoder": (16, 16, 3), "upsampler": (32, 32, 3)}
    assert out.shape == (16, *side.get(stage, (32,)))
    component, sampling, inputs = program.arguments
    assert {x.sharding.is_fully_replicated for x in leaves(component)} == {True}
    for x in leaves((sampling, inputs.replace(mean=None, std=None, codes=None))):
        assert not x.sharding.is_fully_replicated


def test_the_sampling_loop_is_the_pipelines():
    """Of an upsampler that was trained, and from its config alone."""
    model = dalle2_jax.load()
    config = importlib.import_module("configs.upsampler").get_config("small")
    program = blueprint.sample(config, None, meshes.make(), {}, 8)
    component, sampling, inputs = program.arguments
    theirs = jax.jit(
        blueprint.sampling_loop(parts.upsampler.SAMPLER, program.repeats)
    ).trace(model.upsamplers[0].replace(params=component.params), sampling, inputs)
    assert theirs.lower().as_text() == program.traced.lower().as_text()


def test_what_it_refuses():
    mesh = meshes.make()
    with pytest.raises(UserError, match="CLIP samples nothing"):
        blueprint.sample(tiny("clip"), CLIP, mesh, {}, 8)
    with pytest.raises(UserError, match="--pictures=9 must be a multiple of 8"):
        blueprint.sample(tiny("prior"), CLIP, mesh, {}, 9)
    with pytest.raises(UserError, match="batch_size=12 must be a multiple of 8"):
        blueprint.train(tiny("prior", batch_size=12), CLIP, mesh, {})
