"""Text to image: a prior, a decoder, and a cascade of upsamplers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, UInt8, UInt32

from dalle2_jax.data import image
from dalle2_jax.diffusion.settings import MOST_STEPS
from dalle2_jax.parts import part, part_of
from dalle2_jax.parts.component import Component, Inputs
from dalle2_jax.pipeline import settings as asked
from dalle2_jax.pipeline import values
from dalle2_jax.pipeline.encode import (
    clip_score,
    encode_caption,
    image_size,
    spread,
)
from dalle2_jax.pipeline.limits import MOST_PICTURES
from dalle2_jax.pipeline.models import Model, batches
from dalle2_jax.pipeline.settings import PRIOR_COMPONENTS, Groups, Settings

NEEDS = ("tokenizer", "clip", "decoder")
BATCH = 16  # the most pictures at once on a device

# Called as progress(stage, pictures done, pictures in all). If it has a method
# `finished`, that is given the pictures of each batch as soon as they are made.
Progress = Callable[[str, int, int], None]


def text_to_image(
    model: Model,
    prompts: str | Sequence[str],
    *,
    seed: int | None = 0,
    num: int = 1,
    size: int | None = None,
    prior: str | None = None,
    steps: Any = None,
    guidance: Any = None,
    guidance_interval: Any = None,
    sampler: Any = None,
    noise: Mapping[str, Any] | None = None,
    negative_prompt: str | Sequence[str] | None = "",
    best_of: int | None = None,
    progress: Progress | None = None,
) -> UInt8[np.ndarray, "n h w 3"]:
    """Pictures of captions (section 2 of arXiv 2204.06125).

    Args:
      model: from `load`.
      prompts: one caption or several; one that is too long is cut, with a warning.
      seed: picture k of a seed has the same noise in any batch and on any devices.
        None draws a seed, and prints it on stderr.
      num: pictures of each prompt.
      size: their side in pixels, one of ``model.sizes``; by default the largest.
      prior: what the decoder is given as the image's embedding: that of the "diffusion"
        or the "autoregressive" prior, by default of the first that the model has; or
        "none", CLIP's embedding of the caption as if it were a picture's; or "caption",
        nothing, so that it has only the caption (section 5.1).
      steps: sampling steps of the networks that shall not have the model's own: one
        number for all, or {"prior": 25, "decoder": 50, "upsampler": 8}; (8, 4) has an
        entry for each upsampler used. Each is a number or what else schedule.respace
        takes.
      guidance: scales of classifier-free guidance, one number for all networks that
        have it, or {"prior": 2.0, "decoder": 4.0}; 1 is none. Upsamplers have no
        guidance. That of the prior is for either of them; the autoregressive one has no
        steps and no noise.
      guidance_interval: the least and the largest timestep with guidance (arXiv
        2404.07724), as (100, 700) or {"decoder": (100, 700)}. The steps outside of it
        take half the time.
      sampler: "ddpm", "ddim", "dpm_solver" or "unipc", for all networks or by network.
      noise: noise that was drawn elsewhere, for the networks that shall not draw their
        own from the seed: {"prior": [steps, n, d], "decoder": [steps, n, h, w, 3],
        "upsampler": ([steps, n, h, w, 3],)}, n pictures in all. Entry 0 is x_T, entry k
        the noise that is added after step k; the last step adds none.
      negative_prompt: what guidance leads away from, in place of the empty caption: one
        text for all prompts, or a list with one for each.
      best_of: how many pictures to make of each prompt; the ``num`` of them that CLIP
        finds most like it (`clip_score`) are returned, the best first.
      progress: called as progress(stage, pictures done, pictures in all). If it has a
        method, progress.finished(pictures), it is called with each batch of pictures to
        return as soon as they are made.

    Returns:
      [len(prompts) · num, size, size, 3]; the pictures of a prompt stand together.

    Raises:
      UserError: an empty prompt, or settings that the model cannot meet.
    """
    asked.check_model(model, *NEEDS)
    prompts = values.check_prompts(prompts)
    made = num = values.check_num(num, len(prompts))
    if best_of is not None:
        image_size(model)  # by which CLIP compares them
        most = max(num, MOST_PICTURES // len(prompts))
        made = values.check_integer("best_of", best_of, num, most)
    values.check_progress(progress)
    settings = Settings(size, steps, guidance, guidance_interval, sampler, noise)
    model, request = make_request(
        model, prompts, seed, made, settings, negative_prompt, prior
    )
    if best_of is None:
        return cascade(model, request, progress)
    best = _Best(model, prompts, made, num, progress)
    cascade(model, request, best)
    return np.concatenate(best.pictures)


class _Best:
    """A progress that keeps the best of each prompt, once all of a prompt are made."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str],
        made: int,
        num: int,
        progress: Progress | None,
    ):
        self.pictures = []
        self._model, self._made, self._num = model, made, num
        self._prompts, self._progress, self._waiting = iter(prompts), progress, []

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(stage, done, total)

    def finished(self, pictures: UInt8[np.ndarray, "b h w 3"]) -> None:
        self._waiting += list(pictures)
        while len(self._waiting) >= self._made:
            candidates = np.stack(self._waiting[: self._made])
            del self._waiting[: self._made]
            prompt = next(self._prompts)
            scores = clip_score(self._model, candidates, [prompt] * self._made)
            best = candidates[np.argsort(-scores, kind="stable")[: self._num]]
            self.pictures.append(best)
            _hand_over(self._progress, best)


def stream(
    model: Model,
    prompts: str | Sequence[str],
    *,
    seed: int | None = 0,
    num: int = 1,
    size: int | None = None,
    prior: str | None = None,
    steps: Any = None,
    guidance: Any = None,
    guidance_interval: Any = None,
    sampler: Any = None,
    negative_prompt: str | Sequence[str] | None = "",
    every: int | None = None,
) -> Iterator[tuple[str, UInt8[np.ndarray, "b h w 3"]]]:
    """`text_to_image` as a generator of what each network has made, for previews.

    Args:
      every: how many steps there are between two views of a network's pictures while
        they are made; None leaves them out.

    Yields:
      ("decoder", small pictures), then ("upsampler S", pictures of side S), from the
      smallest to the largest; of each batch in turn, if there are several.
    """
    if every is not None:
        every = values.check_integer("every", every, 1, MOST_STEPS)
    settings = Settings(size, steps, guidance, guidance_interval, sampler)
    model, request = make_request(
        model, prompts, seed, num, settings, negative_prompt, prior
    )
    return _views(model, request, every)


class Request(NamedTuple):
    """What the cascade shall make: n pictures.

    Attributes:
      tokens: of their captions.
      null: of the captions that guidance leads away from.
      seeds, numbers: what their noise follows from.
      sampling: how each component that runs is sampled, by name: a mapping for each
        picture.
      z_image: their image embeddings; None leaves them to the prior.
      prior: which one, as of `text_to_image`.
      given: noise that components shall not draw from the keys, by name.
      start: the decoder's x_T; None draws it.
      known: a picture in [-1, 1] of the largest side and a mask, 1 where it is to be
        painted and 0 where it is to stay.
    """

    tokens: Int[np.ndarray, "n l"]
    null: Int[np.ndarray, "n l"]
    seeds: Int[np.ndarray, " n"]
    numbers: Int[np.ndarray, " n"]
    sampling: Mapping[str, Sequence[Mapping[str, Any]]]
    z_image: Float[np.ndarray, "n d"] | None = None
    prior: str | None = None
    given: Mapping[str, Float[np.ndarray, "steps n ..."]] = {}
    start: Float[np.ndarray, "n h w 3"] | None = None
    known: tuple[Float[np.ndarray, "1 s s 3"], Float[np.ndarray, "1 s s 1"]] | None = (
        None
    )


class Made(NamedTuple):
    """What a component has made of a batch, or is making.

    Attributes:
      stage: "prior", "decoder" or "upsampler S".
      rows: numbers of the pictures. Where they are fewer than the batch, the last is
        there several times.
      x: embeddings, or pictures in [-1, 1].
      pictures: whether they are pictures.
      step, steps: steps taken, and steps in all.
    """

    stage: str
    rows: Int[np.ndarray, " b"]
    x: Array
    pictures: bool
    step: int
    steps: int


def make_request(
    model: Any,
    prompts: Any,
    seed: Any,
    num: Any,
    settings: Settings,
    negative_prompt: Any = "",
    prior: Any = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Model, Request]:
    """What of the model runs, and the request for ``num`` pictures of each prompt.

    All is checked. ``changes`` are as of settings.resolve.
    """
    asked.check_model(model, *NEEDS)
    prior = asked.which_prior(model, prior)
    prompts = values.check_prompts(prompts)
    negative = values.check_negative(negative_prompt, len(prompts))
    num = values.check_num(num, len(prompts))
    model = asked.cut(model, settings.size)
    groups = Groups.of(model, PRIOR_COMPONENTS.get(prior))
    sampling = asked.resolve(model, settings, groups, changes)
    count = num * len(prompts)
    given = asked.given_noise(model, settings.noise, count, groups, sampling)
    seed = values.check_seed(seed)
    tokens = tokenize(model, prompts).repeat(num, axis=0)
    return model, Request(
        tokens=tokens,
        null=tokenize(model, negative).repeat(num, axis=0),
        seeds=np.full(count, seed),
        numbers=np.arange(count),
        sampling={name: [each] * count for name, each in sampling.items()},
        prior=prior,
        given=given,
    )


def tokenize(model: Model, texts: Sequence[str]) -> Int[np.ndarray, "n l"]:
    """The captions' tokens, cut or padded to the length that the model's CLIP reads."""
    return model.tokenizer.encode(list(texts), model.clip.network.context_length)


def cascade(
    model: Model, request: Request, progress: Progress | None = None
) -> UInt8[np.ndarray, "n h w 3"]:
    """The pictures that `run` ends with, in order; what is known stays to the bit."""
    count = len(request.tokens)
    pictures = []
    for made in run(model, request):
        if progress is not None:
            progress(made.stage, int(made.rows[-1]) + 1, count)
        if made.pictures and made.x.shape[1] == model.sizes[-1]:
            batch = np.asarray(image.to_uint8(made.x))[: len(np.unique(made.rows))]
            if request.known is not None:
                picture, mask = request.known
                batch = np.where(mask > 0, batch, image.to_uint8(picture))
            pictures.append(batch)
            _hand_over(progress, batch)
    return np.concatenate(pictures)


def _hand_over(
    progress: Progress | None, pictures: UInt8[np.ndarray, "b h w 3"]
) -> None:
    if hasattr(progress, "finished"):
        progress.finished(pictures)


def _views(
    model: Model, request: Request, every: int | None
) -> Iterator[tuple[str, UInt8[np.ndarray, "b h w 3"]]]:
    """What `stream` yields; apart, so that a call is checked before it is iterated."""
    for made in run(model, request, every):
        if made.pictures:
            count = len(np.unique(made.rows))
            yield made.stage, np.asarray(image.to_uint8(made.x))[:count]


def run(model: Model, request: Request, every: int | None = None) -> Iterator[Made]:
    """Yields what each component makes, a batch after the other.

    Args:
      every: how many steps there are between two views of what is being made; None
        shows the results only.
    """
    for rows in batches(len(request.tokens), model.devices.size, BATCH):
        yield from run_batch(model, request, rows, every)


def run_batch(
    model: Model,
    request: Request,
    rows: Int[np.ndarray, " b"],
    every: int | None = None,
) -> Iterator[Made]:
    """What `run` yields of one batch; who asks for no more leaves the rest undone."""

    def place(x: Any) -> Array:
        return jax.device_put(x, spread(model))

    def randomness(name: str) -> Array:
        """What a component's noise follows from: keys, or noise drawn elsewhere."""
        if name not in request.given:
            return keys
        # The pictures go first, where they are split over the devices.
        return place(np.moveaxis(request.given[name][:, rows], 1, 0))

    def sample(name: str, component: Component, inputs: Inputs) -> Iterator[Made]:
        """Views of what a component makes, and at last what it made."""
        own = part_of(name)
        settings = [request.sampling[name][k] for k in rows[: len(inputs.randomness)]]
        sampling = own.sampler.make_sampling(component, settings)
        stage = "prior" if own.makes == "embedding" else name.replace("_", " ")
        for step, steps, x in part.run(own.sampler, component, sampling, inputs, every):
            if step < steps:
                x = getattr(x, "x0", None)
            if x is not None:
                # Waited for, so that no two networks are on the devices if they are
                # offloaded.
                x = x.block_until_ready()
                yield Made(stage, rows, x, own.makes == "picture", step, steps)

    keys = place(make_keys(request.seeds[rows], request.numbers[rows]))
    caption = encode_caption(model.clip, place(request.tokens[rows]))
    null = encode_caption(model.clip, place(request.null[rows]))
    inputs = Inputs(caption=caption, null=null)
    if request.z_image is not None:
        z = place(request.z_image[rows])
    elif request.prior == "none":
        z = caption.z_text
    elif request.prior == "caption":
        z = None
    else:
        name = PRIOR_COMPONENTS[request.prior]
        statistics = part_of(name).read_statistics(
            model.statistics, request.sampling[name][0]
        )
        own = inputs.replace(randomness=randomness(name), **statistics)
        for made in sample(name, model.components[name], own):
            yield made
        z = made.x
    start = None if request.start is None else place(request.start[rows])
    inputs = inputs.replace(z_image=z, start=start)
    count = len(np.unique(rows))
    for name in model.cascade:
        component = in_strips(model.components[name], model.devices, count)
        given = inputs.replace(
            randomness=randomness(name), known=_known(request, component.size)
        )
        if component.strips is not None:  # without those that fill the devices
            given = given.replace(
                low=given.low[:count], randomness=given.randomness[:count]
            )
        for made in sample(name, component, given):
            yield made
        inputs = inputs.replace(low=made.x, start=None)


def in_strips(component: Component, devices: Mesh, count: int) -> Component:
    """An upsampler that splits each picture over the devices, if there are fewer.

    XLA exchanges the strips' borders and their sums for the norms, so that a picture is
    the same. Not with tiles, nor where the deepest level's rows don't divide.
    """
    if component.low_size is None or component.tile is not None:
        return component
    divides = component.size % (component.network.unit * devices.size) == 0
    if count < devices.size and divides:
        rows = PartitionSpec(None, *devices.axis_names)
        component = component.replace(strips=NamedSharding(devices, rows))
    return component


def _known(request: Request, size: int) -> tuple[Array, Array] | None:
    """What is to stay, at a smaller size: pixels of which no part is to be painted."""
    if request.known is None:
        return None
    picture, mask = map(jnp.asarray, request.known)
    if picture.shape[1] == size:
        return picture, mask
    covered = image.resize(mask, size, "area")
    return image.resize(picture, size), (covered > 1e-6).astype(jnp.float32)


def picture_keys(seed: int, count: int) -> Key[Array, " count"]:
    """A key for each picture of a seed, which depends on its number only."""
    return make_keys(np.full(count, seed), np.arange(count))


def make_keys(
    seeds: Int[np.ndarray, " b"], numbers: Int[np.ndarray, " b"]
) -> Key[Array, " b"]:
    """A key for each picture, of its seed and its number."""
    return _make_keys(np.uint32(seeds), np.uint32(numbers))


@jax.jit
def _make_keys(seeds: UInt32[Array, " b"], numbers: UInt32[Array, " b"]) -> Array:
    return jax.vmap(lambda s, k: jax.random.fold_in(jax.random.key(s), k))(
        seeds, numbers
    )
