"""What captions are like."""

import pytest

from dalle2_jax.checks import captions
from dalle2_jax.data import tokenizer


@pytest.fixture(scope="module")
def text():
    return tokenizer.train(["a large red circle", "a small blue square"] * 9, 600, 16)


def judge(text, texts, context_length=16, several=False):
    lengths = captions.count_tokens(text, texts)
    found = captions.judge(texts, lengths, context_length, several)
    return {finding.check: finding for finding in found}


def test_tokens_are_counted_uncut(text):
    lengths = captions.count_tokens(text, ["a large red circle", "a " * 50, ""])
    assert lengths.tolist() == [6, 52, 2]


def test_good_ones(text):
    found = judge(text, ["a large red circle", "a small red square"])
    assert {f.level for f in found.values()} == {"ok"}
    assert found["captions"].found == (
        "2 captions of 6 tokens (median) to 6, of 16 read; 0 are cut, 0 are empty"
    )


def test_those_that_are_too_long(text):
    texts = ["a large red circle"] * 3 + ["a large red circle above " + "a " * 20]
    found = judge(text, texts)["captions"]
    assert found.level == "warning" and "1 are cut" in found.found
    assert "'a large red circle above a a a a a a ...'" in found.remedy
    assert judge(text, texts, context_length=64)["captions"].level == "ok"


def test_those_that_the_tokenizer_spells(text):
    found = judge(text, ["a large red circle", "grinning crocodile"])["words"]
    assert found.level == "warning" and "1 of 2" in found.found
    assert "'grinning crocodile'" in found.found


def test_empty_ones(text):
    found = judge(text, ["a large red circle", " "])["captions"]
    assert found.level == "warning" and "1 are empty" in found.found


def test_those_that_recur(text):
    texts = ["a large red circle"] * 5 + ["a small blue square"]
    found = judge(text, texts)["repeats"]
    assert found.level == "warning"
    assert found.found == (
        "4 of 6 captions repeat another, 'a large red circle' 5 times"
    )
    assert judge(text, texts, several=True)["repeats"].level == "ok"
