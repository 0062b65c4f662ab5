"""A picture as the pair (z, x_T): its CLIP embedding, and the noise it is decoded from.

DDIM decodes x_T given z, and inverts a picture to its x_T, without a caption. The
decoder takes `STEPS` steps at guidance 1 unless told otherwise: inversion must go the
way that decoding comes, and goes it exactly only without guidance.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from dalle2_jax.data import image
from dalle2_jax.data.image import Picture
from dalle2_jax.errors import UserError
from dalle2_jax.parts import decoder, part
from dalle2_jax.parts.component import Inputs
from dalle2_jax.pipeline import generate, values
from dalle2_jax.pipeline import settings as asked
from dalle2_jax.pipeline.encode import (
    encode_caption,
    encode_squares,
    image_size,
    spread,
)
from dalle2_jax.pipeline.generate import NEEDS, Progress, Request
from dalle2_jax.pipeline.models import Model, in_batches
from dalle2_jax.pipeline.settings import Groups, Settings

STEPS = 100  # of DDIM, there and back

Pictures = UInt8[np.ndarray, "frames side side 3"]
Sampling = Mapping[str, Mapping[str, Any]]  # how each component is sampled, by name


class Latent(NamedTuple):
    """What `invert` makes of n pictures."""

    z: Float[np.ndarray, "n d"]
    x_T: Float[np.ndarray, "n h w 3"]


class Squares(NamedTuple):
    """The middle squares of n pictures, as CLIP and as the decoder have them."""

    seen: UInt8[np.ndarray, "n s s 3"]
    made: UInt8[np.ndarray, "n h w 3"]


def invert(
    model: Model,
    pictures: Picture | Sequence[Picture],
    *,
    steps: Any = None,
    guidance: Any = None,
) -> Latent:
    """Return the pairs (z, x_T) of pictures: DDIM inversion, given z and no caption.

    Args:
      pictures: one or a list of them.
      steps, guidance: of the decoder; `decode` must be given the same.

    Raises:
      UserError: not a picture, or a CLIP without its image tower.
    """
    asked.check_model(model, *NEEDS)
    model = model.up_to(model.decoder.size)
    sampling = by_ddim(model, Settings(steps=steps, guidance=guidance))
    return find(model, read(model, image.as_list(pictures)), sampling)


def decode(
    model: Model,
    z: Float[np.ndarray, "n d"],
    x_T: Float[np.ndarray, "n h w 3"] | None = None,
    *,
    eta: float | int = 0.0,
    seed: int | None = 0,
    size: int | None = None,
    steps: Any = None,
    guidance: Any = None,
    progress: Progress | None = None,
) -> Pictures:
    """Return pictures of CLIP image embeddings and noise, by DDIM without a caption.

    Args:
      z: not normalised, as `encode_image` gives them.
      x_T: the decoder's; by default the same white noise for all.
      eta: DDIM's η, from 0 (no noise but x_T) to 1.
      seed: of what noise is drawn, the same for all pictures.

    Raises:
      UserError: an η out of range, or arrays that do not fit the model.
    """
    asked.check_model(model, *NEEDS)
    model = asked.cut(model, size)
    sampling = by_ddim(model, Settings(steps=steps, guidance=guidance), eta)
    z = values.check_array("z", z, ("n", model.decoder.network.clip_dim))
    if x_T is not None:
        side = model.decoder.size
        x_T = values.check_array("x_T", x_T, (len(z), side, side, 3))
    values.check_progress(progress)
    seed = values.check_seed(seed)
    return draw(model, z, x_T, sampling, seed, progress)


def reconstruct(
    model: Model,
    pictures: Picture | Sequence[Picture],
    *,
    eta: float | int = 0.0,
    seed: int | None = 0,
    size: int | None = None,
    steps: Any = None,
    guidance: Any = None,
    progress: Progress | None = None,
) -> Pictures:
    """Return pictures from their own (z, x_T): what is lost is lost by all edits.

    Args and Raises: see `invert` and `decode`.
    """
    asked.check_model(model, *NEEDS)
    model = asked.cut(model, size)
    sampling = by_ddim(model, Settings(steps=steps, guidance=guidance), eta)
    values.check_progress(progress)
    seed = values.check_seed(seed)
    found = find(model, read(model, image.as_list(pictures)), sampling)
    return draw(model, *found, sampling, seed, progress)


# What edits share: nothing here checks what a caller passes, but for pictures


def by_ddim(
    model: Model,
    settings: Settings,
    eta: Any = 0.0,
    prior: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Return how components are sampled: the decoder by DDIM, as inversion needs it.

    Args:
      settings: the caller's.
      prior: the component that makes embeddings of captions, if one runs.
    """
    eta = values.check_number("eta", eta, 0, 1)
    ddim = {"sampler": "ddim", "eta": eta, "steps": STEPS, "guidance": 1.0}
    ddim |= {"clip": None, "guidance_interval": None}
    return asked.resolve(model, settings, Groups.of(model, prior), {"decoder": ddim})


def read(model: Model, pictures: Sequence[Any]) -> Squares:
    """Return the squares of pictures; UserError if one is none, or there are none."""
    size, side = image_size(model), model.decoder.size
    if not pictures:
        raise UserError("no pictures: give at least one")
    rows = []
    for picture in map(image.read, pictures):  # one at a time, as they may be large
        rows.append((image.clip_input(picture, size), image.square(picture, side)))
    return Squares(*map(np.stack, zip(*rows, strict=True)))


def find(model: Model, squares: Squares, sampling: Sampling) -> Latent:
    """Return the pairs (z, x_T) of pictures."""
    z = encode_squares(model, squares.seen)
    empty = generate.tokenize(model, [""])
    inversion = decoder.SAMPLER._replace(advance=decoder.advance_inversion)

    def some(rows: np.ndarray) -> np.ndarray:
        x, z_image, tokens = jax.device_put(
            (
                image.to_float(squares.made[rows]),
                z[rows],
                empty.repeat(len(rows), axis=0),
            ),
            spread(model),
        )
        caption = encode_caption(model.clip, tokens)
        inputs = Inputs(caption=caption, null=caption, z_image=z_image, start=x)
        settings = [sampling["decoder"]] * len(rows)
        return np.asarray(part.sample(inversion, model.decoder, settings, inputs))

    return Latent(z, in_batches(some, len(z), model.devices.size, generate.BATCH))


def draw(
    model: Model,
    z: Float[np.ndarray, "n d"],
    x_T: Float[np.ndarray, "n h w 3"] | None,
    sampling: Sampling,
    seed: int,
    progress: Progress | None = None,
    numbers: np.ndarray | None = None,
) -> Pictures:
    """Return the pictures of pairs, from the same white noise where x_T is None.

    Args:
      numbers: of the pictures, from which the noise that they don't share follows; by
        default all are number 0, and share it.
    """
    if x_T is None:
        side = model.decoder.size
        x_T = jax.random.normal(generate.picture_keys(seed, 1)[0], (side, side, 3))
        x_T = np.broadcast_to(np.asarray(x_T), (len(z), *x_T.shape))
    numbers = np.zeros(len(z), int) if numbers is None else numbers
    request = request_of(model, z, sampling, seed)
    request = request._replace(start=x_T, numbers=numbers)
    return generate.cascade(model, request, progress)


def request_of(
    model: Model, z: Float[np.ndarray, "n d"], sampling: Sampling, seed: int
) -> Request:
    """Return the request for pictures of embeddings, without a caption."""
    empty = generate.tokenize(model, [""]).repeat(len(z), axis=0)
    return Request(
        tokens=empty,
        null=empty,
        seeds=np.full(len(z), seed),
        numbers=np.arange(len(z)),
        sampling=for_each(sampling, len(z)),
        z_image=z,
    )


def for_each(sampling: Sampling, count: int) -> dict[str, list[Mapping[str, Any]]]:
    """Return the settings of each of several pictures, which are the same."""
    return {name: [each] * count for name, each in sampling.items()}
