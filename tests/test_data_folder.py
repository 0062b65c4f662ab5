"""A folder: which pictures and captions are found, and what is left out."""

import json
import os
import time

import pytest
from PIL import Image

from dalle2_jax.data import sources
from dalle2_jax.data.examples import BadExample
from dalle2_jax.data.image import EXTENSIONS
from dalle2_jax.data.sources import open_source
from dalle2_jax.errors import UserError
from tests.pictures import every, png


def write(folder, *names):
    """Writes captioned pictures: NAME.png and NAME.txt, "picture NAME"."""
    for name in names:
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png())
        file.with_suffix(".txt").write_text(f"picture {name}")


def keys(source):
    return [source[i]["key"] for i in range(len(source))]


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    return tmp_path


def test_folder_with_sidecars(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "3.JPG").write_bytes(png(3))
    for name in ("0", "1", "deep/3"):
        (folder / f"{name}.txt").write_text(f" picture\t{name} \n")
    (folder / "README.txt").write_text("not a caption")
    source = open_source("folder", folder)
    assert source.left_out == {
        "pictures without a caption": 1,  # 2.png
        "captions without a picture": 1,
    }
    assert every(source) == {
        "picture 0": png(0),
        "picture 1": png(1),
        "picture deep/3": png(3),
    }


def test_folder_with_metadata(folder):
    lines = [
        {"file_name": "0.png", "caption": "zero"},
        {"file_name": "./1.png", "text": ["one", "uno"]},
        {"file_name": "2.png", "caption": " "},
        {"file_name": "2.png", "caption": 7},
        {"file_name": "2.png"},
        {"caption": "of nothing"},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n\nno JSON\n"
    (folder / "metadata.jsonl").write_text(text)
    source = open_source("folder", folder)
    assert source[0] == {"image": png(0), "caption": "zero", "key": "0.png"}
    assert source[1]["caption"] == ["one", "uno"]
    reasons = []
    for i in range(2, len(source)):
        with pytest.raises(BadExample) as bad:
            source[i]
        reasons.append(bad.value.reason)
    assert reasons == [
        "empty caption",
        "caption not text",
        "no caption",
        "metadata without file_name",
        "metadata not JSON",
    ]
    assert sources.captions(source) == ["zero", "one", "uno"]
    assert source.left_out == {}
    (folder / "3.png").write_bytes(png(3))
    (folder / "3.txt").write_text("unread")
    assert open_source("folder", folder).left_out == {
        "pictures without a caption": 1,
        ".txt files": 1,
    }


def test_pictures_of_every_extension_in_any_case(tmp_path):
    for i, extension in enumerate(EXTENSIONS):
        name = f"{i:02d}"
        file = tmp_path / (name + (extension.upper() if i % 2 else extension))
        Image.new("RGB", (8, 6)).save(file, Image.registered_extensions()[extension])
        text = "TXT" if i % 3 else "txt"
        (tmp_path / f"{name}.{text}").write_text(f"picture {i}")
    source = open_source("folder", tmp_path, holdout=0.0)
    numbers = range(len(EXTENSIONS))
    assert [source[i]["caption"] for i in numbers] == [f"picture {i}" for i in numbers]


def test_what_is_left_out_is_counted(folder, caplog):
    write(folder, "a")
    for name in ("b.heic", "b.txt", "c.HEIC", "d.psd", "e"):
        (folder / name).write_bytes(b"x")
    for i in range(9):
        (folder / f"f.{i}").touch()
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "nowhere.png").symlink_to("nowhere")
    (folder / "itself").symlink_to("itself")
    start = time.monotonic()
    source = open_source("folder", folder)
    assert keys(source) == ["a.png"] and time.monotonic() - start < 30
    assert source.left_out == {
        "pictures without a caption": 3,
        "captions without a picture": 1,
        "pipes, devices and broken links": 4,
        ".heic files": 2,
        **{f".{i} files": 1 for i in range(6)},
        "other files": 5,  # e, d.psd and three more: only so many kinds are told
    }
    assert "left out: " in caplog.text and "2 .heic files" in caplog.text


def test_hidden_files_are_not_data(tmp_path):
    hidden = (".a", ".ipynb_checkpoints/b", "__MACOSX/._c", "d/._e", "d/.f/g", "._h")
    write(tmp_path / ".data", *hidden, "d/i", "..j/k", "l.m")
    source = open_source("folder", tmp_path / ".data")
    assert keys(source) == ["d/i.png", "l.m.png"] and source.left_out == {}


def test_every_folder_is_read_once(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    write(data, "z/b", "a")
    write(other, "deep/c")
    (data / "loop").symlink_to(".")
    (data / "up").symlink_to("..")  # would have `data` in it, and `other`
    (data / "root").symlink_to("/")
    (data / "c").symlink_to("z")  # comes before z
    (data / "z" / "back").symlink_to(data)
    (data / "linked").symlink_to(other)
    (data / "linked2").symlink_to(other)
    (other / "data").symlink_to(data)
    start = time.monotonic()
    source = open_source("folder", data)
    assert keys(source) == ["a.png", "linked/deep/c.png", "z/b.png"]
    assert source.left_out == {"links to folders that are read already": 7}
    assert time.monotonic() - start < 30
    # A picture may be named by another of its names, and by that of a hidden one.
    write(data, ".hidden/h")
    lines = [{"file_name": f, "text": f} for f in ("c/b.png", ".hidden/h.png")]
    text = "\n".join(map(json.dumps, lines))
    (data / "metadata.jsonl").write_text(text)
    assert keys(open_source("folder", data)) == ["c/b.png", ".hidden/h.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
def test_a_folder_that_cannot_be_read_is_counted(tmp_path):
    write(tmp_path, "a", "locked/b")
    (tmp_path / "locked").chmod(0)
    source = open_source("folder", tmp_path)
    (tmp_path / "locked").chmod(0o700)
    assert source.left_out == {"folders that cannot be read": 1}


def test_several_captions_are_one_a_line(folder):
    text = "a red circle\r\n\r\n  a circle \n\ra disc\n"
    (folder / "0.txt").write_bytes(text.encode("utf-8-sig"))
    (folder / "1.txt").write_text("\n one \n")
    source = open_source("folder", folder)
    assert source[0]["caption"] == ["a red circle", "a circle", "a disc"]
    assert source[1]["caption"] == "one"
    assert sources.captions(source) == ["a red circle", "a circle", "a disc", "one"]


def test_names_that_are_not_utf8(tmp_path):
    for name in (b"caf\xe9", b"\xff/\xfe", "é".encode()):
        file = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(file), exist_ok=True)
        for extension, data in ((b".png", png()), (b".txt", b"x")):
            with open(file + extension, "wb") as new:
                new.write(data)
    source = open_source("folder", tmp_path)
    assert keys(source) == ["caf\\udce9.png", "é.png", "\\udcff/\\udcfe.png"]
    lines = [{"file_name": name, "text": "y"} for name in ("caf\udce9.png", "é.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_source("folder", tmp_path)
    assert [source[i]["caption"] for i in range(2)] == ["y", "y"]
    assert keys(source) == ["caf\\udce9.png", "é.png"]
    for key in ("caf\\udce9.png", "caf\udce9.png"):
        (tmp_path / "keep.jsonl").write_text(json.dumps({"key": key}))
        kept = open_source("folder", tmp_path, keep=tmp_path / "keep.jsonl")
        assert keys(kept) == ["caf\\udce9.png"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "data", "a", "b")
    (tmp_path / "keep.jsonl").write_text('{"key": "b.png"}')
    source = open_source("folder", "~/data", keep="~/keep.jsonl")
    assert keys(source) == ["b.png"]


def test_metadata_that_is_hostile(folder):
    lines = [
        b'{"file_name": "0.png", "text": "good"}',
        b'{"file_name": "0.png", "text": "good", "score": NaN}',
        b'{"file_name": "0.png", "caption": null, "text": "good"}',
        b'{"file_name": "0.png", "caption": " ", "text": "good"}',
        b'{"file_name": "0.png", "caption": [null, "good"]}',
        b'{"file_name": "0.png", "text": "\\ud83d"}',
        b'{"file_name": "0.png", "text": "' + b"a " * 100_000 + b'"}',
        b'{"file_name": "0.png", "text": "one", "text": "two"}',
        b'{"file_name": ["0.png"], "text": "x"}',
        b"[" * 100_000,
        b'{"a":' * 500,
    ]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    source = open_source("folder", folder, holdout=0.0)
    found = []
    for i in range(len(source)):
        try:
            found.append(source[i]["caption"])
        except BadExample as bad:
            found.append(bad.reason)
    assert found == [
        *["good"] * 5,
        "caption not UTF-8",
        "caption too long",
        "metadata not JSON",
        "metadata without file_name",
        *["metadata not JSON"] * 2,
    ]
    with open(folder / "metadata.jsonl", "r+b") as file:
        file.truncate(2**36)  # a hole of 64 GiB
    with pytest.raises(UserError, match=r"line 11 is longer than 16,777,216 bytes"):
        open_source("folder", folder)


def test_files_that_are_too_large_are_bad(folder):
    for name in ("0.txt", "1.png"):
        with open(folder / name, "wb") as file:
            file.truncate(2**37)
    (folder / "1.txt").write_text("x")
    source = open_source("folder", folder)
    for i, limit in enumerate(("1,048,576", "536,870,912")):
        with pytest.raises(BadExample, match=f"cannot read .larger than {limit} byt"):
            source[i]


def test_captions_that_are_not_utf8_are_bad(folder):
    (folder / "0.txt").write_bytes("café".encode("latin-1"))
    (folder / "1.txt").write_bytes("café".encode("utf-8-sig"))
    source = open_source("folder", folder)
    with pytest.raises(BadExample, match="caption not UTF-8: .*0.png"):
        source[0]
    assert source[1]["caption"] == "café"
    lines = (
        b'{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": "\xe9"}'
    )
    (folder / "metadata.jsonl").write_bytes(lines)
    source = open_source("folder", folder)
    assert source[0]["caption"] == "a"
    with pytest.raises(BadExample, match="caption not UTF-8: .* line 2"):
        source[1]


def test_folder_errors(folder, tmp_path):
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        open_source("folder", tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=r"no captions: give it a meta.*; left out: 3 pic"
    ):
        open_source("folder", folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no pictures \(\.png.*\)$"):
        open_source("folder", tmp_path / "empty")
    (tmp_path / "empty" / "a.heic").touch()
    with pytest.raises(UserError, match=r"no pictures .*; left out: 1 .heic files"):
        open_source("folder", tmp_path / "empty")
    metadata = folder / "metadata.jsonl"
    metadata.write_text('{"file_name": "0.png"}\n')
    with pytest.raises(UserError, match="captions .the first: no caption.; a line is"):
        open_source("folder", folder)
    metadata.write_text("")
    with pytest.raises(UserError, match="has no captions"):
        open_source("folder", folder)
    for name in ("9.png", "../outside.png", "/etc/passwd", "a\nb.png", "a" * 9999):
        line = json.dumps({"file_name": name, "caption": "x"})
        metadata.write_text(f"{line}\n{line}\n")
        message = "not there: .* 1\\) and 1 more; add"
        with pytest.raises(UserError, match=message) as error:
            open_source("folder", folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_picture_that_vanishes_is_bad(folder):
    for i in range(3):
        (folder / f"{i}.txt").write_text("x")
    source = open_source("folder", folder)
    (folder / "1.png").unlink()
    with pytest.raises(BadExample, match="cannot read .No such file"):
        source[1]
