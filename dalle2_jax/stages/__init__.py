"""What is trained: one stage for each part of the model."""

from ml_collections import ConfigDict

from dalle2_jax import checkpoint
from dalle2_jax.stages import ar_prior, clip, decoder, prior, upsampler
from dalle2_jax.stages.finetune import hold_params, train_only
from dalle2_jax.stages.stage import Load, Stage, check_heads, dtype_of

MAKE = {
    "clip": clip.make,
    "prior": prior.make,
    "ar_prior": ar_prior.make,
    "decoder": decoder.make,
    "upsampler": upsampler.make,
}


def make(config: ConfigDict, load: Load = checkpoint.load) -> Stage:
    """The stage that a config describes, with the params that it has it train.

    Args:
      load: reads the models that the config names.

    Raises:
      UserError: what the config asks for can't be.
    """
    dtype = dtype_of(config, "param_dtype")
    check_heads(config.net.to_dict(), config.mesh.tensor)
    stage = MAKE[config.stage](config, load)
    if config.trainable:
        stage = train_only(stage, config.trainable)
    return hold_params(stage, dtype)
