"""Makes pictures: of captions, or from pictures.

python sample.py --prompt="a large red circle" [--model=DIR] [--num=4] [--out=DIR]
python sample.py --task=variations --image=photo.jpg --eta=0.5
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from dalle2_jax.errors import UserError
from dalle2_jax.flags import run


class Task(NamedTuple):
    """What a task needs and what else it may be told, by the names of flags."""

    needs: tuple[str, ...]
    takes: tuple[str, ...]


TASKS = {
    "text_to_image": Task(("prompt",), ("num", "best_of", "prior", "negative_prompt")),
    "variations": Task(("image",), ("num", "eta")),
    "interpolate": Task(("image", "image2"), ("frames", "shared_noise")),
    "text_diff": Task(
        ("image", "prompt_from", "prompt"), ("frames", "theta", "direction")
    ),
    "inpaint": Task(("image", "mask", "prompt"), ("num", "repeats")),
    "outpaint": Task(("image", "prompt"), ("num", "extend", "repeats")),
    "img2img": Task(("image", "prompt"), ("num", "strength")),
    "pca": Task(("image",), ("components",)),
    "reconstruct": Task(("image",), ()),
}
TASK = flags.DEFINE_enum("task", "text_to_image", list(TASKS), "What to make.")
MODEL = flags.DEFINE_string(
    "model", "", "A model's directory or its name on a hub (the bundled model)."
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "What to compute in."
)
OFFLOAD = flags.DEFINE_bool(
    "offload", False, "Keep on the device only the network that runs."
)
TILE = flags.DEFINE_integer(
    "tile", None, "Upsample on tiles of so many pixels, in less memory."
)
OVERLAP = flags.DEFINE_integer(
    "overlap", None, "Pixels that tiles share (a quarter of a tile)."
)
SEED = flags.DEFINE_integer("seed", 0, "Another seed, other pictures.")
SIZE = flags.DEFINE_integer("size", None, "Side in pixels (the largest possible).")
STEPS = flags.DEFINE_string(
    "steps",
    "",
    "Sampling steps, as prior=25,decoder=50,upsampler=8 (+ between upsamplers: 27+15).",
)
GUIDANCE = flags.DEFINE_string(
    "guidance", "", "Scales of the guidance, as prior=2,decoder=4; 1 is none."
)
OUT = flags.DEFINE_string("out", "samples", "Directory for the pictures.")

# What some tasks need or take; what is not given has no value.
OF_TASKS = [
    flags.DEFINE_multi_string(
        "prompt", [], "A caption; text_to_image takes several, each with a flag."
    ),
    flags.DEFINE_integer("num", None, "Pictures, of each prompt (4)."),
    flags.DEFINE_integer(
        "best_of", None, "Make so many of each prompt, keep what CLIP likes best."
    ),
    flags.DEFINE_enum(
        "prior",
        None,
        ["diffusion", "autoregressive", "none", "caption"],
        "Where the image embedding is from; none is the text's, caption is without.",
    ),
    flags.DEFINE_string("negative_prompt", None, "What guidance leads away from."),
    flags.DEFINE_string("image", None, "A picture's file."),
    flags.DEFINE_string("image2", None, "Another one, to interpolate to."),
    flags.DEFINE_string("mask", None, "A picture as large: white is painted."),
    flags.DEFINE_string("prompt_from", None, "What the picture shows, for text_diff."),
    flags.DEFINE_float("eta", None, "Variations from the picture's own noise: 0 to 1."),
    flags.DEFINE_integer("frames", None, "Pictures of a path."),
    flags.DEFINE_bool("shared_noise", None, "Interpolate with one noise for all."),
    flags.DEFINE_float("theta", None, "How far a text_diff goes: 0 to 1."),
    flags.DEFINE_enum(
        "direction", None, ["text", "prior"], "Whose difference a text_diff goes along."
    ),
    flags.DEFINE_float("strength", None, "How much img2img may change: above 0, to 1."),
    flags.DEFINE_float("extend", None, "How much larger outpaint's canvas is."),
    flags.DEFINE_list("components", None, "How many each picture of pca has: 1,2,4."),
    flags.DEFINE_integer("repeats", None, "How often inpainting takes a step."),
]


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


def task_values() -> dict[str, Any]:
    """The flags of the task that are given, checked; its prompt without the list."""
    task = TASKS[TASK.value]
    given = {f.name: f.value for f in OF_TASKS if f.value not in (None, [])}
    for name in task.needs:
        if name not in given:
            raise UserError(_without(name))
    for name in given:
        if name not in task.needs + task.takes:
            takes = ", ".join(f"--{flag}" for flag in task.needs + task.takes)
            raise UserError(f"--task={TASK.value} takes no --{name}, only {takes}")
    if "num" in task.takes:
        given.setdefault("num", 4)
    if TASK.value != "text_to_image" and "prompt" in given:
        if len(given["prompt"]) > 1:
            raise UserError(f"--task={TASK.value} takes one --prompt")
        given["prompt"] = given["prompt"][0]
    if "components" in given:
        try:
            given["components"] = [int(k) for k in given["components"]]
        except ValueError:
            raise UserError(
                f"--components={','.join(given['components'])}: write numbers, as 1,2,4"
            ) from None
    return given


def _without(name: str) -> str:
    if name == "prompt":
        return 'no --prompt: say what to show, as --prompt="a red circle"'
    kind = "FILE" if name in ("image", "image2", "mask") else "..."
    return f"--task={TASK.value} needs --{name}={kind}"


def make(model: Any, values: dict[str, Any], **rest: Any) -> Any:
    """Calls the task's function, whose arguments are named as the flags."""
    import dalle2_jax

    rename = {"image": "picture", "image2": "other"}
    if TASK.value == "text_to_image":
        rename["prompt"] = "prompts"
    if TASK.value == "reconstruct":
        rename["image"] = "pictures"
    arguments = {rename.get(name, name): value for name, value in values.items()}
    return getattr(dalle2_jax, TASK.value)(model, **arguments, **rest)


def main() -> None:
    values = task_values()
    steps = settings(STEPS.value, "steps", int)
    guidance = settings(GUIDANCE.value, "guidance", float)

    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    import dalle2_jax
    from dalle2_jax.data import image
    from dalle2_jax.train.cache import use_compilation_cache

    use_compilation_cache()
    model = dalle2_jax.load(
        *filter(None, [MODEL.value]),
        dtype=DTYPE.value,
        offload=OFFLOAD.value,
        tile=TILE.value,
        overlap=OVERLAP.value,
    )
    out = make_directory(OUT.value)
    with Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn()
    ) as bars:
        pictures = make(
            model,
            values,
            seed=SEED.value,
            size=SIZE.value,
            steps=steps,
            guidance=guidance,
            progress=_shown(bars),
        )
    prompts = values.get("prompt", "")
    told = {name: str(value) for name, value in values.items()} | {
        "task": TASK.value,
        "seed": str(SEED.value),
        "model": model.path,
        "settings": f"steps {STEPS.value or 'default'}; "
        f"guidance {GUIDANCE.value or 'default'}; tile {TILE.value or 'none'}",
    }
    for k, picture in enumerate(pictures):
        prompt = prompts if isinstance(prompts, str) else prompts[k // values["num"]]
        metadata = told | {"prompt": prompt, "picture": str(k)}
        image.save_png(out / f"{k:03d}.png", picture, metadata)
    if isinstance(prompts, list) and len(prompts) > 1:
        columns = values["num"]  # a row for each prompt
    else:  # a path is one row
        columns = 4 if "num" in values else len(pictures)
    image.save_png(out / "grid.png", image.grid(pictures, columns))
    print(f"{len(pictures)} pictures and grid.png are in {out}")


def _shown(bars: Any) -> Callable[[str, int, int], None]:
    """A progress function that draws a bar for each stage."""
    tasks = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done)

    return progress


def make_directory(path: str) -> Path:
    """Creates a directory, or says why it can't be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out={path}: {error.strerror}") from error
    return Path(path)


if __name__ == "__main__":
    run(main)
