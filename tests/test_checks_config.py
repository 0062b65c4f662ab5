"""What train.py would refuse, all of it."""

import jax
import pytest

from configs import prior
from dalle2_jax import checkpoint
from dalle2_jax.checks import config as checks


def check(**values):
    config = prior.get_config("tiny")
    config.update_from_flattened_dict(values)
    return checks.check(config, checkpoint.load)


def test_a_config_that_can_be_trained():
    findings, setup = check()
    assert [f.level for f in findings] == ["ok"]
    params = jax.tree.leaves(setup.stage.init(jax.random.key(0)))
    count = sum(x.size for x in params)
    assert f"prior, {count:,} parameters to train, batch 32, on 8" in findings[0].found
    assert setup.batch["clip_image"].shape == (32, 64, 64, 3)
    state, _, batch = setup.arguments
    assert batch["tokens"].shape == (1, 32, 24)
    assert sum(x.size for x in jax.tree.leaves(state.params)) == count
    assert setup.source.name == "shapes"


def test_all_mistakes_are_found_at_once():
    values = {"optim.name": "adam", "keep_every": 7, "keep": 0}
    findings, setup = check(**values, **{"optim.b1": 2.0, "stage": "priors"})
    assert {(f.level, f.check) for f in findings} == {("problem", "config")}
    for finding, word in zip(
        findings,
        ("keep is 0", "optim.name is 'adam'", "optim.b1 is 2.0", "'priors'"),
        strict=True,
    ):
        assert word in finding.found
    assert setup.traced is None and setup.mesh is None
    findings, setup = check(batch_size=12, wandb="x", base="/nowhere")
    assert [f.check for f in findings if f.check != "log"] == ["batch", "stage"]
    assert "multiple of 8" in findings[0].found and setup.mesh.size == 8


@pytest.mark.parametrize(
    ("values", "check_", "found"),
    [
        ({"mesh.fsdp": 3}, "mesh", "mesh.fsdp=3, mesh.tensor=1 does not fit 8 devices"),
        ({"base": "/nowhere"}, "stage", "/nowhere is not a model"),
        ({"data.source": "folder"}, "data", 'data "folder" needs a path'),
        ({"sampling.sampler": "euler"}, "config", "euler"),  # not before a preview
        ({"net.heads": 3}, "config", "net.heads is 3: must divide width=32"),
        ({"data.crop": "left"}, "config", "data.crop is 'left'"),
    ],
)
def test_a_mistake_is_one_problem(values, check_, found):
    findings, setup = check(**values)
    assert [(f.level, f.check) for f in findings] == [("problem", check_)]
    assert found in findings[0].found and "\n" not in findings[0].found
    assert setup.traced is None
