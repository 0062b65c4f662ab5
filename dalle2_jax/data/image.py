"""Pictures: files, crops and resizing; the only place that knows the range [-1, 1].

At the public edges a picture is uint8, [height, width, 3], 0 to 255. Inside, networks
and diffusion see float32 in [-1, 1].
"""

import io
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from dalle2_jax.errors import UserError, first_line

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
CROPS = ("center", "random")

# What OpenAI's CLIP was trained with: statistics of pictures in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# Ranges


def to_float(x: UInt8[Array | np.ndarray, "..."]) -> Float[Array | np.ndarray, "..."]:
    """uint8 0 … 255 to float32 [-1, 1]; numpy stays numpy, jax stays jax."""
    return x.astype("float32") / 127.5 - 1


def to_uint8(x: Float[Array | np.ndarray, "..."]) -> UInt8[Array | np.ndarray, "..."]:
    """[-1, 1] to uint8, clipped and rounded; numpy stays numpy, jax stays jax."""
    xp = jnp if isinstance(x, jax.Array) else np
    return xp.clip(xp.round((x.astype("float32") + 1) * 127.5), 0, 255).astype("uint8")


def clip_normalize(x: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """[-1, 1] to what CLIP's image tower takes."""
    return ((x + 1) / 2 - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)


# Files


def read(
    source: str | os.PathLike | bytes | np.ndarray | Image.Image,
    at_least: int | None = None,
) -> Image.Image:
    """Decodes a picture of any mode to RGB: upright by its EXIF, its alpha on white.

    An array is uint8 [h, w, 3]. `at_least` lets a JPEG be decoded at 1/2, 1/4 or 1/8 of
    its size, several times as fast, as long as both its sides keep at least so many
    pixels.

    Raises UserError if it is not a picture, damaged, or beyond Pillow's limit of size.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[-1] != 3:
            raise UserError(
                f"a picture of shape {source.shape} and dtype {source.dtype}: give "
                "uint8 [height, width, 3]"
            )
        return Image.fromarray(source)
    name = f"the picture {source}" if isinstance(source, str | os.PathLike) else "it"
    try:
        return _to_rgb(_open(source, at_least))
    except FileNotFoundError:
        raise UserError(f"there is no file {source}") from None
    # Pillow's decoders raise nearly anything when fed damaged bytes.
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, UnidentifiedImageError):  # its text is an address
            reason = "not a picture in a known format"
        raise UserError(f"cannot read {name}: {reason}") from error


def save_png(
    path: str | os.PathLike,
    picture: UInt8[Array | np.ndarray, "h w 3"] | Image.Image,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a PNG with the metadata as its text chunks (any Unicode)."""
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, value)
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(np.asarray(picture))
    picture.save(path, format="PNG", pnginfo=info)


def grid(
    images: UInt8[Array | np.ndarray, "n h w 3"], columns: int, gap: int = 2
) -> Image.Image:
    """Lays out pictures of one size row by row, on white."""
    images = np.asarray(images)
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8
    )
    for i, image in enumerate(images):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return Image.fromarray(sheet)


def _open(source, at_least: int | None) -> Image.Image:
    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source)
    with Image.open(
        io.BytesIO(source) if isinstance(source, bytes) else source
    ) as file:
        if at_least is not None:
            file.draft(None, (at_least, at_least))
        ImageOps.exif_transpose(file, in_place=True)  # loads it
        return file


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits, which convert("RGB") would clip to 8
        values = np.asarray(picture).astype(np.int64) >> 8
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


# Cropping and resizing: of files, on the host


def crop_square(
    picture: Image.Image, crop: str = "center", rng: np.random.Generator | None = None
) -> Image.Image:
    """The largest square of a picture: from its middle, or ("random") from anywhere.

    Of a square it is the picture itself, and not a copy.
    """
    side = min(picture.size)
    if picture.size == (side, side):
        return picture
    if crop == "random":
        x, y = (int(rng.integers(length - side + 1)) for length in picture.size)
    else:
        x, y = ((length - side) // 2 for length in picture.size)
    return picture.crop((x, y, x + side, y + side))


def clip_input(source: Any, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """A picture as CLIP sees it: its shorter side resized, then the middle of it.

    So does transformers' CLIPImageProcessor, to the last bit. `source` is what `read`
    takes.
    """
    picture = read(source)
    short, long = sorted(picture.size)
    long = int(size * long / short)
    width, height = (size, long) if picture.width <= picture.height else (long, size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(picture.crop((left, top, left + size, top + size)))


def crop_resize(
    picture: Image.Image,
    size: int,
    *,
    crop: str = "center",
    rng: np.random.Generator | None = None,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The largest square of a picture, resized to size × size, antialiased."""
    return resize_square(crop_square(picture, crop, rng), size)


def resize_square(
    picture: Image.Image, size: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """A square picture at another size: bicubic, antialiased."""
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(picture)


def place_at_random(
    amount: float, rng: np.random.Generator
) -> Float[np.ndarray, "2 3"]:
    """Draw the scale, the angle and the shift of a picture, for `move`.

    The scale is between exp(-amount) and exp(amount), the angle is at most `amount`
    radians, and the shift at most `amount` / 2 of the side along each axis.

    Returns:
      The affine map from a point of the new picture to one of the old. Both have their
      origin in the middle, and their side as the unit.
    """
    log_scale, angle, *shift = rng.uniform(-amount, amount, 4)
    cos, sin = np.cos(angle) * np.exp(log_scale), np.sin(angle) * np.exp(log_scale)
    return np.array([[cos, -sin, shift[0] / 2], [sin, cos, shift[1] / 2]])


def move(
    picture: UInt8[np.ndarray, "s s 3"], placing: Float[np.ndarray, "2 3"]
) -> UInt8[np.ndarray, "s s 3"]:
    """Return the picture placed as `place_at_random` says, on white."""
    side, linear = len(picture), placing[:, :2]
    # Pillow's origin is the corner, and its unit the pixel.
    offset = side * (placing[:, 2] + 0.5 - linear @ [0.5, 0.5])
    (a, b), (d, e) = linear
    return np.array(
        Image.fromarray(picture).transform(
            (side, side),
            Image.Transform.AFFINE,
            (a, b, offset[0], d, e, offset[1]),
            Image.Resampling.BICUBIC,
            fillcolor="white",
        )
    )


def square(source: Any, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The middle square of what `read` takes, at a size."""
    return crop_resize(read(source), size)


def read_mask(source: Any) -> Bool[np.ndarray, "h w"]:
    """Where a picture, or an array [h, w] of bool or uint8, is nearer white than black.

    Raises UserError if it is neither.
    """
    if isinstance(source, np.ndarray) and source.ndim == 2:
        if source.dtype == bool:
            return source
        if source.dtype == np.uint8:
            return source >= 128
        raise UserError(f"a mask of dtype {source.dtype}: give bool or uint8")
    return np.asarray(read(source).convert("L")) >= 128


def square_mask(
    mask: Bool[np.ndarray, "h w"], size: int
) -> Bool[np.ndarray, "{size} {size}"]:
    """The middle square of a mask, at a size: all pixels that it touches."""
    square = np.asarray(crop_square(Image.fromarray(mask)), np.float32)
    if len(square) == size:
        return square > 0
    weights = _area_weights(len(square), size)
    return weights.T @ square @ weights > 1e-6


def on_canvas(
    picture: Image.Image,
    size: int,
    times: float,
    place: tuple[float | int, float | int],
) -> tuple[UInt8[np.ndarray, "{size} {size} 3"], Bool[np.ndarray, "{size} {size}"]]:
    """A whole picture on a square canvas, and where the canvas is empty.

    The canvas's side is that many times the picture's longer one; `place` is where the
    picture is in the room that is left, from (0, 0) to (1, 1).
    """
    scale = size / times / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    x, y = round((size - width) * place[0]), round((size - height) * place[1])
    canvas, empty = np.zeros((size, size, 3), np.uint8), np.ones((size, size), bool)
    small = picture.resize((width, height), Image.Resampling.BICUBIC)
    canvas[y : y + height, x : x + width] = small
    empty[y : y + height, x : x + width] = False
    return canvas, empty


# Resizing and blurring: of batches, on the device


def resize(
    x: Float[Array, "b h w c"], size: int, method: str = "bicubic"
) -> Float[Array, "b {size} {size} c"]:
    """Resizes to size × size by "bicubic", "linear", "nearest" or "area".

    Bicubic (a = -1/2) and linear are antialiased when they shrink, as Pillow's and as
    torch's `interpolate(antialias=True)`; "area" is the mean of the pixels covered.
    """
    b, h, w, c = x.shape
    if method == "area":
        rows, columns = _area_weights(h, size), _area_weights(w, size)
        return jnp.einsum(
            "bhwc,hy,wx->byxc", x, rows, columns, precision=jax.lax.Precision.HIGHEST
        )
    method = {"bicubic": "cubic"}.get(method, method)
    return jax.image.resize(x, (b, size, size, c), method, antialias=True)


def gaussian_blur(
    x: Float[Array, "b h w c"], kernel: int = 3, sigma: float = 0.6
) -> Float[Array, "b h w c"]:
    """Blurs every channel; beyond the border is the mirror image, less its first pixel.

    By default as the low-resolution picture in the training of the paper's first
    upsampler (section 2.1).
    """
    offsets = np.arange(kernel) - (kernel - 1) / 2
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).tolist()
    before, after = (kernel - 1) // 2, kernel // 2
    for axis in (1, 2):
        padding = [(before, after) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(x, padding, mode="reflect")
        x = sum(
            weight * jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis)
            for i, weight in enumerate(weights)
        )
    return x


def _area_weights(length: int, size: int) -> Float[np.ndarray, "length size"]:
    """What part of each new pixel each old one covers."""
    old, new = np.arange(length)[:, None], np.arange(size)[None, :] * length / size
    overlap = np.minimum(old + 1, new + length / size) - np.maximum(old, new)
    return (overlap.clip(0) * size / length).astype(np.float32)
