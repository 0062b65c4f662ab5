"""The command that checks a config, as its user runs it."""

import json

import pytest

from dalle2_jax.commands import run
from dalle2_jax.train import cpu

PRIOR = "--config=configs/prior.py:tiny"


def test_the_command(capfd, monkeypatch):
    monkeypatch.setattr(cpu, "keep_memory", lambda: None)
    run("doctor", [PRIOR, "--skip=memory,overfit,speed", "--examples=16", "--json"])
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert found[1] == {
        "level": "ok",
        "check": "examples",
        "found": "16 of 16 examples looked at can be used",
        "remedy": "",
    }
    assert "looking at 16 examples" in err

    with pytest.raises(SystemExit) as stop:
        run("doctor", [PRIOR, "--config.batch_size=9", "--config.base=/nowhere"])
    out, err = capfd.readouterr()
    assert stop.value.code == 1, err
    batch, base = (line for line in out.splitlines() if "problem" in line)
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
def test_mistakes_are_one_line(arguments, message, capfd):
    with pytest.raises(SystemExit) as stop:
        run("doctor", arguments)
    err = capfd.readouterr().err
    assert stop.value.code == 2 and err.startswith(f"error: {message}")
    assert err.count("\n") == 1
