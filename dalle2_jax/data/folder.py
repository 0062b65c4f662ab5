"""A folder of pictures, with captions in metadata.jsonl or in a .txt beside each."""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator

from dalle2_jax.data.examples import (
    LARGEST_PICTURE,
    LARGEST_TEXT,
    LONGEST_LINE,
    BadExample,
    Listing,
    captions_of_record,
    captions_of_text,
    counted,
    decode,
    is_hidden,
)
from dalle2_jax.data.image import EXTENSIONS
from dalle2_jax.errors import UserError, short
from dalle2_jax.files import parse_json, read_bytes, read_lines

METADATA = "metadata.jsonl"
KINDS = 8  # of files that are left out, told by their extensions


def folder(path: str) -> Listing:
    """List the pictures with captions in a folder and in those in it.

    Raises UserError if there are none.
    """
    if not os.path.isdir(path):
        raise UserError(f"there is no folder {path}")
    files, left_out = _files(path)
    pictures = sorted(f for f in files if f.lower().endswith(EXTENSIONS))
    if METADATA in files:
        keys, read = _with_metadata(path, files)
        others = files - {METADATA, *keys, *pictures}
    else:
        texts = {_stem(f): f for f in sorted(files) if f.lower().endswith(".txt")}
        keys, read = _with_sidecars(path, pictures, texts)
        alone = texts.keys() - {_stem(f) for f in pictures}
        left_out["captions without a picture"] = len(alone)
        others = files - {*texts.values(), *pictures}
    left_out["pictures without a caption"] = len(set(pictures) - set(keys))
    left_out += _kinds(others)  # and without those that are 0
    if not keys:
        lacks = (
            "captions: give it a metadata.jsonl with the fields file_name and caption, "
            "or a .txt beside each picture"
            if pictures
            else f"pictures ({', '.join(EXTENSIONS)})"
        )
        has = f"; left out: {counted(left_out)}" if left_out else ""
        raise UserError(f"the folder {path} has no {lacks}{has}")
    return Listing(f"folder {path}", keys, read, left_out=left_out)


def _files(root: str) -> tuple[set[str], Counter[str]]:
    """Return the files in a folder by their paths in it, and what is left out.

    A folder that has several names is read once, under its own if it lies within.
    """
    files: set[str] = set()
    left_out: Counter[str] = Counter()
    visited = {_identity(parent) for parent in _parents(os.path.realpath(root))}
    folders, links = [""], deque()
    while folders or links:
        where = folders.pop() if folders else links.popleft()
        try:
            identity = _identity(os.path.join(root, where))
            if identity in visited:
                left_out["links to folders that are read already"] += 1
                continue
            visited.add(identity)
            with os.scandir(os.path.join(root, where)) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if not where:
                raise UserError(
                    f"cannot read the folder {root}: {error.strerror}"
                ) from error
            left_out["folders that cannot be read"] += 1
            continue
        for entry in entries:
            if is_hidden(entry.name):
                continue
            name = os.path.join(where, entry.name)
            kind = _kind(entry)
            if kind == "folder":
                (links if entry.is_symlink() else folders).append(name)
            elif kind == "file":
                files.add(name)
            else:
                left_out["pipes, devices and broken links"] += 1
    return files, left_out


def _kind(entry: os.DirEntry) -> str:
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "neither"
    except OSError:  # a link to itself, or to where nobody may look
        return "neither"


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _parents(path: str) -> Iterator[str]:
    while (parent := os.path.dirname(path)) != path:
        yield (path := parent)


def _stem(file: str) -> str:
    return os.path.splitext(file)[0]


def _kinds(files: Iterable[str]) -> Counter[str]:
    """Count files by their extensions, the most frequent of them."""
    extensions = Counter(sorted(os.path.splitext(f)[1].lower() for f in files))
    common = extensions.most_common(KINDS)
    kinds = Counter({f"{e or 'other'} files": count for e, count in common})
    kinds["other files"] += extensions.total() - sum(count for _, count in common)
    return +kinds


def _with_sidecars(
    root: str, pictures: list[str], texts: dict[str, str]
) -> tuple[list[str], Callable[[int], dict]]:
    captioned = [f for f in pictures if _stem(f) in texts]
    others = {stem: f for stem, f in texts.items() if f != f"{stem}.txt"}  # .TXT

    def read(i: int) -> dict:
        file = captioned[i]
        stem = _stem(file)
        text = _read(root, others.get(stem, f"{stem}.txt"), LARGEST_TEXT)
        caption = captions_of_text(text, os.path.join(root, file))
        return {"image": _read(root, file, LARGEST_PICTURE), "caption": caption}

    return captioned, read


def _with_metadata(
    root: str, files: set[str]
) -> tuple[list[str], Callable[[int], dict]]:
    metadata = os.path.join(root, METADATA)
    examples, missing = [], []
    try:
        for number, line in enumerate(read_lines(metadata, LONGEST_LINE), 1):
            if not line.strip():
                continue
            where = f"{metadata} line {number}"
            name, caption = _of_line(line, where)
            if name is not None and name not in files and not _within(root, name):
                missing.append(f"{short(name)} (line {number})")
            examples.append((name, caption, where))
    except OSError as error:
        raise UserError(f"cannot read {metadata}: {error.strerror}") from error
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{metadata} names a picture that is not there: "
            f"{missing[0]}{more}; add the file or take out the line"
        )
    bad = [caption for _, caption, _ in examples if isinstance(caption, BadExample)]
    if len(bad) == len(examples):
        first = f" (the first: {bad[0].reason})" if bad else ""
        raise UserError(
            f"{metadata} has no captions{first}; a line is "
            '{"file_name": "a.png", "caption": "what it shows"}'
        )

    def read(i: int) -> dict:
        name, caption, _ = examples[i]
        if isinstance(caption, BadExample):
            raise BadExample(caption.reason, caption.key)
        return {"image": _read(root, name, LARGEST_PICTURE), "caption": caption}

    return [name or where for name, _, where in examples], read


def _of_line(
    line: bytes, where: str
) -> tuple[str | None, str | list[str] | BadExample]:
    """Return the picture's path, or None, and the captions, or what is wrong."""
    name = None
    try:
        record = parse_json(decode(line, where), where, finite=False)
        name = os.path.normpath(record["file_name"])
        return name, captions_of_record(record, where)
    except BadExample as bad:
        reason = bad.reason
    except UserError:
        reason = "metadata not JSON"
    except (KeyError, TypeError):
        reason = "metadata without file_name"
    return name, BadExample(reason, where)  # a new one, for `bad` has the line


def _within(root: str, name: str) -> bool:
    """Whether it names a file in the folder, if a hidden one or by a link."""
    outside = os.path.isabs(name) or name.split(os.sep)[0] == os.pardir
    return not outside and os.path.isfile(os.path.join(root, name))


def _read(root: str, name: str, largest: int) -> bytes:
    file = os.path.join(root, name)
    try:
        return read_bytes(file, largest)
    except OSError as error:
        raise BadExample(f"cannot read ({error.strerror})", file) from error
