"""Folders of embeddings: written, completed, read, damaged."""

import json
import shutil
import sys
from unittest.mock import Mock

import numpy as np
import pytest

from dalle2_jax.data import embeddings
from dalle2_jax.data.batches import batches
from dalle2_jax.data.examples import BadExample
from dalle2_jax.data.rows import Rows
from dalle2_jax.data.sources import open_source
from dalle2_jax.data.tokenizer import Tokenizer
from dalle2_jax.errors import UserError
from tests.pictures import png

SETTINGS = {"clip": "1234", "image_size": 8, "shards": 2}
ALL = {"holdout": 0.0}
TOKENIZER = Mock(spec=Tokenizer)  # tokens are in the folder


def example(i, name="picture"):
    rng = np.random.default_rng(i)
    return {
        "key": f"{i}.png",
        "captions": [f"{name} {i}", f"{name} {i} again"],
        "z_image": rng.normal(i, 1, 3).astype(np.float32),
        "z_text": rng.normal(size=(2, 3)).astype(np.float32),
        "tokens": np.int32([[1, i, 2, 2], [1, i, 9, 2]]),
        "image": png(i),
    }


def write(folder, name="picture", **settings):
    embeddings.begin(folder, {**SETTINGS, **settings})
    for number, numbers in enumerate((range(7), range(7, 12))):
        file = embeddings.shard(folder, number, 2)
        rows = (example(i, name) for i in numbers)
        keys = embeddings.write_shard(file, rows, {"bad": number})
        assert keys == [f"{i}.png" for i in numbers]
    return embeddings.finish(folder)


def test_written_and_read(tmp_path):
    assert write(tmp_path)["count"] == 12
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    z = np.stack([example(i)["z_image"] for i in range(12)]).astype(np.float64)
    np.testing.assert_allclose(metadata["mean"], z.mean(0), rtol=1e-12)
    np.testing.assert_allclose(metadata["std"], z.std(0), rtol=1e-12)
    assert metadata["skipped"] == {"bad": 1}
    source = open_source("embeddings", tmp_path, **ALL)
    assert source.embedded == ("1234", 8)
    for i in range(12):
        read = source[i]
        for name, value in example(i).items():
            np.testing.assert_array_equal(read[name], value)
    parts = [open_source("embeddings", tmp_path, s) for s in ("train", "heldout")]
    assert list(map(len, parts)) == [11, 1]


def test_a_shard_may_be_empty(tmp_path):
    embeddings.begin(tmp_path, SETTINGS)
    for number, rows in enumerate(([], [example(3)])):
        embeddings.write_shard(embeddings.shard(tmp_path, number, 2), rows, {})
    assert embeddings.finish(tmp_path)["count"] == 1
    assert open_source("embeddings", tmp_path)[0]["key"] == "3.png"
    embeddings.write_shard(embeddings.shard(tmp_path, 1, 2), [], {})
    with pytest.raises(UserError, match="has no examples: all were skipped"):
        embeddings.finish(tmp_path)


def test_batches_have_them_with_the_tokens_of_the_caption(tmp_path):
    write(tmp_path)
    source = open_source("embeddings", tmp_path, **ALL)
    given = {"batch_size": 8, "seed": 0, "captions": True}
    for sizes in ({}, {"image": 8}):
        batch = next(batches(source, TOKENIZER, Rows(sizes, embeddings=True), **given))
        assert ("image" in batch) == bool(sizes)
        for z, words, caption in zip(
            batch["z_image"], batch["tokens"], batch["caption"], strict=True
        ):
            i = int(caption.split()[1])
            np.testing.assert_array_equal(z, example(i)["z_image"])
            np.testing.assert_array_equal(
                words[1:3], [i, 9 if "again" in caption else 2]
            )
    with pytest.raises(UserError, match="has pictures of 8 px, and 16 px are needed"):
        batches(source, None, Rows({"image": 16}), **given)
    with pytest.raises(
        UserError, match='crop must be "center", flip False and jitter 0'
    ):
        batches(source, None, Rows({}, crop="random", embeddings=True), **given)


def test_a_mixture_of_embeddings(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, name)
    write(tmp_path / "other", clip="5678")

    def mixture(*names):
        parts = [
            {"source": "embeddings", "path": str(tmp_path / name), "weight": 1}
            for name in names
        ]
        return open_source("mixture", parts=parts)

    source = mixture("one", "two")
    assert source.embedded == ("1234", 8)
    rows = Rows({}, embeddings=True)
    batch = next(batches(source, TOKENIZER, rows, batch_size=8, seed=0))
    assert batch["z_image"].shape == (8, 3)
    with pytest.raises(UserError, match="only with embeddings, of the same CLIP"):
        mixture("one", "other")


def test_begin(tmp_path):
    embeddings.begin(tmp_path / "a", SETTINGS)
    assert embeddings.begin(tmp_path / "a", SETTINGS)["count"] is None
    with pytest.raises(
        UserError, match="begun with clip='1234', and not '5': give the"
    ):
        embeddings.begin(tmp_path / "a", {**SETTINGS, "clip": "5"})
    with pytest.raises(UserError, match="exists and holds no embeddings"):
        embeddings.begin(tmp_path, SETTINGS)
    with pytest.raises(UserError, match="out=gs://b/z is a URL"):
        embeddings.begin("gs://b/z", SETTINGS)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to .*file"):
        embeddings.begin(tmp_path / "file" / "z", SETTINGS)


def test_what_is_not_complete_or_damaged(tmp_path):
    write(tmp_path / "whole")

    def damaged(change):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        change(folder)
        return open_source("embeddings", folder, **ALL)

    def metadata(**changes):
        def change(folder):
            file = folder / "metadata.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

        return change

    def keys(value):
        def change(folder):
            file = embeddings.shard(folder, 0, 2).with_suffix(".json")
            file.write_text(json.dumps({**json.loads(file.read_text()), "keys": value}))

        return change

    def cut(folder):
        file = embeddings.shard(folder, 0, 2)
        file.write_bytes(file.read_bytes()[:1000])

    def overwrite(folder):
        file = embeddings.shard(folder, 0, 2)
        data = bytearray(file.read_bytes())
        data[200:210] = b"\xff" * 10
        file.write_bytes(data)

    for change, message in (
        (lambda f: embeddings.shard(f, 1, 2).unlink(), "shard-00001.* is missing"),
        (lambda f: (f / "metadata.json").unlink(), "has no metadata.json: make it"),
        (
            lambda f: (f / "metadata.json").write_text("{"),
            "metadata.* is not valid JSON",
        ),
        (metadata(count=None), "it is not complete; the command"),
        (lambda f: (f / "metadata.json").write_text("[" * 10**5), "100 levels deep"),
        (metadata(shards=10**9), "shard-00000-of-1000000000.* is missing"),
        (metadata(shards=0), "damaged: it has no valid 'shards'"),
        (metadata(shards="2"), "metadata.json is damaged: it has no valid 'shards'"),
        (metadata(count=[]), "damaged: it has no valid 'count'"),
        (metadata(clip=7), "damaged: it has no valid 'clip'"),
        (keys(None), "shard-00000.*json has no list of keys"),
        (keys([1] * 7), "shard-00000.*json has no list of keys"),
        (keys(["a"]), "12 records and 6 keys"),
        (keys([]), "5 records and 5 keys of 12 examples"),
        (metadata(shards=True), "damaged: it has no valid 'shards'"),
        (metadata(format=9), "has format 9, this version"),
        (cut, "cannot read .*damaged"),
        (lambda f: shutil.copy(*(embeddings.shard(f, i, 2) for i in (1, 0))), "10 rec"),
    ):
        with pytest.raises(UserError, match=message):
            damaged(change)
    source = damaged(overwrite)
    with pytest.raises(BadExample, match="damaged record: 0.png"):
        source[0]
    assert source[8]["key"] == "8.png"


@pytest.mark.parametrize(
    "changes",
    [
        {"captions": "one"},
        {"captions": ["one", ""]},
        {"captions": ["one"]},
        {"captions": [1, 2]},
        {"captions": {"a": "b"}},
        {"z_image": np.zeros((1, 3))},
        {"z_image": 1.0},
        {"z_text": np.zeros((2, 4))},
        {"tokens": np.zeros(2, int)},
        {"tokens": None},
    ],
)
def test_a_record_of_another_shape_is_bad(tmp_path, changes):
    embeddings.begin(tmp_path, {**SETTINGS, "shards": 1})
    file = embeddings.shard(tmp_path, 0, 1)
    embeddings.write_shard(file, [example(0)], {})
    embeddings.finish(tmp_path)
    told = file.with_suffix(".json").read_text()
    row = {**example(0), **changes}
    embeddings.write_shard(file, [{**row, "z_image": example(0)["z_image"]}], {})
    if "z_image" in changes:
        from array_record.python.array_record_module import ArrayRecordWriter
        from flax.serialization import msgpack_serialize

        writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")
        writer.write(msgpack_serialize(row))
        writer.close()
    file.with_suffix(".json").write_text(told)
    with pytest.raises(BadExample, match="damaged record: 0.png"):
        open_source("embeddings", tmp_path)[0]


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    with pytest.raises(UserError, match="is not UTF-8, which array_record needs"):
        embeddings.begin(str(tmp_path / "\udce9"), SETTINGS)


def test_without_array_record_its_package_is_named(tmp_path, monkeypatch):
    for name in ("array_record_module", "array_record_data_source"):
        monkeypatch.setitem(sys.modules, f"array_record.python.{name}", None)
    with pytest.raises(UserError, match="pip install array_record, on Linux or macOS"):
        embeddings.write_shard(embeddings.shard(tmp_path, 0, 1), [], {})


def test_records_that_would_spoil_a_run(tmp_path):
    good = [example(i) for i in range(2)]
    nan = {**good[0], "z_image": np.float32([1, np.nan, 1])}
    real = {**good[0], "tokens": np.float32(good[0]["tokens"])}
    long = {**good[0], "tokens": np.int32([[1, 2]] * 2)}
    embeddings.begin(tmp_path, {**SETTINGS, "shards": 1})
    file = embeddings.shard(tmp_path, 0, 1)
    embeddings.write_shard(file, [*good, nan, real, long], {})
    embeddings.finish(tmp_path)
    source = open_source("embeddings", tmp_path, **ALL)
    for i in (2, 3):
        with pytest.raises(BadExample, match="damaged record"):
            source[i]
    rows = Rows({"image": 8}, embeddings=True)
    with pytest.raises(UserError, match="don't go together"):
        for _ in range(3):
            next(batches(source, TOKENIZER, rows, batch_size=5, seed=0))


def test_a_path_that_is_too_long():
    with pytest.raises(UserError, match="has no metadata.json"):
        open_source("embeddings", "a" * 5000)
