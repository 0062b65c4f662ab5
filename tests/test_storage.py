"""Paths and URLs that users give. Object storage is fsspec's, in memory."""

from pathlib import Path

import fsspec
import numpy as np
import pytest

from dalle2_jax import checkpoint, storage
from dalle2_jax.errors import UserError


@pytest.fixture
def memory():
    """An empty file system; a URL in it is memory://PATH."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


@pytest.mark.parametrize(
    "path, url",
    [
        ("gs://bucket/run/", "gs://bucket/run"),
        (Path("gs://bucket/run"), "gs://bucket/run"),
        ("file:///tmp", "file:///tmp"),
        ("runs/a", None),
        ("./gs:/a", None),
        ("/a/b://c", None),
        ("C:/a", None),
        ("a:b", None),
    ],
)
def test_what_is_a_url(path, url):
    assert storage.url(path) == url


@pytest.mark.parametrize("path", ["gs://bucket/a", Path("gs://bucket/a"), "s3://b/a"])
def test_where_a_directory_must_be_on_this_machine(path):
    with pytest.raises(UserError, match="--out=.*://b.*/a is a URL: give a directory"):
        storage.directory(path, "--out")


def test_a_directory_is_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert storage.directory("a b", "--out") == tmp_path / "a b"
    assert storage.directory("~/a", "--out") == Path("/home/me/a")


def test_a_path_that_is_too_long(tmp_path):
    for use in (storage.expand, checkpoint.load):
        with pytest.raises(
            UserError, match="cannot use the path .*aaa: File name too l"
        ):
            use(tmp_path / ("a" * 300))


def export(path, value, *parts):
    params = {part: {"kernel": np.float32([value])} for part in parts}
    config = {"parts": {part: {} for part in parts}}
    checkpoint.export(path, params=params, config=config)


def test_a_model_at_a_url(memory, tmp_path):
    export("memory://bucket/model", 1.5, "clip", "prior")
    checkpoint.copy("memory://bucket/model", tmp_path / "copy")
    checkpoint.copy(tmp_path / "copy", "memory://bucket/again/")
    for path in ("memory://bucket/model", tmp_path / "copy", "memory://bucket/again"):
        loaded = checkpoint.load(path)
        assert loaded.params["prior"]["kernel"] == 1.5
    # Another one takes its place.
    export("memory://bucket/model", 2.5, "clip")
    assert checkpoint.load("memory://bucket/model").params["clip"]["kernel"] == 2.5
    names = {path.rpartition("/")[2] for path in memory.find("/bucket/model")}
    assert names == {"config.json", "clip.safetensors"}


def test_an_upload_that_fails_leaves_no_model(memory, monkeypatch):
    export("memory://bucket/model", 1.5, "clip", "prior")
    put = type(memory).put_file

    def fail(self, local, remote, **rest):
        if "prior" in remote:
            raise RuntimeError("quota exceeded\nin line 3")
        put(self, local, remote, **rest)

    monkeypatch.setattr(type(memory), "put_file", fail)
    with pytest.raises(UserError, match="cannot write to memory://.*: quota exceeded$"):
        export("memory://bucket/model", 2.5, "clip", "prior")
    with pytest.raises(UserError, match="memory://bucket/model is not a model: it has"):
        checkpoint.load("memory://bucket/model")


def test_an_upload_replaces_nothing_but_a_model(memory):
    memory.pipe_file("/bucket/thesis/a.tex", b"")
    with pytest.raises(UserError, match="memory://bucket/thesis exists and is not a m"):
        export("memory://bucket/thesis", 1.5, "clip")
    assert memory.find("/bucket/thesis") == ["/bucket/thesis/a.tex"]


def test_names_that_lead_out_of_a_copy(memory, monkeypatch):
    export("memory://bucket/model", 1.5, "clip")
    found = memory.find("/bucket/model")
    monkeypatch.setattr(
        type(memory), "find", lambda *_, **__: [*found, "/bucket/model/../../up"]
    )
    with pytest.raises(UserError, match="has a file of a name not allowed: .*/up"):
        checkpoint.load("memory://bucket/model")


@pytest.mark.parametrize(
    "url, message",
    [
        ("memory://nothing", "memory://nothing is not a model: it has no config.json"),
        ("foo://bucket/a", "foo://bucket/a: there is no foo://: give a directory, or"),
        ("gs://bucket/a", r"gs:// needs another package: pip install 'dalle2_jax\[gcs"),
        ("ftp://localhost:1/a", "cannot reach ftp://localhost:1/a: .*refused"),
    ],
)
def test_a_url_that_cannot_be_read(memory, monkeypatch, url, message):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=message):
        checkpoint.load(url)
