"""Of a folder with planted faults exactly these are removed."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dalle2_jax import hub
from dalle2_jax.data import filter as rules
from dalle2_jax.data.sources import open_all, open_source
from dalle2_jax.errors import UserError
from dalle2_jax.pipeline.choose import choose, write
from dalle2_jax.pipeline.embed import embed

# By key: the rule that removes it, and of duplicates the first.
PLANTED = {
    "03.png": ("blank", None),
    "07.jpg": ("duplicate", "00.png"),
    "08.png": ("duplicate", "01.png"),
    "09.png": ("blocked word", None),
    "10.png": ("words", None),
    "12.png": ("aspect", None),
    "13.png": ("language", None),
}
BAD = {"05.png": "unreadable picture", "11.png": "caption not UTF-8"}


def pattern(seed):
    """A picture that CLIP tells from others, even one of few steps."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((64, 64), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    for i in range(15):
        if i != 7:
            pattern(i).save(path / f"{i:02d}.png")
        (path / f"{i:02d}.txt").write_text("squares of many colours")
    noise = np.random.default_rng(0).integers(0, 2, (64, 64, 3))
    Image.fromarray((noise + 100).astype(np.uint8)).save(path / "03.png")
    (path / "05.png").write_bytes((path / "05.png").read_bytes()[:80])
    pattern(0).save(path / "07.jpg", quality=90)
    ImageEnhance.Brightness(pattern(1)).enhance(1.04).save(path / "08.png")
    (path / "09.txt").write_text("squares, and a Forbidden thing")
    (path / "10.txt").write_text("squares")
    (path / "11.txt").write_bytes(b"squares of many caf\xe9s")
    pattern(12).crop((0, 0, 64, 16)).save(path / "12.png")
    (path / "13.txt").write_text("квадраты многих цветов")
    return path


@pytest.fixture(scope="module")
def model(tiny_models):
    return hub.load_clip(tiny_models["clip"])


def limits(**others):
    given = {"min_words": 2, "min_latin": 0.5, "max_aspect": 3.0, "min_std": 2.0}
    blocked = rules.blocklist(["forbidden"])
    return rules.Limits(**given, blocked=blocked, **others)


def test_exactly_what_was_planted_is_removed(folder, model, tmp_path):
    source = open_all("folder", str(folder))
    kept, removed, report = choose(
        source, limits(duplicates=0.998), model, batch_size=1
    )
    found = {r["key"]: (r["rule"], r.get("of")) for r in removed}
    assert found == PLANTED
    assert kept == [f"{i:02d}.png" for i in (0, 1, 2, 4, 6, 14)]
    by_rule = dict.fromkeys((rule for rule, _ in PLANTED.values()), 1)
    by_rule |= dict.fromkeys(BAD.values(), 1) | {"duplicate": 2}
    assert report == {"examples": 15, "kept": 6, "removed": by_rule}

    write(tmp_path, kept, removed, report)
    keep = str(tmp_path / "keep.jsonl")
    source = open_source("folder", folder, keep=keep, holdout=0.0)
    assert [source[i]["key"] for i in range(len(source))] == kept


def test_of_embeddings_nothing_is_computed(folder, tiny_models, tmp_path):
    model, fingerprint = hub.load_local_clip(tiny_models["clip"])
    settings = {"clip": fingerprint, "examples": 15, "shard_size": 15}
    settings |= {"image_size": None, "image_format": "png", "z_dtype": "float32"}
    embed(model, open_all("folder", str(folder)), tmp_path, settings, batch_size=1)
    source = open_all("embeddings", str(tmp_path))
    only = rules.Limits(duplicates=0.998)
    kept, removed, _ = choose(source, only)
    assert {r["key"]: r["of"] for r in removed} == {
        "07.jpg": "00.png",
        "08.png": "01.png",
    }
    assert len(kept) == 11
    with pytest.raises(UserError, match="has no pictures: leave out the rules"):
        choose(source, limits())


def test_what_can_not_be_filtered(folder):
    with pytest.raises(UserError, match="rules on embeddings need CLIP: give --model"):
        choose(open_all("folder", str(folder)), rules.Limits(duplicates=0.9))
    with pytest.raises(UserError, match="shapes has no end"):
        choose(open_all("shapes"), limits())
    for name, value in (("min_std", float("nan")), ("min_words", -1)):
        with pytest.raises(UserError, match=f"filter.{name} is {value}: must be"):
            choose(open_all("folder", str(folder)), rules.Limits(**{name: value}))
