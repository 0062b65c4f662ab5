"""Tar shards: which are found, what is read of them, and what is damaged."""

import io
import json
import os
import sys
import tarfile

import fsspec
import pytest

from dalle2_jax.data import sources
from dalle2_jax.data.examples import BadExample
from dalle2_jax.data.sources import open_source
from dalle2_jax.errors import UserError
from tests.pictures import captioned, every, png, write_shards, write_tar

ALL = {"holdout": 0.0}


@pytest.fixture
def shards(tmp_path):
    write_shards(tmp_path)
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


class Bucket(fsspec.AbstractFileSystem):
    """A remote file system that counts what is fetched."""

    protocol = "bucket"
    files: dict[str, tuple[bytes, str]] = {}  # and their versions
    fetched: list[int] = []

    def info(self, path, **kwargs):
        path = self._strip_protocol(path)
        if path not in self.files:
            raise FileNotFoundError(path)
        data, etag = self.files[path]
        return {"name": path, "size": len(data), "type": "file", "ETag": etag}

    def ls(self, path, detail=True, **kwargs):
        return [self.info(name) if detail else name for name in self.files]

    def cat_file(self, path, version_id=None, start=None, end=None, **kwargs):
        """With its arguments in the order of s3fs's."""
        assert version_id is None
        return super().cat_file(path, start=start, end=end, **kwargs)

    def _open(self, path, mode="rb", **options):
        options.pop("autocommit")
        return BucketFile(self, path, mode, **options)


class BucketFile(fsspec.spec.AbstractBufferedFile):
    def _fetch_range(self, start, end):
        Bucket.fetched.append(end - start)
        return Bucket.files[self.path][0][start:end]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Bucket, "files", {})
    monkeypatch.setattr(Bucket, "fetched", [])
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    return Bucket


def store(bucket, members, version):
    file = io.BytesIO()
    write_tar(file, members)
    bucket.files["a/0.tar"] = file.getvalue(), version
    bucket.fetched.clear()


def test_of_a_remote_tar_only_the_headers_are_read_and_only_once(bucket):
    large = {"0.png": bytes(20 * 2**20), "0.txt": "zero"}
    store(bucket, large, "one")
    assert len(open_source("webdataset", "bucket://a/*.tar")) == 1
    assert sum(bucket.fetched) < 4 * 2**20
    store(bucket, captioned(str(i) for i in range(100)), "one")  # another size
    assert len(open_source("webdataset", "bucket://a/0.tar", **ALL)) == 100
    assert len(bucket.fetched) < 5

    bucket.fetched.clear()
    source = open_source("webdataset", "bucket://a/0.tar", **ALL)
    assert len(source) == 100 and not bucket.fetched
    assert every(source)["picture 7"] == png(7)

    changed = captioned(str(i + 1) for i in range(100))
    store(bucket, {**changed, "x.txt": ""}, "two")
    source = open_source("webdataset", "bucket://a/0.tar", **ALL)
    assert "picture 100" in every(source) and "picture 0" not in every(source)


def test_a_remote_example_is_one_request_unless_its_members_lie_apart(bucket):
    between = {"1.png": png(1), "1.json": " " * 2**15, "1.txt": "picture 1"}
    apart = {"2.txt": "picture 2", "2.bin": bytes(2**16), "2.png": png(2)}
    store(bucket, {**captioned("0"), **between, **apart}, "one")
    source = open_source("webdataset", "bucket://a/0.tar", **ALL)
    for i, requests in enumerate((1, 1, 2)):
        bucket.fetched.clear()
        example = source[i]
        assert (example["image"], example["caption"]) == (png(i), f"picture {i}")
        assert len(bucket.fetched) == requests


def test_a_remote_tar_cut_short_is_not_remembered(bucket, caplog):
    store(bucket, captioned("01"), "one")
    data, _ = bucket.files["a/0.tar"]
    bucket.files["a/0.tar"] = data[:3588], "one"
    for _ in range(2):
        bucket.fetched.clear()
        source = open_source("webdataset", "bucket://a/0.tar")
        assert bucket.fetched
        assert every(source) == {"picture 0": png(0)}
        lost = {"damaged tars": 1, "pictures without a caption": 1}
        assert source.left_out == lost
    assert "0.tar is damaged, it is cut short: 3 files of it are read" in caplog.text


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("s3://b/{0..3}.tar", "s3fs", "s3"), ("gs://b/*.tar", "gcsfs", "gcs")],
)
def test_a_protocol_whose_package_is_missing(url, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"pip install 'dalle2_jax\[{extra}\]'$"):
        open_source("webdataset", url)


def test_a_shard_that_vanishes_is_bad(shards):
    source = open_source("webdataset", f"{shards}/*.tar", **ALL)
    (shards / "a-001.tar").unlink()
    assert source[0]["caption"] == "picture 0"
    with pytest.raises(BadExample, match="cannot read the tar: a-001.tar:5"):
        source[5]


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
    assert source.left_out == {
        "pictures without a caption": 1,
        "captions without a picture": 1,
    }
    assert os.listdir(tmp_path) == ["a.tar"]


def test_tars_with_bad_captions(tmp_path):
    members = {f"{i}.png": png() for i in range(6)}
    members |= {"0.txt": " \n", "1.json": "{", "2.json": "[1]", "3.json": "3"}
    members |= {"4.txt": "caf\xe9".encode("latin-1"), "5.json": b'{"text": "\xff"}'}
    with open(tmp_path / "a.tar", "wb") as file:
        write_tar(file, members)
    source = open_source("webdataset", str(tmp_path / "a.tar"))
    reasons = []
    for i in range(6):
        with pytest.raises(BadExample) as bad:
            source[i]
        reasons.append(bad.value.reason)
    assert reasons == [
        "empty caption",
        *["caption not JSON"] * 3,
        *["caption not UTF-8"] * 2,
    ]
    assert sources.captions(source) == []


def test_a_tar_cut_short_gives_what_is_left(shards, caplog):
    path = shards / "a-000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:3072])  # within the second picture's members
    source = open_source("webdataset", str(path))
    assert list(every(source)) == ["picture 0"]


def test_several_captions_are_one_a_line(tmp_path):
    with open(tmp_path / "a.tar", "wb") as file:
        write_tar(file, {"0.png": png(), "0.txt": "a circle\n\n a disc\r\n"})
    source = open_source("webdataset", str(tmp_path / "a.tar"))
    assert source[0]["caption"] == ["a circle", "a disc"]


def test_hidden_members_are_not_data(tmp_path):
    members = {}
    for name in ("./._0", ".1", "__MACOSX/2", "./a/.ipynb_checkpoints/3", "./4"):
        members |= {f"{name}.png": png(4), f"{name}.txt": "picture 4"}
    with open(tmp_path / "a.tar", "wb") as file:
        write_tar(file, members)
    source = open_source("webdataset", str(tmp_path / "a.tar"))
    assert every(source) == {"picture 4": png(4)} and source.left_out == {}


def test_names_that_are_not_utf8(tmp_path):
    path = os.path.join(str(tmp_path), "\udcff.tar")
    with open(path, "wb") as file:
        write_tar(file, {"caf\udce9.png": png(1), "caf\udce9.txt": "one"})
    for source in (open_source("webdataset", p) for p in (path, str(tmp_path))):
        assert source[0] == {
            "image": png(1),
            "caption": "one",
            "key": "\\udcff.tar:caf\\udce9",
        }
        assert source.name.encode()


def test_damaged_tars_are_counted_and_give_what_is_left(shards, caplog):
    whole = (shards / "a-000.tar").read_bytes()
    (shards / "a-000.tar").write_bytes(whole[:3072])  # at the second one's header
    damaged = bytearray((shards / "a-001.tar").read_bytes())
    damaged[1024 + 10] ^= 1  # of the first example's text
    (shards / "a-001.tar").write_bytes(damaged)
    joined = (shards / "a-002.tar").read_bytes()
    (shards / "a-002.tar").write_bytes(joined + whole)
    source = open_source("webdataset", str(shards), **ALL)
    kept = [0, 5, 6, 7, 8, 9, 10, 11]
    assert every(source) == {f"picture {i}": png(i) for i in kept}
    assert source.left_out["damaged tars"] == 3
    for said in ("000.tar is damaged, it is cut short", "001.tar is damaged, a header"):
        assert said in caplog.text
    assert "002.tar is damaged, more comes after its end" in caplog.text


def test_members_that_are_too_large_are_left_out(tmp_path):
    def member(name, size):
        info = tarfile.TarInfo(name)
        info.size = size
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(-(-size // 512) * 512, os.SEEK_CUR)  # a hole

    with open(tmp_path / "a.tar", "wb") as file:
        for key, picture, text in (("0", 2**37, 1), ("1", 1, 2**33), ("2", 2, 1)):
            member(f"{key}.png", picture)
            member(f"{key}.txt", text)
        file.write(bytes(1024))
    source = open_source("webdataset", str(tmp_path / "a.tar"))
    assert source.left_out == {
        "pictures that are too large": 1,
        "captions that are too long": 1,
    }
    assert len(source) == 1 and source[0]["key"] == "a.tar:2"


def test_what_is_not_a_file_is_left_out(shards, caplog):
    os.mkfifo(shards / "pipe.tar")
    (shards / "zero.tar").symlink_to("/dev/zero")
    (shards / "folder.tar").mkdir()
    for pattern in ("", "/*.tar"):
        assert len(open_source("webdataset", f"{shards}{pattern}", **ALL)) == 12
    assert caplog.text.count("left out: 3 names that are not files") == 1
    for name in ("pipe.tar", "zero.tar"):
        with pytest.raises(UserError, match=f"there is no tar at .*{name}"):
            open_source("webdataset", str(shards / name))


def test_home_is_expanded_and_not_needed(shards, bucket, monkeypatch):
    monkeypatch.setenv("HOME", str(shards))
    assert len(open_source("webdataset", "~/a-{000..002}.tar", **ALL)) == 12
    store(bucket, captioned("01"), "one")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # without a home
    for _ in range(2):
        assert len(open_source("webdataset", "bucket://a/0.tar")) == 2
        assert bucket.fetched and not os.path.exists("~")


@pytest.mark.parametrize(
    "pattern",
    [
        "a-{0..999999999}.tar",
        "a-{000000..999999}{0..9}.tar",
        "{a,b}" * 64,
        "{" * 5000 + "0..9999999" + "}" * 5000,
        "{0..%s}" % ("9" * 18),
    ],
)
def test_braces_of_too_many_names(pattern):
    with pytest.raises(
        UserError, match=r"^the braces of .* are more than 1,000,000 na"
    ):
        open_source("webdataset", pattern)


@pytest.mark.parametrize(
    "pattern",
    ["{" * 5000 + "a" + "}" * 5000, "{" * 5000, "{0..%s}" % ("9" * 9999), "{,}" * 4],
)
def test_braces_that_mean_nothing(tmp_path, pattern):
    with pytest.raises(UserError, match=r"^(there is no tar at|cannot read)"):
        open_source("webdataset", f"{tmp_path}/x{pattern}")


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
