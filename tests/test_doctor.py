"""The command that checks a config, as its user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRIOR = "--config=configs/prior.py:tiny"


def run(*arguments):
    command = [sys.executable, "-m", "dalle2_jax.doctor", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True)


def test_the_command():
    done = run(PRIOR, "--skip=memory,overfit,speed", "--examples=16", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found[1] == {
        "level": "ok",
        "check": "examples",
        "found": "16 of 16 examples looked at can be used",
        "remedy": "",
    }
    assert "looking at 16 examples" in done.stderr

    done = run(PRIOR, "--config.batch_size=9", "--config.base=/nowhere")
    assert done.returncode == 1, done.stderr
    batch, base = (line for line in done.stdout.splitlines() if "problem" in line)
    assert batch.startswith("problem  batch       batch_size=9 must be a multiple of")
    assert base.startswith("problem  stage       /nowhere is not a model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no --config"),
        (["--config=configs/quickstart.py:tiny"], "this config is of several"),
        ([PRIOR, "--skip=sleep"], "--skip=sleep: choose of memory, data"),
        ([PRIOR, "--config.optim.lr=1"], "--config.optim.lr: the config has no key"),
        ([PRIOR, "--examples=0"], ""),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
