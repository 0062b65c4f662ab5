"""Whether what a file says makes a model: each part by itself, and all together."""

from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from dalle2_jax import checkpoint, tensors
from dalle2_jax.diffusion import settings
from dalle2_jax.errors import UserError, short
from dalle2_jax.nn import abstract, build
from dalle2_jax.parts import PARTS, part_of
from dalle2_jax.pipeline.models import Model


def part(name: str, section: dict[str, Any], weights: tensors.Weights) -> None:
    """Check a part of a model of this package before its weights are read.

    Args:
      name, section: of the part in config.json.
      weights: of the part; only their shapes are looked at.

    Raises:
      UserError: the section makes no network, or one that the weights don't fit, or
        says nothing sensible of how to sample from it.
    """
    where = f"{weights.where.parent / 'config.json'}: {name}"
    own = part_of(name)
    if own is None:
        raise UserError(f"{where} is no part: must be one of {', '.join(PARTS)}")
    network = build.build(
        own.module, section.get("net"), weights.shapes, f"{where}.net"
    )
    shapes = {
        name: jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in weights.shapes.items()
    }
    checkpoint.check(shapes, abstract(network), weights.where)
    if own.sampler is None or name.endswith("_last"):
        return
    if own.sampler.diffuses:
        settings.check_part(section, where)
    settings.check(section.get("sampling"), own.sampler.rules, f"{where}.sampling")
    settings.check(section, dict.fromkeys(own.sides, settings.SIDE), where)


def whole(model: Model) -> None:
    """Check that the parts of a model fit one another.

    Raises:
      UserError: a network reads embeddings or text states of other sizes than CLIP
        makes, the tokenizer is of another vocabulary, or statistics are missing.
    """
    if model.clip is not None:
        _check_conditions(model)
    for name, component in model.components.items():
        expected = part_of(name).zero_statistics(component.network)
        # Where it is missing but needed, sampling tells how to measure it.
        if name == "prior" and "prior_x0_error" in model.statistics:
            expected["prior_x0_error"] = np.zeros(component.diffusion["steps"])
        for key, array in flatten_dict(expected, sep="/").items():
            _check_statistic(model, key, array.shape)


def _check_conditions(model: Model) -> None:
    """Check what CLIP is given, and what others read of it."""
    clip = model.clip.network
    made = {
        "clip_dim": clip.embed_dim,
        "context_length": clip.context_length,
        "text_width": clip.text_width,
    }
    for name, component in model.components.items():
        if not hasattr(component.network, "clip_dim"):
            continue
        if clip.text_width is None:
            raise UserError(
                f"{model.path}: {name} needs CLIP's text tower, and there is only its "
                "image tower: load the text tower, too"
            )
        for key, value in made.items():
            read = getattr(component.network, key)
            if read != value:
                raise UserError(
                    f"{model.path}: {name} has {key}={read} and CLIP {value}: load "
                    "parts that were trained with one CLIP"
                )
    if model.tokenizer is not None and clip.text_width is not None:
        model.tokenizer.check(clip.vocab_size, clip.eot, model.path)


def _check_statistic(model: Model, name: str, shape: tuple[int, ...]) -> None:
    found = flatten_dict(dict(model.statistics), sep="/").get(name)
    found = None if found is None else np.shape(found)
    if found != shape:
        raise UserError(
            f"the model {model.path} needs the statistics {name} of shape {shape}, has "
            f"{'none' if found is None else short(found)}: export it again"
        )
