"""A network run on overlapping tiles of pictures, in the memory that one tile takes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dalle2_jax.errors import UserError

Apply = Callable[[Array, Array, Any], Array]


def tiled(apply: Apply, tile: int, overlap: int, unit: int) -> Apply:
    """The network on one tile after the other, blended where they overlap.

    Args:
      apply: (x_t, timesteps, condition) -> output, for pictures [b, s, s, c] of any
        side s; the condition is a pytree of such.
      tile, overlap, unit: as of `check`. Pictures up to a tile are not cut.
    """

    def whole(x_t: Array, t: Array, cond: Any) -> Array:
        side = x_t.shape[1]
        if side <= tile:
            return apply(x_t, t, cond)
        starts, weights = map(jnp.asarray, windows(side, tile, overlap, unit))

        def add(canvas: Array, place: Array) -> tuple[Array, None]:
            y, x = starts[place]

            def cut(a: Array) -> Array:
                sizes = len(a), tile, tile, a.shape[-1]
                return jax.lax.dynamic_slice(a, (0, y, x, 0), sizes)

            y_weights, x_weights = weights[place]
            output = apply(cut(x_t), t, jax.tree.map(cut, cond))
            output = output * y_weights[:, None, None] * x_weights[:, None]
            output = cut(canvas) + output
            return jax.lax.dynamic_update_slice(canvas, output, (0, y, x, 0)), None

        output = jax.eval_shape(apply, x_t, t, cond)
        places = np.argwhere(np.ones((len(starts), len(starts))))
        return jax.lax.scan(add, jnp.zeros(output.shape), jnp.asarray(places))[0]

    return whole


def windows(
    side: int, tile: int, overlap: int, unit: int
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n tile"]]:
    """Where the tiles along one side begin, and the weights of their pixels.

    The weights of a pixel in all tiles add up to 1. Within a picture those of a tile
    are 0 in the outer quarter of the overlap, where it sees least of what surrounds it,
    and rise evenly in its middle half. So a network that sees no further than that
    quarter, and does not normalise over the picture, gives what it gives of the whole.
    """
    stride = (tile - overlap) // unit * unit
    starts = np.array([*range(0, side - tile, stride), side - tile])
    inside = np.minimum(np.arange(tile), np.arange(tile)[::-1]) + 0.5
    weights = ((inside - overlap / 4) / max(overlap / 2, 1)).clip(0, 1)
    weights = np.tile(weights, (len(starts), 1))
    weights[0, : tile // 2] = weights[-1, -(tile // 2) :] = 1  # the picture's border
    total = np.zeros(side)
    for start, row in zip(starts, weights, strict=True):
        total[start : start + tile] += row
    for start, row in zip(starts, weights, strict=True):
        row /= total[start : start + tile]
    return starts, weights.astype(np.float32)


def check(tile: int, overlap: int, unit: int) -> None:
    """That there are such tiles: of a network whose pictures have multiples of `unit`.

    Args:
      tile: side of a tile, in pixels.
      overlap: of neighbouring tiles, in pixels, or somewhat more.

    Raises:
      UserError: there are none.
    """
    if tile < unit or tile % unit:
        raise UserError(f"tile={tile}: must be a multiple of {unit}")
    if not 0 <= overlap <= tile - unit:
        raise UserError(
            f"overlap={overlap} of tiles of {tile} px: must be from 0 to {tile - unit}"
        )
