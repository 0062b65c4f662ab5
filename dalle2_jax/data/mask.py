"""Masks: which part of a picture is to be painted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from dalle2_jax.data import image
from dalle2_jax.errors import UserError, short

MODES = ("alpha", "luminance")

# Lossy formats leave the alpha of opaque pixels a little below 255.
OPAQUE = 250
# The mean difference of a picture from itself as JPEG, or resized, stays below; their
# deviation tells a picture from strokes of one colour.
SAME, FLAT = 16, 4


def read_mask(source: Any, picture: Any, mode: Any = None) -> Bool[np.ndarray, "h w"]:
    """Return which pixels of a picture a mask selects.

    A mask without transparent pixels selects by luminance. One with transparent pixels
    selects them if it shows the picture itself, of which a part is erased, as OpenAI's
    Images API takes it. With other colours it could mean either; `mode` says which:
        "alpha"      selects all that is not opaque, whatever its colour.
        "luminance"  selects what is nearer white than black; transparent is black, so
                     that a layer of white strokes selects the strokes.

    Args:
      source: a picture as large, an array [h, w] or [h, w, 1] of bool, uint8 or floats
        from 0 to 1, or what else `image.read` takes. None selects what is not opaque in
        the picture.
      picture: what `image.read` takes.

    Raises:
      UserError: a mask of another size, one that could mean either, or that lacks what
        the mode selects by.
    """
    if mode is not None and not (isinstance(mode, str) and mode in MODES):
        raise UserError(f'mask_mode={short(mode)}: must be "alpha" or "luminance"')
    if source is None:
        return _own(image.read_rgba(picture), mode)
    if _is_grey(source):
        if mode == "alpha":
            raise UserError('mask_mode="alpha": a mask [h, w] has no alpha')
        mask, selected = None, _threshold(np.asarray(source))
    else:
        mask = np.asarray(image.read_rgba(source, "the mask"))
        selected = mask[..., 3] < OPAQUE
    picture = image.read_rgba(picture)
    if selected.shape[::-1] != picture.size:
        raise UserError(
            f"the mask has {selected.shape[1]} × {selected.shape[0]} pixels, the "
            f"picture {picture.width} × {picture.height}: they must be the same"
        )
    if mask is None:
        return selected
    if mode is None and selected.any():
        if not _shows(mask, np.asarray(picture)):
            raise UserError(
                "the mask has transparent pixels and is not the picture with a part "
                'erased: take mask_mode="alpha" to paint what is transparent in it, or '
                'mask_mode="luminance" to paint what is white'
            )
        mode = "alpha"
    if mode != "alpha":
        return _luminance(mask) >= 128
    if selected.all() or not selected.any():
        raise UserError(
            f"the mask is {'transparent' if selected.all() else 'opaque'} all over: "
            "make what is to be painted transparent and the rest opaque, or take "
            'mask_mode="luminance"'
        )
    return selected


def square_mask(
    mask: Bool[np.ndarray, "h w"], size: int
) -> Bool[np.ndarray, "{size} {size}"]:
    """The middle square of a mask, at a size: all pixels that it touches."""
    square = np.asarray(image.crop_square(Image.fromarray(mask)), np.float32)
    if len(square) == size:
        return square > 0
    weights = image.area_weights(len(square), size)
    return weights.T @ square @ weights > 1e-6


def known_square(
    picture: Any, selected: Bool[np.ndarray, "h w"], size: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The middle square of a picture, at a size, for what a mask leaves of it.

    As `image.square`, but pixels that are transparent and selected, whose colours are
    not known, do not blend into their neighbours when it is resized.
    """
    erased = selected & (np.asarray(image.read_rgba(picture))[..., 3] < OPAQUE)
    picture = image.read(picture)
    picture.putalpha(Image.fromarray(np.where(erased, 0, 255).astype(np.uint8)))
    square = image.crop_square(picture)
    if square.size != (size, size):
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(square)[..., :3]


def _own(picture: Image.Image, mode: str | None) -> Bool[np.ndarray, "h w"]:
    selected = np.asarray(picture)[..., 3] < OPAQUE
    if mode == "luminance" or selected.all() or not selected.any():
        raise UserError(
            "no mask: give one, or a picture with a transparent part, which is painted"
        )
    return selected


def _is_grey(source: Any) -> bool:
    """Whether a mask is an array [h, w] or [h, w, 1]."""
    if not isinstance(source, np.ndarray | jax.Array):
        return False
    return source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 1)


def _threshold(mask: np.ndarray) -> Bool[np.ndarray, "h w"]:
    mask = mask.reshape(mask.shape[:2])
    if mask.dtype == bool:
        return mask
    if mask.dtype == np.uint8:
        if mask.max(initial=0) == 1:  # of 255: it would select nothing
            raise UserError("a mask uint8 of 0 and 1: give mask.astype(bool)")
        return mask >= 128
    if jnp.issubdtype(mask.dtype, np.floating) and ((0 <= mask) & (mask <= 1)).all():
        return mask >= 0.5
    raise UserError(
        f"a mask of dtype {mask.dtype}: give bool, uint8 or floats from 0 to 1"
    )


def _shows(
    mask: UInt8[np.ndarray, "h w 4"], picture: UInt8[np.ndarray, "h w 4"]
) -> bool:
    """Whether a mask has the picture's colours, where it is opaque or all over.

    Editors may keep the colours of what is erased. A part of one colour tells nothing:
    it may be a stroke upon a part of the picture that has this colour, too.
    """
    step = max(1, max(mask.shape) // 1000)
    mask, picture = mask[::step, ::step], picture[::step, ::step]
    return any(
        mask[where, :3].std(axis=0).max(initial=0) > FLAT
        and abs(mask[where, :3] - picture[where, :3].astype(int)).mean() <= SAME
        for where in (mask[..., 3] >= OPAQUE, np.ones(mask.shape[:2], bool))
        if where.any()
    )


def _luminance(mask: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w"]:
    """What is seen of a mask upon black."""
    mask = Image.fromarray(mask)
    black = Image.new("RGBA", mask.size, "black")
    return np.asarray(Image.alpha_composite(black, mask).convert("L"))
