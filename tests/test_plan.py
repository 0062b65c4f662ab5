"""The command that plans, as its user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dalle2_jax.commands import run

ROOT = Path(__file__).parents[1]


def process(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "dalle2_jax.plan", *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )


def test_the_command():
    done = process(
        "--config=configs/prior.py:tiny",
        "--config.base=",  # so that it is upon clip.py:tiny
        "--topology=h100:2",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert "estimated from the CPU's compiler" in done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"] == 32_736 and found["mesh"] == {
        "data": 2,
        "fsdp": 1,
        "tensor": 1,
    }


PRIOR, H100 = "--config=configs/prior.py:tiny", "--topology=h100:2"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no --config"),
        ([PRIOR], "no --topology"),
        ([PRIOR, "--topology=tpu"], "--topology=tpu: give a kind"),
        ([PRIOR, H100, "--search", "--sample"], "--search compiles training"),
        (["--config=configs/quickstart.py:tiny", H100], "this config is of several"),
        (
            ["--config=configs/decoder.py:karlo", H100],
            "configs/decoder.py:karlo doesn't say which",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message, capfd, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        run("plan", arguments)
    err = capfd.readouterr().err
    assert stop.value.code == 2 and err.startswith(f"error: {message}")
    assert err.count("\n") == 1
