"""Batches: the same for a seed and a step however they come about; what they skip."""

import io
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.data import tokenizer
from dalle2_jax.data.batches import batches, count_bad, in_order
from dalle2_jax.data.examples import BadExample, Source
from dalle2_jax.data.mixture import mix
from dalle2_jax.data.rows import Rows
from dalle2_jax.data.sources import open_source
from dalle2_jax.errors import UserError

SIZES = {"image": 8}


def png(array):
    file = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8)).save(file, "PNG")
    return file.getvalue()


def gradient(value):
    """A picture 24 by 16 whose red tells its column, green its row, blue `value`."""
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[..., 0] = 10 * np.arange(24)
    picture[..., 1] = 10 * np.arange(16)[:, None]
    picture[..., 2] = value
    return picture


def numbered(count, bad=(), **options):
    """Gradients captioned by their numbers; those in `bad` are unusable."""

    def read(i):
        if i in bad:
            raise BadExample("no caption", str(i))
        caption = [f"picture {i}", f"image {i}"]
        return {"image": png(gradient(i)), "caption": caption, "key": str(i)}

    return Source("numbers", range(count), read, **options)


def iterate(source, tokens=None, sizes=SIZES, **options):
    made = {name: options.pop(name) for name in Rows._fields if name in options}
    options = {"batch_size": 8, "seed": 3, "captions": True} | options
    return batches(source, tokens, Rows(sizes, **made), **options)


def take(count, *args, **options):
    iterator = iterate(*args, **options)
    return [next(iterator) for _ in range(count)]


def numbers(batch):
    return [int(caption.split()[1]) for caption in batch["caption"]]


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


CHANCE = {"crop": "random", "flip": True, "jitter": 0.1, "crop_fraction": 0.5}


@pytest.mark.parametrize("kind", ["numbers", "shapes"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_gives_the_same_batches(kind, processes):
    source = numbered(20, bad=(3, 7)) if kind == "numbers" else open_source("shapes")
    whole = take(4, source, **CHANCE)
    parts = [
        take(
            4, source, **CHANCE, process_index=i, process_count=processes, threads=i + 1
        )
        for i in range(processes)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
        for rows in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)


def test_resumes_at_any_step():
    source = numbered(11, bad=(5,))
    whole = take(6, source, **CHANCE)
    for step in (1, 4):
        assert_equal(take(6 - step, source, **CHANCE, step=step), whole[step:])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_block_of_neighbours_stays_together(processes):
    source = numbered(10)
    given = {"batch_size": 8, "block": 4, **CHANCE}
    whole = take(3, source, **given)
    found = sum(map(numbers, whole), [])
    groups = [tuple(found[i : i + 4]) for i in range(0, len(found), 4)]
    neighbours = {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 0, 1)}  # the last ones wrap around
    assert set(groups[:3]) == set(groups[3:]) == neighbours
    assert groups[:3] != groups[3:]
    parts = [
        take(3, source, **given, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    joined = [
        sum((numbers(part) for part in rows), []) for rows in zip(*parts, strict=True)
    ]
    assert joined == [numbers(batch) for batch in whole]


def test_batches_of_one_are_the_rows_of_larger_ones():
    source = numbered(11)
    rows = [numbers(b) for b in take(6, source, batch_size=1, step=2)]
    assert sum(rows, []) == sum(map(numbers, take(2, source, batch_size=4)), [])[2:]


def test_the_seed_decides():
    source = numbered(50)
    one, same, other = (numbers(take(1, source, seed=s)[0]) for s in (1, 1, 2))
    assert one == same != other
    numbers(take(1, source, seed=2**32 - 1)[0])


def test_every_epoch_has_every_example_in_a_new_order():
    epochs = [numbers(b) for b in take(3, numbered(8))]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert numbers(take(1, numbered(8, endless=True))[0]) == list(range(8))
    assert len(numbers(take(1, numbered(3))[0])) == 8  # more than there are


def test_shapes_come_in_the_order_of_their_groups():
    source = open_source("shapes", contrast=4)
    batch = take(2, source)[1]
    assert batch["caption"] == [source[i]["caption"] for i in range(8, 16)]
    np.testing.assert_array_equal(batch["image"][0], source[8]["image"](8))


def test_what_a_batch_holds():
    tokens = tokenizer.train(["picture image 0123456789"], 530, 16)
    sizes = {"image": 16, "clip_image": 8}
    batch = take(1, numbered(9), tokens, sizes=sizes, context_length=12)[0]
    assert batch["image"].shape == (8, 16, 16, 3)
    assert batch["clip_image"].shape == (8, 8, 8, 3)
    assert batch["image"].dtype == batch["clip_image"].dtype == np.uint8
    np.testing.assert_array_equal(
        batch["tokens"], tokens.encode(batch["caption"], 12, warn=False)
    )
    assert batch["tokens"].dtype == np.int32
    bare = take(1, numbered(9), captions=False)[0]
    assert list(bare) == ["image"]


def test_one_of_several_captions_is_drawn():
    words = {c.split()[0] for b in take(4, numbered(9)) for c in b["caption"]}
    assert words == {"picture", "image"}


def test_captions_too_long_are_cut_silently():
    tokens = tokenizer.train(["picture image"], 514, 16)
    batch = take(1, numbered(9), tokens, context_length=6)[0]
    assert (batch["tokens"][:, -1] == tokens.eot).all()


def test_bad_examples_are_replaced_counted_and_logged_once(caplog):
    def read(i):
        good = {"image": png(gradient(i)), "caption": f"picture {i}", "key": str(i)}
        if i == 1:
            raise BadExample("empty caption", "1")
        if i == 2:
            return good | {"image": b"no picture"}
        if i == 3:
            return good | {"image": good["image"][:60]}
        return good

    source = Source("few", range(6), read, endless=True)
    with caplog.at_level(logging.WARNING):
        iterator = iterate(source, batch_size=6)
        drawn = [n for _ in range(10) for n in numbers(next(iterator))]
    assert len(drawn) == 60 and set(drawn) == {0, 4, 5}
    report = iterator.report()
    assert set(report["reasons"]) == {"empty caption", "unreadable picture"}
    assert report["reasons"]["empty caption"] >= 10
    assert report["skipped"] == sum(report["reasons"].values()) >= 30
    logged = [r.getMessage() for r in caplog.records]
    assert len(logged) == 2
    assert logged[0] == "skipping an example: empty caption: 1"
    assert logged[1].startswith("skipping an example: unreadable picture: 2 (cannot")


def test_the_report_counts_what_was_handed_out_only():
    iterator = iterate(numbered(8, bad=(0,), endless=True), threads=4)
    assert iterator.report() == {"skipped": 0, "reasons": {}}
    next(iterator)
    assert iterator.report()["reasons"].keys() == {"no caption"}
    again = iterate(numbered(8, bad=(0,), endless=True), threads=1)
    next(again)
    assert again.report() == iterator.report()


def check_workers():
    mixed = mix([numbered(20), open_source("shapes")], [1, 1], 3)
    iterator = iterate(mixed, workers=2, sizes={"image": 16})
    assert_equal(
        take(3, mixed, sizes={"image": 16}), [next(iterator) for _ in range(3)]
    )
    iterator.close()

    source = numbered(20, bad=(3, 7))
    expected = take(9, source, **CHANCE)
    iterator = iterate(source, **CHANCE, workers=2, step=2)
    assert_equal(expected[2:], [next(iterator) for _ in range(7)])
    assert iterator.report()["skipped"] > 0
    iterator.close()

    iterator = iterate(numbered(4, bad=range(4)), workers=1)
    with pytest.raises(UserError, match="100 examples in a row of numbers"):
        next(iterator)
    iterator.close()


def check_killed_worker():
    def read(i):
        if i == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return numbered(20)[i]

    source = Source("numbers", range(20), read, endless=True)
    iterator = iterate(source, workers=1)
    with pytest.raises(UserError, match=r"a data worker ended .exit code -9.; the sys"):
        for _ in range(3):
            next(iterator)
    iterator.close()


def test_workers_give_the_same_batches_and_errors():
    # In a process of its own: what these tests check types with can't be pickled.
    code = (
        "from tests.test_data_batches import check_killed_worker, check_workers; "
        "check_workers(); check_killed_worker()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "leaked" not in result.stderr, result.stderr


def test_in_order_has_each_example_once():
    def make(example):
        if example["key"] == "5":
            raise BadExample("refused", "5")
        return int(example["key"])

    source, counts = numbered(20, bad=(3, 7, 19)), {}
    found = list(in_order(source, range(2, 19), make, threads=3))
    assert len(found) == 17 and isinstance(found[1], BadExample)
    good = list(count_bad(found, counts))
    assert good == [i for i in range(2, 19) if i not in (3, 5, 7)]
    assert counts == {"no caption": 2, "refused": 1}


def test_all_bad_is_an_error():
    with pytest.raises(
        UserError, match=r"100 examples in a row of numbers .*no caption"
    ):
        next(iterate(numbered(4, bad=range(4))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process_count": 3}, "a batch of 8 does not divide by 3 processes"),
        ({"block": 3}, "block is 3: it must divide the 8 rows of a process"),
        ({"seed": -1}, "seed is -1: must be"),
        ({"workers": -1}, "workers is -1"),
        ({"crop": "top"}, "crop is 'top': must be one of center, random"),
    ],
)
def test_errors_say_what_is_wrong(options, message):
    with pytest.raises(UserError, match=message):
        iterate(numbered(4), **options)
    with pytest.raises(UserError, match="numbers has no examples"):
        iterate(numbered(0))
