"""Where the members of a tar lie, by its headers.

Python's tarfile ends without a word at a damaged header, and believes every size.
"""

import io
import tarfile
from collections import Counter
from typing import NamedTuple

BLOCK = tarfile.BLOCKSIZE
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
WITHOUT_DATA = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE),
    *(tarfile.DIRTYPE, tarfile.FIFOTYPE),
)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
LONG_NAMES = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
LARGEST_EXTENSION = 2**20  # bytes of what extends a header
FARTHEST = 2**26  # bytes of damage, within which the next header is looked for


class Contents(NamedTuple):
    """What a tar holds.

    Attributes:
      members: by name, where the bytes of each file begin and end.
      left_out: how many other members there are, by their kind.
      problem: why files may be missing; None if the tar is whole.
    """

    members: dict[str, tuple[int, int]]
    left_out: Counter[str]
    problem: str | None


def read_members(file: io.IOBase, size: int | None) -> Contents:
    """Find the files in a tar of `size` bytes, None if that is not known.

    A damaged header loses what it describes, and no more if the next one is found.

    Raises tarfile.HeaderError if it does not begin with a header: it is not a tar.
    """
    members: dict[str, tuple[int, int]] = {}
    left_out: Counter[str] = Counter()
    extended: dict[str, str] = {}  # what came before a header to extend it
    position = empty = damaged = 0

    def contents(problem: str | None) -> Contents:
        return Contents(members, left_out, problem)

    while empty < 2:
        file.seek(position)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            if not position:
                raise tarfile.TruncatedHeaderError("no header")
            return contents("it is cut short")
        position += BLOCK
        if block.count(0) == BLOCK:
            empty += 1
            continue
        empty = 0
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            length = _length(extended.get("size", header.size))
            if header.type in PAX or header.type in LONG_NAMES:
                extended |= _extension(header.type, file, length)
                position += _padded(length)
                continue
        except tarfile.HeaderError:
            if position == BLOCK:
                raise
            extended = {}
            damaged += BLOCK
            if damaged > FARTHEST:
                return contents("a header is damaged")
            continue
        name = extended.get("path", header.name)
        link = extended.get("linkpath", header.linkname)
        sparse = any(key.startswith("GNU.sparse") for key in extended)
        extended = {}
        if header.type == tarfile.LNKTYPE and link in members:
            members[name] = members[link]
        elif header.type in WITHOUT_DATA:
            if header.type != tarfile.DIRTYPE:
                left_out["links and devices in tars"] += 1
        else:
            end = position + length
            if end > (2**62 if size is None else size):
                return contents("it is cut short")
            if header.type in REGULAR and not sparse:
                members[name] = position, end
            elif header.type != tarfile.XGLTYPE:
                left_out["sparse files in tars"] += 1
            position += _padded(length)
    if file.read(LARGEST_EXTENSION).strip(b"\0"):
        return contents("more comes after its end, as where tars are joined")
    return contents("a header is damaged" if damaged else None)


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _length(number: int | str) -> int:
    try:
        length = int(number)
    except ValueError:
        length = -1
    if length < 0:
        raise tarfile.InvalidHeaderError("invalid size")
    return length


def _extension(kind: bytes, file: io.IOBase, length: int) -> dict[str, str]:
    """Read what extends the next header: pax's records, or GNU's long name."""
    if length > LARGEST_EXTENSION:
        raise tarfile.InvalidHeaderError("too long")
    data = file.read(length)
    if kind in LONG_NAMES:
        return {LONG_NAMES[kind]: _text(data.split(b"\0")[0])}
    found = {}
    start = 0
    while start < len(data) and data[start]:  # "27 path=a.png\n", with its length
        digits = data[start : start + 20].split(b" ")[0]
        end = start + _length(_text(digits))
        record = data[start + len(digits) + 1 : end]
        if end > len(data) or not record.endswith(b"\n"):
            raise tarfile.InvalidHeaderError("a damaged record")
        key, _, value = record[:-1].partition(b"=")
        found[_text(key)] = _text(value)
        start = end
    return found


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
