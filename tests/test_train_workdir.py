"""A run's directory in object storage, which is in memory here."""

import json
import threading

import fsspec
import pytest

from dalle2_jax import checkpoint, storage
from dalle2_jax.errors import UserError
from dalle2_jax.train import checkpoints, loop
from dalle2_jax.train.workdir import Workdir
from tests import gcs_server
from tests.linear import assert_equal, linear, make_batches
from tests.test_train_loop import Crash, crash, make_config


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

    with pytest.raises(Crash), workdir.alone():
        (workdir.files / "previews" / "x.png").write_bytes(b"y")
        raise Crash
    assert bucket.cat_file("/bucket/runs/a/previews/x.png") == b"y"

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


@pytest.fixture(scope="module")
def cloud():
    """gs://bucket on a server of this process."""
    pytest.importorskip("gcsfs")
    server, environment = gcs_server.serve()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield "gs://bucket"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # gcsfs leaves connections open
def test_a_run_in_google_cloud_storage_resumes_exactly(cloud, tmp_path):
    def train(workdir, **events):
        config = make_config(eval_every=0)
        return loop.train(
            linear(), config, make_batches(**events), make_batches(), workdir
        )

    whole = train(tmp_path)
    for step in (4, 13):
        with pytest.raises(Crash):
            train(f"{cloud}/run", events={step: [crash]})
    assert_equal(train(f"{cloud}/run"), whole)
    model = checkpoint.load(f"{cloud}/run/model")
    assert_equal(model.params["linear"], whole.ema)
    checkpoint.copy(f"{cloud}/run/model", tmp_path / "copy")
    log = [
        json.loads(line) for line in gcs_server.read("run/metrics.jsonl").splitlines()
    ]
    assert [line["step"] for line in log] == [5, 10, 15, 20]
    # A step that was not complete when the process was killed is none.
    for name in list(gcs_server.Handler.objects):
        if "/20/" in name and name.count("/") == 3:
            del gcs_server.Handler.objects[name]
    with checkpoints.Run(f"{cloud}/run/checkpoints") as run:
        assert run.latest_step() == 15 and run.notes == []
    gcs_server.Handler.objects.pop("run/checkpoints/15/state/manifest.ocdbt")
    with pytest.raises(UserError, match="no checkpoint in gs://bucket/run/.* 15 .stat"):
        checkpoints.Run(f"{cloud}/run/checkpoints")


def test_a_lock_that_is_no_file(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match="cannot lock .*/.lock: .*remove it"):
        with Workdir(tmp_path).alone():
            pass
    (tmp_path / ".lock").rmdir()
    with pytest.raises(OSError, match="of the run"):  # which is not the lock's
        with Workdir(tmp_path).alone():
            raise OSError("of the run")
