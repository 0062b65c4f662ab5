"""What a stage is, and what the stages share.

A stage is a record of pure functions, as optax's transformations are: the training
loop knows nothing else of what it trains.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from dalle2_jax import checkpoint, rules
from dalle2_jax.data import batches, image, sources, tokenizer
from dalle2_jax.data.rows import RULES as ROWS
from dalle2_jax.data.rows import Rows
from dalle2_jax.diffusion import process, schedule
from dalle2_jax.errors import UserError
from dalle2_jax.nn.clip import CLIP, Caption
from dalle2_jax.nn.layers import ACTIVATIONS
from dalle2_jax.nn.unet import UNet

DTYPE = rules.one_of("float32", "bfloat16")
# What the configs of all stages have; the loop's own are in train/settings.py.
RULES: rules.Rules = {
    "base": rules.TEXT,
    "init_from": rules.TEXT,
    "trainable": rules.TEXT,
    "seed": rules.SEED,
    "batch_size": rules.whole(1, 2**31 - 1),
    "dtype": DTYPE,
    "param_dtype": DTYPE,
    "data": {
        "source": rules.one_of(*sources.OPENERS),
        "path": rules.TEXT,
        "keep": rules.TEXT,
        **ROWS,
        **batches.RULES,
        **batches.BLOCK,
    },
}
# What the section `diffusion` has for training alone.
DIFFUSION = {
    "min_snr_gamma": rules.optional(rules.number(0, 1e6, above=True)),
    "snr_power": rules.optional(rules.number(-10, 10)),
    "logit_normal": rules.optional(rules.pair(rules.number(-100, 100))),
}
TRANSFORMER = {
    "width": rules.COUNT,
    "layers": rules.COUNT,
    "heads": rules.COUNT,
    "activation": rules.one_of(*ACTIVATIONS),
    "remat": rules.FLAG,
}
UNET = {
    "channels": rules.COUNT,
    "blocks": rules.COUNT,
    "in_channels": rules.COUNT,
    "out_channels": rules.COUNT,
    "head_channels": rules.COUNT,
    "groups": rules.COUNT,
    "patch_size": rules.COUNT,
    "dropout": rules.number(0, 1, below=True),
    "scale_shift": rules.FLAG,
    "remat": rules.FLAG,
}

Batch = Mapping[str, Array]
Scalars = dict[str, Array]
Load = Callable[[str | os.PathLike], checkpoint.Export]


class Stage(NamedTuple):
    """One trainable part of the model.

    Attributes:
      name: the part's name in an exported model.
      frozen: parameters that are read but not trained; an argument of every function
        below, so that no compiled program holds them as constants.
      init: key -> params.
      loss: (params, frozen, batch, key) -> (scalar, {name: scalar}).
      metrics: (params, frozen, batch, key) -> {name: [b]}, for held-out pictures.
      preview: (params, frozen, batch, key) -> {name: uint8 pictures or a scalar}.
      batches: (split, step) -> iterator of batches from that step on; split is "train"
        or "heldout".
      export: params -> the arguments of checkpoint.export, the workdir excepted.
      start: host arrays to start from in place of what init draws, or None.
      compares: whether the loss compares examples with each other. Its batch is then
        [accumulate, b, ...], all micro-batches of a step; else it is one, [b, ...].
    """

    name: str
    frozen: Any
    init: Callable[[Array], Any]
    loss: Callable[[Any, Any, Batch, Array], tuple[Array, Scalars]]
    metrics: Callable[[Any, Any, Batch, Array], Scalars]
    preview: Callable[[Any, Any, Batch, Array], dict[str, Array]]
    batches: Callable[[str, int], Iterator[dict[str, np.ndarray]]]
    export: Callable[[Any], dict[str, Any]]
    start: Any = None
    compares: bool = False


class Base(NamedTuple):
    """The exported model that a stage builds on.

    Attributes:
      model: all of it.
      origin: the model that the stage starts from, or None.
      clip, clip_params: its CLIP, which the stage reads and leaves as it is.
      text: its tokenizer.
      empty: the empty caption's tokens.
    """

    model: checkpoint.Export
    origin: checkpoint.Export | None
    clip: CLIP
    clip_params: Any
    text: tokenizer.Tokenizer
    empty: Int[Array, " l"]


def load_models(
    config: ConfigDict, load: Load
) -> tuple[checkpoint.Export | None, checkpoint.Export | None]:
    """Reads ``config.base`` and ``config.init_from``; None for what is not given.

    A stage builds on what it starts from, unless another base is given. The bundled
    model is none: it is the default of the configs that start from nothing.
    """

    def read(path: str) -> checkpoint.Export:
        return load(checkpoint.BUNDLED if path == "bundled" else path)

    origin = read(config.init_from) if config.init_from else None
    if origin is not None and config.base in ("", "bundled"):
        return origin, origin
    return read(config.base) if config.base else None, origin


def load_base(config: ConfigDict, load: Load) -> Base:
    """The models of `load_models`; the base must have a CLIP and a tokenizer."""
    model, origin = load_models(config, load)
    if model is None:
        raise UserError(
            f"the {config.stage} stage needs a model with a trained CLIP: give one "
            "with --config.base=DIR (a workdir's model/ folder), or with "
            "--config.init_from=DIR to fine-tune it"
        )
    where = config.init_from if model is origin else config.base
    if "clip" not in model.params:
        raise UserError(
            f"the model at {where} has no CLIP, only "
            f"{', '.join(sorted(model.params)) or 'nothing'}: train configs/clip.py"
        )
    if model.tokenizer_dir is None:
        raise UserError(
            f"the model at {where} has no tokenizer/ beside its CLIP: export or copy "
            "the whole model again"
        )
    clip = CLIP(**model.config["parts"]["clip"]["net"], dtype=dtype_of(config))
    if clip.image_size is None:
        raise UserError(
            f"the CLIP of the model at {where} has no image tower: give a base that "
            "has both towers"
        )
    check_heads(model.config["parts"]["clip"]["net"], max(1, config.mesh.tensor))
    text = tokenizer.load(model.tokenizer_dir)
    text.check(clip.vocab_size, clip.eot, where)
    return Base(
        model=model,
        origin=origin,
        clip=clip,
        clip_params=float32(model.params["clip"]),
        text=text,
        empty=jnp.asarray(text.encode([""], clip.context_length)[0]),
    )


def float32(params: Any) -> Any:
    """Stages compute with float32 params, whatever the file holds."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def add_part(
    base: checkpoint.Export | None,
    name: str,
    config: Mapping[str, Any],
    params: Any,
    text: tokenizer.Tokenizer | None,
    statistics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The base model with one part added or replaced, as checkpoint.export takes it."""
    base = base or checkpoint.Export({"parts": {}}, {}, None, {})
    return {
        "params": {**base.params, name: params},
        "config": {"parts": {**base.config["parts"], name: config}},
        "tokenizer": text,
        "statistics": {**base.statistics, **(statistics or {})},
    }


def dtype_of(config: ConfigDict, key: str = "dtype") -> jnp.dtype:
    """The dtype that ``config.dtype`` (of activations) or another key names."""
    return jnp.dtype(config[key])


def check_statistics(found: Mapping[str, Any], expected: Any, where: str) -> None:
    """A UserError unless a model's statistics have the shapes that a network needs."""
    known = {name: found[name] for name in expected if name in found}
    checkpoint.check(known, expected, f"the statistics of {where}")


def check_width(net: Mapping[str, Any], where: str, tower: str = "") -> None:
    """A UserError unless a transformer's width can be split over its heads."""
    width, heads = net[f"{tower}width"], net[f"{tower}heads"]
    if width % heads:
        raise UserError(
            f"{where}.{tower}heads is {heads}: must divide {tower}width={width}"
        )


def check_unet(network: UNet, where: str) -> None:
    """A UserError unless a U-Net's channels can be split as its config says."""
    try:
        network.check_widths()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def check_side(side: int, network: UNet, where: str) -> None:
    """A UserError unless a U-Net can work on pictures of that side."""
    if side % network.unit:
        raise UserError(
            f"{where} is {side} px: must be a multiple of {network.unit}, which is "
            "net.patch_size, doubled for each of net.multipliers after the first"
        )


def check_heads(net: Mapping[str, Any], tensor: int) -> None:
    """A UserError where heads of attention can't be split evenly over mesh.tensor."""
    counts = {name: n for name, n in net.items() if name.endswith("heads") and n}
    if net.get("attention_levels"):
        for level in {*net["attention_levels"], len(net["multipliers"]) - 1}:
            channels = net["channels"] * net["multipliers"][level]
            counts[f"level {level}"] = channels // net["head_channels"]
    for name, heads in counts.items():
        if heads % tensor:
            raise UserError(
                f"mesh.tensor={tensor} must divide the heads of attention: {name} has "
                f"{heads}"
            )
    for section in net.values():
        if isinstance(section, Mapping):
            check_heads(section, tensor)


def make_batches(
    config: ConfigDict,
    sizes: Mapping[str, int],
    text: tokenizer.Tokenizer | None = None,
    context_length: int | None = None,
    *,
    clip_params: Any = None,
    degrade: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
) -> Callable[..., Iterator[dict[str, np.ndarray]]]:
    """Stage.batches from ``config.data``: pictures of the sizes by name, and tokens.

    With ``whole`` the iterator gives every process the whole of each batch. Where the
    stage has a CLIP that it leaves as it is, its params are given: if the data has its
    embeddings, they come as z_image in place of the pictures "clip_image". ``degrade``
    is as of `data.rows`.
    """
    data = config.data

    @functools.cache
    def source(split: str) -> sources.Source:
        return open_source(config, split)

    @functools.cache
    def embedded(split: str) -> bool:
        """Whether embeddings are there to be used; they must be of this CLIP."""
        if source(split).embedded is None or clip_params is None:
            return False
        if source(split).embedded.clip != checkpoint.fingerprint(clip_params):
            raise UserError(
                f"{source(split).name} are of another CLIP than the model's that the "
                f"{config.stage} stage builds on: embed with that one as --model"
            )
        return True

    def make(split: str, step: int, whole: bool = False) -> Iterator[dict]:
        pictures = dict(sizes)
        if embedded(split):
            pictures.pop("clip_image", None)
        rows = Rows(
            pictures,
            crop=data.crop,
            crop_fraction=data.crop_fraction,
            degrade=degrade,
            flip=data.flip,
            jitter=data.jitter,
            embeddings=embedded(split),
        )
        return batches.batches(
            source(split),
            text,
            rows,
            batch_size=config.batch_size,
            seed=config.seed,
            context_length=context_length,
            block=data.block if split == "train" else 1,
            step=step,
            threads=data.threads,
            workers=data.workers if split == "train" else 0,
            process_index=0 if whole else jax.process_index(),
            process_count=1 if whole else jax.process_count(),
        )

    return make


def open_source(config: ConfigDict, split: str) -> sources.Source:
    """The pictures and captions that ``config.data`` names.

    The parts of a mixture have the options of ``config.data`` that they don't give.
    """
    data = config.data
    sections = {kind: data[kind].to_dict() for kind in sources.OPENERS if kind in data}
    given = sections[data.source] if data.source in sections else {}
    if data.source == "mixture":
        given["defaults"] = sections
    if data.keep:
        given["keep"] = data.keep
    return sources.open_source(
        data.source, data.path, split=split, seed=config.seed, **given
    )


# CLIP, frozen, as the later stages read it.


def upon_clip(net: Mapping[str, Any], clip: Mapping[str, Any]) -> dict[str, Any]:
    """A network's arguments, with the numbers of the net of the CLIP that it reads."""
    return {
        **net,
        "clip_dim": clip["embed_dim"],
        "context_length": clip["context_length"],
        "text_width": clip["text_width"],
    }


def encode_image(
    clip: CLIP, params: Any, pictures: Float[Array, "b h w 3"]
) -> Float[Array, "b d"]:
    """z_image of pictures in [-1, 1], of CLIP's size."""
    pictures = image.clip_normalize(pictures)
    return clip.apply({"params": params}, pictures, method="encode_image")


def see(clip: CLIP, params: Any, batch: Batch) -> Float[Array, "b d"]:
    """z_image of a batch: what the data brings, or else of its pictures."""
    if "z_image" in batch:
        return batch["z_image"]
    return encode_image(clip, params, image.to_float(batch["clip_image"]))


def encode_caption(clip: CLIP, params: Any, tokens: Int[Array, "b l"]) -> Caption:
    """What CLIP's text tower says of a caption."""
    return clip.apply({"params": params}, tokens, method="encode_caption")


def drop_caption(
    tokens: Int[Array, "b l"], empty: Int[Array, " l"], drop: Bool[Array, " b"]
) -> Int[Array, "b l"]:
    """The empty caption's tokens in place of those that ``drop`` picks."""
    return jnp.where(drop[:, None], empty, tokens)


# Diffusion training.


def denoising_loss(
    apply: Callable[[Array, Array], Array],
    table: schedule.Schedule,
    x0: Float[Array, "b ..."],
    key: Array,
    diffusion: Mapping[str, Any],
) -> Float[Array, " b"]:
    """Equation 14 of DDPM (arXiv 2006.11239), each example at a random timestep.

    The timesteps of a batch are spread evenly, from a random start: one alone is
    uniform, and their loss varies less (VDM, arXiv 2107.00630, appendix I.1). Where
    `diffusion` has a logit_normal, its mean and deviation, they are spread so that the
    logit of timestep / steps is normal (SD3, arXiv 2403.03206, section 3.1).

    Args:
      apply: (x_t, timesteps) -> the network's output.
      table: the training schedule.
      x0: clean data.
      diffusion: the config's section of that name.
    """
    key_i, key_eps = jax.random.split(key)
    b = len(x0)
    where = (jnp.arange(b) / b + jax.random.uniform(key_i)) % 1
    if diffusion["logit_normal"] is not None:
        mean, deviation = diffusion["logit_normal"]
        where = jax.nn.sigmoid(mean + deviation * jax.scipy.special.ndtri(where))
    i = jnp.minimum((where * table.steps).astype(jnp.int32), table.steps - 1)
    eps = jax.random.normal(key_eps, x0.shape)
    x_t = process.q_sample(table, x0, i, eps)
    output = apply(x_t, jnp.asarray(table.timesteps)[i])
    return process.loss(
        table,
        output,
        x0,
        x_t,
        eps,
        i,
        predict=diffusion["predict"],
        variance=diffusion["variance"],
        min_snr_gamma=diffusion["min_snr_gamma"],
        snr_power=diffusion["snr_power"],
    )
