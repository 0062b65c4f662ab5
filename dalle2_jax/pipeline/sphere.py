"""Embeddings and noise as points of a sphere."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def slerp(
    a: Float[np.ndarray, "..."],
    b: Float[np.ndarray, "..."],
    t: Sequence[float | int] | Float[np.ndarray, " n"],
) -> Float[np.ndarray, "n ..."]:
    """Spherical interpolation of two arrays, seen as vectors (Shoemake 1985).

    At t = 0 it is a, at 1 b; in between the angle grows evenly, and so does the length
    if the two differ. Where they point the same way it is linear.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    t = np.asarray(t, np.float64).reshape(-1, *(1,) * a.ndim)
    u, v = (x / np.linalg.norm(x) for x in (a, b))
    # Of small angles the cosine would lose all digits (Kahan).
    angle = 2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))

    def weight(t: np.ndarray) -> np.ndarray:
        """sin(t · angle) / sin(angle), also where the angle is 0."""
        return t * np.sinc(t * angle / np.pi) / np.sinc(angle / np.pi)

    return (weight(1 - t) * a + weight(t) * b).astype(np.float32)


def unit(x: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    """The vectors at length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def mean_direction(
    parts: Sequence[Float[np.ndarray, "#n d"]], weights: Float[np.ndarray, " k"]
) -> Float[np.ndarray, "#n d"]:
    """The weighted mean of the vectors' directions, with their weighted mean length."""
    length = sum(
        w * np.linalg.norm(z, axis=-1, keepdims=True)
        for w, z in zip(weights, parts, strict=True)
    )
    mean = sum(w * unit(z) for w, z in zip(weights, parts, strict=True))
    return (unit(mean) * length).astype(np.float32)
