"""Pictures painted by a caption: what a picture shows there, or where, is kept.

Pictures, settings and results are those of `edit`.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from dalle2_jax.data import image
from dalle2_jax.data.image import Picture
from dalle2_jax.data.mask import known_square, read_mask, square_mask
from dalle2_jax.diffusion import generate as diffusion
from dalle2_jax.errors import UserError, short
from dalle2_jax.pipeline import generate, values
from dalle2_jax.pipeline import settings as asked
from dalle2_jax.pipeline.generate import NEEDS, Progress, Request
from dalle2_jax.pipeline.latent import Pictures
from dalle2_jax.pipeline.limits import MOST_EXTEND, MOST_REPEATS
from dalle2_jax.pipeline.models import Model, in_batches
from dalle2_jax.pipeline.settings import Settings

REPEATS = 4  # how often RePaint takes a step


def img2img(
    model: Model,
    picture: Picture,
    prompt: str,
    *,
    strength: float | int = 0.7,
    seed: int | None = 0,
    num: int = 1,
    size: int | None = None,
    steps: Any = None,
    guidance: Any = None,
    guidance_interval: Any = None,
    sampler: Any = None,
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
    asked.check_model(model, *NEEDS)
    strength = values.check_number("strength", strength, 0, 1, above=True)
    values.check_progress(progress)
    picture = image.read(image.as_one(picture))
    prompt = values.check_prompt(prompt)
    settings = Settings(size, steps, guidance, guidance_interval, sampler)
    model, request = generate.make_request(model, prompt, seed, num, settings)
    decoder, sampling = model.decoder, request.sampling["decoder"]
    table = diffusion.levels(decoder.diffusion, sampling[0])
    left = max(1, round(strength * table.steps))
    x0 = image.to_float(image.square(picture, decoder.size))

    def noised(rows: np.ndarray) -> np.ndarray:
        keys = generate.make_keys(request.seeds[rows], request.numbers[rows])
        level = np.float32([table.signal[left - 1], table.noise[left - 1]])
        return np.asarray(_noised(keys, x0, level))

    count = len(request.tokens)
    start = in_batches(noised, count, model.devices.size, generate.BATCH)
    steps = {"steps": tuple(int(t) for t in table.timesteps[:left])}
    sampling = {**request.sampling, "decoder": [each | steps for each in sampling]}
    request = request._replace(start=start, sampling=sampling)
    return generate.cascade(model, request, progress)


def inpaint(
    model: Model,
    picture: Picture,
    mask: Picture | None,
    prompt: str,
    *,
    seed: int | None = 0,
    num: int = 1,
    size: int | None = None,
    steps: Any = None,
    guidance: Any = None,
    guidance_interval: Any = None,
    sampler: Any = None,
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
    asked.check_model(model, *NEEDS)
    repeats = values.check_integer("repeats", repeats, 1, MOST_REPEATS)
    values.check_progress(progress)
    picture = image.read_rgba(image.as_one(picture))
    selected = read_mask(mask, picture, mask_mode)
    prompt = values.check_prompt(prompt)
    settings = Settings(size, steps, guidance, guidance_interval, sampler)
    model, request = generate.make_request(model, prompt, seed, num, settings)
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
    picture: Picture,
    prompt: str,
    *,
    extend: float | int = 0.5,
    place: tuple[float | int, float | int] = (0.5, 0.5),
    seed: int | None = 0,
    num: int = 1,
    size: int | None = None,
    steps: Any = None,
    guidance: Any = None,
    guidance_interval: Any = None,
    sampler: Any = None,
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
    asked.check_model(model, *NEEDS)
    extend = values.check_number("extend", extend, 0, MOST_EXTEND, above=True)
    where = values.check_numbers("place", place, 0, 1)
    if len(where) != 2:
        raise UserError(f"place={short(place)}: give two numbers from 0 to 1")
    repeats = values.check_integer("repeats", repeats, 1, MOST_REPEATS)
    values.check_progress(progress)
    picture = image.read(image.as_one(picture))
    prompt = values.check_prompt(prompt)
    settings = Settings(size, steps, guidance, guidance_interval, sampler)
    model, request = generate.make_request(model, prompt, seed, num, settings)
    side = model.sizes[-1]
    canvas, white = image.on_canvas(picture, side, 1 + extend, tuple(where))
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
    if not model.decoder.network.inpaints:
        again = {"sampler": "repaint", "repeats": repeats}
        each = [settings | again for settings in request.sampling["decoder"]]
        request = request._replace(sampling={**request.sampling, "decoder": each})
    mask = white[None, ..., None].astype(np.float32)
    known = image.to_float(picture)[None], mask
    return generate.cascade(model, request._replace(known=known), progress)


@jax.jit
def _noised(
    keys: Key[Array, " b"], x0: Float[Array, "s s 3"], level: Float[Array, "2"]
) -> Float[Array, "b s s 3"]:
    """A picture with the noise of each key, at a level's signal and noise."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, len(x0))
    eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape))(keys)
    return level[0] * x0 + level[1] * eps
