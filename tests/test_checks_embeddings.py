"""Embeddings against a model's statistics."""

import numpy as np
import pytest

from dalle2_jax.checks import embeddings

MEAN, STD = np.linspace(-1, 1, 64), np.linspace(0.5, 2, 64)


def draw(shift=0.0, spread=1.0, n=200):
    noise = np.random.default_rng(0).normal(size=(n, 64))
    return (MEAN + STD * (shift + spread * noise)).astype(np.float32)


def judge(z, own=False):
    return embeddings.judge(z, {"z_image_mean": MEAN, "z_image_std": STD}, own)


def test_distance():
    far = embeddings.distance(draw(shift=0.5, spread=2.0), MEAN, STD)
    assert far.shift == pytest.approx(0.5, abs=0.1)
    assert far.spread == pytest.approx(np.log(2), abs=0.05)
    assert far.shift_of_chance == pytest.approx(200**-0.5)


def test_a_sample_of_the_same_is_explained_whatever_its_size():
    for n in (20, 200, 2000):
        far = embeddings.distance(draw(n=n), MEAN, STD)
        assert far.explained
        assert far.shift == pytest.approx(far.shift_of_chance, rel=0.4)
        assert far.spread == pytest.approx(far.spread_of_chance, rel=0.4)


@pytest.mark.parametrize(
    ("values", "level"),
    [
        ({}, "ok"),
        ({"shift": 0.5}, "warning"),
        ({"spread": 1.5}, "warning"),
        ({"shift": 2.0}, "problem"),
        ({"shift": 0.02}, "ok"),
    ],
)
def test_another_distribution_is_found(values, level):
    finding = judge(draw(**values))
    assert finding.level == level and bool(finding.remedy) == (level != "ok")


def test_a_new_prior_takes_its_own():
    assert judge(draw(shift=2.0), own=True).level == "ok"


def test_what_cannot_be_compared():
    z = draw()
    assert embeddings.judge(z, {}, False).level == "ok"
    z[3, 5] = np.nan
    assert "1 of 200 embeddings are not finite" in judge(z).found
    assert judge(z).level == "problem"
    narrow = judge(draw()[:, :32])
    assert narrow.level == "problem" and "32 dimensions" in narrow.found
