"""Tell how often a model's pictures of shapes show their captions.

    dalle2 evaluate --model=DIR --num=200 --seed=12345 --out=report.json

samples from a model and prints how often each attribute is right, and how often it
would be by chance. It writes every verdict to report.json and some of the pictures to
report.png.
"""

import json

from absl import flags

from dalle2_jax import storage
from dalle2_jax.errors import UserError
from dalle2_jax.flags import Flags

FLAGS = Flags()
_define = FLAGS.group("Flags")
MODEL = _define(
    flags.DEFINE_string,
    "model",
    "",
    "Directory of a model or its name on the hub; by default the bundled model.",
)
NUM = _define(flags.DEFINE_integer, "num", 200, "Number of captions of each kind.", 1)
SEED = _define(
    flags.DEFINE_integer, "seed", 12345, "Seed of the captions and of the noise.", 0
)
OUT = _define(flags.DEFINE_string, "out", "report.json", "File for the report.")


def main() -> None:
    """Read the flags, sample, judge, print the table and write the report."""
    out = storage.directory(OUT.value, "--out")
    try:
        if out.is_dir():
            raise UserError(f"--out={OUT.value} is a directory: give a file")
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write --out={OUT.value}: {error.strerror}") from error

    from dalle2_jax import hub
    from dalle2_jax.evaluate import shapes
    from dalle2_jax.pipeline import generate

    model = hub.load(*filter(None, [MODEL.value]))
    verdicts = shapes.evaluate(
        lambda prompts, seed: generate.text_to_image(model, prompts, seed=seed),
        NUM.value,
        SEED.value,
    )
    rates = {
        "accuracy": shapes.accuracy(verdicts),
        "chance": shapes.accuracy(shapes.exchange_captions(verdicts)),
    }
    print(shapes.format_table(rates["accuracy"]))
    print("\nby chance (each picture judged by another's caption)")
    print(shapes.format_table(rates["chance"]))
    report = {
        "model": model.path,
        "num": NUM.value,
        "seed": SEED.value,
        **{
            name: {
                kind: {attribute: rate._asdict() for attribute, rate in column.items()}
                for kind, column in table.items()
            }
            for name, table in rates.items()
        },
        "captions": [
            {"kind": v.kind, "caption": v.caption, "right": v.right} for v in verdicts
        ],
    }
    out.write_text(json.dumps(report, indent=1) + "\n")
    shapes.draw_gallery(verdicts).save(out.with_suffix(".png"))
