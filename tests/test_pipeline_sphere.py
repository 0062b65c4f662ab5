"""The sphere's geometry against its formulas in float64."""

import numpy as np
import pytest

from dalle2_jax.pipeline import sphere


def test_slerp_agrees_with_the_formula_in_float64():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 40))
    angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    for t in (0.1, 0.5, 0.9):
        expected = np.sin((1 - t) * angle) * a + np.sin(t * angle) * b
        np.testing.assert_allclose(
            sphere.slerp(a, b, [t])[0], expected / np.sin(angle), rtol=1e-5
        )
    np.testing.assert_array_equal(sphere.slerp(a, b, [0, 1]), np.float32([a, b]))


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-7, 1e-3])
def test_slerp_of_near_parallel_vectors(angle):
    a, b = np.array([2.0, 0.0]), 2 * np.array([np.cos(angle), np.sin(angle)])
    found = sphere.slerp(a, b, [0.25])[0]
    expected = 2 * np.array([np.cos(angle / 4), np.sin(angle / 4)])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


def test_slerp_keeps_the_length_and_the_shape():
    a, b = (x / np.linalg.norm(x) for x in np.random.default_rng(2).normal(size=(2, 9)))
    path = sphere.slerp(a.reshape(3, 3), b.reshape(3, 3), np.linspace(0, 1, 5))
    assert path.shape == (5, 3, 3)
    np.testing.assert_allclose(np.linalg.norm(path, axis=(1, 2)), 1, rtol=1e-6)


def test_a_blend_of_one_is_that_one():
    z = np.random.default_rng(3).normal(size=(2, 1, 8)).astype(np.float32)
    alone = sphere.mean_direction([z[0], z[1]], np.array([1.0, 0.0]))
    np.testing.assert_allclose(alone, z[0], rtol=1e-6)
    half = sphere.mean_direction([z[0], z[0] * 3], np.array([0.5, 0.5]))
    np.testing.assert_allclose(half, z[0] * 2, rtol=1e-6)
