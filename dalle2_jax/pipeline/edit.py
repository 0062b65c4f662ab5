"""What unCLIP does with a picture: sections 3 and 4 of arXiv 2204.06125.

Every picture is a pair (z, x_T): its CLIP embedding, and the noise from which DDIM
decodes it given that embedding. Whatever changes one and keeps the other is an edit.

A picture is a PIL image, an array uint8 [h, w, 3] or the path of a file, of any size;
its middle square is what is edited. What makes pictures takes the settings of
`text_to_image` (``seed``, ``size``, ``steps``, ``guidance``, ``progress``) and returns
uint8 [n, size, size, 3]. Where a picture's own x_T is used, the decoder takes `STEPS`
steps of DDIM at guidance 1 unless told otherwise: inversion must go the way that
decoding comes, and goes it exactly only without guidance.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from dalle2_jax.data import image
from dalle2_jax.errors import UserError
from dalle2_jax.nn import codes
from dalle2_jax.parts import decoder, part
from dalle2_jax.parts.component import Inputs
from dalle2_jax.pipeline import generate
from dalle2_jax.pipeline import settings as asked
from dalle2_jax.pipeline.encode import (
    as_list,
    as_one,
    encode_caption,
    encode_image,
    encode_text,
    spread,
)
from dalle2_jax.pipeline.generate import Progress, Request
from dalle2_jax.pipeline.models import Model, in_batches, require
from dalle2_jax.pipeline.settings import Groups, Settings
from dalle2_jax.pipeline.sphere import mean_direction, slerp, unit

STEPS = 100  # of DDIM, there and back
DRAWS = 4  # of the prior, for the mean of a caption's embeddings

Pictures = UInt8[np.ndarray, "frames side side 3"]


class Latent(NamedTuple):
    """What `invert` makes of n pictures."""

    z: Float[np.ndarray, "n d"]
    x_T: Float[np.ndarray, "n h w 3"]


def invert(
    model: Model,
    pictures: Any,
    *,
    steps: Any = None,
    guidance: Any = None,
) -> Latent:
    """The pairs (z, x_T) of pictures: DDIM inversion, given z and no caption.

    Args:
      pictures: one or a sequence of them.
      steps, guidance: of the decoder; `decode` must be given the same.

    Raises:
      UserError: not a picture, or a CLIP without its image tower.
    """
    require(model, "tokenizer", "clip", "decoder")
    model = model.up_to(model.decoder.size)
    sampling = _deterministic(model, Settings(steps=steps, guidance=guidance))
    pictures = as_list(pictures)
    z = encode_image(model, pictures)
    squares = np.stack([image.square(p, model.decoder.size) for p in pictures])
    empty = generate.tokenize(model, [""])
    inversion = decoder.SAMPLER._replace(advance=decoder.advance_inversion)

    def some(rows: np.ndarray) -> np.ndarray:
        x, z_image, tokens = jax.device_put(
            (
                image.to_float(squares[rows]),
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
    """Pictures of CLIP image embeddings and noise, by DDIM without a caption.

    Args:
      z: not normalised, as `encode_image` gives them.
      x_T: the decoder's; by default the same white noise for all.
      eta: DDIM's η, from 0 (no noise but x_T) to 1.
      seed: of what noise is drawn, the same for all pictures.

    Raises:
      UserError: an η out of range, or arrays that do not fit the model.
    """
    require(model, "tokenizer", "clip", "decoder")
    settings = Settings(size, steps, guidance)
    seed, numbers = asked.check_seed(seed), np.zeros(len(z), int)
    if x_T is None:
        side = model.decoder.size
        x_T = jax.random.normal(generate.picture_keys(seed, 1)[0], (side, side, 3))
        x_T = np.broadcast_to(np.asarray(x_T), (len(z), *x_T.shape))
    return _decode(model, settings, z, x_T, eta, seed, numbers, progress)


def reconstruct(model: Model, pictures: Any, **settings: Any) -> Pictures:
    """Pictures from their own (z, x_T): what is lost is lost by all edits."""
    return decode(
        model, *invert(model, pictures, **_only(settings, "decoder")), **settings
    )


def variations(
    model: Model,
    picture: Any,
    *,
    seed: int | None = 0,
    num: int = 1,
    eta: float | int | None = None,
    size: int | None = None,
    steps: Any = None,
    guidance: Any = None,
    guidance_interval: Any = None,
    sampler: Any = None,
    noise: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Pictures:
    """Pictures that CLIP sees alike (section 3.1): of one z, without a caption.

    Args:
      num: how many.
      eta: from 0, which gives the picture back, to 1: the η of DDIM from the picture's
        own x_T, the paper's way. None starts from white noise and samples as the model
        does, as Karlo's pipeline.
      noise: as of `text_to_image`, where eta is None.

    Raises:
      UserError: not a picture, a CLIP without its image tower, or settings that the
        model cannot meet.
    """
    require(model, "tokenizer", "clip", "decoder")
    num = asked.check_num(num)
    settings = Settings(size, steps, guidance, guidance_interval, sampler, noise)
    seed = asked.check_seed(seed)
    if eta is not None:
        for name in ("noise", "sampler"):
            if getattr(settings, name):
                raise UserError(f"{name}= goes with white noise: leave out eta")
        found = invert(model, as_one(picture), **_only(settings._asdict(), "decoder"))
        z, x_T = (a.repeat(num, axis=0) for a in found)
        return _decode(model, settings, z, x_T, eta, seed, np.arange(num), progress)
    z = encode_image(model, as_one(picture)).repeat(num, axis=0)
    return generate.cascade(*_request(model, settings, z, seed), progress)


def interpolate(
    model: Model,
    picture: Any,
    other: Any,
    *,
    frames: int = 8,
    weights: Sequence[float | int] | None = None,
    shared_noise: bool = False,
    seed: int | None = 0,
    **settings: Any,
) -> Pictures:
    """A path from a picture to another (section 3.2): `slerp` of z and of x_T.

    Args:
      frames: how many, both ends included.
      weights: of the other picture in each frame, 0 to 1, in place of even ones.
      shared_noise: one white x_T for all frames in place of the pictures' own. What is
        alike then stays in place, but the ends are not quite the two pictures.

    Raises:
      UserError: fewer than two frames, a weight out of range, or as `decode`.
    """
    if weights is None:
        weights = np.linspace(0, 1, _check_frames(frames))
    weights = asked.check_fractions("weights", weights)
    if shared_noise:
        ends = Latent(encode_image(model, as_one(picture) + as_one(other)), None)
    else:
        ends = invert(
            model, as_one(picture) + as_one(other), **_only(settings, "decoder")
        )
    path = [None if a is None else slerp(a[0], a[1], weights) for a in ends]
    return decode(model, *path, seed=seed, **settings)


def blend(
    model: Model,
    pictures: Any = (),
    prompts: str | Sequence[str] = (),
    weights: Sequence[float | int] | None = None,
    *,
    num: int = 1,
    seed: int | None = 0,
    size: int | None = None,
    steps: Any = None,
    guidance: Any = None,
    progress: Progress | None = None,
) -> Pictures:
    """Pictures between several pictures and captions, by weight.

    z is the weighted mean of their directions, as long as their weighted mean length;
    that of a caption is the prior's. x_T is white noise.

    Args:
      weights: of the pictures, then of the prompts; positive; by default all alike.
      num: how many.

    Raises:
      UserError: nothing to blend, or weights that do not fit.
    """
    num, seed = asked.check_num(num), asked.check_seed(seed)
    pictures = as_list(pictures)
    prompts = asked.check_prompts(prompts) if len(prompts) else []
    count = len(pictures) + len(prompts)
    if not count:
        raise UserError("nothing to blend: give pictures or prompts")
    weights = np.ones(count) if weights is None else np.asarray(weights, float)
    if weights.shape != (count,) or not (np.isfinite(weights) & (weights > 0)).all():
        raise UserError(
            f"weights are {weights.tolist()}: give {count} positive numbers, of the "
            "pictures and then the prompts"
        )
    parts = [z[None] for z in encode_image(model, pictures)] if pictures else []
    if prompts:
        drawn = embed(
            model, prompts, num=num, seed=seed, steps=steps, guidance=guidance
        )
        parts += list(drawn.reshape(len(prompts), num, -1))
    z = mean_direction(parts, weights / weights.sum())
    z = np.broadcast_to(z, (num, z.shape[-1]))
    groups = Groups.of(model, "prior" if prompts else None)
    settings = Settings(size, steps, guidance)
    return generate.cascade(*_request(model, settings, z, seed, groups), progress)


def text_diff(
    model: Model,
    picture: Any,
    prompt_from: str,
    prompt: str,
    *,
    direction: str | None = None,
    theta: float | int | Sequence[float | int] | None = None,
    frames: int = 5,
    seed: int | None = 0,
    **settings: Any,
) -> Pictures:
    """A picture on its way from what one caption says to another (section 3.3).

    All frames are decoded from the picture's own x_T. Their z leads away from its own
    by the difference of the captions:
        "text"   slerp(z, z_d, θ), with z_d the direction from one caption's CLIP
                 embedding to the other's: the paper's, with θ up to 0.25 to 0.5.
        "prior"  z + θ (z_to - z_from), with the means of what the prior draws for each
                 caption, which are differences of pictures and so keep more of it.

    Args:
      prompt_from: what the picture shows.
      prompt: what it shall show.
      direction: by default "prior" if the model has a diffusion prior.
      theta: the last θ, which the frames approach from 0 in even steps, by default 1 by
        the prior and 0.5 by the text; or the θ of each frame. 0 to 1.

    Raises:
      UserError: a θ out of range, an empty caption, two that are the same to CLIP, or
        as `decode`.
    """
    if direction is None:
        direction = "text" if model.prior is None else "prior"
    if direction not in ("text", "prior"):
        raise UserError(f'direction={direction!r}: must be "text" or "prior"')
    if theta is None:
        theta = 1.0 if direction == "prior" else 0.5
    if np.ndim(theta) == 0:
        theta = np.linspace(
            0, asked.check_fractions("theta", [theta])[0], _check_frames(frames)
        )
    theta = asked.check_fractions("theta", theta)
    captions = asked.check_prompts([prompt_from, prompt])
    before, after = unit(encode_text(model, captions))
    if np.allclose(before, after):
        raise UserError(f"{prompt_from!r} and {prompt!r} are the same to CLIP")
    start = invert(model, as_one(picture), **_only(settings, "decoder"))
    z = start.z[0]
    if direction == "text":
        path = slerp(z, unit(after - before) * np.linalg.norm(z), theta)
    else:
        drawn = embed(model, captions, num=DRAWS, seed=seed, **_only(settings, "prior"))
        ends = drawn.reshape(2, DRAWS, -1).mean(1)
        path = (z + theta[:, None] * (ends[1] - ends[0])).astype(np.float32)
    x_T = np.broadcast_to(start.x_T, (len(path), *start.x_T.shape[1:]))
    settings |= _only(settings, "decoder", "upsampler")
    return decode(model, path, x_T, seed=seed, **settings)


def pca(
    model: Model,
    picture: Any,
    *,
    components: Sequence[int] | None = None,
    seed: int | None = 0,
    **settings: Any,
) -> Pictures:
    """A picture from ever more of its embedding (section 4, figure 7).

    Each frame is decoded from z less all but its first principal components, those of
    the training set's embeddings, and from the same white noise.

    Args:
      components: how many each frame has; by default powers of two, and all that the
        model knows.

    Raises:
      UserError: a model without components, more of them than it knows, or as `decode`.
    """
    if model.codes is None:
        raise UserError(
            f"the model {model.path} has no principal components: they come with an "
            "autoregressive prior (configs/ar_prior.py)"
        )
    most = model.codes.axes.shape[1]
    if components is None:
        components = [*(2**k for k in range((most - 1).bit_length())), most]
    components = list(components)
    if not components or not all(0 <= k <= most for k in components):
        raise UserError(f"components is {components}: must be from 0 to {most}")
    z = encode_image(model, as_one(picture))
    views = [codes.project(model.codes, z, k) for k in components]
    return decode(model, np.concatenate(views), seed=seed, **settings)


def embed(
    model: Model,
    prompts: str | Sequence[str],
    *,
    num: int = 1,
    seed: int | None = 0,
    steps: Any = None,
    guidance: Any = None,
) -> Float[np.ndarray, "n d"]:
    """CLIP image embeddings of captions, the prior's, ``num`` of each."""
    settings = Settings(steps=steps, guidance=guidance)
    model, request = generate.make_request(model, prompts, seed, num, settings)

    def some(rows: np.ndarray) -> np.ndarray:
        return np.asarray(
            next(generate.run_batch(model, request, rows)).x
        )  # the prior's

    return in_batches(some, len(request.tokens), model.devices.size, generate.BATCH)


# What the edits share


def _deterministic(
    model: Model, settings: Settings, eta: float | int = 0.0
) -> dict[str, dict[str, Any]]:
    """How the components are sampled: the decoder by DDIM, as inversion needs it."""
    ddim = {"sampler": "ddim", "eta": eta, "steps": STEPS, "guidance": 1.0}
    ddim |= {"clip": None, "guidance_interval": None}
    return asked.resolve(model, settings, Groups.of(model), {"decoder": ddim})


def _decode(
    model: Model,
    settings: Settings,
    z: np.ndarray,
    x_T: np.ndarray,
    eta: float | int,
    seed: int,
    numbers: np.ndarray,
    progress: Progress | None,
) -> Pictures:
    z, x_T = np.asarray(z, np.float32), np.asarray(x_T, np.float32)
    side = model.decoder.size
    dim = model.decoder.network.clip_dim
    if z.ndim != 2 or z.shape[1] != dim or not len(z):
        raise UserError(f"z has shape {list(z.shape)}: must be [n, {dim}]")
    if x_T.shape != (len(z), side, side, 3):
        raise UserError(
            f"x_T has shape {list(x_T.shape)}: must be {[len(z), side, side, 3]}"
        )
    eta = float(asked.check_fractions("eta", [eta])[0])
    model = asked.cut(model, settings.size)
    sampling = _deterministic(model, settings, eta)
    model, request = _request(model, Settings(), z, seed)
    sampling = _for_each(sampling, len(z))
    request = request._replace(start=x_T, numbers=numbers, sampling=sampling)
    return generate.cascade(model, request, progress)


def _request(
    model: Model,
    settings: Settings,
    z: np.ndarray,
    seed: int,
    groups: Groups | None = None,
) -> tuple[Model, Request]:
    """What of the model runs, and the request of embeddings without a caption.

    ``groups`` are what the settings may be for; by default what runs.
    """
    model = asked.cut(model, settings.size)
    groups = Groups.of(model) if groups is None else groups
    groups = groups._replace(upsampler=Groups.of(model).upsampler)
    sampling = asked.resolve(model, settings, groups)
    given = asked.given_noise(model, settings.noise, len(z), groups, sampling)
    empty = generate.tokenize(model, [""]).repeat(len(z), axis=0)
    return model, Request(
        tokens=empty,
        null=empty,
        seeds=np.full(len(z), seed),
        numbers=np.arange(len(z)),
        sampling=_for_each(sampling, len(z)),
        z_image=z,
        given=given,
    )


def _for_each(sampling: dict[str, Any], count: int) -> dict[str, list[Any]]:
    return {name: [each] * count for name, each in sampling.items()}


def _check_frames(frames: Any) -> int:
    """Returns a number of frames; UserError if they are no path."""
    if isinstance(frames, int) and frames < 2:
        raise UserError(f"frames={frames}: a path has at least 2, its ends")
    return asked.check_integer("frames", frames, 2, asked.MOST_PICTURES)


def _only(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Of the steps and the guidance, those of some networks."""
    found = {}
    for name in ("steps", "guidance"):
        value = settings.get(name)
        if isinstance(value, Mapping):
            value = {k: v for k, v in value.items() if k in names}
        found[name] = value
    return found
