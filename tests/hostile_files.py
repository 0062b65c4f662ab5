"""Files that are damaged or meant to do harm: strategies of Hypothesis for them."""

import functools
import io
import json
import tarfile

import hypothesis.strategies as st
import numpy as np
from PIL import Image

# What a size, an offset or a count is overwritten with, in either byte order.
CLAIMS = [
    *(b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0"),
    *(b"\xff\xff", b"\0\0", b"\0\0\xea\x60", b"\x60\xea\0\0", b"99999999", b"-1"),
]
FORMATS = [
    *("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM"),
    *("EPS", "PDF", "ICO", "ICNS", "TGA", "PCX", "SGI", "DDS", "MSP", "XBM", "MPO"),
]


@st.composite
def spoiled(draw, data: bytes) -> bytes:
    """Bytes that were cut, flipped, overwritten, lost, put in or repeated."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        # Headers are at the beginning, and a file may be large.
        most = draw(st.sampled_from([64, 1024, len(found)]))
        at = draw(st.integers(0, max(0, min(most, len(found)) - 1)))
        length = draw(st.sampled_from([1, 4, 100, 512]))
        match draw(st.sampled_from(["cut", "flip", "set", "lose", "put in", "repeat"])):
            case "cut":
                del found[at:]
            case "flip":
                found[at : at + 1] = bytes(b ^ 1 << length % 7 for b in found[at:][:1])
            case "set":
                claim = draw(st.sampled_from(CLAIMS))
                found[at : at + len(claim)] = claim
            case "lose":
                del found[at : at + length]
            case "put in":
                found[at:at] = draw(st.binary(min_size=1, max_size=64))
            case "repeat":
                found[at:at] = found[at : at + length] * draw(st.integers(1, 8))
    return bytes(found)


def encode(picture: Image.Image, form: str, **options) -> bytes:
    """A picture's file."""
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


@functools.cache
def pictures() -> dict[str, bytes]:
    """A file of each format and mode that Pillow writes, also of those not read."""
    values = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    rgb = Image.fromarray(values)
    exif = rgb.getexif()
    exif[0x0112] = 6  # lies on its side
    deep = Image.fromarray(values[..., 0].astype(np.uint16) * 256)
    real = Image.fromarray(values[..., 0].astype(np.float32))
    found = {
        "PNG palette": encode(rgb.quantize(8), "PNG", transparency=3),
        "PNG 16": encode(deep, "PNG"),
        "PNG animated": encode(
            rgb, "PNG", save_all=True, append_images=[rgb.rotate(9)]
        ),
        "GIF animated": encode(
            rgb, "GIF", save_all=True, append_images=[rgb.rotate(9)]
        ),
        "JPEG progressive": encode(rgb, "JPEG", progressive=True, exif=exif),
        "JPEG CMYK": encode(rgb.convert("CMYK"), "JPEG"),
        "WEBP lossless": encode(rgb.convert("RGBA"), "WEBP", lossless=True),
        "TIFF LZW": encode(rgb, "TIFF", compression="tiff_lzw"),
        "TIFF deflate": encode(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "TIFF 32": encode(deep.convert("I"), "TIFF"),
        "TIFF float": encode(real, "TIFF"),
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="//a/b"/></svg>',
        "WMF": b"\xd7\xcd\xc6\x9a" + bytes(100),
    }
    for form in FORMATS:
        for mode in ("RGB", "RGBA", "L", "1"):
            try:
                options = {"speed": 10} if form == "AVIF" else {}
                found[f"{form} {mode}"] = encode(rgb.convert(mode), form, **options)
            except (OSError, ValueError, KeyError):
                continue  # it is not of that mode, or has no encoder here
    return found


@st.composite
def odd_members(draw) -> bytes:
    """A member of a tar, with a checksum that is right and values that are not."""
    info = tarfile.TarInfo(draw(st.sampled_from(["z.png", "z.txt", "../../z.png", ""])))
    data = draw(st.binary(max_size=700))
    kinds = st.sampled_from(
        [b"0", b"\0", b"1", b"2", b"5", b"6", b"7", b"g", b"S", b"V"]
    )
    info.type = draw(kinds | st.binary(min_size=1, max_size=1))
    info.linkname = draw(st.sampled_from(["", "0.png", "/dev/zero", "z.png"]))
    claims = [0, 1, -1, -512, 2**33, 10**11, 2**62, -(2**62)]
    info.size = draw(st.just(len(data)) | st.sampled_from(claims))
    header = info.tobuf(tarfile.GNU_FORMAT)
    return header + data + bytes(-len(data) % tarfile.BLOCKSIZE)


@st.composite
def odd_extensions(draw) -> bytes:
    """What extends the next header of a tar: records of pax, or a long name."""
    keys = st.sampled_from(
        ["size", "path", "linkpath", "GNU.sparse.major", "GNU.sparse"]
    )
    values = st.sampled_from(["-5", "1e9", "9" * 30, "0", "a.png", "x\0y", "", "²"])
    data = b""
    for _ in range(draw(st.integers(0, 3))):
        text = f" {draw(keys)}={draw(values)}\n".encode()
        length = draw(st.just(len(text) + 2) | st.sampled_from([0, -3, 10**9]))
        data += str(length).encode() + text
    data = draw(st.just(data) | st.binary(max_size=600))
    info = tarfile.TarInfo("extension")
    info.type = draw(st.sampled_from([b"x", b"X", b"L", b"K", b"g"]))
    info.size = len(data)
    header = info.tobuf(tarfile.GNU_FORMAT)
    return header + data + bytes(-len(data) % tarfile.BLOCKSIZE)


TEXTS = st.one_of(
    st.text(max_size=30),
    st.text(
        "a \n\r\0\x85\u0301\u2028\u202e\u3042\ud83d\udce9\ufeff\U0001f600", max_size=9
    ),
    st.just("a" * 100_001),
)
VALUES = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
        st.sampled_from([10**30, -1, 2**63, 1e308]),
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3)
    ),
    max_leaves=6,
)


def objects(*names: str) -> st.SearchStrategy[dict]:
    """Objects of JSON with some of these names, and others."""
    known = st.fixed_dictionaries({}, optional={name: VALUES for name in names})
    return st.builds(dict.__or__, st.dictionaries(TEXTS, VALUES, max_size=2), known)


def lines(*names: str) -> st.SearchStrategy[bytes]:
    """Lines of a file of JSON, or of what is not."""
    made = objects(*names).map(lambda value: json.dumps(value).encode())
    return st.one_of(
        made,
        made.flatmap(spoiled),
        st.binary(max_size=100),
        st.sampled_from([b"[" * 10_000, b'{"a":' * 5_000, b"1" * 5_000, b"\xff\xfe{"]),
    ).map(lambda line: line.replace(b"\n", b""))
