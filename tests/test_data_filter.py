"""The rules, one by one."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from dalle2_jax.data import filter as rules
from dalle2_jax.data.filter import Limits
from dalle2_jax.errors import UserError


@pytest.mark.parametrize(
    ("caption", "limits", "rule"),
    [
        ("a red cat", {}, None),
        ("a red cat", {"min_words": 3, "max_words": 3}, None),
        ("a red cat", {"min_words": 4}, "words"),
        ("a red cat", {"max_words": 2}, "words"),
        ("a red cat", {"min_characters": 9, "max_characters": 9}, None),
        ("a red cat", {"min_characters": 10}, "characters"),
        ("a red cat", {"max_characters": 8}, "characters"),
        ("ein süßer Kater, 3 kg", {"min_latin": 1.0}, None),
        ("кот a", {"min_latin": 0.25}, None),
        ("кот a", {"min_latin": 0.26}, "language"),
        ("123 !", {"min_latin": 0.1}, "language"),
    ],
)
def test_captions(caption, limits, rule):
    assert rules.caption_problem([caption], Limits(**limits)) == rule
    assert rules.caption_problem(["a red cat", caption], Limits(**limits)) == rule


def test_blocked_words():
    blocked = Limits(blocked=rules.blocklist(["Cat", "hot  dog", "c++", ""]))
    for caption in ("a CAT.", "hot-dog stand", "cat", "my (hot dog)", "in c"):
        assert rules.caption_problem([caption], blocked) == "blocked word"
    for caption in ("a category", "concat", "hot dogs", "a dog, hot", "ice"):
        assert rules.caption_problem([caption], blocked) is None
    with pytest.raises(UserError, match="the blocklist has no words"):
        rules.blocklist(["", " \n"])


def test_read_blocklist(tmp_path):
    (tmp_path / "words").write_text("one\n\ntwo\n")
    assert rules.read_blocklist(tmp_path / "words").search("two")
    (tmp_path / "words").write_bytes(b"\xff\xfe")
    for name in ("words", "nowhere"):
        with pytest.raises(UserError, match=f"cannot read the blocklist .*{name}"):
            rules.read_blocklist(tmp_path / name)


@pytest.mark.parametrize(
    ("picture", "limits", "rule"),
    [
        ((64, 32, 9.0), {}, None),
        ((64, 32, 9.0), {"min_side": 32, "max_aspect": 2.0, "min_std": 9.0}, None),
        ((64, 32, 9.0), {"min_side": 33}, "size"),
        ((32, 64, 9.0), {"max_aspect": 1.9}, "aspect"),
        ((64, 32, 9.0), {"min_std": 9.1}, "blank"),
    ],
)
def test_pictures(picture, limits, rule):
    assert rules.picture_problem(*picture, Limits(**limits)) == rule


def test_deviation():
    picture = np.full((4, 6, 3), (200, 10, 90), np.uint8)
    assert rules.deviation(picture) == 0
    picture[:, :3, 1] = 30
    assert rules.deviation(picture) == 10


def test_embeddings(tmp_path):
    z_image = np.float32([[2, 0], [0, 3], [1, 1], [5, 5.01], [1, 0]])
    z_text = [np.float32(z) for z in ([[1, 0], [1, 1]], [[1, 0]], [[1, 1]], [[1, 1]])]
    z_text.append(np.float32([[1, 0]]))
    score = rules.embedding_problems(z_image, z_text, Limits(min_clip_score=0.7))
    assert score == [None, ("clip score", None), None, None, None]
    score = rules.embedding_problems(z_image, z_text, Limits(min_clip_score=0.71))
    assert score[0] == ("clip score", None)  # the worst of its captions: cos 45°

    save_file(
        {"weights": np.float32([1, -1]), "bias": np.array(0.5, np.float32)},
        tmp_path / "c.safetensors",
    )
    np.savez(tmp_path / "c.npz", weights=np.float64([1, -1]))
    biased = rules.read_classifier(tmp_path / "c.safetensors")
    plain = rules.read_classifier(tmp_path / "c.npz")
    assert (biased.bias, plain.bias) == (0.5, 0.0)
    for classifier, low in ((biased, 0.6), (plain, 0.1)):
        limits = Limits(classifier=classifier, min_classifier=low)
        found = rules.embedding_problems(z_image, z_text, limits)
        assert [p is not None for p in found] == [False, True, True, True, False]
        limits = Limits(classifier=classifier, max_classifier=low)
        found = rules.embedding_problems(z_image, z_text, limits)
        assert [p is not None for p in found] == [True, False, False, False, True]

    limits = Limits(duplicates=0.999, min_clip_score=0.5)
    assert rules.embedding_problems(z_image, z_text, limits) == [
        None,
        ("clip score", None),
        None,
        ("duplicate", 2),
        ("duplicate", 0),
    ]


def test_classifier_errors(tmp_path):
    np.savez(tmp_path / "a.npz", weights=np.ones((2, 2)))
    with pytest.raises(UserError, match=r"has .*\(2, 2\)}: it must have weights"):
        rules.read_classifier(tmp_path / "a.npz")
    for odd in (["a"], [np.nan], [1j], np.zeros(1, "M8[D]")):
        np.savez(tmp_path / "a.npz", weights=np.asarray(odd))
        with pytest.raises(UserError, match="not finite numbers"):
            rules.read_classifier(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "a.npz", weights=np.zeros(10**6))
    with pytest.raises(UserError, match="too large when it is unpacked"):
        rules.read_classifier(tmp_path / "a.npz")
    (tmp_path / "b.safetensors").write_bytes(b"no")
    for name in ("b.safetensors", "c.npz"):
        with pytest.raises(UserError, match=f"cannot read the classifier .*{name}"):
            rules.read_classifier(tmp_path / name)
    limits = Limits(classifier=rules.Classifier(np.ones(3, np.float32), 0.0))
    with pytest.raises(UserError, match="of 3 dimensions, .* have 2"):
        rules.embedding_problems(np.ones((1, 2)), [np.ones((1, 2))], limits)


@pytest.mark.parametrize("block", [1, 7, 16, 1024])
def test_near_duplicates_are_those_of_a_plain_search(block):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(60, 3)).astype(np.float32)  # in so few dimensions many
    of = rules.near_duplicates(z, 0.95, block)
    unit = z.astype(np.float64) / np.linalg.norm(z, axis=1, keepdims=True)
    expected: list[int] = []
    for i in range(60):
        like = [j for j in range(i) if expected[j] == j and unit[i] @ unit[j] >= 0.95]
        expected.append(like[0] if like else i)
    assert 10 < len(set(expected)) < 50
    np.testing.assert_array_equal(of, expected)
