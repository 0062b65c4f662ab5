"""The command python -m dalle2_jax.filter."""

import json
import subprocess
import sys
from pathlib import Path

from dalle2_jax.data.sources import open_source
from tests.pictures import png


def test_it_writes_lists_and_a_report(tmp_path):
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

    def call(*arguments):
        command = [sys.executable, "-m", "dalle2_jax.filter", *arguments]
        root = Path(__file__).parents[1]
        return subprocess.run(command, cwd=root, capture_output=True, text=True)

    given = [f"--path={folder}", f"--blocklist={words}", "--min_words=2"]
    done = call(*given, f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "12 of 15 examples stay" in done.stdout
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

    refused = call("--path=/nowhere", f"--out={tmp_path / 'out'}")
    assert refused.returncode == 2
    assert refused.stderr == "error: there is no folder /nowhere\n"
    refused = call(*given, "--out=x", "--min_classifier=1")
    assert "--classifier needs --min_classifier" in refused.stderr
