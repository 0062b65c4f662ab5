"""Rules that tell which captioned pictures are worth training on; pure functions.

Of the kind that data sets for CLIP are filtered by: LAION-5B (arXiv 2210.08402) and
DataComp (arXiv 2304.14108, section 3.4).
"""

import io
import os
import re
import unicodedata
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from safetensors.numpy import load

from dalle2_jax import rules
from dalle2_jax.errors import UserError, cut, first_line
from dalle2_jax.files import read_bytes

LARGEST_BLOCKLIST = 2**24  # bytes
LARGEST_CLASSIFIER = 2**20


class Classifier(NamedTuple):
    """A linear one: its score of z, at unit length, is weights · z + bias."""

    weights: Float[np.ndarray, " d"]
    bias: float


class Limits(NamedTuple):
    """What an example must keep to; None for no limit, bounds themselves are allowed.

    Attributes:
      min_words, max_words, min_characters, max_characters: of each caption.
      min_latin: share of Latin letters among each caption's letters, 0 to 1.
      blocked: what no caption may match, of `blocklist`.
      min_side: of the picture, in pixels.
      max_aspect: its longer side by its shorter one.
      min_std: of its pixels, of `deviation`; a blank picture's is near 0.
      min_clip_score, max_clip_score: cosine of the picture and each caption.
      classifier, min_classifier, max_classifier: its score of the picture.
      duplicates: the threshold of `near_duplicates`.
    """

    min_words: int | None = None
    max_words: int | None = None
    min_characters: int | None = None
    max_characters: int | None = None
    min_latin: float | int | None = None
    blocked: re.Pattern | None = None
    min_side: int | None = None
    max_aspect: float | int | None = None
    min_std: float | int | None = None
    min_clip_score: float | int | None = None
    max_clip_score: float | int | None = None
    classifier: Classifier | None = None
    min_classifier: float | int | None = None
    max_classifier: float | int | None = None
    duplicates: float | int | None = None


_LENGTH = rules.optional(rules.whole(0, 10**9))
_COSINE = rules.optional(rules.number(-1, 1))
_SCORE = rules.optional(rules.number(-1e9, 1e9))
RULES = {
    **dict.fromkeys(("min_words", "max_words"), _LENGTH),
    **dict.fromkeys(("min_characters", "max_characters", "min_side"), _LENGTH),
    "min_latin": rules.optional(rules.CHANCE),
    "max_aspect": rules.optional(rules.number(1, 1e9)),
    "min_std": rules.optional(rules.number(0, 255)),
    **dict.fromkeys(("min_clip_score", "max_clip_score", "duplicates"), _COSINE),
    **dict.fromkeys(("min_classifier", "max_classifier"), _SCORE),
}


def check_limits(limits: Limits) -> None:
    """Raise a UserError where a limit is no number, or out of its range."""
    rules.check(limits._asdict(), RULES, "filter")


OF_PICTURES = ("min_side", "max_aspect", "min_std")
OF_EMBEDDINGS = ("min_clip_score", "max_clip_score", "classifier", "duplicates")


def outside(
    value: float | int | np.floating,
    low: float | int | None,
    high: float | int | None = None,
) -> bool:
    """Whether a value is below or above its bounds; NaN is outside of any."""
    inside = (low is None or value >= low) and (high is None or value <= high)
    return not inside


# Captions


def caption_problem(captions: Sequence[str], limits: Limits) -> str | None:
    """The first rule that one of the captions breaks, or None."""
    for caption in captions:
        words = len(caption.split())
        if outside(words, limits.min_words, limits.max_words):
            return "words"
        if outside(len(caption), limits.min_characters, limits.max_characters):
            return "characters"
        if limits.min_latin is not None and latin_share(caption) < limits.min_latin:
            return "language"
        if limits.blocked is not None and limits.blocked.search(_words(caption)):
            return "blocked word"
    return None


def latin_share(text: str) -> float:
    """The share of Latin letters among the letters of a text; 0 without any letter."""
    letters = [c for c in text if c.isalpha()]
    latin = sum(c.isascii() or "LATIN" in unicodedata.name(c, "") for c in letters)
    return latin / len(letters) if letters else 0.0


def blocklist(phrases: Iterable[str]) -> re.Pattern:
    """Matches whole words or phrases, whatever their case and what is between words.

    UserError if there are none.
    """
    found = {_words(phrase) for phrase in phrases} - {""}
    if not found:
        raise UserError("the blocklist has no words")
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(found)))})(?!\w)")


def read_blocklist(path: str | Path) -> re.Pattern:
    """`blocklist` of a file with a word or phrase a line; UserError if it is none."""
    try:
        text = read_bytes(os.path.expanduser(path), LARGEST_BLOCKLIST)
        return blocklist(text.decode("utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the blocklist {path}: {first_line(error)}"
        ) from error


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


# Pictures


def picture_problem(
    width: int, height: int, std: float | np.floating, limits: Limits
) -> str | None:
    """The first rule that a picture of a size and a deviation breaks, or None."""
    short, long = sorted((width, height))
    if outside(short, limits.min_side):
        return "size"
    if outside(long / short, None, limits.max_aspect):
        return "aspect"
    if outside(std, limits.min_std):
        return "blank"
    return None


def deviation(picture: UInt8[np.ndarray, "h w 3"]) -> float:
    """The standard deviation of its pixels, of the channel where it is largest."""
    return float(picture.std(axis=(0, 1), dtype=np.float64).max())


# Embeddings


def unit(z: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    """At unit length."""
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def embedding_problems(
    z_image: Float[np.ndarray, "n d"],
    z_text: Sequence[Float[np.ndarray, "_ d"]],
    limits: Limits,
) -> list[tuple[str, int | None] | None]:
    """Of each example None, or the first rule that it breaks.

    With "duplicate" comes the number of the example that it is a duplicate of.

    Args:
      z_image: of the pictures.
      z_text: of each one's captions.
    """
    z = unit(z_image.astype(np.float32))
    problems: list[tuple[str, int | None] | None] = [None] * len(z)
    for i, captions in enumerate(z_text):
        worst = (unit(captions.astype(np.float32)) @ z[i]).min()
        if outside(worst, limits.min_clip_score, limits.max_clip_score):
            problems[i] = "clip score", None
    if limits.classifier is not None:
        weights, bias = limits.classifier
        if weights.shape != z.shape[1:]:
            raise UserError(
                f"the classifier is of {len(weights)} dimensions, and this CLIP's "
                f"embeddings have {z.shape[1]}"
            )
        for i, score in enumerate(z @ weights + bias):
            if problems[i] is None and outside(
                score, limits.min_classifier, limits.max_classifier
            ):
                problems[i] = "classifier", None
    if limits.duplicates is not None:
        left = np.flatnonzero([problem is None for problem in problems])
        for i, first in enumerate(near_duplicates(z[left], limits.duplicates)):
            if first != i:
                problems[left[i]] = "duplicate", int(left[first])
    return problems


def read_classifier(path: str | Path) -> Classifier:
    """Weights [d] and bias [] (0 if it lacks one) of a .safetensors or .npz file.

    UserError if it has anything else.
    """
    try:
        data = read_bytes(os.path.expanduser(path), LARGEST_CLASSIFIER)
        if str(path).endswith(".npz"):
            with zipfile.ZipFile(io.BytesIO(data)) as packed:
                if sum(i.file_size for i in packed.infolist()) > LARGEST_CLASSIFIER:
                    raise ValueError("too large when it is unpacked")
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                arrays = dict(file)
        else:
            arrays = load(data)
    except Exception as error:  # of either library, and of the file system
        raise UserError(
            f"cannot read the classifier {path}: {first_line(error)}"
        ) from error
    shapes = {name: array.shape for name, array in arrays.items()}
    bias = arrays.pop("bias", np.zeros(()))
    if set(arrays) != {"weights"} or arrays["weights"].ndim != 1 or bias.ndim:
        raise UserError(
            f"the classifier {path} has {cut(str(shapes), 300)}: it must have weights "
            "of shape (d,) and, if any, bias of shape ()"
        )
    weights = arrays["weights"]
    real = all(np.can_cast(a.dtype, np.float64) for a in (weights, bias))
    if not real or not np.isfinite(weights).all() or not np.isfinite(bias):
        raise UserError(
            f"the classifier {path} has weights or a bias that are not finite numbers"
        )
    return Classifier(weights.astype(np.float32), float(bias))


def near_duplicates(
    z: Float[np.ndarray, "n d"], threshold: float | int, block: int = 1024
) -> Int[np.ndarray, " n"]:
    """Of each row, the first kept one whose cosine with it is the threshold or more.

    A row without one is kept, and is its own. So no two that are kept are as alike, and
    all that are not have one like them that is. Exact: n² / 2 products, a block of rows
    with a block of rows at a time.
    """
    count, dim = z.shape
    if not count:
        return np.arange(0)
    block = min(block, count)
    blocks = -(-count // block)
    rows = np.zeros((blocks * block, dim), np.float32)
    rows[:count] = unit(z)
    of = np.arange(len(rows))
    kept = np.zeros(len(rows), bool)
    for i in range(blocks):
        new = slice(i * block, (i + 1) * block)
        found = np.full(block, -1)
        for j in range(i):
            old = slice(j * block, (j + 1) * block)
            first = np.asarray(_first(rows[new], rows[old], kept[old], threshold))
            found = np.where((found < 0) & (first >= 0), first + old.start, found)
        own = jnp.asarray(rows[new])
        alike = np.asarray(_alike(own, own, threshold))
        for k in range(block):  # within the block one after the other
            if found[k] >= 0:
                continue
            kept[new.start + k] = True
            after = alike[k] & (found < 0) & (np.arange(block) > k)
            found[after] = new.start + k
        of[new] = np.where(found < 0, of[new], found)
    return of[:count]


def _alike(a: Array, b: Array, threshold: float | int | Array) -> Array:
    products = jnp.dot(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return products >= threshold


@jax.jit
def _first(a: Array, b: Array, kept: Array, threshold: float | int | Array) -> Array:
    """Of each row of a, the first kept row of b that is like it, or -1."""
    alike = _alike(a, b, threshold) & kept
    return jnp.where(alike.any(1), alike.argmax(1), -1)
