"""A run's directory in object storage, which is in memory here."""

import fsspec
import pytest

from dalle2_jax import storage
from dalle2_jax.errors import UserError
from dalle2_jax.train.workdir import Workdir


@pytest.fixture
def bucket(monkeypatch):
    """The files of gs://bucket, by their names."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    found = lambda url: (fs, url.replace("gs://bucket", "/bucket"))  # noqa: E731
    monkeypatch.setattr(storage, "file_system", found)
    yield fs
    fs.store.clear()


def test_a_run_in_object_storage(bucket):
    workdir = Workdir("gs://bucket/runs/a/")
    assert workdir.path == "gs://bucket/runs/a"
    assert workdir.join("checkpoints") == "gs://bucket/runs/a/checkpoints"
    (workdir.files / "metrics.jsonl").write_text("1\n")
    workdir.push(wait=60)
    assert not bucket.exists("/bucket/runs/a/metrics.jsonl")
    workdir.push()
    (workdir.files / "previews").mkdir()
    (workdir.files / "previews" / "x.png").write_bytes(b"x")
    (workdir.files / "metrics.jsonl").write_text("1\n2\n")
    workdir.push()
    assert bucket.cat_file("/bucket/runs/a/metrics.jsonl") == b"1\n2\n"
    assert bucket.cat_file("/bucket/runs/a/previews/x.png") == b"x"

    resumed = Workdir("gs://bucket/runs/a")
    assert (resumed.files / "metrics.jsonl").read_text() == "1\n2\n"
    bucket.pipe_file("/bucket/runs/a/metrics.jsonl", b"as it was")
    resumed.push()  # nothing has changed
    assert bucket.cat_file("/bucket/runs/a/metrics.jsonl") == b"as it was"


def test_storage_that_cannot_be_written(bucket, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no permission\nfor you")

    workdir = Workdir("gs://bucket/run")
    (workdir.files / "metrics.jsonl").write_text("1\n")
    monkeypatch.setattr(type(bucket), "put_file", fail)
    monkeypatch.setattr(type(bucket), "pipe_file", fail)
    message = "cannot write to workdir gs://bucket/run: no permission$"
    with pytest.raises(UserError, match=message):
        Workdir("gs://bucket/run")
    with pytest.raises(UserError, match="cannot write the log to gs://bucket/run: no"):
        workdir.push()


def test_a_directory_is_left_alone(tmp_path):
    workdir = Workdir(tmp_path / "a" / "..")
    assert workdir.files == tmp_path / "a" / ".." and workdir.join("b").endswith("../b")
    workdir.push()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
