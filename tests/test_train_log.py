"""What a run prints and writes."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from dalle2_jax.errors import UserError
from dalle2_jax.train.log import Log


def make(workdir, start=0, **options):
    return Log(workdir, name="clip", start=start, steps=100, batch_size=32, **options)


def read(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_line_for_each_call_where_there_is_no_terminal(tmp_path, capsys):
    with make(tmp_path) as log:
        log.say("clip: [3] parameters")
        log.advance(1)
        log.scalars(50, {"loss": 0.123456, "steps_per_s": 10.0, "skipped": 3})
        log.scalars(50, {"heldout/accuracy": 0.5})
    assert capsys.readouterr().out.splitlines() == [
        "clip: [3] parameters",
        "step 50/100  loss 0.1235  steps_per_s 10  skipped 3  left 0:00:05",
        "step 50/100  heldout/accuracy 0.5",
    ]
    assert read(tmp_path) == [
        {"step": 50, "loss": 0.123456, "steps_per_s": 10.0, "skipped": 3},
        {"step": 50, "heldout/accuracy": 0.5},
    ]


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with make(tmp_path, start=30) as log:
        log.say("a line above")
        log.advance(50)
        log.scalars(50, {"loss": 0.25, "steps_per_s": 10.0})
        log.scalars(50, {"heldout/accuracy": 0.5})
    out = capsys.readouterr().out
    for part in ("a line above", "50/100", "loss 0.25  10 steps/s", "accuracy 0.5"):
        assert part in out


def test_rates_do_not_count_the_first_step(tmp_path, monkeypatch):
    now = iter([990.0, 999.0, 1000.0, 1000.5, 1001.0, 1002.0, 1004.0, 1004.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    with make(tmp_path, start=10) as log:
        with log.waiting():  # of the first step, for 9 s
            pass
        log.advance(11)
        with log.waiting():  # for 0.5 s
            pass
        log.advance(12)
        rates = {"steps_per_s": 5, "images_per_s": 160, "data_wait": 0.25}
        assert log.rates(21) == rates
        log.least_s = 0.1
        rates = {"steps_per_s": 2, "images_per_s": 64, "data_wait": 0, "mfu": 0.2}
        assert log.rates(25) == rates
        assert log.rates(25) == {}


def test_a_resumed_log_drops_what_is_done_again(tmp_path):
    with make(tmp_path) as log:
        for step in (10, 20, 30):
            log.scalars(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # torn by a kill
    with make(tmp_path, start=20) as log:
        log.scalars(30, {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [
        (10, 1.0),
        (20, 1.0),
        (30, 2.0),
    ]


def test_a_log_with_lines_that_cannot_be_read(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 10, "loss": NaN}'
    bad = [b"loss 3", b"3", b"{}", b'{"step": "x"}', b"\xff\x00", b"[" * 10**5, b""]
    path.write_bytes(b"\n".join([bad[0], good, *bad[1:], good, b'{"step": 1']))
    before = path.read_bytes()
    with make(tmp_path, start=20) as log:
        log.scalars(30, {"loss": 2.0})
    assert path.read_bytes() == good + b"\n" + good + b'\n{"step": 30, "loss": 2.0}\n'
    assert (tmp_path / "metrics.unread").read_bytes() == before
    assert f"7 lines of {path} can't be read" in capsys.readouterr().out
    with make(tmp_path, start=30):
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize("make_odd", [Path.mkdir, os.mkfifo])
def test_a_log_that_is_no_file(tmp_path, make_odd):
    make_odd(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="cannot write the log to .*metrics.jsonl"):
        make(tmp_path)


def test_previews_are_pictures_and_scalars(tmp_path):
    images = np.full((4, 8, 8, 3), 7, np.uint8)
    with make(tmp_path) as log:
        log.previews(50, {"samples": images, "distance": np.float32(0.5)})
    with Image.open(tmp_path / "previews" / "samples_0000050.png") as grid:
        assert grid.size == (18, 18) and grid.getpixel((0, 0)) == (7, 7, 7)
    assert read(tmp_path) == [{"step": 50, "preview/distance": 0.5}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="is Linux's")
def test_a_full_disk(tmp_path):
    message = f"cannot write the log to {tmp_path}: .*No space left"
    with pytest.raises(UserError, match=message), make(tmp_path) as log:
        log._file.close()
        log._file = open("/dev/full", "a")
        log.scalars(50, {"loss": 1.0})


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    with make(tmp_path, tensorboard=True) as log:
        log.scalars(50, {"loss": 1.0})
        log.previews(50, {"samples": np.zeros((1, 8, 8, 3), np.uint8)})
    (events,) = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    assert b"loss" in written and b"samples" in written and b"PNG" in written


def test_tensorboard_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="pip install"):
        make(tmp_path, tensorboard=True)


def test_wandb(tmp_path, monkeypatch):
    """With a stand-in for its package, which the tests don't need."""
    runs, logged = [], []
    run = SimpleNamespace(
        log=lambda values, step: logged.append((step, values)),
        finish=lambda: logged.append("finished"),
    )
    fake = SimpleNamespace(
        init=lambda **options: runs.append(options) or run, Image=np.shape
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        with make(tmp_path, wandb="project") as log:
            log.scalars(50, {"loss": 1.0})
            log.previews(50, {"samples": np.zeros((1, 8, 8, 3), np.uint8)})
    assert logged[:3] == [(50, {"loss": 1.0}), (50, {"samples": (8, 8, 3)}), "finished"]
    assert runs[0] == runs[1] and runs[0]["project"] == "project"
    assert runs[0]["resume"] == "allow" and len(runs[0]["id"]) == 8


def test_wandb_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb='p' needs wandb: pip install"):
        make(tmp_path, wandb="p")


def test_wandb_without_an_account(tmp_path, monkeypatch):
    def init(**options):
        raise LookupError("No API key configured.")

    fake = SimpleNamespace(init=init, Error=LookupError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match="wandb='p': No API key .*WANDB_MODE=offline"):
        make(tmp_path, wandb="p")


def test_other_processes_say_and_write_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with make(tmp_path, tensorboard=True) as log:
        log.say("hello")
        log.advance(1)
        log.scalars(1, {"loss": 1.0} | log.rates(2))
        log.previews(1, {"samples": np.zeros((1, 8, 8, 3), np.uint8)})
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
