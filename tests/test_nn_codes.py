"""Principal components and their codes against numpy's singular value decomposition."""

import numpy as np
import pytest

from dalle2_jax.errors import UserError
from dalle2_jax.nn import codes


@pytest.fixture(scope="module")
def z():
    """Correlated embeddings off the origin, float32 as CLIP gives them."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(500, 12)) * np.geomspace(3, 0.01, 12)
    rotation = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    return np.float32(mixed @ rotation + rng.normal(size=12))


def reference(z, components):
    """The best approximation of that rank, by the SVD of the centred embeddings."""
    z = z.astype(np.float64)
    u, s, vt = np.linalg.svd(z - z.mean(0), full_matrices=False)
    kept = u[:, :components] * s[:components] @ vt[:components]
    return z.mean(0) + kept, vt[:components], s[:components] ** 2 / (len(z) - 1)


def test_axes_are_those_of_the_svd(z):
    fitted = codes.fit(z, 5)
    _, vt, variances = reference(z, 5)
    np.testing.assert_allclose(np.abs(np.sum(fitted.axes * vt.T, 0)), 1, atol=1e-5)
    np.testing.assert_allclose(fitted.axes.T @ fitted.axes, np.eye(5), atol=1e-6)
    x = (z - fitted.mean) @ fitted.axes
    np.testing.assert_allclose(x.var(0, ddof=1), variances, rtol=1e-4)
    assert (np.diff(variances) < 0).all()
    np.testing.assert_allclose(fitted.low, x.min(0), atol=1e-5)
    np.testing.assert_allclose(fitted.high, x.max(0), atol=1e-5)
    largest = np.take_along_axis(fitted.axes, np.abs(fitted.axes).argmax(0)[None], 0)
    assert (largest > 0).all()


@pytest.mark.parametrize("components", [1, 4, 12])
def test_projection_is_the_best_of_its_rank(z, components):
    expected, _, _ = reference(z, components)
    projected = codes.project(codes.fit(z, 12), z, components)
    np.testing.assert_allclose(projected, expected, atol=1e-5)


def test_decoding_is_off_by_half_a_bucket_at_most(z):
    fitted, buckets = codes.fit(z, 12), 64
    indices = codes.encode(fitted, z, buckets)
    assert indices.dtype == np.int32 and indices.shape == (500, 12)
    assert (indices.min(0) == 0).all() and (indices.max(0) == buckets - 1).all()
    width = (fitted.high - fitted.low) / buckets
    error = np.abs((codes.decode(fitted, indices, buckets) - z) @ fitted.axes)
    assert (error <= width / 2 + 1e-5).all()
    # A uniform error of that width, on average.
    np.testing.assert_allclose(np.sqrt((error**2).mean(0)) / width, 12**-0.5, rtol=0.1)


def test_codes_of_what_they_decode_to_are_the_same():
    rng = np.random.default_rng(1)
    fitted = codes.fit(np.float32(rng.normal(size=(200, 6))), 6)
    indices = rng.integers(0, 1024, (50, 6), np.int32)
    again = codes.encode(fitted, codes.decode(fitted, indices, 1024), 1024)
    assert np.mean(again == indices) > 0.99  # a middle stays clear of the edges
    np.testing.assert_allclose(again, indices, atol=1)


def test_what_lies_beyond_is_in_the_outermost_bucket(z):
    fitted = codes.fit(z, 3)
    far = fitted.mean + 1e3 * fitted.axes.T
    np.testing.assert_array_equal(np.diag(codes.encode(fitted, far, 16)), 15)
    far = fitted.mean - 1e3 * fitted.axes.T
    np.testing.assert_array_equal(np.diag(codes.encode(fitted, far, 16)), 0)


def test_quantiles_hold_equally_many():
    x = np.float32(np.random.default_rng(2).normal(size=1000))
    edges = codes.fit_quantiles(x, 8)
    assert edges.shape == (7,)
    found = codes.quantile(edges, x)
    np.testing.assert_array_equal(np.bincount(found, minlength=8), 125)
    assert x[found == 0].max() < x[found == 7].min()


@pytest.mark.parametrize("components", [0, 13])
def test_more_components_than_there_are(z, components):
    with pytest.raises(UserError, match=f"components={components}: 500 .* 1 to 12"):
        codes.fit(z, components)
    with pytest.raises(UserError, match="5 embeddings of dimension 12 have 1 to 4"):
        codes.fit(z[:5], 5)
