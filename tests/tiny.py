"""The tiny row of a stage's config, made into a stage."""

import importlib

from dalle2_jax import parts


def make_stage(name, base=None, **values):
    """A stage of batch 8; keys are given flattened, as "data.source"."""
    config = importlib.import_module(f"configs.{name}").get_config("tiny")
    config.base = str(base or "")
    config.batch_size = 8
    config.update_from_flattened_dict(values)
    return parts.make_stage(config)
