"""The members of a tar: what Python's tarfile finds, and what it loses or believes."""

import io
import tarfile
import time

import numpy as np
import pytest

from dalle2_jax.data.tar_members import read_members

BLOCK = 512
FILES = {f"{i}.{kind}": bytes([i + 1]) * 700 for i in range(10) for kind in ("a", "b")}


def tar(files, form=tarfile.USTAR_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as new:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))
    return file.getvalue()


def header(name="x", size=0, kind=tarfile.REGTYPE, **options):
    """A header with any size, also below zero and of more than 8 GB."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for key, value in options.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def record(kind, data, size=None):
    """A member whose data extends the next header."""
    padded = data + bytes(-len(data) % BLOCK)
    return header("e", len(data) if size is None else size, kind) + padded


def pax(**values):
    found = b""
    for key, value in values.items():
        text = f" {key.replace('__', '.')}={value}\n".encode("utf-8", "surrogateescape")
        size = len(text) + len(str(len(text) + 2))
        found += str(size).encode() + text
    return record(tarfile.XHDTYPE, found)


def found(data, size=True):
    """What is found in a tar, with the members' bytes, in a time that is no hang."""
    start = time.monotonic()
    contents = read_members(io.BytesIO(data), len(data) if size else None)
    assert time.monotonic() - start < 30
    return {k: data[slice(*at)] for k, at in contents.members.items()}, contents


@pytest.mark.parametrize(
    "form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
@pytest.mark.parametrize("size", [True, False])
def test_members_are_those_of_tarfile(form, size):
    files = {
        **FILES,
        "empty": b"",
        "d/" * 40 + "long": b"x" * 512,
        "é日/caf\udce9": b"y" * 513,
    }
    if form != tarfile.USTAR_FORMAT:
        files["n" * 300] = b"z"
    members, contents = found(tar(files, form), size)
    assert members == files
    assert contents.problem is None and contents.left_out == {}


def test_links_and_what_else_is_no_file():
    data = b"".join(
        [
            header("d/", kind=tarfile.DIRTYPE),
            header("a", 3) + b"abc" + bytes(509),
            header("b", kind=tarfile.LNKTYPE, linkname="a"),  # as tar writes hard links
            record(tarfile.GNUTYPE_LONGLINK, b"a\0"),
            header("c", kind=tarfile.LNKTYPE, linkname="x"),
            header("e", kind=tarfile.LNKTYPE, linkname="x"),
            header("f", kind=tarfile.SYMTYPE, linkname="a"),
            header("g", 2**40, kind=tarfile.FIFOTYPE),
            header("h", kind=tarfile.CHRTYPE),
            record(tarfile.XGLTYPE, b"16 path=global\n"),
            header("i", 1) + b"i" + bytes(511),
            bytes(1024),
        ]
    )
    members, contents = found(data)
    assert members == {"a": b"abc", "b": b"abc", "c": b"abc", "i": b"i"}
    assert contents.left_out == {"links and devices in tars": 4}
    assert contents.problem is None


def test_a_cut_anywhere_is_told():
    whole = tar(FILES)
    end = len(FILES) * 3 * BLOCK
    for cut in [*range(BLOCK, end + 2 * BLOCK, BLOCK), 700, 5000, end + 1]:
        members, contents = found(whole[:cut])
        assert contents.problem == "it is cut short"
        assert len(members) == cut // (3 * BLOCK)
        assert members.items() <= FILES.items()
    assert found(whole[: end + 2 * BLOCK])[1].problem is None


def test_a_damaged_header_loses_one_member():
    whole = tar(FILES)
    for number in range(1, 20):
        damaged = bytearray(whole)
        damaged[number * 3 * BLOCK + 5] ^= 255
        members, contents = found(bytes(damaged))
        name = list(FILES)[number]
        assert members == {k: v for k, v in FILES.items() if k != name}
        assert contents.problem == "a header is damaged"
    zeroed = whole[: 3 * BLOCK] + bytes(BLOCK) + whole[4 * BLOCK :]
    members, contents = found(zeroed)
    assert len(members) == 19 and contents.problem == "a header is damaged"


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(header(size=-1000), id="size below zero"),
        pytest.param(pax(size=-1000) + header(size=8), id="pax size below zero"),
        pytest.param(pax(size="9" * 5000) + header(), id="pax size of 5000 digits"),
        pytest.param(pax(size="x") + header(), id="pax size of letters"),
        pytest.param(record(tarfile.XHDTYPE, b"0 a=b\n"), id="record of no length"),
        pytest.param(record(tarfile.XHDTYPE, b"-5 a=b\n"), id="record goes back"),
        pytest.param(record(tarfile.XHDTYPE, b"99 a=b\n"), id="record too long"),
        pytest.param(record(tarfile.XHDTYPE, b"x" * 99), id="no record"),
        pytest.param(record(tarfile.XHDTYPE, b"", 2**60), id="endless pax"),
        pytest.param(record(tarfile.GNUTYPE_LONGNAME, b"", 2**33), id="endless name"),
        pytest.param(record(tarfile.GNUTYPE_LONGLINK, b"", -512), id="name below 0"),
        pytest.param(b"\xff" * BLOCK, id="no header"),
    ],
)
def test_a_hostile_header_is_passed_over(bad):
    before = header("a", 1) + b"a" + bytes(511)
    after = header("b", 1) + b"b" + bytes(511) + bytes(1024)
    members, contents = found(before + bad + after)
    assert {"a": b"a", "b": b"b"}.items() <= members.items()
    assert contents.problem == "a header is damaged"
    for size in (True, False):
        assert found(before + bad, size)[1].problem == "it is cut short"


@pytest.mark.parametrize("claimed", [BLOCK + 1, 8 * 2**30, 100 * 2**30, 2**80])
@pytest.mark.parametrize("size", [True, False])
def test_a_member_beyond_the_end_is_not_read(claimed, size):
    before = header("a", 1) + b"a" + bytes(511)
    for bad in (header("b", claimed), pax(size=claimed) + header("b")):
        members, contents = found(before + bad + bytes(BLOCK), size)
        assert members["a"] == b"a" and contents.problem == "it is cut short"
        assert "b" not in members or not size


def test_sparse_files_are_left_out():
    data = b"".join(
        [
            header("a", BLOCK, tarfile.GNUTYPE_SPARSE) + bytes([1]) * BLOCK,
            pax(GNU__sparse__major=1, GNU__sparse__name="b", GNU__sparse__size=2**60),
            header("b", BLOCK) + b"9" * BLOCK,  # the map's length: 10^512
            pax(GNU__sparse__map="0," * 9999),
            header("c", 0),
            header("d", 1) + b"d" + bytes(511),
            bytes(1024),
        ]
    )
    members, contents = found(data)
    assert members == {"d": b"d"} and contents.problem is None
    assert contents.left_out == {"sparse files in tars": 3}


def test_more_after_the_end_is_told():
    members, contents = found(tar({"a": b"a"}) + tar({"b": b"b"}))
    assert members == {"a": b"a"}
    assert contents.problem == "more comes after its end, as where tars are joined"


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"x" * 9000, b"\x1f\x8b" * 512])
def test_what_is_no_tar(data):
    with pytest.raises(tarfile.HeaderError):
        read_members(io.BytesIO(data), len(data))


def test_damage_of_any_kind_loses_no_more_than_it_says():
    rng = np.random.default_rng(0)
    whole = tar(FILES, tarfile.PAX_FORMAT)
    for _ in range(200):
        data = np.frombuffer(whole, np.uint8).copy()
        at = rng.integers(BLOCK, 40 * BLOCK, rng.integers(1, 9))
        data[at] = rng.integers(0, 256, len(at))
        data = data.tobytes()[: rng.choice([len(data), rng.integers(BLOCK, len(data))])]
        members, contents = found(data)
        if members.keys() != FILES.keys():
            assert contents.problem is not None
        assert all(len(v) == 700 for k, v in members.items() if k in FILES)


def test_the_search_for_a_header_has_an_end(monkeypatch):
    monkeypatch.setattr("dalle2_jax.data.tar_members.FARTHEST", 4 * BLOCK)
    for blocks, lost in ((4, False), (5, True)):
        before, after = tar({"a": b""})[:BLOCK], tar({"b": b""})
        members, contents = found(before + b"x" * blocks * BLOCK + after)
        assert ("b" not in members) == lost
        assert contents.problem == "a header is damaged"
