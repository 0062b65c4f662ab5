"""Captions: which are read of a text or a record, and which are bad."""

import pytest

from dalle2_jax.data import examples
from dalle2_jax.data.examples import BadExample, counted, is_hidden


def result(function, *given):
    try:
        return function(*given, "key")
    except BadExample as bad:
        assert bad.key == "key"
        return f"bad: {bad.reason}"


@pytest.mark.parametrize(
    ("given", "caption"),
    [
        (" a\tb\n c ", "a b c"),
        (["a", " ", None, "b "], ["a", "b"]),
        (["a"], "a"),
        ("x" * examples.LONGEST_CAPTION, "x" * examples.LONGEST_CAPTION),
        ("😀", "😀"),
        (None, "bad: no caption"),
        ([None, "  "], "bad: empty caption"),
        ([], "bad: empty caption"),
        (7, "bad: caption not text"),
        (["a", 7], "bad: caption not text"),
        (float("nan"), "bad: caption not text"),
        ({"a": "b"}, "bad: caption not text"),
        ("a \ud83d", "bad: caption not UTF-8"),
        (["a", "\udce9"], "bad: caption not UTF-8"),
        ("x" * (examples.LONGEST_CAPTION + 1), "bad: caption too long"),
        (["x" * 60_000] * 2, "bad: caption too long"),
        (["a", " "] * 1000, ["a"] * 1000),
        (["a"] * 1001, "bad: too many captions"),
    ],
)
def test_clean(given, caption):
    assert result(examples.clean, given) == caption


@pytest.mark.parametrize(
    ("given", "caption"),
    [
        (b"one", "one"),
        ("\ufeffdeux é\r\n\r\n un \r".encode(), ["deux é", "un"]),
        ("a\u2028b\x0bc\x85d".encode(), "a b c d"),  # Python's other line ends
        (b"\n \n", "bad: empty caption"),
        (b"", "bad: empty caption"),
        (b"caf\xe9", "bad: caption not UTF-8"),
        (b"\xed\xa0\xbd", "bad: caption not UTF-8"),  # half of a character
        (b"x" * 2**20, "bad: caption too long"),
    ],
)
def test_captions_of_a_text(given, caption):
    assert result(examples.captions_of_text, given) == caption


@pytest.mark.parametrize(
    ("given", "caption"),
    [
        (b'{"caption": "a", "text": "b"}', "a"),
        (b'{"caption": null, "text": "b"}', "b"),
        (b'{"caption": " ", "text": ["b", "c"], "x": NaN}', ["b", "c"]),
        (b'{"caption": "", "text": null}', "bad: empty caption"),
        (b'{"caption": null}', "bad: no caption"),
        (b"{}", "bad: no caption"),
        (b'{"text": "\\ud83d\\ude00"}', "😀"),
        (b'{"text": "\\ud83d"}', "bad: caption not UTF-8"),
        (b'{"text": "\xff"}', "bad: caption not UTF-8"),
        (b'["a"]', "bad: caption not JSON"),
        (b"[" * 100_000, "bad: caption not JSON"),
        (b'{"text": "a", "text": "b"}', "bad: caption not JSON"),
        (b'{"text": ' + b"9" * 9999 + b"}", "bad: caption not JSON"),
        (b"\0" * 99, "bad: caption not JSON"),
    ],
)
def test_captions_of_json(given, caption):
    assert result(examples.captions_of_json, given) == caption


def test_hidden():
    hidden = (".a", "b/.a/c", "b/._c", "__MACOSX/a", "a/@eaDir/b")
    seen = ("a", "./a", "../b", "a.b/c.d", "a/__macos/b", "...a"[3:])
    assert all(map(is_hidden, hidden)) and not any(map(is_hidden, seen))


def test_counts():
    assert counted({"a": 1, "b": 3000}) == "3,000 b, 1 a"
