"""The programs of training and of sampling for any devices, with no params in memory.

For who wants them compiled and not run. A model of the right shapes, whose params are
all zeros that take no memory, stands in for the one that a config builds on.
"""

import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dalle2_jax import checkpoint, stages
from dalle2_jax.data import tokenizer
from dalle2_jax.diffusion import generate
from dalle2_jax.errors import UserError
from dalle2_jax.nn import abstract
from dalle2_jax.nn.ar_prior import ARPrior
from dalle2_jax.nn.clip import CLIP, Caption
from dalle2_jax.nn.codes import Codes
from dalle2_jax.nn.decoder import Decoder
from dalle2_jax.nn.prior import DiffusionPrior
from dalle2_jax.nn.unet import UNet
from dalle2_jax.pipeline import loops, models
from dalle2_jax.train import loop, optim, update


class Program(NamedTuple):
    """A traced program and what it works on.

    Attributes:
      name: of the stage.
      traced: of `jax.jit`, with the shardings that it runs with.
      params: what is trained, or sampled with; shapes with shardings, as all arguments.
      arguments: of the program.
      examples: in a call.
      repeats: how often the loop in it runs; 1 without one.
    """

    name: str
    traced: Any
    params: Any
    arguments: Any
    examples: int
    repeats: int


def train(
    config: ConfigDict, clip: Mapping[str, Any] | None, mesh: Mesh, options: dict
) -> Program:
    """The training step of `train.loop`.

    Args:
      config: of the stage.
      clip: arguments of the CLIP that it builds on (its own, if it is the CLIP stage),
        or None.
      mesh: over devices that need not be there.
      options: XLA's, as the loop gives them.

    Raises:
      UserError: as training raises them.
    """
    loop.check_batch_size(config, mesh)
    with tempfile.TemporaryDirectory() as folder:
        export = hollow(config, clip, folder)
        # Two examples tell the shapes of all.
        small = config.copy_and_resolve_references()
        small.update(dict(batch_size=2, base="", init_from="hollow"))
        small.data.update(dict(source="shapes", path="", workers=0))
        if config.stage == "clip":
            small.tokenizer.path = ""
        stage = stages.make(small, lambda path: export)
        example = next(stage.batches("train", 0))
    optimizer = optim.make(config.steps, **config.optim)
    step = update.make_step(stage, config, mesh, optimizer, options)
    arguments = update.abstract_arguments(step, stage, config, mesh, example)
    with jax.set_mesh(mesh):
        traced = step.update.trace(*arguments, np.int32(0))
    return Program(
        name=stage.name,
        traced=traced,
        params=step.abstract.params,
        arguments=arguments,
        examples=config.batch_size,
        repeats=config.accumulate,
    )


def sample(
    config: ConfigDict,
    clip: Mapping[str, Any] | None,
    mesh: Mesh,
    options: dict,
    pictures: int,
) -> Program:
    """The stage's sampling loop as `sample.py` runs it, params in the config's dtype.

    Args:
      config, clip, options: as of `train`.
      mesh: all of its devices share the pictures; each holds all params.
      pictures: at once.

    Raises:
      UserError: a stage that doesn't sample, or pictures that can't be split evenly.
    """
    if config.stage == "clip":
        raise UserError("--sample: CLIP samples nothing; plan another stage's sampling")
    if pictures < 1 or pictures % mesh.size:
        raise UserError(
            f"--pictures={pictures} must be a multiple of {mesh.size}, the devices"
        )
    dtype = stages.dtype_of(config)
    devices = Mesh(mesh.devices.reshape(-1), ("data",), axis_types=(AxisType.Auto,))
    with tempfile.TemporaryDirectory() as folder:
        export = hollow(config, clip, folder)
        model = models.assemble([("the plan", export)], devices, dtype)

    def place(tree: Any, spec: P, dtype: Any = None) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, dtype or x.dtype, sharding=NamedSharding(devices, spec)
            ),
            tree,
        )

    everywhere, split = P(), P("data")
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), pictures))
    keys = place(keys, split)
    inputs: tuple[Any, ...]
    if config.stage == "upsampler":
        part, function = model.upsamplers[0], loops.sample_upsampler
        low = jax.ShapeDtypeStruct((pictures, *2 * [part.low_size], 3), jnp.float32)
        inputs = place(low, split), keys
    else:
        part = getattr(model, config.stage)
        caption = place(_caption(model.clip.network, pictures), split)
        if config.stage == "ar_prior":
            function = loops.sample_ar_prior
            inputs = caption, caption, keys, place(model.codes, everywhere)
        elif config.stage == "prior":
            function = loops.sample_prior
            statistics = place((model.z_image_mean, model.z_image_std), everywhere)
            inputs = caption, caption, keys, *statistics
        else:
            function = loops.sample_decoder
            inputs = caption.z_text, caption, caption, keys
    if config.stage == "ar_prior":
        repeats = part.network.components - 1
    else:
        repeats = generate.levels(part.diffusion, part.sampling).steps
    part = part.replace(params=place(part.params, everywhere, dtype))
    arguments = part, *inputs
    return Program(
        name=config.stage,
        traced=jax.jit(function.__wrapped__, compiler_options=options).trace(
            *arguments
        ),
        params=part.params,
        arguments=arguments,
        examples=pictures,
        repeats=repeats,
    )


def _caption(clip: CLIP, count: int) -> Caption:
    """The shapes of what CLIP says of captions."""
    tokens = jax.ShapeDtypeStruct((count, clip.context_length), jnp.int32)
    return jax.eval_shape(
        lambda params, tokens: clip.apply(
            {"params": params}, tokens, method="encode_caption"
        ),
        abstract(clip),
        tokens,
    )


def clip_net(config: ConfigDict) -> dict[str, Any]:
    """CLIP's arguments, of a config of its stage, with a vocabulary of full size."""
    size = config.tokenizer.vocab_size
    return {**config.net.to_dict(), "vocab_size": size, "eot": size - 1}


def hollow(
    config: ConfigDict, clip: Mapping[str, Any] | None, folder: str
) -> checkpoint.Export:
    """A trained model of the stage and the CLIP below it, whose numbers are all zero.

    Args:
      config: of the stage.
      clip: CLIP's arguments, or None.
      folder: for its tokenizer, which knows no words.
    """
    parts: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    statistics: dict[str, Any] = {}
    if clip is not None:
        text = tokenizer.blank(clip["vocab_size"], clip["context_length"])
        text.save(folder)
        parts["clip"] = CLIP(**clip), {"net": clip}
        d = np.zeros(clip["embed_dim"], np.float32)
        statistics = {"z_image_mean": d, "z_image_std": d + 1}
    if config.stage != "clip":
        name, network, net = _own(config, clip)
        section = {"net": net, "sampling": config.sampling.to_dict()}
        values = config.to_dict()
        for key in ("diffusion", "size", "low_size"):
            if key in values:
                section[key] = values[key]
        parts[name] = network, section
    if config.stage == "ar_prior":
        k = np.zeros(net["components"], np.float32)
        codes = Codes(d, np.zeros((len(d), len(k)), np.float32), k, k)
        edges = np.zeros(net["dot_products"] - 1, np.float32)
        statistics["ar_prior"] = {**codes._asdict(), "dot_products": edges}
    return checkpoint.Export(
        config={"parts": {name: section for name, (_, section) in parts.items()}},
        params={
            name: jax.tree.map(
                lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape),
                abstract(network),
            )
            for name, (network, _) in parts.items()
        },
        tokenizer_dir=None if clip is None else folder,
        statistics=statistics,
    )


def _own(
    config: ConfigDict, clip: Mapping[str, Any] | None
) -> tuple[str, nn.Module, dict[str, Any]]:
    """The stage's network: its name in a model, itself, and its arguments."""
    match config.stage:
        case "prior":
            net = stages.prior.network(config, clip)
            return "prior", DiffusionPrior(**net), net
        case "ar_prior":
            net = stages.ar_prior.network(config, clip)
            return "ar_prior", ARPrior(**net), net
        case "decoder":
            net = stages.decoder.network(config, clip)
            return "decoder", Decoder(**net), net
        case "upsampler":
            net = config.net.to_dict()
            return f"upsampler_{config.size}", UNet(**net), net
    raise UserError(f"there is no stage {config.stage!r}")
