"""Folders of embeddings: written, completed, read, damaged."""

import json
import shutil
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
    with pytest.raises(UserError, match="begun with clip=1234, and not 5: give the"):
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
        (lambda f: (f / "metadata.json").write_text("{"), "cannot read .*metadata"),
        (metadata(count=None), "it is not complete; the command"),
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
