"""Whether what a file says makes a model: each part by itself, and all together."""

from typing import Any

import jax
import numpy as np

from dalle2_jax import checkpoint, tensors
from dalle2_jax.diffusion import settings
from dalle2_jax.errors import UserError, short
from dalle2_jax.nn import abstract, build
from dalle2_jax.nn.codes import Codes
from dalle2_jax.nn.unet import UNet
from dalle2_jax.pipeline import models

_CANDIDATES = settings.whole(1, 1000)
# What a part needs beside its network and the sections that all of them have.
_PRIOR = {
    "candidates": _CANDIDATES,
    "variance": settings.one_of(None, "analytic"),
    "last_std": settings.number(0, 100),
}
_AR_PRIOR = {
    "candidates": _CANDIDATES,
    "guidance": settings.number(-1000, 1000),
    "temperature": settings.number(0, 1000),
}
_UPSAMPLER = {"round_low": settings.one_of(True, False)}


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
    upsamples = name.startswith("upsampler")
    if name not in models._NETWORKS and not upsamples:
        known = ", ".join(models._NETWORKS)
        raise UserError(f"{where} is no part: must be {known} or upsampler_SIZE")
    kind = models._NETWORKS.get(name, UNet)
    network = build.build(kind, section.get("net"), weights.shapes, f"{where}.net")
    shapes = {
        name: jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in weights.shapes.items()
    }
    checkpoint.check(shapes, abstract(network), weights.where)
    if name == "clip" or name.endswith("_last"):
        return
    if name == "ar_prior":
        settings.check(section.get("sampling"), _AR_PRIOR, f"{where}.sampling")
        return
    settings.check_part(section, where)
    if name == "prior":
        settings.check(section["sampling"], _PRIOR, f"{where}.sampling")
    else:
        settings.check(section, {"size": settings.SIDE}, where)
    if upsamples:
        settings.check(section["sampling"], _UPSAMPLER, f"{where}.sampling")
        settings.check(section, {"low_size": settings.SIDE}, where)


def whole(model: models.Model) -> None:
    """Check that the parts of a model fit one another.

    Raises:
      UserError: a network reads embeddings or text states of other sizes than CLIP
        makes, the tokenizer is of another vocabulary, or statistics are missing.
    """
    if model.clip is not None:
        _check_conditions(model)
    if model.prior is not None:
        dim = model.prior.network.clip_dim
        for name in ("z_image_mean", "z_image_std"):
            _check_statistic(model, name, getattr(model, name), (dim,))
        if model.x0_error is not None:  # without it, sampling tells how to measure it
            steps = model.prior.diffusion["steps"]
            _check_statistic(model, "prior_x0_error", model.x0_error, (steps,))
    if model.codes is not None:
        network = model.ar_prior.network
        d, k = network.clip_dim, network.components
        shapes = Codes(mean=(d,), axes=(d, k), low=(k,), high=(k,))
        for name, array, shape in zip(Codes._fields, model.codes, shapes, strict=True):
            _check_statistic(model, f"ar_prior/{name}", array, shape)


def _check_conditions(model: models.Model) -> None:
    """Check what CLIP is given, and what others read of it."""
    clip = model.clip.network
    made = {
        "clip_dim": clip.embed_dim,
        "context_length": clip.context_length,
        "text_width": clip.text_width,
    }
    for name in ("prior", "ar_prior", "decoder"):
        part = getattr(model, name)
        if part is None:
            continue
        if clip.text_width is None:
            raise UserError(
                f"{model.path}: {name} needs CLIP's text tower, and there is only its "
                "image tower: load the text tower, too"
            )
        for key, value in made.items():
            read = getattr(part.network, key)
            if read != value:
                raise UserError(
                    f"{model.path}: {name} has {key}={read} and CLIP {value}: load "
                    "parts that were trained with one CLIP"
                )
    if model.tokenizer is not None and clip.text_width is not None:
        model.tokenizer.check(clip.vocab_size, clip.eot, model.path)


def _check_statistic(
    model: models.Model, name: str, array: Any, shape: tuple[int, ...]
) -> None:
    found = None if array is None else np.shape(array)
    if found != shape:
        raise UserError(
            f"the model {model.path} needs the statistics {name} of shape {shape}, has "
            f"{'none' if found is None else short(found)}: export it again"
        )
