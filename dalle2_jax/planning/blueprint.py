"""The programs of training and of sampling for any devices, with no params in memory.

For who wants them compiled and not run. A model of the right shapes, whose params are
all zeros that take no memory, stands in for the one that a config builds on.
"""

import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dalle2_jax import checkpoint, parts
from dalle2_jax.data import tokenizer
from dalle2_jax.errors import UserError
from dalle2_jax.nn import abstract
from dalle2_jax.nn.clip import CLIP, Caption
from dalle2_jax.parts import PARTS, part_of
from dalle2_jax.parts.component import Component, Inputs
from dalle2_jax.parts.part import Sampler
from dalle2_jax.pipeline import models
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
        stage = parts.make_stage(small, lambda path: export)
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
    dtype = parts.dtype_of(config)
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
    own = PARTS[config.stage]
    name = own.component_name(config)
    component = model.components[name]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), pictures))
    inputs = Inputs(randomness=place(keys, split))
    if clip is not None:
        caption = place(_caption(model.clip.network, pictures), split)
        inputs = inputs.replace(caption=caption, null=caption, z_image=caption.z_text)
    if component.low_size is not None:
        low = jax.ShapeDtypeStruct(
            (pictures, *2 * [component.low_size], 3), jnp.float32
        )
        inputs = inputs.replace(low=place(low, split))
    sampler = own.sampler
    sampling = sampler.make_sampling(component, [model.sampling[name]] * pictures)
    repeats = sampler.steps(component, sampling)
    component = component.replace(params=place(component.params, everywhere, dtype))
    statistics = own.read_statistics(model.statistics, model.sampling[name])
    inputs = inputs.replace(**place(statistics, everywhere))
    arguments = component, place(sampling, split), inputs
    return Program(
        name=config.stage,
        traced=jax.jit(sampling_loop(sampler, repeats), compiler_options=options).trace(
            *arguments
        ),
        params=component.params,
        arguments=arguments,
        examples=pictures,
        repeats=repeats,
    )


def sampling_loop(sampler: Sampler, steps: int) -> Callable[..., Any]:
    """All of a loop of so many steps, which sampling runs as three programs."""

    def loop(component: Component, sampling: Any, inputs: Inputs) -> Any:
        prepared, state = sampler.begin(component, sampling, inputs)
        state = sampler.advance(component, sampling, prepared, state, 0, steps)
        return sampler.finish(component, sampling, prepared, state)

    return loop


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


def hollow(
    config: ConfigDict, clip: Mapping[str, Any] | None, folder: str
) -> checkpoint.Export:
    """A trained model of the stage and the CLIP below it, whose numbers are all zero.

    Args:
      config: of the stage.
      clip: CLIP's arguments, or None.
      folder: for its tokenizer, which knows no words.
    """
    sections: dict[str, dict[str, Any]] = {}
    statistics: dict[str, Any] = {}
    if clip is not None:
        text = tokenizer.blank(clip["vocab_size"], clip["context_length"])
        text.save(folder)
        sections["clip"] = {"net": dict(clip)}
    if config.stage != "clip":
        own, values = PARTS[config.stage], config.to_dict()
        section = {
            k: values[k] for k in ("diffusion", "size", "low_size") if k in values
        }
        section |= {"net": own.arguments(config, clip), "sampling": values["sampling"]}
        sections[own.component_name(config)] = section
        statistics = own.zero_statistics(own.module(**section["net"]))
    return checkpoint.Export(
        config={"parts": sections},
        params={
            name: jax.tree.map(
                lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape),
                abstract(part_of(name).module(**section["net"])),
            )
            for name, section in sections.items()
        },
        tokenizer_dir=None if clip is None else folder,
        statistics=statistics,
    )
