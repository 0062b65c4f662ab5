"""Measure a prior's errors, for its analytic variance.

    dalle2 analytic --model=DIR --out=DIR --config=prior.py:small

The config says which data to read, as --config.data.source=folder and
--config.data.path=DATA; of its other keys only seed, batch_size and dtype are used.
The copy of the model in --out has the mean squared error of each timestep in its
statistics, and its config says sampling.variance "analytic", as in Table 3 of
arXiv 2204.06125.
"""

from absl import flags

from dalle2_jax.errors import UserError
from dalle2_jax.flags import CONFIG_HELP, Flags

FLAGS = Flags()
_define = FLAGS.group("Flags")
MODEL = _define(flags.DEFINE_string, "model", "", "Directory of a model, or bundled.")
OUT = _define(
    flags.DEFINE_string, "out", "", "Directory for the model with the errors."
)
CONFIG = _define(FLAGS.config, "config", None, CONFIG_HELP)
EXAMPLES = _define(
    flags.DEFINE_integer, "examples", 256, "Number of pictures to measure at.", 1
)


def main() -> None:
    """Read the flags, measure, and write the model."""
    for flag, value in (("model", MODEL.value), ("out", OUT.value)):
        if not value:
            raise UserError(f"no --{flag}: give a directory")
    if CONFIG.value is None:
        raise UserError("no --config: give one, as --config=prior.py:small")

    from dalle2_jax import checkpoint, parts
    from dalle2_jax.checks import values
    from dalle2_jax.data import tokenizer
    from dalle2_jax.parts import prior
    from dalle2_jax.runtime import use_compilation_cache

    use_compilation_cache()
    config = CONFIG.value
    values.check(config)
    config.init_from, config.base = MODEL.value, ""
    model, error = prior.measure_x0_error(config, EXAMPLES.value, parts.load)
    sections = model.config["parts"]
    prior_section = sections["prior"]
    sampling = {**prior_section["sampling"], "variance": "analytic"}
    checkpoint.export(
        OUT.value,
        params=model.params,
        config={
            "parts": {**sections, "prior": {**prior_section, "sampling": sampling}}
        },
        tokenizer=tokenizer.load(model.tokenizer_dir),
        statistics={**model.statistics, "prior_x0_error": error},
    )
    shown = ", ".join(f"{error[t]:.4f} at {t}" for t in (0, len(error) // 2, -1))
    print(f"mean squared error of x0: {shown}; the model is in {OUT.value}")
