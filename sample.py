"""Make pictures: of captions, or from pictures.

python sample.py --prompt="a large red circle" [--model=DIR] [--num=4] [--out=DIR]
python sample.py --task=variations --image=photo.jpg --eta=0.5

Each batch of pictures is saved as soon as it is made, beside those of earlier runs.
"""

import itertools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from dalle2_jax.errors import UserError
from dalle2_jax.flags import run


class Task(NamedTuple):
    """What a task needs and what else it may be told, by the names of flags."""

    needs: tuple[str, ...]
    takes: tuple[str, ...]


MOST = 10_000  # pictures of a run
TASKS = {
    "text_to_image": Task(("prompt",), ("num", "best_of", "prior", "negative_prompt")),
    "variations": Task(("image",), ("num", "eta")),
    "interpolate": Task(("image", "image2"), ("frames", "shared_noise")),
    "text_diff": Task(
        ("image", "prompt_from", "prompt"), ("frames", "theta", "direction")
    ),
    "inpaint": Task(("image", "prompt"), ("mask", "mask_mode", "num", "repeats")),
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
SEED = flags.DEFINE_integer(
    "seed", 0, "Another seed, other pictures.", lower_bound=0, upper_bound=2**32 - 1
)
SIZE = flags.DEFINE_integer("size", None, "Side in pixels (the largest possible).")
STEPS = flags.DEFINE_string(
    "steps",
    "",
    "Sampling steps, as prior=25,decoder=50,upsampler=8 (+ between upsamplers: 27+15).",
)
GUIDANCE = flags.DEFINE_string(
    "guidance", "", "Scales of the guidance, as prior=2,decoder=4; 1 is none."
)
OUT = flags.DEFINE_string(
    "out", "samples", "Directory for the pictures; those that are there stay."
)

# What some tasks need or take; what is not given has no value.
OF_TASKS = [
    flags.DEFINE_multi_string(
        "prompt", [], "A caption; text_to_image takes several, each with a flag."
    ),
    flags.DEFINE_integer(
        "num", None, "Pictures, of each prompt (4).", lower_bound=1, upper_bound=MOST
    ),
    flags.DEFINE_integer(
        "best_of",
        None,
        "Make so many of each prompt, keep what CLIP likes best.",
        lower_bound=1,
        upper_bound=MOST,
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
    flags.DEFINE_string(
        "mask",
        None,
        "A picture as large: white is painted; or the picture with a part erased.",
    ),
    flags.DEFINE_enum(
        "mask_mode",
        None,
        ["alpha", "luminance"],
        "Paint what is transparent in the mask, or what is white.",
    ),
    flags.DEFINE_string("prompt_from", None, "What the picture shows, for text_diff."),
    flags.DEFINE_float("eta", None, "Variations from the picture's own noise: 0 to 1."),
    flags.DEFINE_integer(
        "frames", None, "Pictures of a path.", lower_bound=2, upper_bound=MOST
    ),
    flags.DEFINE_bool("shared_noise", None, "Interpolate with one noise for all."),
    flags.DEFINE_float("theta", None, "How far a text_diff goes: 0 to 1."),
    flags.DEFINE_enum(
        "direction", None, ["text", "prior"], "Whose difference a text_diff goes along."
    ),
    flags.DEFINE_float("strength", None, "How much img2img may change: above 0, to 1."),
    flags.DEFINE_float("extend", None, "How much larger outpaint's canvas is."),
    flags.DEFINE_list("components", None, "How many each picture of pca has: 1,2,4."),
    flags.DEFINE_integer(
        "repeats",
        None,
        "How often inpainting takes a step.",
        lower_bound=1,
        upper_bound=1000,
    ),
]


def settings(text: str, flag: str, number: type) -> dict:
    """Return the dict that "prior=25,decoder=50,upsampler=8+4" means."""

    def parse(value: str) -> int | float | str:
        try:
            return number(value)
        except ValueError:
            if number is int and value:
                return value  # a name such as fast27, which the sampler checks
            raise UserError(
                f"--{flag}={text}: {value!r} is no number; write NETWORK=NUMBER, as "
                "decoder=50,prior=25"
            ) from None

    result = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        values = tuple(map(parse, value.split("+")))
        if name in result:
            raise UserError(f"--{flag}={text}: {name} is given twice")
        if len(values) > 1 and name != "upsampler":
            raise UserError(
                f"--{flag}={text}: give the {name} one number; + is between upsamplers"
            )
        result[name] = values if name == "upsampler" else values[0]
    return result


def task_values() -> dict[str, Any]:
    """Return the flags of the task that are given, checked.

    Its prompt is a list for text_to_image alone.
    """
    task = TASKS[TASK.value]
    given = {f.name: f.value for f in OF_TASKS if f.value not in (None, [])}
    for name in task.needs:
        if name not in given:
            raise UserError(_without(name))
    for name in given:
        if name not in task.needs + task.takes:
            takes = ", ".join(f"--{flag}" for flag in task.needs + task.takes)
            raise UserError(f"--task={TASK.value} takes no --{name}, only {takes}")
    for name in ("prompt", "negative_prompt", "prompt_from"):
        _check_text(name, given.get(name, ""))
    if "num" in task.takes:
        given.setdefault("num", 4)
        count = max(given["num"], given.get("best_of", 0))
        count *= len(given.get("prompt", [""]))
        if count > MOST:
            raise UserError(f"{count:,} pictures: at most {MOST:,} are made in a run")
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


def _check_text(name: str, text: str | list[str]) -> None:
    try:
        "".join(text).encode()
    except UnicodeEncodeError:
        raise UserError(f"--{name}={text!a} is not UTF-8") from None


def _without(name: str) -> str:
    if name == "prompt":
        return 'no --prompt: say what to show, as --prompt="a red circle"'
    kind = "FILE" if name in ("image", "image2") else "..."
    return f"--task={TASK.value} needs --{name}={kind}"


def make(model: Any, values: dict[str, Any], **rest: Any) -> Any:
    """Call the task's function, whose arguments are named as the flags."""
    import dalle2_jax

    rename = {"image": "picture", "image2": "other"}
    if TASK.value == "text_to_image":
        rename["prompt"] = "prompts"
    if TASK.value == "reconstruct":
        rename["image"] = "pictures"
    arguments = {rename.get(name, name): value for name, value in values.items()}
    if TASK.value == "inpaint":
        arguments.setdefault("mask", None)
    return getattr(dalle2_jax, TASK.value)(model, **arguments, **rest)


def check_pictures(values: Mapping[str, Any]) -> None:
    """Raise UserError if a picture can't be read, before a model is loaded."""
    from dalle2_jax.data import image
    from dalle2_jax.data.mask import read_mask

    for name in {"image", "image2"} & values.keys():
        image.read(values[name])
    if TASK.value == "inpaint":
        read_mask(values.get("mask"), values["image"], values.get("mask_mode"))


class Files:
    """The pictures of a run, written as soon as they are made.

    They have the next free numbers of the directory, and nothing in it is replaced.
    """

    def __init__(self, directory: Path):
        self.directory, self.written = directory, []
        numbers = [re.fullmatch(r"([0-9]+)\.png", p.name) for p in directory.iterdir()]
        first = max((int(found[1]) for found in numbers if found), default=-1) + 1
        self._names = (f"{number:03d}.png" for number in itertools.count(first))

    def write(self, picture: Any, metadata: Mapping[str, str]) -> None:
        self.written.append(self._write_as(self._names, picture, metadata))

    def write_grid(self, grid: Any) -> None:
        """Write grid.png, or grid_002.png and so on beside the grids of other runs."""
        names = (f"grid_{number:03d}.png" for number in itertools.count(2))
        name = self._write_as(itertools.chain(["grid.png"], names), grid, {})
        print(f"{self}, and {name}")

    def _write_as(self, names, picture, metadata) -> str:
        """Write a picture under the first name that is free."""
        from dalle2_jax.data import image

        for name in names:
            try:
                image.save_png(self.directory / name, picture, metadata, replace=False)
                return name
            except FileExistsError:
                continue
            except OSError as error:
                raise UserError(
                    f"cannot write {self.directory / name}: {error.strerror}; {self}"
                ) from error

    def __str__(self) -> str:
        if not self.written:
            return "no picture is saved"
        first, last = self.written[0], self.written[-1]
        if first == last:
            return f"1 picture is in {self.directory}: {first}"
        count = len(self.written)
        return f"{count} pictures are in {self.directory}: {first} to {last}"


def main() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that are not UTF-8
    saved = "no picture is saved"
    try:
        values = task_values()
        steps = settings(STEPS.value, "steps", int)
        guidance = settings(GUIDANCE.value, "guidance", float)
        check_pictures(values)
        saved = Files(make_directory(OUT.value))
        sample(values, saved, steps=steps, guidance=guidance)
    except KeyboardInterrupt:
        print(f"interrupted: {saved}", file=sys.stderr)
        sys.exit(130)


def sample(values: dict[str, Any], files: Files, **rest: Any) -> None:
    """Load the model, make the pictures of the task, and write them."""
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    import dalle2_jax
    from dalle2_jax.data import image
    from dalle2_jax.runtime import use_compilation_cache

    use_compilation_cache()
    model = dalle2_jax.load(
        *filter(None, [MODEL.value]),
        dtype=DTYPE.value,
        offload=OFFLOAD.value,
        tile=TILE.value,
        overlap=OVERLAP.value,
    )
    prompts = values.get("prompt", "")
    told = {name: str(value) for name, value in values.items()} | {
        "task": TASK.value,
        "seed": str(SEED.value),
        "model": model.path,
        "settings": f"steps {STEPS.value or 'default'}; "
        f"guidance {GUIDANCE.value or 'default'}; tile {TILE.value or 'none'}",
    }

    def write(pictures: Any) -> None:
        for picture in pictures:
            k = len(files.written)
            prompt = (
                prompts if isinstance(prompts, str) else prompts[k // values["num"]]
            )
            files.write(picture, told | {"prompt": prompt, "picture": str(k)})

    with Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn()
    ) as bars:
        progress = _shown(bars)
        progress.finished = write
        pictures = make(
            model, values, seed=SEED.value, size=SIZE.value, progress=progress, **rest
        )
    if isinstance(prompts, list) and len(prompts) > 1:
        columns = values["num"]  # a row for each prompt
    else:  # a path is one row
        columns = 4 if "num" in values else len(pictures)
    files.write_grid(image.grid(pictures, columns))


def _shown(bars: Any) -> Callable[[str, int, int], None]:
    """Return a progress function that draws a bar for each stage."""
    tasks = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done)

    return progress


def make_directory(path: str) -> Path:
    """Create a directory and try to write in it; UserError if that fails."""
    if "://" in path:
        raise UserError(f"--out={path}: pictures can only be written to local folders")
    directory = Path(os.path.expanduser(path))
    try:
        if directory.exists() and not directory.is_dir():
            raise UserError(f"--out={path} is a file: give a folder")
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe_") as probe:
            probe.write(b"0")
    except OSError as error:
        raise UserError(f"cannot write to --out={path}: {error.strerror}") from error
    return directory


if __name__ == "__main__":
    run(main)
