"""Mixtures: their proportions, and that every source is read whole, in any order."""

from collections import Counter

import numpy as np
import pytest

from dalle2_jax.data.batches import batches
from dalle2_jax.data.examples import Embedded, Source
from dalle2_jax.data.mixture import mix
from dalle2_jax.data.rows import Rows
from dalle2_jax.data.sources import open_source
from dalle2_jax.errors import UserError
from tests.pictures import png
from tests.tiny import make_stage


def named(name, count, embedded=None, left_out=()):
    return Source(
        name,
        range(count),
        lambda i: {"image": png(i), "caption": f"{name} {i}"},
        embedded=embedded,
        left_out=Counter(left_out),
    )


def test_what_is_left_out_is_that_of_all():
    parts = [named("a", 3, left_out="xy"), named("b", 4, left_out="yyz")]
    assert mix(parts, [1, 1], seed=0).left_out == {"x": 1, "y": 3, "z": 1}


def drawn(source, start, stop):
    return [tuple(source[i]["caption"].split()) for i in range(start, stop)]


def test_proportions_and_epochs():
    source = mix([named("a", 30), named("b", 7)], [3, 1.0], seed=5)
    for start in (0, 4000, 10**9):
        names = Counter(name for name, _ in drawn(source, start, start + 400))
        assert names == {"a": 300, "b": 100}
    a = [number for name, number in drawn(source, 0, 80) if name == "a"]
    assert sorted(a[:30], key=int) == sorted(a[30:60], key=int) != a[:30]
    assert len(set(a[:30])) == 30 and a[:30] != a[30:60]
    again = mix([named("a", 30), named("b", 7)], [0.75, 0.25], seed=5)
    other = mix([named("a", 30), named("b", 7)], [3, 1], seed=6)
    assert drawn(again, 11, 90) == drawn(source, 11, 90) != drawn(other, 11, 90)


def test_batches_of_processes_and_resumed(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    folder = {"source": "folder", "path": str(tmp_path), "weight": 1, "holdout": 0.25}
    parts = [folder, {"source": "shapes", "weight": 1, "pairs": 0.0}]
    source = open_source("mixture", seed=2, parts=parts)

    def take(first, count, **options):
        settings = {"batch_size": 8, "seed": 2, "captions": True, "step": first}
        iterator = batches(source, None, Rows({"image": 8}), **settings, **options)
        return [next(iterator) for _ in range(count)]

    whole = take(0, 6)
    halves = [take(2, 4, process_index=i, process_count=2) for i in range(2)]
    for step, *rows in zip(range(2, 6), *halves, strict=True):
        np.testing.assert_array_equal(
            whole[step]["image"], np.concatenate([row["image"] for row in rows])
        )
    captions = [caption for batch in whole for caption in batch["caption"]]
    pictures = Counter(c for c in captions if c.startswith("picture"))
    assert pictures.total() == 24 and len(pictures) == 9  # 3 are held out
    heldout = open_source("mixture", split="heldout", seed=2, parts=parts)
    left = {caption for name, caption in drawn_words(heldout, 40) if name == "picture"}
    assert left | {c.split()[1] for c in pictures} == {str(i) for i in range(12)}


def drawn_words(source, count):
    return [tuple(source[i]["caption"].split()[:2]) for i in range(count)]


def test_a_stage_trains_on_a_mixture_from_its_config(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    folder = {"source": "folder", "path": str(tmp_path), "weight": 0.5}
    parts = (folder, {"source": "shapes", "weight": 0.5})
    given = {"data.source": "mixture", "data.mixture.parts": parts}
    stage = make_stage("clip", None, **given)
    assert next(stage.batches("train", 3))["clip_image"].shape[0] == 8


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "needs at least one source"),
        (("folder",), "a part of a mixture is 'folder': it must be as"),
        (({"source": "shapes"},), "a part of a mixture is .*'weight'"),
        (({"source": "shapes", "weight": 0},), "is 0: must be a number above"),
        (({"source": "shapes", "weight": "3"},), "is '3': must be a number above 0"),
        (({"source": "shapes", "weight": float("inf")},), "inf: must be a number abo"),
        (({"source": "folder", "weight": 1},), 'data "folder" needs a path'),
        (({"source": "folder", "path": 3, "weight": 1},), "a part of a mixture is .*"),
        (({"source": ["shapes"], "weight": 1},), "a part of a mixture is .*: not text"),
        (
            ({"source": "shapes", "weight": 1, "split": "train"},),
            "'split' is not an opt",
        ),
        (({"source": "shapes", "weight": 1, 2: 3},), "2 is not an option of a source"),
        (({"source": "shapes", "weight": 1, "x": 1},), 'has no option "x"'),
        (({"source": "mixture", "weight": 1},), "can't be part of a mixture"),
        (({"source": "tape", "weight": 1},), 'data "tape": there is'),
    ],
)
def test_errors(parts, message):
    with pytest.raises(UserError, match=message):
        open_source("mixture", parts=parts)


def test_what_can_not_be_mixed():
    embedded = named("z", 3, Embedded("1234", None))
    with pytest.raises(UserError, match="p and z can't be mixed: embeddings only"):
        mix([named("p", 3), embedded], [1, 1], 0)
    with pytest.raises(UserError, match="p has no examples"):
        mix([named("p", 0)], [1], 0)
