"""Pictures painted by a caption: what a picture shows there, or where, is kept.

Pictures, settings and results are those of `edit`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from dalle2_jax.data import image
from dalle2_jax.data.mask import known_square, read_mask, square_mask
from dalle2_jax.diffusion import generate as diffusion
from dalle2_jax.diffusion import process
from dalle2_jax.errors import UserError
from dalle2_jax.pipeline import generate
from dalle2_jax.pipeline.edit import Pictures
from dalle2_jax.pipeline.encode import as_one
from dalle2_jax.pipeline.generate import Progress, Request, Settings
from dalle2_jax.pipeline.models import Model

REPEATS = 4  # how often RePaint takes a step


def img2img(
    model: Model,
    picture: Any,
    prompt: str,
    *,
    strength: float | int = 0.7,
    seed: int = 0,
    num: int = 1,
    size: int | None = None,
    steps: Mapping[str, Any] | None = None,
    guidance: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Pictures:
    """A picture seen through noise and painted anew by a caption (SDEdit).

    The decoder starts from the picture with the noise of a part of its way, and takes
    the steps that are left (Meng et al. 2021, arXiv 2108.01073).

    Args:
      strength: that part, above 0 (nothing changes) up to 1 (nothing is kept).

    Raises:
      UserError: a strength out of range, or as `text_to_image`.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength={strength}: must be above 0 and at most 1")
    settings = Settings(size, steps, guidance)
    model, request = generate.of_prompts(model, [prompt], seed, num, settings)
    part = model.decoder
    table = diffusion.levels(part.diffusion, part.sampling)
    left = max(1, round(strength * table.steps))
    x0 = image.to_float(image.square(as_one(picture)[0], part.size))
    keys = jax.vmap(jax.random.fold_in, (0, None))(request.keys, part.size)
    eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape))(keys)
    x0 = jnp.broadcast_to(x0, eps.shape)
    start = process.q_sample(table, x0, jnp.int32(left - 1), eps)
    levels = tuple(int(t) for t in table.timesteps[:left])
    part = part.replace(sampling=part.sampling.copy({"steps": levels}))
    model = model._replace(decoder=part)
    return generate.cascade(model, request._replace(start=np.asarray(start)), progress)


def inpaint(
    model: Model,
    picture: Any,
    mask: Any,
    prompt: str,
    *,
    seed: int = 0,
    num: int = 1,
    size: int | None = None,
    steps: Mapping[str, Any] | None = None,
    guidance: Mapping[str, float] | None = None,
    repeats: int = REPEATS,
    mask_mode: str | None = None,
    progress: Progress | None = None,
) -> Pictures:
    """A part of a picture painted anew, to fit the rest and a caption.

    What the mask leaves stays to the bit, at the size that is returned. A decoder
    that was trained to inpaint (configs/decoder.py:small_inpaint) is shown what stays.
    Any other is held to it and takes each step several times, as RePaint does.

    Args:
      mask: a picture, or an array [h, w] of bool, uint8 or floats from 0 to 1, as large
        as the picture: white is painted, black stays. Or the picture itself with a part
        erased: what is transparent is painted, as by OpenAI's Images API. None takes
        the transparent part of `picture`.
      prompt: of the whole picture.
      repeats: how often a decoder that was not trained for it takes a step.
      mask_mode: "alpha" paints what is transparent in the mask, "luminance" what is
        white; needed for a transparent mask with other colours than the picture's.

    Raises:
      UserError: a mask of another size, one that selects nothing, or that could mean
        either; or as `text_to_image`.
    """
    picture = as_one(picture)[0]
    selected = read_mask(mask, picture, mask_mode)
    settings = Settings(size, steps, guidance)
    model, request = generate.of_prompts(model, [prompt], seed, num, settings)
    side = model.sizes[-1]
    white = square_mask(selected, side)
    if not white.any():
        raise UserError(
            "the mask selects nothing of the picture's middle square: make white what "
            'is to be painted, or transparent with mask_mode="alpha"'
        )
    picture = known_square(picture, selected, side)
    return _paint(model, request, picture, white, repeats, progress)


def outpaint(
    model: Model,
    picture: Any,
    prompt: str,
    *,
    extend: float | int = 0.5,
    place: tuple[float | int, float | int] = (0.5, 0.5),
    seed: int = 0,
    num: int = 1,
    size: int | None = None,
    steps: Mapping[str, Any] | None = None,
    guidance: Mapping[str, float] | None = None,
    repeats: int = REPEATS,
    progress: Progress | None = None,
) -> Pictures:
    """A picture made smaller, and what surrounds it painted: `inpaint` of a canvas.

    Args:
      extend: how much larger the square canvas is than the picture's longer side: 0.5
        is one and a half times as large.
      place: where on the canvas the picture is, from (0, 0), its upper left corner, to
        (1, 1).
      others: as of `inpaint`.

    Raises:
      UserError: a canvas that is not larger, a place out of range; or as `inpaint`.
    """
    picture = image.read(as_one(picture)[0])
    if not 0 < extend <= 7:
        raise UserError(f"extend={extend}: must be above 0 and at most 7")
    if len(place) != 2 or not all(0 <= x <= 1 for x in place):
        raise UserError(f"place={place}: give two numbers from 0 to 1")
    settings = Settings(size, steps, guidance)
    model, request = generate.of_prompts(model, [prompt], seed, num, settings)
    side = model.sizes[-1]
    canvas, white = image.on_canvas(picture, side, 1 + extend, place)
    return _paint(model, request, canvas, white, repeats, progress)


def _paint(
    model: Model,
    request: Request,
    picture: UInt8[np.ndarray, "s s 3"],
    white: np.ndarray,
    repeats: int,
    progress: Progress | None,
) -> Pictures:
    """Paints what is white; the rest of the picture stays to the bit."""
    if repeats < 1:
        raise UserError(f"repeats={repeats}: must be at least 1")
    part = model.decoder
    if not part.network.inpaints:
        again = {"sampler": "repaint", "repeats": repeats}
        model = model._replace(decoder=part.replace(sampling=part.sampling.copy(again)))
    mask = white[None, ..., None].astype(np.float32)
    known = image.to_float(picture)[None], mask
    return generate.cascade(model, request._replace(known=known), progress)
