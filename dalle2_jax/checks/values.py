"""Whether the values of a config can be trained with, before anything is loaded."""

from ml_collections import ConfigDict

from dalle2_jax import parts
from dalle2_jax.errors import UserError, short
from dalle2_jax.train import settings


def check(config: ConfigDict) -> None:
    """Raise a UserError unless a config, of one stage or of several, can be.

    Of several stages all are checked before the first is trained. JAX is not started,
    so that this can be done before processes join.
    """
    if "stages" not in config:
        settings.check(config)
        parts.check(config)
        return
    names = config.stages

    def is_stage(name: str) -> bool:
        return isinstance(config.get(name), ConfigDict) and "stage" in config[name]

    if isinstance(names, str) or not names or not all(map(is_stage, names)):
        raise UserError(
            f"config.stages is {short(names)}: must be names of the config's stages, "
            "at least one, in the order in which they are trained"
        )
    for name in names:
        stage = config[name]
        try:
            settings.check(stage)
            parts.check(stage)
        except UserError as error:
            # The stage is a section of this config.
            raise UserError(
                str(error).replace("config.", f"config.{name}.", 1)
            ) from None
