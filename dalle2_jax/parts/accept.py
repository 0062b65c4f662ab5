"""Whether what a file says makes a part of a model, and models read with that check."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dalle2_jax import checkpoint, rules, tensors
from dalle2_jax.diffusion import settings
from dalle2_jax.errors import UserError
from dalle2_jax.nn import abstract, build
from dalle2_jax.parts.table import PARTS, part_of


def load(
    directory: str | os.PathLike, only: Sequence[str] | None = None
) -> checkpoint.Export:
    """Read a model as `checkpoint.load` does, and check each of its parts."""
    return checkpoint.load(directory, only=only, accept=part)


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
    rules.check(section.get("sampling"), own.sampler.rules, f"{where}.sampling")
    rules.check(section, dict.fromkeys(own.sides, rules.SIDE), where)
