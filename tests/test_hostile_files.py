"""Hostile files: what is read of them is right, the rest is counted or told in a line.

`pytest --hostile=10000` draws as many of each kind, other ones each time.
"""

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from dalle2_jax.data import embeddings, image
from dalle2_jax.data.examples import (
    BadExample,
    captions_of_json,
    captions_of_text,
    read_keep,
)
from dalle2_jax.data.examples import clean as clean_captions
from dalle2_jax.data.mask import read_mask
from dalle2_jax.data.sources import open_source
from dalle2_jax.errors import UserError
from dalle2_jax.files import parse_json
from tests import hostile_files, test_data_embeddings
from tests.pictures import captioned, png, write_tar

ALL = {"holdout": 0.0}
FILES = {f"{i}.{kind}" for i in range(6) for kind in ("png", "txt")}


@pytest.fixture(autouse=True, scope="module")
def walls():
    """Nothing is started, nothing is connected to, and memory is 4 GiB at most."""

    def refuse(*args, **kwargs):
        pytest.fail(f"a file had this done: {args}")  # no Exception, so none catches it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", refuse)
        patch.setattr(os, "system", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        if sys.platform != "linux":
            yield
            return
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = resource.getrlimit(resource.RLIMIT_AS)
        most = pages * resource.getpagesize() + 2**32
        resource.setrlimit(resource.RLIMIT_AS, (most, limit[1]))
        yield
        resource.setrlimit(resource.RLIMIT_AS, limit)


@contextlib.contextmanager
def told():
    """Whatever is wrong is told in one line, or counted, soon."""
    start = time.process_time()
    try:
        yield
    except (UserError, BadExample) as error:
        text = str(error)
        assert len(text.splitlines()) == 1 and len(text) < 1500
        assert "MemoryError" not in text
    assert time.process_time() - start < 20


@contextlib.contextmanager
def folder():
    """A new folder for each of the inputs that a test draws."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def usable(source):
    """The examples, or None for each that can't be used."""
    found = []
    for i in range(len(source)):
        try:
            found.append(source[i])
        except BadExample as bad:
            assert len(bad.reason) < 100
            found.append(None)
    return found


def assert_captions(captions):
    several = [captions] if isinstance(captions, str) else captions
    assert several and all(c and len(c.splitlines()) == 1 for c in several)
    "".join(several).encode()


@given(st.data())
def test_pictures(data):
    files = hostile_files.pictures()
    name = data.draw(st.sampled_from(sorted(files)))
    data = data.draw(hostile_files.spoiled(files[name]) | st.binary(max_size=200))
    with told():
        picture = image.read(data)
        assert picture.mode == "RGB" and all(picture.size)
    with told():
        square = image.clip_input(data, 8)
        assert square.shape == (8, 8, 3)
    with told():
        mask = read_mask(data, data)
        assert mask.shape == picture.size[::-1]


def test_a_format_is_read_or_refused():
    for name, data in hostile_files.pictures().items():
        if name.split()[0] in (*image.FORMATS, "MPO"):
            assert image.read(data).size in ((16, 12), (12, 16))
        else:
            with pytest.raises(UserError, match="not a picture in a known format"):
                image.read(data)


TARS = {}
for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
    with tempfile.TemporaryFile() as file:
        write_tar(file, captioned(range(6)))
        file.seek(0)
        TARS[form] = file.read()


def assert_tar(data, whole):
    """What is there is right; what is lost is counted."""
    with folder() as path, told():
        (path / "a.tar").write_bytes(data)
        source = open_source("webdataset", path / "a.tar", **ALL)
        found = usable(source)
        for read in filter(None, found):
            assert_captions(read["caption"])
        assert len(found) >= len(whole) or source.left_out


@given(st.sampled_from(list(TARS.values())).flatmap(hostile_files.spoiled))
def test_spoiled_tars(data):
    assert_tar(data, [png(i) for i in range(6)])


@given(
    st.lists(hostile_files.odd_members() | hostile_files.odd_extensions(), max_size=4),
    st.binary(max_size=1200) | st.just(bytes(1024)),
)
def test_odd_tars(parts, end):
    with tempfile.TemporaryFile() as file:
        write_tar(file, captioned(range(2)))
        file.seek(0)
        data = file.read().rstrip(b"\0")
    data += bytes(-len(data) % tarfile.BLOCKSIZE)
    with folder() as path, told():
        (path / "a.tar").write_bytes(data + b"".join(parts) + end)
        source = open_source("webdataset", path / "a.tar", **ALL)
        found = usable(source)
        assert {png(0), png(1)} <= {read["image"] for read in found if read}


@pytest.mark.parametrize("names", [["caption", "text", "file_name"], ["key"]])
@given(data=st.data())
def test_json(names, data):
    line = data.draw(hostile_files.lines(*names))
    with told():
        assert isinstance(parse_json(line, "a.json"), dict)
    for read in (captions_of_json, captions_of_text):
        with told():
            assert_captions(read(line, "key"))
    with folder() as path, told():
        (path / "keep.jsonl").write_bytes(b'{"key": "a"}\n' + line)
        keys = read_keep(path / "keep.jsonl")
        assert "a" in keys and len(keys) <= 2
        "".join(keys).encode()


@given(hostile_files.VALUES)
def test_captions(value):
    with told():
        assert_captions(clean_captions(value, "key"))


@given(
    st.lists(hostile_files.lines("caption", "text") | hostile_files.lines("file_name"))
)
def test_metadata(lines):
    """A line that can't be read takes no other away."""
    with folder() as path, told():
        for i in range(3):
            (path / f"{i}.png").write_bytes(png(i))
        good = [b'{"file_name": "%d.png", "caption": "%d"}' % (i, i) for i in range(3)]
        lines = [
            line.replace(b"{", b'{"file_name": "1.png", ', 1) if len(line) % 2 else line
            for line in lines
        ]
        (path / "metadata.jsonl").write_bytes(b"\n".join([*good, *lines]))
        found = usable(open_source("folder", path, **ALL))
        assert [read["caption"] for read in found[:3]] == ["0", "1", "2"]
        assert len(found) == 3 + sum(bool(line.strip()) for line in lines)
        for read in filter(None, found):
            assert_captions(read["caption"])


STEMS = st.sampled_from(["a", "b", "A", ".a", "._b", "c.d", "é", "\udce9", " ", "-"])
ENDS = st.sampled_from([".png", ".PNG", ".jpg", ".eps", ".txt", ".TXT", ".json", ""])


@given(
    st.dictionaries(
        st.tuples(STEMS, ENDS).map("".join),
        st.one_of(
            st.sampled_from(
                [png(), b"", b"one\ntwo\n", b"\xff\xfe", b"%!PS-Adobe-3.0"]
            ),
            st.sampled_from(["pipe", "folder", ".", "..", "gone", "/dev/zero"]),
        ),
        max_size=8,
    )
)
def test_folders(entries):
    """Of each file it is told what it was taken for."""
    with folder() as path, told():
        (path / "z.png").write_bytes(png())
        (path / "z.txt").write_text("z")
        for name, content in entries.items():
            if content == "pipe":
                os.mkfifo(path / name)
            elif content == "folder":
                (path / name).mkdir()
            elif isinstance(content, str):
                (path / name).symlink_to(content)
            else:
                (path / name).write_bytes(content)
        source = open_source("folder", path, **ALL)
        counted = len(source) + sum(source.left_out.values())
        texts = {read["key"].rpartition(".")[0] for read in usable(source) if read}
        seen = [
            name
            for name, content in entries.items()
            if name[0] != "." and content != "folder"
        ]
        assert len(source) + len(texts) <= counted + len(texts) <= 2 * (2 + len(seen))
        assert 2 + len(seen) <= counted + len(source)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "embedded"
    test_data_embeddings.write(path)
    return path


def spoil_embeddings(path, name, change):
    """What is read of a copy in which one file is changed."""
    with folder() as copy, told():
        copy = shutil.copytree(path, copy / "copy")
        (copy / name).write_bytes(change((copy / name).read_bytes()))
        source = open_source("embeddings", copy, **ALL)
        for read in filter(None, usable(source)):
            assert_captions(read["caption"])
            assert read["z_image"].shape == (3,) and np.isfinite(read["z_image"]).all()
            assert read["z_text"].shape == (len(read["captions"]), 3)
            assert read["tokens"].shape == (len(read["captions"]), 4)
        assert len(source) == 12


FIRST = "shard-00000-of-00002"


@pytest.mark.parametrize("name", ["metadata.json", f"{FIRST}.json"])
@given(
    change=hostile_files.objects("clip", "image_size", "shards", "count", "format")
    | hostile_files.objects("keys", "sum", "skipped")
)
def test_embeddings_with_odd_values(embedded, name, change):
    spoil_embeddings(
        embedded, name, lambda old: json.dumps({**json.loads(old), **change}).encode()
    )


@pytest.mark.parametrize("name", ["metadata.json", f"{FIRST}.array_record"])
@given(data=st.data())
def test_spoiled_embeddings(embedded, name, data):
    spoil_embeddings(embedded, name, lambda old: data.draw(hostile_files.spoiled(old)))


@given(
    st.lists(
        hostile_files.objects("captions", "z_image", "z_text", "tokens", "image"),
        min_size=1,
        max_size=3,
    )
)
def test_odd_records(changes):
    """A record that is none takes no other away."""
    good = [test_data_embeddings.example(i) for i in range(2)]
    odd = [{**good[0], **change, "key": str(i)} for i, change in enumerate(changes)]
    with folder() as path, told():
        embeddings.begin(path, {**test_data_embeddings.SETTINGS, "shards": 1})
        with contextlib.suppress(Exception):  # what can't be stored
            embeddings.write_shard(embeddings.shard(path, 0, 1), good + odd, {})
            embeddings.finish(path)
        found = usable(open_source("embeddings", path, **ALL))
        assert all(found[:2])
        for read in filter(None, found):
            assert_captions(read["caption"])


PARTS = {"source": "folder", "path": ".", "weight": 1.0}


@given(hostile_files.VALUES | st.lists(hostile_files.objects(*PARTS, "keep", "seed")))
def test_mixtures(parts):
    if isinstance(parts, list):
        parts = [{**PARTS, **p} if isinstance(p, dict) else p for p in parts]
    with told():
        open_source("mixture", parts=parts)
