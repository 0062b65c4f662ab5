"""Whether the parts of a model fit one another."""

import numpy as np
from flax.traverse_util import flatten_dict

from dalle2_jax.errors import UserError, short
from dalle2_jax.parts import part_of
from dalle2_jax.pipeline.models import Model


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
