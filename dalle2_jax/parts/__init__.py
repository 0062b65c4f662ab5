"""The parts of the model, each declared in a file of its own and listed in table.py."""

from ml_collections import ConfigDict

from dalle2_jax import rules
from dalle2_jax.data import sources
from dalle2_jax.diffusion import settings
from dalle2_jax.errors import UserError, short
from dalle2_jax.parts import stage as stages
from dalle2_jax.parts.accept import load
from dalle2_jax.parts.finetune import hold_params, train_only
from dalle2_jax.parts.stage import Load, Stage, check_heads, dtype_of
from dalle2_jax.parts.table import PARTS
from dalle2_jax.parts.table import part_of as part_of


def check(config: ConfigDict) -> None:
    """Checks the values that a stage reads of its config; JAX is not started.

    Raises:
      UserError: a value is out of its range, or values don't go together.
    """
    if not isinstance(config.stage, str) or config.stage not in PARTS:
        raise UserError(
            f"config.stage is {short(config.stage)}: must be one of {', '.join(PARTS)}"
        )
    part, values = PARTS[config.stage], config.to_dict()
    rules.check(values, stages.RULES, "config")
    options = values["data"].get(values["data"]["source"]) or {}
    sources.check_options(options, f"config.data.{values['data']['source']}")
    sides = dict.fromkeys(part.sides, rules.SIDE)
    rules.check(values, part.rules | sides, "config")
    if part.sampler is not None:
        if part.sampler.diffuses:
            settings.check_part(values, "config")
        rules.check(values["sampling"], part.sampler.rules, "config.sampling")
    part.check(config)
    check_heads(config.net.to_dict(), max(1, config.mesh.tensor))


def make_stage(config: ConfigDict, load: Load = load) -> Stage:
    """The stage that a config describes, with the params that it has it train.

    Args:
      load: reads the models that the config names.

    Raises:
      UserError: what the config asks for can't be.
    """
    check(config)
    stage = PARTS[config.stage].make_stage(config, load)
    if config.trainable:
        stage = train_only(stage, config.trainable)
    return hold_params(stage, dtype_of(config, "param_dtype"))
