"""docs/make_styles_data.py: what is held out, and what of it training may see."""

import io
import json
import runpy
from pathlib import Path

import numpy as np
from PIL import Image

from dalle2_jax.data.rows import read_picture
from dalle2_jax.data.sources import open_source
from tests.pictures import write_tar

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "docs/make_styles_data.py"))
STYLES = ("Noto", "Twemoji", "Fluent")


def webp(seed):
    """A picture of its own for each seed."""
    colours = np.random.default_rng(seed).integers(256, size=(4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    picture = Image.fromarray(colours).resize((128, 128), Image.Resampling.NEAREST)
    picture.save(file, "WEBP", quality=90)
    return file.getvalue()


def test_no_picture_that_is_held_out_is_trained_on(tmp_path):
    """ "N" and "N again" are one picture, in each style."""
    members = {}
    for i in range(40):
        for k, style in enumerate(STYLES):
            for thing in (f"{i}", f"{i} again"):
                captions = [f"{thing} in the style of {style}", thing]
                name = f"{style}_{thing.replace(' ', '-')}"
                members[f"{name}.webp"] = webp(3 * i + k)
                members[f"{name}.json"] = json.dumps({"caption": captions})
    with open(tmp_path / "a.tar", "wb") as file:
        write_tar(file, members)
    SCRIPT["main"](str(tmp_path / "a.tar"), str(tmp_path / "out"))

    pairs = {}
    for name in ("heldout", "train"):
        lines = (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        pairs[name] = {(r["thing"], r["style"]) for r in map(json.loads, lines)}
    assert 5 <= len(pairs["heldout"]) <= 20  # of 240, 1 in 20
    hidden = {(thing.split()[0], style) for thing, style in pairs["heldout"]}
    shown = {(thing.split()[0], style) for thing, style in pairs["train"]}
    assert not hidden & shown and len(hidden | shown) == 120

    for size in (64, 128):
        keep = {"keep": tmp_path / "out" / "train.jsonl", "holdout": 0.0}
        source = open_source("webdataset", str(tmp_path / "out" / str(size)), **keep)
        captions = [source[i]["caption"] for i in range(len(source))]
        things = [full.split(" in the style of ")[0] for full, *_ in captions]
        assert len(captions) == len(pairs["train"])
        assert things == sorted(things)
        assert captions[0] == [captions[0][0]] * 3 + [things[0]]
        assert read_picture(source[0]).size == (size, size)
