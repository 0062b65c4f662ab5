"""The table of the parts of the model."""

import re

from dalle2_jax.parts import ar_prior, clip, decoder, prior, upsampler
from dalle2_jax.parts.part import Part

PARTS = {
    part.name: part
    for part in (clip.PART, prior.PART, ar_prior.PART, decoder.PART, upsampler.PART)
}


def part_of(name: str) -> Part | None:
    """The part of a model's component, such as "upsampler_256", or None."""
    return PARTS.get(name) or PARTS.get(re.sub(r"_\d+(_last)?$", "", name))
