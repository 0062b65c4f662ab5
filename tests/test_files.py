"""Files that others wrote: what is read, and what is refused at once."""

import os

import pytest

from dalle2_jax import files
from dalle2_jax.errors import UserError
from dalle2_jax.files import parse_json, read_bytes, read_json

LIMIT = 2**20


def test_a_file_is_read_whole(tmp_path):
    for content in (b"", b"ab\r\n\0"):
        (tmp_path / "file").write_bytes(content)
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to("file")
        assert read_bytes(tmp_path / "link", len(content)) == content


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)  # a hole
    for name, said in [
        ("pipe", "not a regular file"),
        ("zero", "not a regular file"),
        ("huge", "larger than 1,048,576 bytes"),
        ("", "it is a directory"),
        ("none", "No such file or directory"),
        ("a\0b", "no valid file name"),
        ("\ud83d", "no valid file name"),
    ]:
        with pytest.raises(OSError) as error:
            read_bytes(os.path.join(tmp_path, name), LIMIT)
        assert error.value.strerror == said
        with pytest.raises(UserError, match=f"cannot read .*: {said}"):
            read_json(os.path.join(tmp_path, name), LIMIT)


def test_json_is_read(tmp_path):
    file = tmp_path / "a.json"
    text = '{"a": [1, -2.5, null, {"é": "\\udcff"}]}'
    value = {"a": [1, -2.5, None, {"é": "\udcff"}]}
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_bytes(text.encode(encoding))
        assert read_json(file) == value
        assert parse_json(text.encode(encoding).decode(), file) == value
    nan = parse_json('{"a": NaN, "b": -1e999}', "x", finite=False)
    assert nan["a"] != nan["a"] and nan["b"] == -float("inf")


def test_json_may_be_nested_so_deep():
    def nested(levels):
        return '{"a":' * (levels - 1) + "{}" + "}" * (levels - 1)

    assert parse_json(nested(files.DEEPEST_JSON), "x")["a"]
    for levels in (files.DEEPEST_JSON + 1, 900, 100_000):
        with pytest.raises(UserError, match="x is not valid JSON: more than 100 lev"):
            parse_json(nested(levels), "x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "x is not valid JSON: Expecting value"),
        (b'{"a": 1', "x is not valid JSON: Expecting"),
        (b"[" * 100_000, "more than 100 levels deep"),
        (b'{"a": "\xff"}', "x is not UTF-8 text .byte 7."),
        ('{"a": 1}'.encode("utf-16"), "x is not UTF-8 text"),
        (b"[1, 2]", "x must hold a JSON object"),
        (b"null", "x must hold a JSON object"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "the name 'c' occurs twice"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": [Infinity]}', "Infinity is not a finite number"),
        (b'{"a": 1e999}', "1e999 is not a finite number"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "x is not valid JSON: Exceeds the limit"),
    ],
)
def test_bad_json_is_one_line(text, said):
    with pytest.raises(UserError, match=said) as error:
        parse_json(text, "x")
    assert "\n" not in str(error.value)
