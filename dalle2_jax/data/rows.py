"""A row of a batch: the pictures, and what else, that are made of one example."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dalle2_jax.data import image as images
from dalle2_jax.data.examples import BadExample, Source, as_list
from dalle2_jax.errors import UserError
from dalle2_jax.rules import FLAG, check, number, one_of

RULES = {
    "crop": one_of(*images.CROPS),
    "crop_fraction": number(0, 1, above=True),
    "flip": FLAG,
    "jitter": number(0, 1, below=True),
}


class Rows(NamedTuple):
    """What is made of each example.

    Attributes:
      sizes: side in pixels of each picture, by its name; all are of one square.
      crop: how the square is taken from the picture, "center" or "random".
      crop_fraction: below 1, "image" is a random part of the picture at its size, of
        that fraction of its side.
      degrade: (uint8 [s, s, 3], generator) -> the picture "low", made of "image".
      flip: whether half of the pictures are mirrored; captions must not speak of left
        and right then.
      jitter: the most that a picture is scaled, turned and moved at random, on white;
        see image.place_at_random. 0 for not at all.
      embeddings: whether the source's embedding and tokens are taken.
    """

    sizes: Mapping[str, int]
    crop: str = "center"
    crop_fraction: float = 1.0
    degrade: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None
    flip: bool = False
    jitter: float = 0.0
    embeddings: bool = False

    def check(self, source: Source) -> None:
        """A UserError where rows can't be made so, or not of this source."""
        check(self._asdict(), RULES, "data")
        if source.embedded is None:
            return
        largest = max(self.sizes.values(), default=0)
        have = source.embedded.image_size or 0
        if largest > have:
            what = f"pictures of {have} px" if have else "no pictures"
            raise UserError(
                f"{source.name} has {what}, and {largest} px are needed: make it with "
                f"--image_size={largest}"
            )
        if self.embeddings and (self.flip or self.jitter or self.crop != "center"):
            raise UserError(
                f"the embeddings of {source.name} are of the middle of each picture: "
                'crop must be "center", flip False and jitter 0'
            )

    def make(self, example: Mapping[str, Any], seed: tuple[int, int]) -> dict[str, Any]:
        """The row of an example, whose caption is one of its captions.

        Chance follows from the seed. Raises BadExample if the picture can't be read.
        """
        captions = as_list(example["caption"])
        chances = self.crop == "random" or self.crop_fraction < 1
        chances = chances or self.flip or self.jitter > 0
        rng, choice = None, 0
        if chances or self.degrade or len(captions) > 1:  # making one takes a while
            rng = np.random.default_rng(seed)
            choice = rng.integers(len(captions))
        row = {"caption": captions[choice]}
        if self.embeddings:
            row["z_image"] = np.asarray(example["z_image"], np.float32)
            row["tokens"] = example["tokens"][choice]
        if self.sizes:
            row |= self._pictures(example, rng)
        return row

    def _pictures(
        self, example: Mapping[str, Any], rng: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        square = square_of(example, max(self.sizes.values()), self.crop, rng)
        pictures = {name: square(size) for name, size in self.sizes.items()}
        if self.flip and rng.random() < 0.5:
            pictures = {name: picture[:, ::-1] for name, picture in pictures.items()}
        if self.jitter:
            placing = images.place_at_random(self.jitter, rng)
            pictures = {name: images.move(p, placing) for name, p in pictures.items()}
        if self.crop_fraction < 1 and "image" in pictures:
            side = round(self.sizes["image"] * self.crop_fraction)
            pictures["image"] = _random_part(pictures["image"], side, rng)
        if self.degrade is not None:
            pictures["low"] = self.degrade(pictures["image"], rng)
        return pictures


def square_of(
    example: Mapping[str, Any],
    largest: int,
    crop: str = "center",
    rng: np.random.Generator | None = None,
) -> Callable[[int], np.ndarray]:
    """A picture's square as a function of the size wanted, uint8 [size, size, 3].

    Raises BadExample if it can't be read.
    """
    picture = example["image"]
    if callable(picture):
        return picture
    square = images.crop_square(read_picture(example, largest), crop, rng)
    return lambda size: images.resize_square(square, size)


def read_picture(
    example: Mapping[str, Any], at_least: int | None = None
) -> Image.Image:
    """The example's picture, see image.read; BadExample if it can't be read."""
    try:
        return images.read(example["image"], at_least)
    except UserError as error:
        raise BadExample("unreadable picture", f"{example['key']} ({error})") from error


def _random_part(
    picture: np.ndarray, side: int, rng: np.random.Generator
) -> np.ndarray:
    y, x = rng.integers(len(picture) - side + 1, size=2)
    return picture[y : y + side, x : x + side]
