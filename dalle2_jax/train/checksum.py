"""Checksums of what a checkpoint holds: of arrays on the devices, and of JSON."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def of_state(state: Any) -> dict[str, list[int]]:
    """Two sums modulo 2^32 of the bits of each array of a tree, by its path.

    They don't depend on how an array is split over devices. The first tells any change
    of one element, the second weighs each by its place. Each device reads what it has,
    at the speed of its memory, and nothing is copied to the host but the sums.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    names = [jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in leaves]
    found = jax.device_get(_sums_of(state)([x for _, x in leaves]))
    return {name: sums.tolist() for name, sums in zip(names, found, strict=True)}


def of_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sums_of(state: Any) -> Any:
    """`_sums` of each array, which every process has in full."""
    sharding = getattr(jax.tree.leaves(state)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return _all_sums
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.jit(_all_sums, out_shardings=everywhere)


@jax.jit
def _all_sums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_sums(x) for x in arrays]


def _sums(x: jax.Array) -> jax.Array:
    bits = x
    if x.dtype != bool:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    bits = bits.astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(
            jnp.uint32, x.shape, axis
        )
    # An odd factor keeps every bit of an element, and a hash of the place is unlike
    # its neighbours'.
    weight = (place ^ (place >> 15)) * jnp.uint32(2654435761)
    weight = (weight ^ (weight >> 13)) | 1
    return jnp.stack([jnp.sum(v, dtype=jnp.uint32) for v in (bits, bits * weight)])
