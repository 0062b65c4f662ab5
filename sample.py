"""Makes pictures of captions.

python sample.py --prompt="a large red circle" [--model=DIR] [--num=4] [--out=DIR]
"""

from pathlib import Path

from absl import flags

from dalle2_jax.errors import UserError
from dalle2_jax.flags import run

PROMPT = flags.DEFINE_multi_string("prompt", [], "A caption; may be repeated.")
MODEL = flags.DEFINE_string(
    "model", "", "A model's directory or its name on a hub (the bundled model)."
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "What to compute in."
)
OFFLOAD = flags.DEFINE_bool(
    "offload", False, "Keep on the device only the network that runs."
)
NUM = flags.DEFINE_integer("num", 4, "Pictures of each prompt.")
SEED = flags.DEFINE_integer("seed", 0, "Another seed, other pictures.")
SIZE = flags.DEFINE_integer("size", None, "Side in pixels (the largest possible).")
PRIOR = flags.DEFINE_enum(
    "prior",
    None,
    ["diffusion", "autoregressive", "none", "caption"],
    "Where the image embedding is from; none is the text's, caption is without one.",
)
STEPS = flags.DEFINE_string(
    "steps",
    "",
    "Sampling steps, as prior=25,decoder=50,upsampler=8 (+ between upsamplers: 27+15).",
)
GUIDANCE = flags.DEFINE_string(
    "guidance", "", "Scales of the guidance, as prior=2,decoder=4; 1 is none."
)
OUT = flags.DEFINE_string("out", "samples", "Directory for the pictures.")


def settings(text: str, flag: str, number: type) -> dict:
    """The dict that "prior=25,decoder=50,upsampler=8+4" means."""

    def parse(value: str) -> int | float | str:
        try:
            return number(value)
        except ValueError:
            return value  # a name such as fast27, which the sampler checks

    result = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not equals or not value:
            raise UserError(
                f"--{flag}={text}: write NETWORK=NUMBER, as decoder=50,prior=25"
            )
        values = tuple(map(parse, value.split("+")))
        result[name] = values if name == "upsampler" else values[0]
    return result


def main() -> None:
    if not PROMPT.value:
        raise UserError('no --prompt: say what to show, as --prompt="a red circle"')
    steps = settings(STEPS.value, "steps", int)
    guidance = settings(GUIDANCE.value, "guidance", float)

    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    import dalle2_jax
    from dalle2_jax.data import image
    from dalle2_jax.train.cache import use_compilation_cache

    use_compilation_cache()
    model = dalle2_jax.load(
        *filter(None, [MODEL.value]), dtype=DTYPE.value, offload=OFFLOAD.value
    )
    out = make_directory(OUT.value)
    with Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn()
    ) as bars:
        tasks = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        pictures = dalle2_jax.text_to_image(
            model,
            PROMPT.value,
            seed=SEED.value,
            num=NUM.value,
            size=SIZE.value,
            prior=PRIOR.value,
            steps=steps,
            guidance=guidance,
            progress=progress,
        )
    for k, picture in enumerate(pictures):
        metadata = {
            "prompt": PROMPT.value[k // NUM.value],
            "seed": str(SEED.value),
            "picture": str(k),
            "model": model.path,
            "settings": f"steps {STEPS.value or 'default'}; "
            f"guidance {GUIDANCE.value or 'default'}",
        }
        image.save_png(out / f"{k:03d}.png", picture, metadata)
    columns = NUM.value if len(PROMPT.value) > 1 else min(NUM.value, 4)
    image.save_png(out / "grid.png", image.grid(pictures, columns))
    print(f"{len(pictures)} pictures and grid.png are in {out}")


def make_directory(path: str) -> Path:
    """Creates a directory, or says why it can't be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out={path}: {error.strerror}") from error
    return Path(path)


if __name__ == "__main__":
    run(main)
