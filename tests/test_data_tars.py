"""Tar shards: which are found, what is read of them, and what is damaged."""

import json
import os
import tarfile

import fsspec
import pytest

from dalle2_jax.data import sources
from dalle2_jax.data.examples import BadExample
from dalle2_jax.data.sources import open_source
from dalle2_jax.errors import UserError
from tests.pictures import captioned, every, png, write_tar

ALL = {"holdout": 0.0}


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        with open(tmp_path / f"a-{shard:03d}.tar", "wb") as file:
            write_tar(file, captioned([f"{4 * shard + i}" for i in range(4)]))
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("a-000.tar", 4),
        ("a-{000..002}.tar", 12),
        ("a-{000,002}.tar", 8),
        ("{a,a}-{000..001}.tar", 16),
        ("a-*.tar", 12),
        ("a-00[12].tar", 8),
        ("", 12),
    ],
)
def test_tars_by_pattern(shards, pattern, count):
    source = open_source("webdataset", f"{shards}/{pattern}", **ALL)
    assert len(source) == count
    for caption, data in every(source).items():
        assert data == png(int(caption.split()[1]))


def test_tars_at_a_url():
    with fsspec.open("memory://tars/b-0.tar", "wb") as file:
        write_tar(file, captioned("123"))
    source = open_source("webdataset", "memory://tars/b-*.tar")
    assert sorted(every(source)) == ["picture 1", "picture 2", "picture 3"]
    with pytest.raises(UserError, match="there is no tar at memory://tars/c"):
        open_source("webdataset", "memory://tars/c-{0..1}.tar")


def test_tars_of_any_order_and_layout(tmp_path):
    members = {
        "../../evil.png": png(1),  # a key and never a file
        "b/x.y.JPG": png(2),
        "alone.png": png(),
        "text only.txt": "x",
        "b/x.y.json": json.dumps({"caption": "from json", "other": 1}),
        "../../evil.txt": "outside",
        "c.webp": png(3),
        "c.json": json.dumps({"text": ["three", "drei"]}),
    }
    with open(tmp_path / "a.tar", "wb") as file:
        write_tar(file, members)
    source = open_source("webdataset", str(tmp_path / "a.tar"))
    found = {source[i]["key"]: source[i]["caption"] for i in range(len(source))}
    assert found == {
        "a.tar:../../evil": "outside",
        "a.tar:b/x.y": "from json",
        "a.tar:c": ["three", "drei"],
    }
    assert os.listdir(tmp_path) == ["a.tar"]


def test_tars_with_bad_captions(tmp_path):
    members = {f"{i}.png": png() for i in range(4)}
    members |= {"0.txt": " \n", "1.json": "{", "2.json": "[1]", "3.json": "3"}
    with open(tmp_path / "a.tar", "wb") as file:
        write_tar(file, members)
    source = open_source("webdataset", str(tmp_path / "a.tar"))
    reasons = []
    for i in range(4):
        with pytest.raises(BadExample) as bad:
            source[i]
        reasons.append(bad.value.reason)
    assert reasons == ["empty caption", "caption not JSON", *["no caption"] * 2]
    assert sources.captions(source) == []


def test_a_tar_cut_short_gives_what_is_left(shards, caplog):
    path = shards / "a-000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:3072])  # within the second picture's members
    source = open_source("webdataset", str(path))
    assert list(every(source)) == ["picture 0"]


def test_tar_errors(shards, tmp_path):
    for pattern in ("b.tar", "b-*.tar", "{b,c}.tar"):
        with pytest.raises(UserError, match="there is no tar at"):
            open_source("webdataset", f"{shards}/{pattern}")
    with pytest.raises(UserError, match="empty range"):
        open_source("webdataset", f"{shards}/a-{{2..0}}.tar")
    bad = tmp_path / "bad.tar"
    bad.write_bytes(b"this is no tar" * 100)
    with pytest.raises(UserError, match="bad.tar is not a tar"):
        open_source("webdataset", str(bad))
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        tar.add(shards / "a-000.tar")
    with pytest.raises(UserError, match="or a compressed one"):
        open_source("webdataset", str(tmp_path / "c.tar.gz"))
    with open(tmp_path / "d.tar", "wb") as file:
        write_tar(file, {"0.png": png()})
    with pytest.raises(UserError, match="found no pictures with captions"):
        open_source("webdataset", str(tmp_path / "d.tar"))
    with pytest.raises(UserError, match="cannot read nonsense://x.tar: Protocol"):
        open_source("webdataset", "nonsense://x.tar")
