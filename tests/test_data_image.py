"""Pictures: ranges, files of every mode, crops, resizing and blurring."""

import io
import os
import resource
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dalle2_jax.data import image
from dalle2_jax.errors import UserError


def encode(picture, format="PNG", **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def noise(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


PHOTO = Image.fromarray(np.uint8(128 + 30 * noise(40, 48, 3)).clip(0, 255))


# Ranges


@pytest.mark.parametrize("xp", [np, jnp])
def test_ranges_and_back(xp):
    values = xp.arange(256, dtype="uint8")
    x = image.to_float(values)
    assert type(x) is type(values) and x.dtype == "float32"
    assert (float(x[0]), float(x[255])) == (-1, 1)
    back = image.to_uint8(x)
    assert type(back) is type(values) and back.dtype == "uint8"
    np.testing.assert_array_equal(back, values)


def test_to_uint8_clips_and_rounds():
    x = np.array([-7.0, -1, 0.4999 / 127.5 - 1, 0.5001 / 127.5 - 1, 1, 7], np.float32)
    np.testing.assert_array_equal(image.to_uint8(x), [0, 0, 0, 1, 255, 255])
    assert image.to_uint8(jnp.array([0.5], jnp.bfloat16))[0] == 191


def test_clip_normalize():
    x = jnp.ones((1, 2, 2, 3)) * jnp.array([-1.0, 0.0, 1.0])
    expected = (np.array([0, 0.5, 1]) - image.CLIP_MEAN) / image.CLIP_STD
    np.testing.assert_allclose(image.clip_normalize(x)[0, 0, 0], expected, rtol=1e-6)


# Files


def test_read_puts_alpha_on_white():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    palette = clear.convert("RGB").quantize(2)
    palette.info["transparency"] = palette.getpixel((1, 0))
    gray = Image.new("LA", (2, 1), (0, 0))
    gray.putpixel((1, 0), (40, 255))
    for picture, second in ((clear, (255, 0, 0)), (gray, (40, 40, 40))):
        read = image.read(encode(picture))
        assert read.mode == "RGB"
        assert [read.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), second]
    transparent = palette.info["transparency"]
    read = image.read(encode(palette, transparency=transparent))
    assert read.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_read_turns_every_mode_to_rgb(mode, tmp_path):
    picture = Image.new("RGB", (4, 4), "white").convert(mode)
    path = tmp_path / "picture.tiff"
    picture.save(path)
    read = image.read(path)
    assert read.mode == "RGB" and read.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        (np.array([[0, 256 * 100, 65535]], np.uint16), [0, 100, 255]),
        (np.array([[0, 256 * 100, 65535]], np.int32), [0, 100, 255]),
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.4, 1]], np.float32), [0, 102, 255]),
        (np.array([[0, 99.6, 255]], np.float32), [0, 100, 255]),
        (np.array([[0, 25600.5, 65535]], np.float32), [0, 100, 255]),
        (np.array([[-3, 0, 3]], np.float32), [0, 128, 255]),
        (np.array([[7e9, 7e9]], np.float32), [0, 0]),
        (np.array([[0, 0]], np.float32), [0, 0]),
    ],
)
def test_read_scales_16_and_32_bits(values, levels, tmp_path):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    for source in (tmp_path / "a.tiff", Image.fromarray(values)):
        assert np.asarray(image.read(source))[0, :, 1].tolist() == levels


def test_read_knows_16_bits_by_the_format():
    dark = b"P5 2 1 65535\n\x00\x64\x00\xff"  # of 65,535, though no more than 255
    assert np.asarray(image.read(dark)).max() == 0
    floats = b"Pf 2 1 -1.0\n" + np.array([0.4, 1], "<f4").tobytes()
    assert np.asarray(image.read(floats))[0, :, 0].tolist() == [102, 255]


def test_read_refuses_what_is_not_finite():
    values = np.array([[0, np.nan]], np.float32)
    with pytest.raises(UserError, match="not finite"):
        image.read(Image.fromarray(values))


def test_read_turns_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    picture = Image.new("RGB", (8, 4))
    assert image.read(encode(picture, "JPEG", exif=exif)).size == (4, 8)
    assert image.read(picture).size == (8, 4)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_read_takes_pictures_with_a_damaged_exif(format):
    data = encode(Image.new("RGB", (8, 4)), format, exif=b"Exif\0\0no TIFF")
    assert image.read(data).size == (8, 4)


def test_read_takes_the_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encode(
            frames[0], format, save_all=True, append_images=frames[1:], lossless=True
        )
        assert image.read(data).getpixel((1, 1)) == (255, 0, 0), format


@pytest.mark.parametrize("xp", [np, jnp])
def test_read_takes_arrays(xp):
    grey = xp.arange(12, dtype="uint8").reshape(3, 4)
    expected = np.asarray(grey)[..., None].repeat(3, -1)
    clear = xp.concatenate([expected, xp.zeros((3, 4, 1), "uint8")], -1)
    for array in (grey, grey[..., None], xp.asarray(expected)):
        np.testing.assert_array_equal(np.asarray(image.read(array)), expected)
    assert (np.asarray(image.read(clear)) == 255).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "type NoneType"),
        (7, "type int"),
        (np.zeros((4, 4, 3), np.float32), "dtype float32: give uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), "4 × 0 pixels"),
        ("/dev/zero", "is not a file"),
        ("/", "is not a file"),
        ("~/nothing/here.png", "/root/nothing/here.png"),
        ("\udcff.png", "there is no file"),
        ("a\0.png", "null byte"),
    ],
)
def test_read_says_what_is_no_picture(source, message, monkeypatch):
    monkeypatch.setenv("HOME", "/root")
    with pytest.raises(UserError, match=message):
        image.read(source)


def test_read_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UserError, match="is not a file"):
        image.read(tmp_path / "a.png")


@pytest.mark.parametrize("format", image.FORMATS)
def test_read_of_damaged_files_ends_in_a_line(format, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    rng = np.random.default_rng(0)
    whole = np.frombuffer(encode(PHOTO, format), np.uint8)
    said = []
    for most in (len(whole), 40) * 20:
        data = whole.copy()
        data[rng.integers(min(most, len(data)), size=3)] = rng.integers(256, size=3)
        try:
            image.read(data.tobytes())
        except UserError as error:
            said.append(str(error))
    assert said and not any("\n" in line for line in said)


def test_read_is_bounded(monkeypatch):
    bomb = io.BytesIO()
    info = PngInfo()
    info.add_itxt("a", "0" * 2**21, zip=True)
    Image.new("1", (1, 1)).save(bomb, "PNG", pnginfo=info)
    with pytest.raises(UserError, match="too large"):
        image.read(bomb.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(UserError, match=r"100 pixels\) exceeds limit of 80 pixels"):
        image.read(encode(Image.new("1", (10, 10))))


def test_read_keeps_the_picture_when_the_file_is_gone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture = Image.fromarray(np.arange(32, dtype=np.uint8).reshape(4, 8)).convert(
        "RGB"
    )
    for name in ("a.png", "a.tiff"):
        picture.save(tmp_path / name, exif=exif)
        read = image.read(tmp_path / name)
        (tmp_path / name).unlink()
        expected = np.asarray(picture)[::-1, ::-1]
        np.testing.assert_array_equal(np.asarray(read), expected)


def test_read_may_decode_jpegs_smaller():
    data = encode(Image.new("RGB", (640, 320)), "JPEG")
    assert image.read(data).size == (640, 320)
    assert image.read(data, at_least=80).size == (160, 80)
    assert image.read(data, at_least=81).size == (320, 160)


def test_read_names_what_is_wrong(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(UserError, match=r"there is no file .*a\.png"):
        image.read(path)
    path.write_bytes(b"not a picture")
    with pytest.raises(
        UserError, match=r"a\.png: not a picture in a known format \(PNG"
    ):
        image.read(path)
    with pytest.raises(UserError, match="not a picture"):
        image.read(b"")
    whole = encode(Image.fromarray(np.uint8(noise(64, 64) * 50)))
    with pytest.raises(UserError, match="truncated"):
        image.read(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot read"):
        image.read(whole[:50] + bytes(50) + whole[100:])


@pytest.mark.parametrize("extension", image.EXTENSIONS)
def test_read_knows_the_formats_of_all_extensions(extension, tmp_path):
    picture = Image.new("RGB", (16, 16), "white")
    path = tmp_path / f"a{extension}"
    mode = {".pgm": "L", ".pbm": "1"}.get(extension, "RGB")
    picture.convert(mode).save(path)
    assert image.read(path).getpixel((8, 8)) == (255, 255, 255)


def test_read_starts_no_program(monkeypatch):
    for name in ("Popen", "call", "check_call", "run"):
        monkeypatch.setattr(subprocess, name, lambda *_, **__: pytest.fail("started"))
    with pytest.raises(UserError, match="not a picture in a known format"):
        image.read(encode(Image.new("RGB", (8, 8)), "EPS"))
    assert {"PNG", "JPEG", "WEBP"} <= set(image.FORMATS)
    assert not {"EPS", "WMF", "PDF"} & set(image.FORMATS)


def test_save_png_keeps_metadata(tmp_path):
    path = tmp_path / "a.png"
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    image.save_png(path, picture, {"prompt": "ein Bär 🐻", "seed": "0"})
    with Image.open(path) as saved:
        assert saved.text == {"prompt": "ein Bär 🐻", "seed": "0"}
        np.testing.assert_array_equal(np.asarray(saved), picture)


def test_save_png_keeps_what_has_no_bytes_as_escapes(tmp_path):
    image.save_png(tmp_path / "a.png", Image.new("L", (1, 1)), {"image": "\udcff.png"})
    assert Image.open(tmp_path / "a.png").text["image"] == r"\udcff.png"


def test_save_png_replaces_only_what_it_may(tmp_path):
    picture = Image.new("L", (1, 1))
    image.save_png(tmp_path / "a.png", picture)
    with pytest.raises(FileExistsError):
        image.save_png(tmp_path / "a.png", picture, replace=False)
    assert len(list(tmp_path.iterdir())) == 1


def test_save_png_leaves_no_half_of_a_file(tmp_path):
    noisy = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError):
            image.save_png(tmp_path / "b.png", noisy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "b.png").exists()


def test_grid_lays_out_in_rows():
    pictures = np.stack([np.full((4, 6, 3), 10 * i, np.uint8) for i in range(5)])
    sheet = np.asarray(image.grid(pictures, 3, gap=1))
    assert sheet.shape == (4 + 1 + 4, 6 * 3 + 2, 3)
    assert (sheet[0, 0] == 0).all() and (sheet[5, 7] == 40).all()
    assert (sheet[5:, 14:] == 255).all() and (sheet[:, 6] == 255).all()
    assert image.grid(pictures[:1], 3).size == (6, 4)


def test_grid_of_many_pictures_shrinks_them(monkeypatch):
    monkeypatch.setattr(image, "GRID_PIXELS", 4 * 64)
    pictures = np.arange(16, dtype=np.uint8)[:, None, None, None]
    sheet = image.grid(pictures.repeat(8, 1).repeat(8, 2).repeat(3, 3), 4, gap=0)
    assert sheet.size == (16, 16) and sheet.getpixel((15, 15)) == (15, 15, 15)


# Crops


def test_crop_center_takes_the_middle():
    picture = Image.fromarray(np.arange(10, dtype=np.uint8)[None].repeat(4, 0))
    square = np.asarray(image.crop_square(picture))
    np.testing.assert_array_equal(square[0], [3, 4, 5, 6])


def test_crop_of_a_square_is_all_of_it():
    picture = Image.new("RGB", (4, 4))
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    for crop in image.CROPS:
        assert image.crop_square(picture, crop, rng) is picture
    assert rng.bit_generator.state == before


def test_crop_random_takes_any_square():
    picture = Image.fromarray(np.arange(6, dtype=np.uint8)[:, None].repeat(4, 1))
    rng = np.random.default_rng(0)
    tops = {
        np.asarray(image.crop_square(picture, "random", rng))[0, 0] for _ in "x" * 50
    }
    assert tops == {0, 1, 2}


def test_crop_resize_is_antialiased():
    stripes = np.zeros((64, 80, 3), np.uint8)
    stripes[:, ::2] = 255
    small = image.crop_resize(Image.fromarray(stripes), 8)
    assert small.shape == (8, 8, 3) and small.dtype == np.uint8
    assert abs(small[:, 1:-1].astype(int) - 127).max() <= 3
    one = image.crop_resize(Image.new("RGB", (1, 7), "red"), 8)
    assert (one == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("placing", "expected"),
    [
        ([[1, 0, 0], [0, 1, 0]], lambda x, white: x),
        ([[0, -1, 0], [1, 0, 0]], lambda x, white: np.rot90(x)),
        (
            [[1, 0, 0.25], [0, 1, 0]],
            lambda x, white: np.concatenate([x[:, 2:], white[:, :2]], axis=1),
        ),
    ],
)
def test_move(placing, expected):
    x = np.random.default_rng(0).integers(256, size=(8, 8, 3)).astype(np.uint8)
    moved = image.move(x, np.array(placing, float))
    np.testing.assert_array_equal(moved, expected(x, np.full_like(x, 255)))


def test_place_at_random_keeps_to_the_amount():
    rng = np.random.default_rng(0)
    maps = np.stack([image.place_at_random(0.2, rng) for _ in range(500)])
    scale = np.sqrt(np.linalg.det(maps[:, :, :2]))
    assert np.exp(-0.2) < scale.min() < 0.83 and 1.2 < scale.max() < np.exp(0.2)
    angle = np.arctan2(maps[:, 1, 0], maps[:, 0, 0])
    assert 0.19 < np.abs(angle).max() < 0.2
    assert 0.095 < np.abs(maps[:, :, 2]).max() < 0.1


# Resizing and blurring


@pytest.mark.parametrize("method", ["bicubic", "linear", "area", "nearest"])
def test_resize_keeps_what_is_constant(method):
    x = jnp.full((1, 12, 12, 2), 0.3)
    for size in (5, 12, 31):
        resized = image.resize(x, size, method)
        assert resized.shape == (1, size, size, 2)
        np.testing.assert_allclose(resized, 0.3, rtol=1e-5)


def test_resize_area_is_the_mean():
    x = jnp.asarray(noise(2, 8, 8, 3))
    means = x.reshape(2, 4, 2, 4, 2, 3).mean((2, 4))
    np.testing.assert_allclose(image.resize(x, 4, "area"), means, atol=1e-6)
    row = jnp.arange(3.0).reshape(1, 1, 3, 1).repeat(3, 1)
    np.testing.assert_allclose(
        image.resize(row, 2, "area")[0, 0, :, 0], [1 / 3, 5 / 3], rtol=1e-6
    )


def test_resize_bicubic_keeps_a_ramp():
    """Cubic kernels reproduce linear functions away from the borders."""
    ramp = jnp.arange(16.0).reshape(1, 1, 16, 1).repeat(16, 1)
    up = image.resize(ramp, 32)[0, 5, 6:-6, 0]
    np.testing.assert_allclose(up, (np.arange(32) / 2 - 0.25)[6:-6], rtol=1e-5)
    down = image.resize(ramp, 8)[0, 4, 2:-2, 0]
    np.testing.assert_allclose(down, (np.arange(8) * 2 + 0.5)[2:-2], rtol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("size", [5, 8, 13, 20, 40, 51])
@pytest.mark.parametrize("method", ["bicubic", "linear"])
def test_resize_is_torchs(method, size):
    torch = pytest.importorskip("torch")
    x = noise(2, 20, 20, 3)
    mode = {"bicubic": "bicubic", "linear": "bilinear"}[method]
    theirs = torch.nn.functional.interpolate(
        torch.tensor(x).permute(0, 3, 1, 2),
        size=(size, size),
        mode=mode,
        antialias=True,
    )
    ours = image.resize(jnp.asarray(x), size, method)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-5)


def test_blur_of_a_point_is_the_kernel():
    point = jnp.zeros((1, 7, 7, 2)).at[0, 3, 3, 1].set(1)
    blurred = np.asarray(image.gaussian_blur(point))
    side = np.exp(-1 / (2 * 0.6**2))
    kernel = np.array([side, 1, side]) / (1 + 2 * side)
    np.testing.assert_allclose(
        blurred[0, 2:5, 2:5, 1], np.outer(kernel, kernel), rtol=1e-5
    )
    assert blurred.sum() == pytest.approx(1, rel=1e-5) and not blurred[..., 0].any()


def test_blur_mirrors_at_the_border():
    x = jnp.asarray(noise(1, 6, 6, 1))
    wide = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    np.testing.assert_allclose(
        image.gaussian_blur(x, 5, 1.0),
        image.gaussian_blur(wide, 5, 1.0)[:, 2:-2, 2:-2],
        atol=1e-6,
    )


@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (7, 5), (24, 24), (500, 29)])
def test_clip_sees_what_transformers_shows_it(shape):
    """Their processor, in the form that works with Pillow, here without PyTorch."""
    transformers = pytest.importorskip("transformers")
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
    )
    theirs = processor(Image.fromarray(picture), return_tensors="np").pixel_values
    ours = image.clip_input(picture, 24)[None]
    normal = image.clip_normalize(image.to_float(jnp.asarray(ours)))
    np.testing.assert_allclose(normal, theirs.transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 10**6), (10**6, 1)])
def test_long_pictures_take_no_memory(shape):
    stripe = np.zeros((*shape, 3), np.uint8)
    stripe.reshape(-1, 3)[stripe.size // 6 - 99 : stripe.size // 6 + 99] = 255
    assert (image.clip_input(stripe, 64) == 255).all()
    assert image.square(stripe, 64).shape == (64, 64, 3)
    assert image.on_canvas(image.read(stripe), 64, 1.5, (0, 0))[0].shape == (64, 64, 3)


def test_a_canvas_holds_the_whole_picture():
    picture = Image.new("RGB", (40, 20), (9, 8, 7))
    canvas, empty = image.on_canvas(picture, 32, 2.0, (1.0, 0.0))
    assert canvas.shape == (32, 32, 3) and (~empty).sum() == 16 * 8
    assert not empty[:8, 16:].any() and (canvas[:8, 16:] == (9, 8, 7)).all()
