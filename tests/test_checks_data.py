"""A sample of the data, with faults in it."""

import json

import numpy as np
import pytest
from PIL import Image

from configs import decoder
from dalle2_jax import checkpoint
from dalle2_jax.checks import data
from dalle2_jax.data import shapes
from dalle2_jax.data.sources import open_source


def picture(i, side=48):
    scene = shapes.sample_scene(np.random.default_rng(i), "train", 0.5)
    return Image.fromarray(shapes.render(scene, side))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures, of which eight are as they should be."""
    path = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        picture(i).save(path / f"{i:02d}.png")
        (path / f"{i:02d}.txt").write_text(f"picture {i}")
    (path / "03.png").write_bytes(b"no picture")
    (path / "04.txt").write_text("  ")
    picture(5).save(path / "06.png")  # the same as 05
    Image.new("RGB", (40, 48), "red").save(path / "07.png")
    picture(8, 24).save(path / "08.png")
    picture(12).save(path / "12.png")  # without a caption
    return path


def look(folder, **values):
    source = open_source("folder", folder, holdout=0.0)
    options = dict(draw=32, clip_size=None, threads=1)
    return *data.sample(source, 256, **{**options, **values}), source


def test_examples_that_cannot_be_used(folder):
    rows, bad, source = look(folder)
    assert len(rows) == 10
    assert bad == {"unreadable picture": 1, "empty caption": 1}
    finding = data.judge_examples(rows, bad, source)
    assert finding.level == "warning"
    assert "10 of 12 examples looked at can be used, of 12 in folder" in finding.found
    assert "1 unreadable picture, 1 empty caption" in finding.found
    assert "1 pictures without a caption" in finding.found
    assert data.judge_examples(rows[:1], bad, source).level == "problem"


def test_small_pictures(folder):
    rows, *_ = look(folder)
    finding = data.judge_sizes(rows, 32)
    assert finding.level == "warning" and "24 to 48 px, median 48; 1 of 10" in (
        finding.found
    )
    assert data.judge_sizes(rows, 24).level == "ok"
    assert data.judge_sizes(rows, 64).level == "problem"


def test_blank_pictures(folder):
    rows, *_ = look(folder)
    finding = data.judge_blank(rows)
    assert finding.level == "warning"
    assert finding.found == "1 of 10 pictures are of one colour, as 07.png"
    assert data.judge_blank([r for r in rows if r["key"] != "07.png"]).level == "ok"


def test_duplicates(folder):
    rows, *_ = look(folder)
    finding = data.judge_duplicates(rows, None)
    assert finding.level == "warning"
    assert finding.found == (
        "1 of 10 pictures repeat another to the pixel, as 05.png and 06.png"
    )
    alone = [row for row in rows if row["key"] != "06.png"]
    assert data.judge_duplicates(alone, None).level == "ok"
    z = np.eye(9, dtype=np.float32)
    assert data.judge_duplicates(alone, z).level == "ok"
    z[7] = z[2] + 0.01
    near = data.judge_duplicates(alone, z)
    assert near.level == "warning" and "1 are like another" in near.found
    assert f"as {alone[2]['key']} and {alone[7]['key']}" in near.found


def test_the_sample_is_spread_over_the_source(folder):
    source = open_source("folder", folder, holdout=0.0)
    rows, _ = data.sample(source, 4, draw=32, clip_size=16, threads=1)
    assert [row["key"] for row in rows] == ["00.png", "06.png", "09.png"]  # 03 is bad
    assert rows[0]["clip_image"].shape == (16, 16, 3)
    assert rows[0]["side"] == 48 and rows[0]["captions"] == ["picture 0"]


def test_drawn_pictures_have_any_size():
    source = open_source("shapes")
    rows, bad = data.sample(source, 3, draw=32, clip_size=16, threads=1)
    assert len(rows) == 3 and not bad and "side" not in rows[0]
    assert data.judge_sizes(rows, 64) == ("ok", "sizes", "drawn at any size", "")


def test_all_of_it_with_a_clip(folder):
    config = decoder.get_config("tiny")
    config.data.source, config.data.path = "folder", str(folder)
    config.data.folder.holdout = 0.0
    source = open_source("folder", folder, holdout=0.0)
    found = data.check(config, source, None, checkpoint.load, 256)
    # Without a stage there is no tokenizer to tell of captions.
    assert [f.check for f in found] == [
        "examples",
        "sizes",
        "blank",
        "duplicates",
        "embeddings",
    ]
    levels = {f.check: f.level for f in found}
    assert levels["sizes"] == "ok" and levels["duplicates"] == "warning"
    assert "like another by CLIP" in found[3].found
    assert "statistics" in found[4].found


def test_nothing_can_be_used(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    line = {"file_name": "a.png", "caption": "none"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    config = decoder.get_config("tiny")
    source = open_source("folder", tmp_path)
    (finding,) = data.check(config, source, None, checkpoint.load, 256)
    assert finding.level == "problem" and "0 of 1" in finding.found
