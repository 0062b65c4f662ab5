"""The command python -m dalle2_jax.embed."""

import subprocess
import sys
from pathlib import Path

import pytest

from dalle2_jax.commands import run
from dalle2_jax.data.sources import open_source


def call(*arguments):
    command = [sys.executable, "-m", "dalle2_jax.embed", *map(str, arguments)]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_it_embeds_and_trains(tiny_models, tmp_path):
    given = [f"--model={tiny_models['clip']}", "--source=shapes", f"--out={tmp_path}"]
    done = call(*given, "--option=pairs=0.0", "--limit=12", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{tmp_path}: 12 pictures\n")
    examples = open_source("embeddings", tmp_path, holdout=0.0)
    pictures = open_source("shapes", pairs=0.0)
    for i in range(12):
        assert examples[i]["caption"] == [pictures[i]["caption"]]


def test_mistakes_are_one_line(tiny_models, tmp_path, capfd):
    given = [f"--model={tiny_models['clip']}", f"--out={tmp_path}"]
    for arguments, message in (
        ([], "error: no --model: give a directory\n"),
        ([*given, "--source=shapes"], "error: shapes has no end: say how many with"),
        ([*given, "--path=/no"], "error: there is no folder /no\n"),
        ([*given, "--process_index=1"], "error: --process_index=1: must be from 0 to"),
    ):
        with pytest.raises(SystemExit) as stop:
            run("embed", arguments)
        err = capfd.readouterr().err
        assert stop.value.code == 2 and err.startswith(message), err
