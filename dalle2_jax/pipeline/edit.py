"""What unCLIP does with a picture: sections 3 and 4 of arXiv 2204.06125.

Every picture is a pair (z, x_T), see `latent`. Whatever changes one and keeps the other
is an edit.

A picture is a PIL image, an array uint8 [h, w, 3] or the path of a file, of any size
(image.read tells what else); its middle square is what is edited. What makes pictures
takes the settings of `text_to_image` (``seed``, ``size``, ``steps``, ``guidance``,
``progress``) and returns uint8 [n, size, size, 3].
"""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Float

from dalle2_jax.data import image
from dalle2_jax.data.image import Picture
from dalle2_jax.errors import UserError, short
from dalle2_jax.nn import codes
from dalle2_jax.pipeline import generate, latent, values
from dalle2_jax.pipeline import settings as asked
from dalle2_jax.pipeline.encode import encode_squares, encode_text
from dalle2_jax.pipeline.generate import NEEDS, Progress, Request
from dalle2_jax.pipeline.latent import Pictures, Sampling
from dalle2_jax.pipeline.models import Model, in_batches
from dalle2_jax.pipeline.settings import Groups, Settings
from dalle2_jax.pipeline.sphere import mean_direction, slerp, unit

DRAWS = 4  # of the prior, for the mean of a caption's embeddings
MOST_WEIGHT = 1e6


def variations(
    model: Model,
    picture: Picture,
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
    """Return pictures that CLIP sees alike (section 3.1): of one z, without a caption.

    Args:
      num: how many.
      eta: from 0, which gives the picture back, to 1: the η of DDIM from the picture's
        own x_T, the paper's way. None starts from white noise and samples as the model
        does, as Karlo's pipeline.
      sampler, noise: as of `text_to_image`, where eta is None.

    Raises:
      UserError: not a picture, a CLIP without its image tower, or settings that the
        model cannot meet.
    """
    asked.check_model(model, *NEEDS)
    num = values.check_num(num)
    model = asked.cut(model, size)
    settings = Settings(size, steps, guidance, guidance_interval, sampler, noise)
    if eta is None:
        groups = Groups.of(model)
        sampling = asked.resolve(model, settings, groups)
        given = asked.given_noise(model, noise, num, groups, sampling)
    else:
        for name in ("noise", "sampler"):
            if getattr(settings, name) is not None:
                raise UserError(f"{name}= goes with white noise: leave out eta")
        sampling = latent.by_ddim(model, settings, eta)
    values.check_progress(progress)
    squares = latent.read(model, [image.as_one(picture)])
    seed = values.check_seed(seed)
    if eta is not None:
        found = latent.find(model, squares, sampling)
        z, x_T = (a.repeat(num, axis=0) for a in found)
        numbers = np.arange(num)
        return latent.draw(model, z, x_T, sampling, seed, progress, numbers)
    z = encode_squares(model, squares.seen).repeat(num, axis=0)
    request = latent.request_of(model, z, sampling, seed)._replace(given=given)
    return generate.cascade(model, request, progress)


def interpolate(
    model: Model,
    picture: Picture,
    other: Picture,
    *,
    frames: int = 8,
    weights: Sequence[float | int] | None = None,
    shared_noise: bool = False,
    eta: float | int = 0.0,
    seed: int | None = 0,
    size: int | None = None,
    steps: Any = None,
    guidance: Any = None,
    progress: Progress | None = None,
) -> Pictures:
    """Return a path between two pictures (section 3.2): `slerp` of z and of x_T.

    Args:
      frames: how many, both ends included.
      weights: of the other picture in each frame, 0 to 1, in place of even ones.
      shared_noise: one white x_T for all frames in place of the pictures' own. What is
        alike then stays in place, but the ends are not quite the two pictures.
      eta: as of `decode`.

    Raises:
      UserError: fewer than two frames, a weight out of range, or as `decode`.
    """
    asked.check_model(model, *NEEDS)
    if weights is None:
        weights = np.linspace(0, 1, values.check_frames(frames))
    weights = values.check_numbers("weights", weights, 0, 1)
    shared_noise = values.check_bool("shared_noise", shared_noise)
    model = asked.cut(model, size)
    settings = Settings(size, steps, guidance)
    sampling = latent.by_ddim(model, settings, eta)
    values.check_progress(progress)
    ends = [image.as_one(picture), image.as_one(other, "other")]
    squares = latent.read(model, ends)
    seed = values.check_seed(seed)
    if shared_noise:
        z, x_T = encode_squares(model, squares.seen), None
    else:
        z, x_T = latent.find(model, squares, sampling)
        x_T = slerp(x_T[0], x_T[1], weights)
    z = slerp(z[0], z[1], weights)
    return latent.draw(model, z, x_T, sampling, seed, progress)


def blend(
    model: Model,
    pictures: Picture | Sequence[Picture] = (),
    prompts: str | Sequence[str] = (),
    weights: Sequence[float | int] | None = None,
    *,
    num: int = 1,
    seed: int | None = 0,
    size: int | None = None,
    steps: Any = None,
    guidance: Any = None,
    guidance_interval: Any = None,
    sampler: Any = None,
    progress: Progress | None = None,
) -> Pictures:
    """Return pictures between several pictures and captions, by weight.

    z is the weighted mean of their directions, as long as their weighted mean length;
    that of a caption is the prior's. x_T is white noise.

    Args:
      weights: of the pictures, then of the prompts; positive; by default all alike.
      num: how many.

    Raises:
      UserError: nothing to blend, or weights that do not fit.
    """
    asked.check_model(model, *NEEDS)
    pictures = image.as_list(pictures)
    prompts = values.check_prompts(prompts, least=0)
    count = len(pictures) + len(prompts)
    if not count:
        raise UserError("nothing to blend: give pictures or prompts")
    num = values.check_num(num, max(1, len(prompts)))
    weights = np.ones(count) if weights is None else weights
    weights = values.check_numbers("weights", weights, 0, MOST_WEIGHT, above=True)
    if len(weights) != count:
        raise UserError(
            f"{len(weights)} weights: give {count} positive numbers, of the pictures "
            "and then the prompts"
        )
    model = asked.cut(model, size)
    settings = Settings(size, steps, guidance, guidance_interval, sampler)
    prior = _prior(model) if prompts else None
    sampling = asked.resolve(model, settings, Groups.of(model, prior))
    values.check_progress(progress)
    squares = latent.read(model, pictures) if pictures else None
    seed = values.check_seed(seed)
    parts = []
    if pictures:
        parts += [z[None] for z in encode_squares(model, squares.seen)]
    if prompts:
        drawn = _embed(model, prompts, num, seed, sampling)
        parts += list(drawn.reshape(len(prompts), num, -1))
    z = mean_direction(parts, weights / weights.sum())
    z = np.broadcast_to(z, (num, z.shape[-1]))
    request = latent.request_of(model, z, sampling, seed)
    return generate.cascade(model, request, progress)


def text_diff(
    model: Model,
    picture: Picture,
    prompt_from: str,
    prompt: str,
    *,
    direction: str | None = None,
    theta: float | int | Sequence[float | int] | None = None,
    frames: int = 5,
    eta: float | int = 0.0,
    seed: int | None = 0,
    size: int | None = None,
    steps: Any = None,
    guidance: Any = None,
    progress: Progress | None = None,
) -> Pictures:
    """Return a picture on its way from one caption to another (section 3.3).

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
      eta: as of `decode`.

    Raises:
      UserError: a θ out of range, an empty caption, two that are the same to CLIP, or
        as `decode`.
    """
    asked.check_model(model, *NEEDS)
    captions = [
        values.check_prompt(prompt_from, "prompt_from"),
        values.check_prompt(prompt),
    ]
    if direction is None:
        direction = "text" if model.prior is None else "prior"
    direction = values.check_choice("direction", direction, ("text", "prior"))
    theta = values.scalar(theta)
    if theta is None:
        theta = 1.0 if direction == "prior" else 0.5
    if isinstance(theta, Real):
        last = values.check_number("theta", theta, 0, 1)
        theta = np.linspace(0, last, values.check_frames(frames))
    theta = values.check_numbers("theta", theta, 0, 1)
    model = asked.cut(model, size)
    prior = _prior(model) if direction == "prior" else None
    settings = Settings(size, steps, guidance)
    sampling = latent.by_ddim(model, settings, eta, prior)
    values.check_progress(progress)
    squares = latent.read(model, [image.as_one(picture)])
    seed = values.check_seed(seed)
    before, after = unit(encode_text(model, captions))
    if np.allclose(before, after):
        told = " and ".join(map(short, captions))
        raise UserError(f"{told} are the same to CLIP")
    start = latent.find(model, squares, sampling)
    z = start.z[0]
    if direction == "text":
        path = slerp(z, unit(after - before) * np.linalg.norm(z), theta)
    else:
        drawn = _embed(model, captions, DRAWS, seed, sampling)
        ends = drawn.reshape(2, DRAWS, -1).mean(1)
        path = (z + theta[:, None] * (ends[1] - ends[0])).astype(np.float32)
    x_T = np.broadcast_to(start.x_T, (len(path), *start.x_T.shape[1:]))
    return latent.draw(model, path, x_T, sampling, seed, progress)


def pca(
    model: Model,
    picture: Picture,
    *,
    components: Sequence[int] | None = None,
    eta: float | int = 0.0,
    seed: int | None = 0,
    size: int | None = None,
    steps: Any = None,
    guidance: Any = None,
    progress: Progress | None = None,
) -> Pictures:
    """Return a picture from ever more of its embedding (section 4, figure 7).

    Each frame is decoded from z less all but its first principal components, those of
    the training set's embeddings, and from the same white noise.

    Args:
      components: how many each frame has; by default powers of two, and all that the
        model knows.
      eta: as of `decode`.

    Raises:
      UserError: a model without components, more of them than it knows, or as `decode`.
    """
    asked.check_model(model, *NEEDS)
    if model.codes is None:
        raise UserError(
            f"the model {model.path} has no principal components: they come with an "
            "autoregressive prior (configs/ar_prior.py)"
        )
    most = model.codes.axes.shape[1]
    if components is None:
        components = [*(2**k for k in range((most - 1).bit_length())), most]
    components = values.check_integers("components", components, 0, most)
    model = asked.cut(model, size)
    settings = Settings(size, steps, guidance)
    sampling = latent.by_ddim(model, settings, eta)
    values.check_progress(progress)
    squares = latent.read(model, [image.as_one(picture)])
    seed = values.check_seed(seed)
    z = encode_squares(model, squares.seen)
    z = np.concatenate([codes.project(model.codes, z, k) for k in components])
    return latent.draw(model, z, None, sampling, seed, progress)


def embed(
    model: Model,
    prompts: str | Sequence[str],
    *,
    num: int = 1,
    seed: int | None = 0,
    steps: Any = None,
    guidance: Any = None,
    guidance_interval: Any = None,
    sampler: Any = None,
) -> Float[np.ndarray, "n d"]:
    """Return CLIP image embeddings of captions, the prior's, ``num`` of each.

    Args:
      steps, guidance, guidance_interval, sampler: of the prior; see `text_to_image`.

    Raises:
      UserError: an empty prompt, a model without a prior, or settings that it cannot
        meet.
    """
    asked.check_model(model, "tokenizer", "clip")
    prompts = values.check_prompts(prompts)
    num = values.check_num(num, len(prompts))
    settings = Settings(None, steps, guidance, guidance_interval, sampler)
    groups = Groups((_prior(model),), decoder=())
    sampling = asked.resolve(model, settings, groups)
    return _embed(model, prompts, num, values.check_seed(seed), sampling)


def _prior(model: Model) -> str:
    """The component that makes embeddings of captions."""
    return asked.PRIOR_COMPONENTS[asked.which_prior(model)]


def _embed(
    model: Model, prompts: Sequence[str], num: int, seed: int, sampling: Sampling
) -> Float[np.ndarray, "n d"]:
    """Embeddings of captions, ``num`` of each."""
    tokens = generate.tokenize(model, prompts).repeat(num, axis=0)
    count = len(tokens)
    request = Request(
        tokens=tokens,
        null=generate.tokenize(model, [""]).repeat(count, axis=0),
        seeds=np.full(count, seed),
        numbers=np.arange(count),
        sampling=latent.for_each(sampling, count),
        prior=asked.which_prior(model),
    )

    def some(rows: np.ndarray) -> np.ndarray:
        first = next(generate.run_batch(model, request, rows))  # the prior's
        return np.asarray(first.x)

    return in_batches(some, count, model.devices.size, generate.BATCH)
