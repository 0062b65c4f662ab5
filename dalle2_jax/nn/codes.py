"""Image embeddings as codes: principal components, each cut into buckets.

Section 2.2 of arXiv 2204.06125, on the autoregressive prior. What is fitted is kept in
a model's statistics.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from dalle2_jax.errors import UserError

# A code must not hang on an accelerator's bfloat16.
_exactly = jax.lax.Precision.HIGHEST


class Codes(NamedTuple):
    """The principal components of image embeddings, and the range of each.

    Attributes:
      mean: of the embeddings.
      axes: orthonormal columns, by decreasing variance along them.
      low, high: the least and the most along each axis in the training set.
    """

    mean: Float[Array | np.ndarray, " d"]
    axes: Float[Array | np.ndarray, "d k"]
    low: Float[Array | np.ndarray, " k"]
    high: Float[Array | np.ndarray, " k"]


def fit(z: Float[np.ndarray, "n d"], components: int) -> Codes:
    """The first principal components of a training set's z_image.

    Computed in float64 and returned in float32. An axis points to where its entry of
    the largest magnitude is positive, so that every machine fits the same.

    Raises:
      UserError: there aren't as many components.
    """
    n, d = z.shape
    most = min(n - 1, d)
    if not 1 <= components <= most:
        raise UserError(
            f"components={components}: {n} embeddings of dimension {d} have 1 to {most}"
        )
    z = z.astype(np.float64)
    mean = z.mean(0)
    _, axes = np.linalg.eigh(np.cov(z, rowvar=False))
    axes = axes[:, ::-1][:, :components]  # eigh's order is increasing
    largest = np.abs(axes).argmax(0)
    axes = axes * np.sign(axes[largest, np.arange(components)])
    x = (z - mean) @ axes
    low = x.min(0)
    high = np.maximum(x.max(0), low + 1e-6)  # a direction in which nothing varies
    return Codes(*(np.float32(a) for a in (mean, axes, low, high)))


def encode(
    codes: Codes, z: Float[Array | np.ndarray, "n d"], buckets: int
) -> Int[Array, "n k"]:
    """The bucket, 0 … buckets - 1, of each component; all of an axis's are as wide.

    What lies beyond the training set's range is in the outermost.
    """
    x = jnp.matmul(z - codes.mean, codes.axes, precision=_exactly)
    bucket = jnp.floor((x - codes.low) / (codes.high - codes.low) * buckets)
    return jnp.clip(bucket, 0, buckets - 1).astype(jnp.int32)


def decode(
    codes: Codes, indices: Int[Array | np.ndarray, "n k"], buckets: int
) -> Float[Array, "n d"]:
    """The embeddings whose components are in the middle of the buckets."""
    x = codes.low + (indices + 0.5) / buckets * (codes.high - codes.low)
    return codes.mean + jnp.matmul(x, codes.axes.T, precision=_exactly)


def project(
    codes: Codes, z: Float[Array | np.ndarray, "n d"], components: int
) -> Float[Array, "n d"]:
    """The embeddings less all but their first components (section 4, figure 7)."""
    axes = codes.axes[:, :components]
    x = jnp.matmul(z - codes.mean, axes, precision=_exactly)
    return codes.mean + jnp.matmul(x, axes.T, precision=_exactly)


def fit_quantiles(x: Float[np.ndarray, " n"], buckets: int) -> Float[np.ndarray, " q"]:
    """The buckets - 1 edges between equally many of the values."""
    return np.float32(
        np.quantile(x.astype(np.float64), np.arange(1, buckets) / buckets)
    )


def quantile(
    edges: Float[Array | np.ndarray, " q"], x: Num[Array | np.ndarray, " n"]
) -> Int[Array, " n"]:
    """The bucket, 0 … q, in which each value is."""
    return jnp.searchsorted(edges, x, side="right").astype(jnp.int32)
