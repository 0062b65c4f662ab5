"""CLIP alone: embeddings of captions and of pictures."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from dalle2_jax.data import image
from dalle2_jax.data.image import Picture
from dalle2_jax.errors import UserError
from dalle2_jax.nn.clip import Caption
from dalle2_jax.parts import stage
from dalle2_jax.parts.component import Component
from dalle2_jax.pipeline import values
from dalle2_jax.pipeline.models import Model, in_batches, require
from dalle2_jax.pipeline.settings import check_model
from dalle2_jax.runtime import jit

BATCH = 64  # the most captions or pictures at once on a device


def encode_text(clip: Model, texts: str | Sequence[str]) -> Float[np.ndarray, "n d"]:
    """CLIP embeddings of captions, not normalised to unit length, float32.

    Args:
      clip: from `load_clip`, or any model with a CLIP.
      texts: captions; one that is too long is cut, with a warning.

    Raises:
      UserError: there are no captions, or the model has no CLIP.
    """
    check_model(clip, "tokenizer", "clip")
    texts = values.check_texts(texts, "text")
    tokens = clip.tokenizer.encode(texts, clip.clip.network.context_length)
    return encode_tokens(clip, tokens)


def encode_tokens(
    clip: Model, tokens: Int[np.ndarray, "n l"], most: int = BATCH
) -> Float[np.ndarray, "n d"]:
    """z_text of captions, `most` at once on a device."""

    def some(rows: np.ndarray) -> np.ndarray:
        words = jax.device_put(tokens[rows], spread(clip))
        return np.asarray(encode_caption(clip.clip, words).z_text)

    return in_batches(some, len(tokens), clip.devices.size, most)


def encode_image(
    clip: Model, images: Picture | Sequence[Picture]
) -> Float[np.ndarray, "n d"]:
    """CLIP embeddings of pictures, not normalised to unit length, float32.

    Args:
      clip: from `load_clip`, or any model whose CLIP has its image tower.
      images: a picture or a list of them, each a PIL image, an array uint8 [h, w, 3],
        the path of a file, or what else `data.image.read` takes; of any size. They are
        resized, cropped and normalised as transformers' CLIPImageProcessor does.

    Raises:
      UserError: a picture can't be read, or the model has no image tower.
    """
    check_model(clip, "clip")
    return encode_squares(clip, read_squares(clip, images))


def read_squares(clip: Model, images: Any) -> UInt8[np.ndarray, "n s s 3"]:
    """One picture or several as CLIP's image tower takes them."""
    size = image_size(clip)
    images = image.as_list(images)
    if not images:
        raise UserError("no pictures: give at least one")
    return np.stack([image.clip_input(x, size) for x in images])


def encode_squares(
    clip: Model, pictures: UInt8[np.ndarray, "n s s 3"], most: int = BATCH
) -> Float[np.ndarray, "n d"]:
    """z_image of pictures of CLIP's size, `most` at once on a device."""

    def some(rows: np.ndarray) -> np.ndarray:
        seen = jax.device_put(pictures[rows], spread(clip))
        return np.asarray(encode_pictures(clip.clip, seen))

    return in_batches(some, len(pictures), clip.devices.size, most)


def encode_examples(
    clip: Model, examples: Iterable[dict[str, Any]], most: int = BATCH
) -> Iterator[dict[str, Any]]:
    """Adds CLIP's embeddings to examples, one after the other.

    Args:
      examples: dicts with `clip_image`, uint8 [s, s, 3] of CLIP's size, which they
        lose, and `captions`, list of n str.
      most: pictures at once on a device.

    Yields:
      Each with `z_image`, float32 [d], `z_text`, float32 [n, d], and `tokens`, int32
      [n, l]; captions that are too long are cut.
    """
    length = clip.clip.network.context_length
    examples = iter(examples)
    while rows := list(itertools.islice(examples, most * clip.devices.size)):
        captions = [caption for row in rows for caption in row["captions"]]
        tokens = clip.tokenizer.encode(captions, length, warn=False)
        pictures = np.stack([row.pop("clip_image") for row in rows])
        ends = np.cumsum([len(row["captions"]) for row in rows])[:-1]
        found = zip(
            rows,
            encode_squares(clip, pictures, most),
            np.split(encode_tokens(clip, tokens, most), ends),
            np.split(tokens, ends),
            strict=True,
        )
        for row, z_image, z_text, own in found:
            yield {**row, "z_image": z_image, "z_text": z_text, "tokens": own}


def image_size(clip: Model) -> int:
    """The side of the pictures that CLIP's image tower takes; UserError without one."""
    require(clip, "clip")
    size = clip.clip.network.image_size
    if size is None:
        raise UserError(
            f"the CLIP of {clip.path} has no image tower: load it together with the "
            "CLIP that it was trained with (for Karlo openai/clip-vit-large-patch14)"
        )
    return size


def clip_score(
    clip: Model, images: Picture | Sequence[Picture], texts: str | Sequence[str]
) -> Float[np.ndarray, " n"]:
    """Cosines of the CLIP embeddings of pictures and captions, one caption each.

    Arguments and errors are those of `encode_image` and `encode_text`.
    """
    check_model(clip, "tokenizer", "clip")
    texts = values.check_texts(texts, "text")
    squares = read_squares(clip, images)
    if len(squares) != len(texts):
        raise UserError(
            f"{len(squares)} pictures and {len(texts)} texts: give a text for each "
            "picture"
        )
    z_image, z_text = encode_squares(clip, squares), encode_text(clip, texts)
    products = (z_image * z_text).sum(-1)
    return products / np.linalg.norm(z_image, axis=-1) / np.linalg.norm(z_text, axis=-1)


def spread(model: Model) -> NamedSharding:
    """A batch split over the model's devices."""
    return NamedSharding(model.devices, PartitionSpec("data"))


@jit
def encode_caption(clip: Component, tokens: Int[Array, "b l"]) -> Caption:
    """What the prior and the decoder read of captions."""
    return stage.encode_caption(clip.network, clip.params, tokens)


@jit
def encode_pictures(
    clip: Component, pictures: UInt8[Array, "b s s 3"]
) -> Float[Array, "b d"]:
    """z_image of pictures of CLIP's size."""
    return stage.encode_image(clip.network, clip.params, image.to_float(pictures))
