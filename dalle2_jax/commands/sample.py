"""Make pictures: of captions, or from pictures.

    dalle2 sample --prompt="a large red circle" [--model=DIR] [--num=4] [--out=DIR]
    dalle2 sample --task=variations --image=photo.jpg --eta=0.5

Each batch of pictures is saved as soon as it is made, beside those of earlier runs.
"""

from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from dalle2_jax import storage
from dalle2_jax.data.picture_files import PictureFiles, make_directory
from dalle2_jax.errors import UserError
from dalle2_jax.files import read_json
from dalle2_jax.flags import Flags
from dalle2_jax.pipeline import limits, parse, tasks

FLAGS = Flags()
_what = FLAGS.group("What to make")
TASK = _what(
    flags.DEFINE_enum, "task", "text_to_image", list(tasks.TASKS), "What to make"
)
PROMPT = _what(
    flags.DEFINE_multi_string,
    "prompt",
    [],
    "A caption; text_to_image takes several, each with a flag.",
)
NEGATIVE_PROMPT = _what(
    flags.DEFINE_multi_string,
    "negative_prompt",
    [],
    "What guidance leads away from: once, or once for each prompt.",
)
NUM = _what(
    flags.DEFINE_integer,
    "num",
    None,
    "Number of pictures of each prompt, by default 4.",
    1,
    limits.MOST_PICTURES,
)
BEST_OF = _what(
    flags.DEFINE_integer,
    "best_of",
    None,
    "Make so many of each prompt, and keep the --num that CLIP finds most like it.",
    1,
    limits.MOST_PICTURES,
)
SIZE = _what(
    flags.DEFINE_integer,
    "size",
    None,
    "Side of the pictures in pixels, by default the largest of the model.",
    1,
)
SEED = _what(
    flags.DEFINE_string,
    "seed",
    "0",
    "Another seed makes other pictures; random draws one and prints it.",
)
OUT = _what(
    flags.DEFINE_string,
    "out",
    "samples",
    "Directory for the pictures; files that are there stay.",
)

_model = FLAGS.group("The model")
MODEL = _model(
    flags.DEFINE_string,
    "model",
    "",
    "A directory, a URL or a name on the hub; by default the bundled model.",
)
VARIANT = _model(
    flags.DEFINE_string,
    "variant",
    None,
    "Which weights to read where there are several, as fp16.",
)
DTYPE = _model(
    flags.DEFINE_enum,
    "dtype",
    "float32",
    ["float32", "bfloat16", "float16"],
    "Type of the params and the activations.",
)
OFFLOAD = _model(
    flags.DEFINE_bool,
    "offload",
    False,
    "Keep on the device only the network that runs.",
)
TILE = _model(
    flags.DEFINE_integer,
    "tile",
    None,
    "Upsample on tiles of so many pixels, in less memory.",
    1,
)
OVERLAP = _model(
    flags.DEFINE_integer,
    "overlap",
    None,
    "Pixels that tiles share, by default a quarter of a tile.",
    0,
)

_networks = FLAGS.group(
    "How networks are sampled: one VALUE for all, or NETWORK=VALUE,..."
)
STEPS = _networks(
    flags.DEFINE_string,
    "steps",
    "",
    "Sampling steps, as 25 or prior=25,decoder=50,upsampler=8; with + between several "
    "upsamplers, as upsampler=27+15.",
)
GUIDANCE = _networks(
    flags.DEFINE_string,
    "guidance",
    "",
    "Guidance scales, as 4 or prior=2,decoder=4; 1 is none.",
)
GUIDANCE_INTERVAL = _networks(
    flags.DEFINE_string,
    "guidance_interval",
    None,
    "Least and largest timestep with guidance, as 100:700 or decoder=100:700.",
)
SAMPLER = _networks(
    flags.DEFINE_string,
    "sampler",
    None,
    "ddpm, ddim, dpm_solver or unipc, as ddim or decoder=ddim,prior=ddpm.",
)
PRIOR = _networks(
    flags.DEFINE_enum,
    "prior",
    None,
    ["diffusion", "autoregressive", "none", "caption"],
    "Source of the image embedding; none takes the caption's, caption is without.",
)

_edits = FLAGS.group("Tasks on pictures")
EDITS = [
    _edits(flags.DEFINE_string, "image", None, "File of a picture."),
    _edits(
        flags.DEFINE_string, "image2", None, "File of the picture to interpolate to."
    ),
    _edits(
        flags.DEFINE_string,
        "mask",
        None,
        "A picture of the same size, white where to paint; or the picture with a part "
        "erased.",
    ),
    _edits(
        flags.DEFINE_enum,
        "mask_mode",
        None,
        ["alpha", "luminance"],
        "Paint what is transparent in the mask, or what is white.",
    ),
    _edits(
        flags.DEFINE_string,
        "prompt_from",
        None,
        "What the picture shows, for text_diff.",
    ),
    _edits(
        flags.DEFINE_float,
        "eta",
        None,
        "Make variations from the picture's own noise: 0 to 1.",
        0,
        1,
    ),
    _edits(
        flags.DEFINE_integer,
        "frames",
        None,
        "Number of pictures of a path.",
        2,
        limits.MOST_PICTURES,
    ),
    _edits(
        flags.DEFINE_bool,
        "shared_noise",
        None,
        "Interpolate with the same noise for all frames.",
    ),
    _edits(flags.DEFINE_float, "theta", None, "How far text_diff goes: 0 to 1.", 0, 1),
    _edits(
        flags.DEFINE_enum,
        "direction",
        None,
        ["text", "prior"],
        "Whose difference text_diff follows.",
    ),
    _edits(
        flags.DEFINE_float,
        "strength",
        None,
        "How much img2img may change: above 0, to 1.",
        0,
        1,
    ),
    _edits(
        flags.DEFINE_float,
        "extend",
        None,
        "How much larger outpaint's canvas is than the picture.",
        0,
        limits.MOST_EXTEND,
    ),
    _edits(
        flags.DEFINE_list,
        "components",
        None,
        "Number of components of each picture of pca, as 1,2,4.",
    ),
    _edits(
        flags.DEFINE_integer,
        "repeats",
        None,
        "How often inpainting takes a step.",
        1,
        limits.MOST_REPEATS,
    ),
]
# What some tasks need or take; what is not given has no value.
OF_TASKS = [
    *(PROMPT, NEGATIVE_PROMPT, NUM, BEST_OF, PRIOR, GUIDANCE_INTERVAL, SAMPLER),
    *EDITS,
]


def main() -> None:
    """Read the flags, check them, and make the pictures."""
    saved: Any = "no picture is saved"
    try:
        given = {f.name: f.value for f in OF_TASKS if f.value not in (None, [])}
        values = tasks.check(TASK.value, given)
        steps = parse.by_network("steps", STEPS.value, parse.steps)
        guidance = parse.by_network(
            "guidance", GUIDANCE.value, parse.scale, tasks.GUIDED
        )
        seed = parse.seed(SEED.value)
        if OVERLAP.value is not None and TILE.value is None:
            raise UserError(f"--overlap={OVERLAP.value}: give --tile, too")
        check_size(SIZE.value)
        check_pictures(values)
        saved = PictureFiles(make_directory(OUT.value))
        sample(values, saved, seed=seed, steps=steps, guidance=guidance)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(str(saved)) from None


def check_size(size: int | None) -> None:
    """Raise UserError if a model on this machine has no such size.

    Its config.json tells; what has none is left to loading.
    """
    if size is None or storage.url(MODEL.value):
        return
    from dalle2_jax import checkpoint

    folder = checkpoint.BUNDLED
    if MODEL.value not in ("", "bundled"):
        folder = storage.expand(MODEL.value)
    if not (folder / "config.json").is_file():
        return
    config = read_json(folder / "config.json", checkpoint.LARGEST_CONFIG)
    parts = config.get("parts")
    parts = parts if isinstance(parts, dict) else {}
    sizes = {
        part.get("size")
        for name, part in parts.items()
        if name.startswith(("decoder", "upsampler")) and isinstance(part, dict)
    }
    if sizes and size not in sizes:
        sides = ", ".join(map(str, sorted(filter(None, sizes))))
        raise UserError(f"--size={size}: this model makes pictures of side {sides}")


def check_pictures(values: Mapping[str, Any]) -> None:
    """Raise UserError if a picture can't be read, before a model is loaded."""
    if not {"image", "image2", "mask"} & values.keys():
        return
    from dalle2_jax.data import image
    from dalle2_jax.data.mask import read_mask

    for name in {"image", "image2"} & values.keys():
        image.read(values[name])
    if TASK.value == "inpaint":
        read_mask(values.get("mask"), values["image"], values.get("mask_mode"))


def sample(
    values: dict[str, Any], files: PictureFiles, *, seed: int | None, **rest: Any
) -> None:
    """Load the model, make the pictures of the task, and write them."""
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    import dalle2_jax
    from dalle2_jax.data import image
    from dalle2_jax.pipeline.values import check_seed
    from dalle2_jax.runtime import use_compilation_cache

    use_compilation_cache()
    seed = check_seed(seed)
    model = dalle2_jax.load(
        *filter(None, [MODEL.value]),
        dtype=DTYPE.value,
        offload=OFFLOAD.value,
        tile=TILE.value,
        overlap=OVERLAP.value,
        variant=VARIANT.value,
    )
    prompts = values.get("prompt", "")
    told = {name: str(value) for name, value in values.items()} | {
        "task": TASK.value,
        "seed": str(seed),
        "model": model.path,
        "settings": f"steps {STEPS.value or 'default'}; "
        f"guidance {GUIDANCE.value or 'default'}; tile {TILE.value or 'none'}",
    }

    def write(pictures: Any) -> None:
        for picture in pictures:
            k = len(files.written)
            own = {
                name: value if isinstance(value, str) else value[k // values["num"]]
                for name in ("prompt", "negative_prompt")
                if (value := values.get(name)) is not None
            }
            files.write(picture, {"prompt": "", **told, **own, "picture": str(k)})

    with Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn()
    ) as bars:
        progress = _shown(bars)
        progress.finished = write
        pictures = tasks.make(
            TASK.value,
            model,
            values,
            seed=seed,
            size=SIZE.value,
            progress=progress,
            **rest,
        )
    if isinstance(prompts, list) and len(prompts) > 1:
        columns = values["num"]  # a row for each prompt
    else:  # a path is one row
        columns = 4 if "num" in values else len(pictures)
    print(f"{files}, and {files.write_grid(image.grid(pictures, columns))}")


def _shown(bars: Any) -> Callable[[str, int, int], None]:
    """Return a progress function that draws a bar for each stage."""
    shown = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in shown:
            shown[stage] = bars.add_task(stage, total=total)
        bars.update(shown[stage], completed=done)

    return progress
