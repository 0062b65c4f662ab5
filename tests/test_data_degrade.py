"""Degradation: each part beside scipy or Pillow, and what the whole of it may do."""

import io
from collections import Counter
from functools import partial

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from dalle2_jax.data import degrade, shapes
from dalle2_jax.data.batches import batches
from dalle2_jax.data.rows import Rows
from dalle2_jax.data.sources import open_source
from dalle2_jax.errors import UserError

# Of configs/upsampler.py.
LIGHT = {
    "isotropic": (0.025, 0.7),
    "anisotropic": (0.125, 2.0),
    "noise": (1, 2),
    "jpeg": (80, 95),
}


def chance(*seed):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def picture():
    rng = chance(0)
    return shapes.render(shapes.sample_scene(rng), 128)


@pytest.fixture
def noise_picture():
    return chance(1).uniform(0, 255, (24, 20, 3)).astype(np.float32)


@pytest.mark.parametrize("angle", [0.0, 0.4, 2.0])
@pytest.mark.parametrize("variances", [(0.5, 8.0), (4.0, 4.0)])
def test_the_kernel_is_the_normal_density(angle, variances):
    covariance = degrade.rotated(angle, np.array(variances))
    kernel = degrade.gaussian(covariance, 10)
    y, x = np.mgrid[-10:11, -10:11]
    density = stats.multivariate_normal([0, 0], covariance).pdf(np.dstack([x, y]))
    np.testing.assert_allclose(kernel, density / density.sum(), rtol=1e-10)
    # Its first axis is where the angle points, counted from x towards y.
    axis = np.array([np.cos(angle), np.sin(angle)])
    assert axis @ covariance @ axis == pytest.approx(variances[0])


def test_blur_is_scipys_convolution(noise_picture):
    kernel = degrade.gaussian(degrade.rotated(0.7, np.array([1.0, 6.0])), 5)
    kernel[2, 3] += 0.2  # not symmetric: correlation would differ
    expected = ndimage.convolve(
        noise_picture.astype(np.float64), kernel[..., None], mode="mirror"
    )
    blurred = degrade.blur(noise_picture, kernel)
    assert blurred.dtype == np.float32
    np.testing.assert_allclose(blurred, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "pillow"),
    [
        ("area", Image.Resampling.BOX),
        ("bilinear", Image.Resampling.BILINEAR),
        ("bicubic", Image.Resampling.BICUBIC),
    ],
)
@pytest.mark.parametrize("size", [7, 31])
def test_resizing_is_pillows_without_rounding(method, pillow, size, noise_picture):
    pixels = (64 + noise_picture / 2).round()  # Pillow clips in between, too
    resized = degrade.resize(pixels, size, method)
    file = Image.fromarray(pixels.astype(np.uint8)).resize((size, size), pillow)
    assert np.abs(resized - np.asarray(file, np.float32)).max() <= 1.01
    assert method == "area" or (resized != resized.round()).any()


@pytest.mark.parametrize("size", [6, 8, 16])
def test_nearest_takes_points_and_keeps_the_picture_in_place(size):
    y, x = np.mgrid[:24, :24].astype(np.float32)
    ramp = np.stack([x, y, x + y], axis=-1)
    at = (np.arange(size) + 0.5) * 24 / size - 0.5
    points = degrade.resize(ramp, size, "nearest")
    np.testing.assert_allclose(points[..., 0], np.tile(at, (size, 1)), atol=1e-4)
    np.testing.assert_allclose(points[..., 1], np.tile(at, (size, 1)).T, atol=1e-4)
    stripes = np.broadcast_to((x[..., None] % 4 < 2) * 255.0, ramp.shape)
    points = degrade.resize(stripes.astype(np.float32), size, "nearest")
    assert size == 16 or points.std() > 60 or np.ptp(points) == 0  # aliased, not grey


@pytest.mark.parametrize("quality", [30, 95])
def test_jpeg_is_pillows(quality, picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    expected = np.asarray(Image.open(file))
    ours = degrade.through_jpeg(picture.astype(np.float32), quality)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("kind", degrade.NOISES)
def test_noise(kind):
    grey = np.full((128, 128, 3), 127, np.float32)
    for seed in range(5):
        noise = degrade.add_noise(grey, kind, 10, chance(seed)) - grey
        values = noise.reshape(-1, 3)
        covariance = np.cov(values.T)
        assert np.abs(values.mean(0)).max() < 0.5
        largest = np.linalg.eigvalsh(covariance)[-1]
        match kind:
            case "color":
                np.testing.assert_allclose(covariance, 100 * np.eye(3), atol=6)
            case "gray":
                np.testing.assert_allclose(covariance, 100 * np.ones((3, 3)), atol=6)
            case "correlated":
                assert largest == pytest.approx(100, rel=0.06)
                assert np.abs(covariance - np.diag(np.diag(covariance))).max() > 1
        # White: neighbours do not know each other.
        assert (
            abs(np.corrcoef(noise[:, 1:, 0].ravel(), noise[:, :-1, 0].ravel())[0, 1])
            < 0.03
        )


def test_all_orders_occur_equally_often():
    rng = chance(2)
    orders = Counter(tuple(degrade.draw_order(rng)) for _ in range(18_000))
    assert len(orders) == 6 * 5 * 4 * 3 * 2 / 2
    assert all(o.index("shrink") < o.index("fit") for o in orders)
    assert stats.chisquare(list(orders.values())).pvalue > 1e-3


def test_the_same_chance_gives_the_same_picture(picture):
    one, same, other = (degrade.bsr(picture, chance(5, k), size=32) for k in (1, 1, 2))
    assert one.shape == (32, 32, 3) and one.dtype == np.uint8
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize("size", [32, 48])
def test_a_degraded_picture_shows_the_same(picture, size):
    """On average it is the picture, blurred, in its place and of its colours."""
    clean = degrade.resize(picture.astype(np.float32), size, "area")
    draws = [degrade.bsr(picture, chance(6, k), size=size) for k in range(40)]
    mean = np.mean(draws, axis=0)
    assert np.corrcoef(mean.ravel(), clean.ravel())[0, 1] > 0.9
    assert np.abs(mean.mean((0, 1)) - clean.mean((0, 1))).max() < 4
    moves = np.argwhere(np.ones((5, 5))) - 2
    errors = [np.abs(np.roll(mean, move, (0, 1)) - clean).mean() for move in moves]
    assert (moves[np.argmin(errors)] == 0).all()


def test_strengths_matter(picture):
    clean = degrade.resize(picture.astype(np.float32), 32, "area")

    def error(**strengths):
        draws = [
            degrade.bsr(picture, chance(7, k), size=32, **strengths) for k in range(8)
        ]
        return np.mean([np.abs(d - clean).mean() for d in draws])

    weak = error(**LIGHT)
    strong = {"isotropic": (4, 4), "anisotropic": (30, 30), "noise": (25, 25)}
    strong |= {"jpeg": (5, 5)}
    for name, value in strong.items():
        assert error(**LIGHT | {name: value}) > 1.2 * weak
    assert error() > 1.5 * weak


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        (
            {"jpeg": (95, 30)},
            r"bsr.jpeg is \(95, 30\): must be two of a whole number from 1 to 100",
        ),
        ({"isotropic": (0.0, 1.0)}, "bsr.isotropic is .* from 0.01"),
        ({"noise": (-1, 5)}, "bsr.noise is .* from 0 to 255, the smaller one first"),
    ],
)
def test_strengths_that_cannot_be_are_refused(picture, strengths, message):
    with pytest.raises(UserError, match=message):
        degrade.bsr(picture, chance(0), size=16, **strengths)


def test_batches_carry_it_whatever_the_threads_and_processes():
    make_low = partial(degrade.bsr, size=4)
    rows = Rows({"image": 32}, crop_fraction=0.5, degrade=make_low)

    def take(step=0, **options):
        options = {"batch_size": 4, "seed": 1, "step": step, **options}
        iterator = batches(open_source("shapes"), None, rows, **options)
        return [next(iterator) for _ in range(2)]

    whole = take()
    assert whole[0]["low"].shape == (4, 4, 4, 3) and whole[0]["low"].dtype == np.uint8
    assert whole[0]["image"].shape == (4, 16, 16, 3)
    parts = [take(process_index=i, process_count=2, threads=i + 1) for i in range(2)]
    for k in range(2):
        joined = np.concatenate([part[k]["low"] for part in parts])
        np.testing.assert_array_equal(joined, whole[k]["low"])
    np.testing.assert_array_equal(take(step=1)[0]["low"], whole[1]["low"])
