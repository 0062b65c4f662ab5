"""Small pictures as upsamplers meet them: blurred, resampled, noisy and compressed.

The degradation of BSRGAN (Zhang et al. 2021, arXiv 2103.14006, section 3), without its
camera sensor noise. On the host, in float32 from 0 to 255.
"""

import io

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from scipy import signal

from dalle2_jax import rules

Picture = Float[np.ndarray, "h w 3"]
Kernel = Float[np.ndarray, "k k"]
Range = tuple[float | int, float | int]

STEPS = ("isotropic", "anisotropic", "shrink", "fit", "noise", "jpeg")
# Antialiased, but for "nearest".
METHODS = {
    "area": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_STRENGTHS = rules.pair(rules.number(0.01, 100), ordered=True)
RULES = {
    "isotropic": _STRENGTHS,
    "anisotropic": _STRENGTHS,
    "noise": rules.pair(rules.whole(0, 255), ordered=True),
    "jpeg": rules.pair(rules.whole(1, 100), ordered=True),
    "jpeg_chance": rules.CHANCE,
}
NOISES = {"correlated": 0.2, "color": 0.4, "gray": 0.4}  # how often each


def bsr(
    picture: UInt8[np.ndarray, "h h 3"],
    rng: np.random.Generator,
    *,
    size: int,
    isotropic: Range = (0.1, 2.8),
    anisotropic: Range = (0.5, 8.0),
    noise: tuple[int, int] = (1, 25),
    jpeg: tuple[int, int] = (30, 95),
    jpeg_chance: float | int = 0.75,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """A square picture degraded in a random order (section 3.4), at a smaller size.

    Two blurs, two resizings, noise and JPEG are shuffled; JPEG once more is the last.
    Each strength is drawn evenly from its range; those by default are the paper's for a
    quarter of the side.

    Args:
      isotropic: standard deviation of the first blur, in pixels.
      anisotropic: variance of the second one along each of its axes.
      noise: standard deviation, of 255.
      jpeg: qualities.
      jpeg_chance: of JPEG within the order.

    Raises:
      UserError: a range that is none, or a strength that can't be.
    """
    given = {
        "isotropic": isotropic,
        "anisotropic": anisotropic,
        "noise": noise,
        "jpeg": jpeg,
        "jpeg_chance": jpeg_chance,
    }
    rules.check(given, RULES, "bsr")

    def shrink(x: np.ndarray) -> np.ndarray:
        """To a random side, down to half of the one that is asked for (3.2)."""
        method = rng.choice([*METHODS, "nearest"])
        if method == "nearest":  # of a picture that may be too sharp for it
            scale = len(x) / size
            x = blur(x, gaussian(rng.uniform(0.1, 0.6 * scale) ** 2 * np.eye(2), 10))
            return resize(x, size, method)
        return resize(x, round(len(x) / rng.uniform(1, 2 * len(x) / size)), method)

    def compress(x: np.ndarray) -> np.ndarray:
        return through_jpeg(x, int(rng.integers(*jpeg, endpoint=True)))

    def one(step: str, x: np.ndarray) -> np.ndarray:
        match step:
            case "isotropic":
                covariance = rng.uniform(*isotropic) ** 2 * np.eye(2)
                return blur(x, gaussian(covariance, _radius(rng)))
            case "anisotropic":
                covariance = rotated(
                    rng.uniform(0, np.pi), rng.uniform(*anisotropic, 2)
                )
                return blur(x, gaussian(covariance, _radius(rng)))
            case "shrink":
                return shrink(x)
            case "fit":
                return resize(x, size, rng.choice(list(METHODS)))
            case "noise":
                kind = rng.choice(list(NOISES), p=list(NOISES.values()))
                level = int(rng.integers(*noise, endpoint=True))
                return add_noise(x, kind, level, rng)
            case "jpeg":
                return compress(x) if rng.random() < jpeg_chance else x

    x = picture.astype(np.float32)
    for step in draw_order(rng):
        x = one(step, x).clip(0, 255)
    return compress(x).astype(np.uint8)


def draw_order(rng: np.random.Generator) -> list[str]:
    """STEPS in a random order, the exact size after the random one."""
    order = [STEPS[i] for i in rng.permutation(len(STEPS))]
    first, second = sorted((order.index("shrink"), order.index("fit")))
    order[first], order[second] = "shrink", "fit"
    return order


# Blur (section 3.1)


def gaussian(covariance: Float[np.ndarray, "2 2"], radius: int) -> Kernel:
    """The kernel of side 2 · radius + 1 of a covariance of (x, y), of sum 1."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    offsets = np.stack([x, y], axis=-1).astype(float)
    distance = np.einsum("hwi,ij,hwj->hw", offsets, np.linalg.inv(covariance), offsets)
    weights = np.exp(-distance / 2)
    return weights / weights.sum()


def rotated(
    angle: float, variances: Float[np.ndarray, " 2"]
) -> Float[np.ndarray, "2 2"]:
    """The covariance with these variances along axes turned by an angle."""
    cos, sin = np.cos(angle), np.sin(angle)
    axes = np.array([[cos, -sin], [sin, cos]])
    return axes * variances @ axes.T


def blur(x: Picture, kernel: Kernel) -> Picture:
    """Convolution; beyond the border is the mirror image, less its first pixel."""
    radius = len(kernel) // 2
    x = np.pad(x, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    kernel = kernel[..., None].astype(np.float32)
    return signal.fftconvolve(x, kernel, mode="valid", axes=(0, 1))


def _radius(rng: np.random.Generator) -> int:
    """Of kernels of 7 × 7 to 21 × 21 pixels."""
    return int(rng.integers(3, 10, endpoint=True))


# Resizing (section 3.2), noise and JPEG (section 3.3)


def resize(x: Picture, size: int, method: str) -> Float[np.ndarray, "{size} {size} 3"]:
    """By one of METHODS, or "nearest": points at the new pixels' centres.

    Those lie between old pixels as often as not, and so are interpolated linearly,
    which keeps the picture where it is.
    """

    def one(channel: Image.Image) -> Image.Image:
        if method != "nearest":
            return channel.resize((size, size), METHODS[method])
        x_scale, y_scale = channel.width / size, channel.height / size
        return channel.transform(
            (size, size),
            Image.Transform.AFFINE,
            (x_scale, 0, 0, 0, y_scale, 0),
            Image.Resampling.BILINEAR,
        )

    channels = np.moveaxis(x, -1, 0)
    return np.stack([one(Image.fromarray(c)) for c in channels], axis=-1)


def add_noise(
    x: Picture, kind: str, level: float | int, rng: np.random.Generator
) -> Picture:
    """White Gaussian noise of a standard deviation of `level`.

    That of each channel is its own ("color"), the same in all ("gray"), or in between
    ("correlated": of a random covariance whose largest variance is level²).
    """
    h, w, _ = x.shape
    if kind == "gray":
        z = rng.standard_normal((h, w, 1), np.float32)
    else:
        z = rng.standard_normal((h, w, 3), np.float32)
    if kind == "correlated":
        axes, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        deviations = np.sqrt(rng.random(3))
        z = z @ (axes * deviations / deviations.max()).T.astype(np.float32)
    return x + np.float32(level) * z


def through_jpeg(x: Picture, quality: int) -> Picture:
    """What a JPEG file of that quality keeps."""
    file = io.BytesIO()
    pixels = Image.fromarray(x.clip(0, 255).round().astype(np.uint8))
    pixels.save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file, formats=["JPEG"]), np.float32)
