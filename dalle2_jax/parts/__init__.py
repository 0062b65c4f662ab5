"""The parts of the model, each declared in a file of its own and listed here."""

import re

from ml_collections import ConfigDict

from dalle2_jax import checkpoint
from dalle2_jax.errors import UserError
from dalle2_jax.parts import ar_prior, clip, decoder, prior, upsampler
from dalle2_jax.parts.finetune import hold_params, train_only
from dalle2_jax.parts.part import Part
from dalle2_jax.parts.stage import Load, Stage, check_heads, dtype_of

PARTS = {
    part.name: part
    for part in (clip.PART, prior.PART, ar_prior.PART, decoder.PART, upsampler.PART)
}


def part_of(name: str) -> Part | None:
    """The part of a model's component, such as "upsampler_256", or None."""
    return PARTS.get(name) or PARTS.get(re.sub(r"_\d+(_last)?$", "", name))


def make_stage(config: ConfigDict, load: Load = checkpoint.load) -> Stage:
    """The stage that a config describes, with the params that it has it train.

    Args:
      load: reads the models that the config names.

    Raises:
      UserError: what the config asks for can't be.
    """
    if config.stage not in PARTS:
        raise UserError(f"stage={config.stage!r}: must be one of {', '.join(PARTS)}")
    dtype = dtype_of(config, "param_dtype")
    check_heads(config.net.to_dict(), config.mesh.tensor)
    stage = PARTS[config.stage].make_stage(config, load)
    if config.trainable:
        stage = train_only(stage, config.trainable)
    return hold_params(stage, dtype)
