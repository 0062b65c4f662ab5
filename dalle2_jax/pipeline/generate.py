"""Text to image: a prior, a decoder, and a cascade of upsamplers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, UInt8

from dalle2_jax.data import image
from dalle2_jax.diffusion import schedule
from dalle2_jax.errors import UserError
from dalle2_jax.pipeline import loops
from dalle2_jax.pipeline.encode import clip_score, encode_caption, spread
from dalle2_jax.pipeline.models import Model, Part, batches, require

BATCH = 16  # the most pictures at once on a device

# Called as progress(stage, pictures done, pictures in all). If it has a method
# `finished`, that is given the pictures of each batch as soon as they are made.
Progress = Callable[[str, int, int], None]


def text_to_image(
    model: Model,
    prompts: str | Sequence[str],
    *,
    seed: int = 0,
    num: int = 1,
    size: int | None = None,
    prior: str | None = None,
    steps: Mapping[str, Any] | None = None,
    guidance: Mapping[str, float] | None = None,
    noise: Mapping[str, Any] | None = None,
    negative_prompt: str = "",
    best_of: int | None = None,
    progress: Progress | None = None,
) -> UInt8[np.ndarray, "n h w 3"]:
    """Pictures of captions (section 2 of arXiv 2204.06125).

    Args:
      model: from `load`.
      prompts: one caption or several; one that is too long is cut, with a warning.
      seed: picture k of a seed has the same noise in any batch and on any devices.
      num: pictures of each prompt.
      size: their side in pixels, one of ``model.sizes``; by default the largest.
      prior: what the decoder is given as the image's embedding: that of the "diffusion"
        or the "autoregressive" prior, by default of the first that the model has; or
        "none", CLIP's embedding of the caption as if it were a picture's; or "caption",
        nothing, so that it has only the caption (section 5.1).
      steps: sampling steps of the networks that shall not have the model's own:
        {"prior": 25, "decoder": 50, "upsampler": (8,)}, with an entry for each
        upsampler used. Each is a number or what else schedule.respace takes.
      guidance: scales of classifier-free guidance, {"prior": 2.0, "decoder": 4.0}; 1 is
        none. Upsamplers have no guidance. That of the prior is for either of them; the
        autoregressive one has no steps and no noise.
      noise: noise that was drawn elsewhere, for the networks that shall not draw their
        own from the seed: {"prior": [steps, n, d], "decoder": [steps, n, h, w, 3],
        "upsampler": ([steps, n, h, w, 3],)}, n pictures in all. Entry 0 is x_T, entry k
        the noise that is added after step k; the last step adds none.
      negative_prompt: what guidance leads away from, in place of the empty caption.
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
    made = num if best_of is None else best_of
    if made < num:
        raise UserError(f"best_of={best_of}: must be at least num={num}")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    settings = Settings(size, steps, guidance, noise)
    model, request = of_prompts(
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
    seed: int = 0,
    num: int = 1,
    size: int | None = None,
    prior: str | None = None,
    steps: Mapping[str, Any] | None = None,
    guidance: Mapping[str, float] | None = None,
    negative_prompt: str = "",
) -> Iterator[tuple[str, UInt8[np.ndarray, "b h w 3"]]]:
    """`text_to_image` as a generator of what each network has made, for previews.

    Yields:
      ("decoder", small pictures), then ("upsampler S", pictures of side S), from the
      smallest to the largest; of each batch in turn, if there are several.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    settings = Settings(size, steps, guidance)
    model, request = of_prompts(
        model, prompts, seed, num, settings, negative_prompt, prior
    )
    for stage, rows, x in run(model, request):
        if stage != "prior":
            rows = np.unique(rows)
            yield stage, np.asarray(image.to_uint8(x))[: len(rows)]


class Settings(NamedTuple):
    """What the caller changes of a model's sampling; see `text_to_image`."""

    size: int | None = None
    steps: Mapping[str, Any] | None = None
    guidance: Mapping[str, float] | None = None
    noise: Mapping[str, Any] | None = None


class Request(NamedTuple):
    """What the cascade shall make: n pictures.

    Attributes:
      tokens: of their captions.
      null: of the caption that guidance leads away from.
      keys: what their noise follows from.
      z_image: their image embeddings; None leaves them to the prior.
      prior: which one, as of `text_to_image`.
      given: noise that networks shall not draw from the keys, by network.
      start: the decoder's x_T; None draws it.
      known: a picture in [-1, 1] of the largest side and a mask, 1 where it is to be
        painted and 0 where it is to stay.
    """

    tokens: Int[np.ndarray, "n l"]
    null: Int[np.ndarray, "1 l"]
    keys: Key[Array, " n"]
    z_image: Float[np.ndarray, "n d"] | None = None
    prior: str | None = None
    given: Mapping[str, Float[np.ndarray, "steps n ..."]] = {}
    start: Float[np.ndarray, "n h w 3"] | None = None
    known: tuple[Float[np.ndarray, "1 s s 3"], Float[np.ndarray, "1 s s 1"]] | None = (
        None
    )


def of_prompts(
    model: Model,
    prompts: Sequence[str],
    seed: int,
    num: int,
    settings: Settings,
    negative_prompt: str = "",
    prior: str | None = None,
) -> tuple[Model, Request]:
    """The model with the settings, and the request for ``num`` of each prompt."""
    require(model, "tokenizer", "clip", "decoder")
    prior = _which_prior(model, prior)
    check_prompts(prompts)
    check(num, seed)
    if prior == "autoregressive":
        model = model._replace(prior=model.ar_prior)
    diffused = STAGES if prior == "diffusion" else STAGES[1:]
    guided = STAGES[:2] if prior in ("diffusion", "autoregressive") else STAGES[1:2]
    model = set_all(model, settings, diffused, guided)
    tokens = tokenize(model, prompts).repeat(num, axis=0)
    count = len(tokens)
    return model, Request(
        tokens=tokens,
        null=tokenize(model, [negative_prompt]),
        keys=picture_keys(seed, count),
        prior=prior,
        given=given_noise(model, settings.noise or {}, count, diffused),
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
    for stage, rows, x in run(model, request):
        if progress is not None:
            progress(stage, int(rows[-1]) + 1, count)
        if stage != "prior" and x.shape[1] == model.sizes[-1]:
            batch = np.asarray(image.to_uint8(x))[: len(np.unique(rows))]
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


def run(
    model: Model, request: Request
) -> Iterator[tuple[str, Int[np.ndarray, " b"], Array]]:
    """Yields (stage, numbers of the pictures, what it made), a batch after the other.

    The prior makes embeddings, the others pictures in [-1, 1]. Where pictures are fewer
    than devices, there may be copies after them.
    """
    for rows in batches(len(request.tokens), model.devices.size, BATCH):
        for stage, x in run_batch(model, request, rows):
            yield stage, rows, x


def run_batch(
    model: Model, request: Request, rows: Int[np.ndarray, " b"]
) -> Iterator[tuple[str, Array]]:
    """What `run` yields of one batch; who asks for no more leaves the rest undone."""

    def place(x: Any) -> Array:
        return jax.device_put(x, spread(model))

    def randomness(part: str) -> Array:
        """What a network's noise follows from: keys, or noise drawn elsewhere."""
        if part not in request.given:
            return place(request.keys[rows])
        # The pictures go first, where they are split over the devices.
        return place(np.moveaxis(request.given[part][:, rows], 1, 0))

    # Each result is waited for, so that no two networks are on the devices if they are
    # offloaded.
    words = place(request.tokens[rows])
    caption = encode_caption(model.clip, words)
    null = encode_caption(model.clip, jnp.broadcast_to(request.null, words.shape))
    if request.z_image is not None:
        z = place(request.z_image[rows])
    elif request.prior == "none":
        z = caption.z_text
    elif request.prior == "caption":
        z = None
    else:
        z = loops.sample_embedding(
            model, request.prior, caption, null, randomness("prior")
        )
        yield "prior", z.block_until_ready()
    start = None if request.start is None else place(request.start[rows])
    known = _known(request, model.decoder.size)
    noise = randomness("decoder")
    x = loops.sample_decoder(model.decoder, z, caption, null, noise, start, known)
    yield "decoder", x.block_until_ready()
    count = len(np.unique(rows))
    for part in model.upsamplers:
        part = in_strips(part, model.devices, count)
        if part.strips is not None:
            x = x[:count]  # without those that fill the devices
        name = f"upsampler {part.size}"
        noise, known = randomness(name)[: len(x)], _known(request, part.size)
        x = loops.sample_upsampler(part, x, noise, known)
        yield name, x.block_until_ready()


def in_strips(part: Part, devices: Mesh, count: int) -> Part:
    """An upsampler that splits each picture over the devices, if there are fewer.

    XLA exchanges the strips' borders and their sums for the norms, so that a picture is
    the same. Not with tiles, nor where the deepest level's rows don't divide.
    """
    divides = part.size % (part.network.unit * devices.size) == 0
    if count < devices.size and divides and part.tile is None:
        rows = PartitionSpec(None, *devices.axis_names)
        part = part.replace(strips=NamedSharding(devices, rows))
    return part


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
    """A key for each picture, which depends on the seed and its number only."""
    return jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.arange(count)
    )


# What the caller asks for, checked and put into the model.

STAGES = ("prior", "decoder", "upsampler")


def set_all(
    model: Model, settings: Settings, steps: Sequence[str], guided: Sequence[str]
) -> Model:
    """The model with the settings, but for the noise; checks that they fit it.

    ``steps`` and ``guided`` are the networks that have steps and guidance.
    """
    model = _set(_cut(model, settings.size), "steps", settings.steps or {}, steps)
    return _set(model, "guidance", settings.guidance or {}, guided)


def _which_prior(model: Model, prior: str | None) -> str:
    """The prior asked for, or the first that the model has."""
    parts = {"diffusion": model.prior, "autoregressive": model.ar_prior}
    has = [name for name, part in parts.items() if part is not None]
    if prior is None:
        if not has:
            require(model, "prior")
        prior = has[0]
    if prior not in (*has, "none", "caption"):
        raise UserError(
            f"prior={prior!r}: the model {model.path} has {', '.join(has) or 'none'}; "
            f"choose one of {', '.join([*has, 'none', 'caption'])}"
        )
    if (
        prior == "diffusion"
        and model.prior.sampling["variance"] == "analytic"
        and model.x0_error is None
    ):
        raise UserError(
            f"the prior of {model.path} is to be sampled with analytic variance, which "
            "hasn't been measured: run python -m dalle2_jax.analytic"
        )
    return prior


def check_prompts(prompts: Sequence[str]) -> None:
    """A UserError where there is no prompt, or one that says nothing."""
    if not prompts:
        raise UserError("no prompt: give at least one caption")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"the prompt {prompt!r} is empty: say what to show")


def check(num: int, seed: int) -> None:
    """A UserError where so many pictures, or this seed, can't be."""
    if num < 1:
        raise UserError(f"num={num}: the number of pictures must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed}: must be from 0 to {2**32 - 1}")


def _cut(model: Model, size: int | None) -> Model:
    """The model without the upsamplers beyond ``size``; checks that the others fit."""
    if size is not None and size not in model.sizes:
        sizes = ", ".join(map(str, model.sizes))
        raise UserError(f"size={size}: this model makes pictures of side {sizes}")
    used = tuple(p for p in model.upsamplers if size is None or p.size <= size)
    side = model.decoder.size
    for part in used:
        if part.low_size != side:
            raise UserError(
                f"the upsampler to {part.size} px takes pictures of {part.low_size} "
                f"px, and what comes before it in {model.path} makes {side} px"
            )
        side = part.size
    return model._replace(upsamplers=used)


def _set(
    model: Model, setting: str, values: Mapping[str, Any], allowed: Sequence[str]
) -> Model:
    """The model with a sampling setting changed for the networks named."""
    for name in values:
        if name not in allowed:
            raise UserError(f"{setting} for {name!r}: give it for {', '.join(allowed)}")
    for name in ("prior", "decoder"):
        if name in values:
            part = _changed(getattr(model, name), setting, values[name], name)
            model = model._replace(**{name: part})
    if "upsampler" in values:
        each = values["upsampler"]
        each = (
            each if isinstance(each, Sequence) and not isinstance(each, str) else [each]
        )
        if len(each) != len(model.upsamplers):
            raise UserError(
                f"{setting} for {len(each)} upsamplers ({each}): there are "
                f"{len(model.upsamplers)} to run"
            )
        parts = [
            _changed(part, setting, value, "upsampler")
            for part, value in zip(model.upsamplers, each, strict=True)
        ]
        model = model._replace(upsamplers=tuple(parts))
    return model


def _changed(part: Part, setting: str, value: Any, name: str) -> Part:
    if setting == "steps":
        _table(part, value)
    elif not isinstance(value, int | float) or not value >= 0:
        raise UserError(f"guidance of the {name} is {value!r}: must be 0 or more")
    return part.replace(sampling=part.sampling.copy({setting: value}))


def given_noise(
    model: Model, noise: Mapping[str, Any], count: int, allowed: Sequence[str]
) -> dict[str, Float[np.ndarray, "steps n ..."]]:
    """The noise that the caller gives, by network, checked."""
    given = {}
    for name, arrays in noise.items():
        if name not in allowed:
            raise UserError(f"noise for {name!r}: give it for {', '.join(allowed)}")
        if name == "upsampler":
            parts = model.upsamplers
        else:
            parts, arrays = (getattr(model, name),), (arrays,)
        if len(arrays) != len(parts):
            raise UserError(
                f"noise for {len(arrays)} upsamplers: there are {len(parts)} to run"
            )
        for part, array in zip(parts, arrays, strict=True):
            array = np.asarray(array, np.float32)
            steps = _table(part, part.sampling["steps"]).steps
            for setting, plain in {"candidates": 1, "last_std": 0}.items():
                if name == "prior" and part.sampling[setting] != plain:
                    raise UserError(
                        f"noise of a prior with {setting}={part.sampling[setting]}: "
                        f"it must have {plain}"
                    )
            side = (part.size, part.size, 3)
            shape = (part.network.clip_dim,) if name == "prior" else side
            if array.shape != (steps, count, *shape):
                raise UserError(
                    f"noise of the {name} is {list(array.shape)}: must be "
                    f"{[steps, count, *shape]} (steps, pictures, ...)"
                )
            given[f"upsampler {part.size}" if name == "upsampler" else name] = array
    return given


def _table(part: Part, steps: Any) -> schedule.Schedule:
    """The schedule of a network at its sampling steps; a UserError if it has none."""
    table = schedule.make(part.diffusion["schedule"], part.diffusion["steps"])
    return schedule.respace(table, steps)
