"""Pictures: files, crops and resizing; the only place that knows the range [-1, 1].

At the public edges a picture is uint8, [height, width, 3], 0 to 255. Inside, networks
and diffusion see float32 in [-1, 1].
"""

import io
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from dalle2_jax.errors import UserError, cut, first_line

# Only the formats of these extensions are read, whatever a file is called: Pillow's
# decoders of others start a program (EPS) or take nearly any file for theirs (TGA).
# Extensions that the installed Pillow can't decode (AVIF before 11.3) are left out.
EXTENSIONS = tuple(
    extension
    for extension in (
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp"),
        *(".dib", ".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm"),
    )
    if extension in Image.registered_extensions()
)
FORMATS = tuple({Image.registered_extensions()[e]: None for e in EXTENSIONS})
GRID_PIXELS = 2**27
CROPS = ("center", "random")

# What `read` takes.
Picture = str | os.PathLike | bytes | IO[bytes] | Image.Image | np.ndarray | jax.Array

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
    source: Any, at_least: int | None = None, what: str = "the picture"
) -> Image.Image:
    """Return a picture as RGB: upright by its EXIF, transparency on white.

    Of several frames it is the first. Pictures of 32 bits are scaled to 8 by their
    values, see `_levels`.

    Args:
      source: a path, the bytes of a file or an open one, a PIL image, or an array of
        numpy or JAX, uint8 or bool (False is black), [h, w], [h, w, 1], [h, w, 3] or
        [h, w, 4] (RGBA). Arrays of floats are refused: their range is not known.
      at_least: let a JPEG be decoded at 1/2, 1/4 or 1/8 of its size, several times as
        fast, as long as both its sides keep at least so many pixels.
      what: its name in an error.

    Raises:
      UserError: not a picture in one of `FORMATS`, damaged, or of more pixels than
        Pillow allows (twice PIL.Image.MAX_IMAGE_PIXELS, 179 million).
    """
    return _read(source, _to_rgb, at_least, what)


def read_rgba(source: Any, what: str = "the picture") -> Image.Image:
    """Return a picture as RGBA, not premultiplied; see `read`."""
    return _read(source, _to_rgba, what=what)


def as_list(pictures: Any) -> list[Any]:
    """Return one picture or several as a list; the pictures are not read.

    Several are a list, a tuple, an iterator, or an array [n, h, w, c].
    """
    several = isinstance(pictures, list | tuple | Iterator)
    several &= not hasattr(pictures, "read") and not hasattr(pictures, "_fields")
    if several or getattr(pictures, "ndim", 0) == 4:
        return list(pictures)
    return [pictures]


def as_one(picture: Any, name: str = "picture") -> Any:
    """Return the one picture; UserError if there are none or several."""
    pictures = as_list(picture)
    if len(pictures) != 1:
        raise UserError(f"{name} is {len(pictures)} pictures: give one")
    return pictures[0]


def save_png(
    path: str | os.PathLike,
    picture: UInt8[Array | np.ndarray, "h w 3"] | Image.Image,
    metadata: Mapping[str, str] | None = None,
    replace: bool = True,
) -> None:
    """Write a PNG with the metadata as its text chunks (any Unicode).

    A file that can't be written whole is removed. Raises OSError; FileExistsError if
    there is something at the path that is not to be replaced.
    """
    info = PngInfo()
    for key, value in (metadata or {}).items():
        # Lone surrogates, as of file names that are not UTF-8, have no bytes.
        info.add_itxt(key, value.encode(errors="backslashreplace").decode())
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(np.asarray(picture))
    data = io.BytesIO()
    picture.save(data, format="PNG", pnginfo=info)
    file = open(path, "wb" if replace else "xb")
    try:
        with file:
            file.write(data.getbuffer())
    except BaseException:
        os.unlink(path)
        raise


def grid(
    images: UInt8[Array | np.ndarray, "n h w 3"], columns: int, gap: int = 2
) -> Image.Image:
    """Lay out pictures of one size row by row, on white.

    Those of a sheet of more than `GRID_PIXELS` are made smaller: it could not be read.
    """
    images = np.asarray(images)
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    step = math.ceil(math.sqrt(rows * columns * height * width / GRID_PIXELS))
    images = images[:, ::step, ::step]
    _, height, width, _ = images.shape
    sheet = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8
    )
    for i, image in enumerate(images):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return Image.fromarray(sheet)


def _read(
    source: Any,
    convert: Callable[[Image.Image], Image.Image],
    at_least: int | None = None,
    what: str = "the picture",
) -> Image.Image:
    """A picture that is converted once it is decoded; UserError if that fails."""
    name = what
    if isinstance(source, str | os.PathLike):
        source = os.path.expanduser(source)
        name += f" {cut(str(source), 300)}"
    try:
        picture = convert(_open(source, at_least))
        if not all(picture.size):
            raise UserError(f"it has {picture.width} × {picture.height} pixels")
        return picture
    except FileNotFoundError:
        path = cut(str(source), 300)
        raise UserError(f"{what}: there is no file {path}") from None
    # Pillow's decoders raise nearly anything when fed damaged bytes.
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, UnidentifiedImageError):  # its text is an address
            reason = f"not a picture in a known format ({', '.join(FORMATS)})"
        raise UserError(f"cannot read {name}: {reason}") from error


def _open(source: Any, at_least: int | None) -> Image.Image:
    """A picture of any mode, loaded and upright."""
    if isinstance(source, Image.Image):
        return _upright(source.copy())
    if isinstance(source, np.ndarray | jax.Array):
        return _from_array(np.asarray(source))
    if isinstance(source, str | bytes) or hasattr(source, "read"):
        file = io.BytesIO(source) if isinstance(source, bytes) else source
    else:
        raise UserError(
            f"it is of type {type(source).__name__}; give a path, the bytes of a file, "
            "a PIL image or an array uint8 [height, width, 3]"
        )
    if isinstance(source, str) and not stat.S_ISREG(os.stat(source).st_mode):
        raise UserError("it is not a file")  # reading a pipe or a device may not end
    with Image.open(file, formats=FORMATS) as picture:
        if at_least is not None:
            picture.draft(None, (at_least, at_least))
        picture.load()
        return _upright(picture)


def _from_array(array: np.ndarray) -> Image.Image:
    told = f"it is an array of shape {array.shape} and dtype {array.dtype}"
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise UserError(f"{told}: give uint8 [height, width, 3]")
    if not array.size:
        raise UserError(f"it has {array.shape[1]} × {array.shape[0]} pixels")
    if array.dtype == bool:
        array = array * np.uint8(255)
    if array.dtype != np.uint8:
        raise UserError(f"{told}: {_remedy(array)}")
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _remedy(array: np.ndarray) -> str:
    """How to make uint8 of an array, if its range tells."""
    low, high = (array.min(), array.max()) if array.dtype.kind in "iuf" else (1, 0)
    if array.dtype.kind == "f" and 0 <= low <= high <= 1:
        as_uint8 = "(255 * x).round().astype(np.uint8) of a range from 0 to 1"
    elif array.dtype.kind == "f" and -1 <= low <= high <= 1:
        as_uint8 = "(127.5 * (x + 1)).round().astype(np.uint8) of a range from -1 to 1"
    elif 0 <= low <= high <= 255:
        as_uint8 = "x.astype(np.uint8)"
    else:
        return "give uint8, from 0 to 255"
    return f"give uint8, as {as_uint8}"


def _upright(picture: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except Exception:  # of a damaged EXIF: it takes no picture away
        pass
    return picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode[0] in "IF":  # which convert("RGB") would clip to 0 … 255
        return Image.fromarray(_levels(picture)).convert("RGB")
    if picture.has_transparency_data:
        picture = _to_rgba(picture)
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _to_rgba(picture: Image.Image) -> Image.Image:
    if picture.mode[0] in "IF":
        picture = _to_rgb(picture)
    return picture if picture.mode == "RGBA" else picture.convert("RGBA")


def _levels(picture: Image.Image) -> UInt8[np.ndarray, "h w"]:
    """A grey picture of 16 or 32 bits at 8 bits.

    Modes I and F don't tell what is white, but for files that have 16 bits at most. It
    is 1 if no value is larger, else 255, else 65,535. Larger or negative values are
    scaled by the least and the largest.
    """
    values = np.asarray(picture)
    deep = picture.mode == "I" and picture.format in ("PNG", "PPM")
    if picture.mode.startswith("I;16") or deep:
        return (values.astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise UserError("it has values that are not finite")
    if low < 0 or high > 65535:
        values = (values - low) * (255 / (high - low or 1))
    elif high > 255:
        values = values // 256
    elif high <= 1:
        values = values * 255
    return np.round(values).astype(np.uint8)


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
    takes. Of a picture more than 32 times as long as wide only the middle is resized,
    as it would else take any amount of memory.
    """
    picture = _middle(read(source), 32)
    short, long = sorted(picture.size)
    long = int(size * long / short)
    width, height = (size, long) if picture.width <= picture.height else (long, size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(picture.crop((left, top, left + size, top + size)))


def _middle(picture: Image.Image, most: int) -> Image.Image:
    """The middle of a picture, at most so many times as long as wide."""
    longest = most * min(picture.size)
    if max(picture.size) <= longest:
        return picture
    left, top = (max(0, length - longest) // 2 for length in picture.size)
    return picture.crop((left, top, picture.width - left, picture.height - top))


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
        rows, columns = area_weights(h, size), area_weights(w, size)
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


def area_weights(length: int, size: int) -> Float[np.ndarray, "length size"]:
    """What part of each new pixel each old one covers."""
    old, new = np.arange(length)[:, None], np.arange(size)[None, :] * length / size
    overlap = np.minimum(old + 1, new + length / size) - np.maximum(old, new)
    return (overlap.clip(0) * size / length).astype(np.float32)
