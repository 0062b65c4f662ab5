"""The reference arrays, and the peers' weights laid out as our networks' params."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dalle2_jax.convert import table, weights

Weights = dict[str, np.ndarray]
Params = dict[str, Any]


def load(name: str) -> Weights:
    """The arrays that make.py stored under a name."""
    with np.load(Path(__file__).with_name(f"{name}.npz")) as file:
        return dict(file)


def unpack(
    arrays: Weights,
) -> tuple[Weights, dict[str, Array], dict[str, Array]]:
    """Weights, inputs and outputs, in the dtypes that JAX works in."""
    stored = below(arrays, "weights/")
    stored = {name: value.astype(np.float32) for name, value in stored.items()}
    inputs, outputs = (
        {name: jnp.asarray(value) for name, value in below(arrays, group).items()}
        for group in ("inputs/", "outputs/")
    )
    return stored, inputs, outputs


def below(arrays: Weights, prefix: str) -> Weights:
    """The arrays whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def params(names: table.Table, network: Any, arrays: Weights, **options: Any) -> Params:
    """A peer's weights as the params of our network, by a table of dalle2_jax.convert.

    Every weight is used, and every parameter found, or it is a UserError.
    """
    shapes = {name: value.shape for name, value in arrays.items()}
    found = weights.Weights(Path("the peer"), shapes, arrays.__getitem__)
    return table.to_ours(names, network, found, **options)


def size(tree: Any) -> int:
    """How many numbers a tree of arrays or of shapes holds."""
    return sum(x.size for x in jax.tree.leaves(tree))


def assert_fits(model: Any, params: Params) -> None:
    """The params have the names, shapes and dtypes of the network's own."""
    described = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert described == jax.tree.map(
        lambda x: (x.shape, x.dtype), table.abstract(model)
    )


def assert_close(actual: Array, expected: Array, tolerance: float) -> None:
    """float32, and the largest error is small beside the largest expected value."""
    assert actual.dtype == jnp.float32
    assert actual.shape == expected.shape
    error = float(jnp.abs(actual - expected).max() / jnp.abs(expected).max())
    assert error <= tolerance, f"relative error {error:.1e}"
