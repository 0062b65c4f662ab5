"""The command python -m dalle2_jax.filter."""

import json

import pytest

from dalle2_jax.commands import run
from dalle2_jax.data.sources import open_source
from tests.pictures import png


def test_it_writes_lists_and_a_report(tmp_path, capfd):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(15):
        (folder / f"{i:02d}.png").write_bytes(png(i))
        (folder / f"{i:02d}.txt").write_text("a plain picture")
    (folder / "05.png").write_bytes(b"")
    (folder / "09.txt").write_text("a Forbidden one")
    (folder / "10.txt").write_text("squares")
    (folder / "11.txt").write_bytes(b"a caf\xe9")
    words = tmp_path / "words"
    words.write_text("forbidden\n")

    given = [f"--path={folder}", f"--blocklist={words}", "--min_words=2"]
    run("filter", [*given, f"--out={tmp_path / 'out'}"])
    assert "12 of 15 examples stay" in capfd.readouterr().out
    lines = (tmp_path / "out" / "removed.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        {"key": "09.png", "rule": "blocked word"},
        {"key": "10.png", "rule": "words"},
    ]
    keep = open_source("folder", folder, keep=str(tmp_path / "out" / "keep.jsonl"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    # One is held out. No rule has looked at the pictures, of which one is damaged.
    assert len(keep) == 11 and report["kept"] == 12
    assert report["removed"]["caption not UTF-8"] == 1

    for arguments, message in (
        (["--path=/nowhere", f"--out={tmp_path / 'out'}"], "there is no folder /nowh"),
        ([*given, "--out=x", "--min_classifier=1"], "--classifier needs --min_class"),
    ):
        with pytest.raises(SystemExit) as stop:
            run("filter", arguments)
        err = capfd.readouterr().err
        assert stop.value.code == 2 and err.startswith(f"error: {message}")
