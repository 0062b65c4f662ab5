"""The tokenizer: CLIP's layout, encoding, training, saving, and what goes wrong."""

import json
import os
import time

import numpy as np
import pytest
from transformers import CLIPTokenizer

from dalle2_jax.data import tokenizer
from dalle2_jax.errors import UserError

CAPTIONS = ["a small red circle", "a large red square", "a small blue circle"] * 3


@pytest.fixture(scope="module")
def small():
    return tokenizer.train(CAPTIONS, 530, 16)


def test_vocabulary_is_laid_out_as_clips(small):
    assert small.vocab_size == 530
    assert (small.sot, small.eot, small.pad) == (528, 529, 529)
    # Ids that OpenAI's CLIP has too: "!", "a" that ends a word, "z" that does.
    tokens = small.encode(["! a z"], 6)
    np.testing.assert_array_equal(tokens, [[528, 256, 320, 345, 529, 529]])


def test_every_byte_can_be_encoded(small):
    text = "né 日本 🐻 don't\t\x00"
    tokens = small.encode([text], 64)
    assert tokens.max() < small.vocab_size
    assert "日本" in small.decode(tokens[0])


def test_encode_frames_and_pads(small):
    tokens = small.encode(["a small RED  circle", ""], 12)
    assert tokens.dtype == np.int32 and tokens.shape == (2, 12)
    assert (tokens[:, 0] == small.sot).all()
    np.testing.assert_array_equal(tokens[1, 1:], [small.eot] * 11)
    lengths = small.lengths(tokens)
    assert lengths[1] == 2 and tokens[0, lengths[0] - 1] == small.eot
    assert small.decode(tokens[0]) == "a small red circle"
    np.testing.assert_array_equal(
        tokens.argmax(1) + 1, lengths
    )  # how CLIP finds the end


def test_encode_agrees_with_transformers(small, tmp_path):
    small.save(tmp_path)
    wrapped = CLIPTokenizer.from_pretrained(tmp_path)
    texts = ["a small red circle", "", "éa blue-ish thing; it's 42!", "x" * 50]
    theirs = wrapped(texts, padding="max_length", max_length=16, truncation=True)
    ours = small.encode(texts, 16, warn=False)
    np.testing.assert_array_equal(ours, theirs["input_ids"])


def test_too_long_is_cut_with_a_warning(small):
    with pytest.warns(UserWarning, match="6 that are read"):
        tokens = small.encode(["xyz " * 20], 8)
    assert tokens[0, -1] == small.eot and (tokens[0, :-1] != small.eot).all()
    small.encode(["xyz " * 20], 8, warn=False)


@pytest.mark.parametrize(
    "text", ["red circle " * 10**6, "a" * 10**7, "red" + " \n" * 10**6, "😀" * 10**6]
)
def test_a_book_is_encoded_at_once_and_as_its_beginning(small, text):
    start = time.perf_counter()
    tokens = small.encode([text], 16, warn=False)
    assert time.perf_counter() - start < 30
    np.testing.assert_array_equal(tokens, small.encode([text[:400]], 16, warn=False))


def test_half_of_a_character_is_refused(small):
    with pytest.raises(UserError, match=r"^'a .ud83d' is not valid Unicode: '.ud83d'"):
        small.encode(["a", "a \ud83d"], 16)
    with pytest.raises(UserError, match=r"^'a .ud83d' is not valid Unicode"):
        tokenizer.train(["a \ud83d"], 530, 16)


def test_training_on_a_book_cuts_its_words():
    """They would take minutes."""
    trained = tokenizer.train(["é日" * 50_000, "a" * 100_000], 530, 16)
    assert 514 < trained.vocab_size <= 530


def test_a_folder_with_a_pipe(small, tmp_path):
    small.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer.json is not a regular file"):
        tokenizer.load(tmp_path)


def test_training_learns_words_and_ignores_order(small):
    assert small.lengths(small.encode(["red"], 16))[0] < 2 + len("red")
    again = tokenizer.train(reversed(CAPTIONS), 530, 16)
    texts = [*CAPTIONS, "a purple thing"]
    np.testing.assert_array_equal(again.encode(texts, 32), small.encode(texts, 32))
    whole = tokenizer.train(CAPTIONS, 4096, 16)  # more than there are merges
    assert 530 < whole.vocab_size < 600
    assert whole.eot == whole.vocab_size - 1
    assert whole.lengths(whole.encode(["red circle"], 16))[0] == 4


def test_saved_and_loaded_is_the_same(small, tmp_path):
    small.save(tmp_path)
    loaded = tokenizer.load(tmp_path)
    for name in ("vocab_size", "sot", "eot", "pad"):
        assert getattr(loaded, name) == getattr(small, name)
    texts = [*CAPTIONS, "Ünknown 日本"]
    np.testing.assert_array_equal(loaded.encode(texts, 32), small.encode(texts, 32))


def test_loads_vocab_and_merges_and_their_padding(small, tmp_path):
    """The older layout of a tokenizer's folder, with its own padding, as Karlo's."""
    model = json.loads(small._backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "pad_token": "!"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = tokenizer.load(tmp_path)
    assert (loaded.vocab_size, loaded.eot, loaded.pad) == (530, 529, 0)
    tokens = loaded.encode(CAPTIONS, 32)
    expected = small.encode(CAPTIONS, 32)
    np.testing.assert_array_equal(loaded.lengths(tokens), small.lengths(expected))
    at = np.arange(32) < loaded.lengths(tokens)[:, None]
    np.testing.assert_array_equal(tokens, np.where(at, expected, 0))


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="there is no folder ./nowhere"):
        tokenizer.load("./nowhere")
    with pytest.raises(UserError, match="needs tokenizer.json"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="found no tokenizer"):
        tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="vocabulary of 500 is too small.*514"):
        tokenizer.train(CAPTIONS, 500, 16)
    with pytest.raises(UserError, match="no captions"):
        tokenizer.train([], 600, 16)


def test_a_blank_one_has_the_numbers_of_a_vocabulary():
    blank = tokenizer.blank(49_408, 16)
    assert (blank.vocab_size, blank.sot, blank.eot) == (49_408, 49_406, 49_407)
    assert blank.encode([""], 16)[0, :2].tolist() == [49_406, 49_407]


def test_a_saved_tokenizer_is_read_without_transformers(small, tmp_path, monkeypatch):
    """And encodes as transformers does with the same files."""
    small.save(tmp_path / "saved")
    theirs = tokenizer.import_transformers().CLIPTokenizer.from_pretrained(
        tmp_path / "saved"
    )
    monkeypatch.setattr(tokenizer, "import_transformers", None)
    ours = tokenizer.load(tmp_path / "saved")
    texts = ["A Red  Circle", "\tit's\n10% café", "日本 🎉 é", "<|endoftext|> a!", ""]
    expected = theirs(texts, padding="max_length", max_length=40)["input_ids"]
    np.testing.assert_array_equal(ours.encode(texts, 40), expected)
    assert (ours.sot, ours.eot, ours.pad) == (small.sot, small.eot, small.pad)
    assert ours.vocab_size == small.vocab_size
    row = ours.encode(["a red circle"], 16)[0]
    assert ours.decode(row) == theirs.decode(row, skip_special_tokens=True).strip()
    ours.save(tmp_path / "again")
    np.testing.assert_array_equal(
        tokenizer.load(tmp_path / "again").encode(texts, 40), expected
    )
