"""Measures how wrong a model's prior is at each timestep, for its analytic variance.

python -m dalle2_jax.analytic --model=DIR --out=DIR --config=configs/prior.py:small

The config says which data to read, as --config.data.source=folder and
--config.data.path=DATA; of its other keys only seed, batch_size and dtype are used. The
copy of the model in --out has the errors in its statistics, and its config says
sampling.variance "analytic", as Table 3 of arXiv 2204.06125 does.
"""

from absl import flags
from ml_collections import config_flags

from dalle2_jax.errors import UserError
from dalle2_jax.flags import run

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/prior.py:SIZE; --config.data.KEY=VALUE changes the data."
)
MODEL = flags.DEFINE_string("model", "", "A model's directory, or bundled.")
OUT = flags.DEFINE_string("out", "", "Directory for the model with the errors.")
EXAMPLES = flags.DEFINE_integer("examples", 256, "Pictures to measure at.")


def main() -> None:
    """The command: reads the flags, measures, and writes the model."""
    for flag, value in (("model", MODEL.value), ("out", OUT.value)):
        if not value:
            raise UserError(f"no --{flag}: give a directory")
    if CONFIG.value is None:
        raise UserError("no --config: give one, as --config=configs/prior.py:small")
    if EXAMPLES.value < 1:
        raise UserError(f"--examples={EXAMPLES.value}: must be at least 1")

    from dalle2_jax import checkpoint, parts
    from dalle2_jax.checks import values
    from dalle2_jax.data import tokenizer
    from dalle2_jax.parts import prior
    from dalle2_jax.train.cache import use_compilation_cache

    use_compilation_cache()
    config = CONFIG.value
    values.check(config)
    config.init_from, config.base = MODEL.value, ""
    model, error = prior.measure_x0_error(config, EXAMPLES.value, parts.load)
    sections = model.config["parts"]
    sampling = {**sections["prior"]["sampling"], "variance": "analytic"}
    checkpoint.export(
        OUT.value,
        params=model.params,
        config={
            "parts": {**sections, "prior": {**sections["prior"], "sampling": sampling}}
        },
        tokenizer=tokenizer.load(model.tokenizer_dir),
        statistics={**model.statistics, "prior_x0_error": error},
    )
    shown = ", ".join(f"{error[t]:.4f} at {t}" for t in (0, len(error) // 2, -1))
    print(f"mean squared error of x0: {shown}; the model is in {OUT.value}")


if __name__ == "__main__":
    run(main)
