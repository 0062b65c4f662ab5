"""Convert Karlo, CLIP and models of their shape, and back to diffusers.

    dalle2 convert SRC [SRC ...] DST
    dalle2 convert --to-diffusers SRC DST

The first writes a model of this package. SRC is a folder of a diffusers unCLIP
pipeline, of a transformers CLIPModel, or of a model of this package; the parts of
several are put together, so that a text-to-image folder and one of the CLIP with both
towers make one model. The second writes a folder that diffusers' pipelines load.
"""

from absl import flags

from dalle2_jax.errors import UserError
from dalle2_jax.flags import Flags

FLAGS = Flags("SRC [SRC ...] DST")
_define = FLAGS.group("Flags")
DTYPE = _define(
    flags.DEFINE_string, "dtype", None, "Type of the params; by default of the files."
)
VARIANT = _define(
    flags.DEFINE_string,
    "variant",
    None,
    "Which weights to read where there are several, as fp16.",
)
TO_DIFFUSERS = _define(
    flags.DEFINE_boolean, "to-diffusers", False, "Write a folder of diffusers."
)


def main(folders: list[str]) -> None:
    """Read the flags, put the models of SRC together, and write them as one."""
    if len(folders) < 2:
        raise UserError(
            "give the folders to read and the folder to write: SRC [SRC ...] DST"
        )
    from dalle2_jax import checkpoint
    from dalle2_jax.convert import karlo, weights
    from dalle2_jax.data import tokenizer

    *sources, target = folders
    cast = weights.caster(DTYPE.value)
    model = checkpoint.merge(
        [karlo.read_any(source, cast, variant=VARIANT.value) for source in sources]
    )
    if TO_DIFFUSERS.value:
        karlo.write(model, target)
        return
    checkpoint.export(
        target,
        params=model.params,
        config=model.config,
        tokenizer=model.tokenizer_dir and tokenizer.load(model.tokenizer_dir),
        statistics=model.statistics,
    )
