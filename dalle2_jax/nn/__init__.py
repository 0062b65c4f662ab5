"""The networks: linen modules that know neither diffusion nor losses."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def abstract(network: nn.Module) -> dict[str, Any]:
    """Return the shapes and dtypes of a network's params; nothing is computed.

    Tracing takes seconds for a large network, so the last results are kept. Params are
    float32 whatever the activations are.
    """
    if hasattr(network, "dtype"):
        network = network.clone(dtype=jnp.float32)
    try:
        hash(network)
    except TypeError:  # an argument is a list or a dict
        return _abstract(network)
    return _remembered(network)


def _abstract(network: nn.Module) -> dict[str, Any]:
    return jax.eval_shape(
        lambda: network.init(jax.random.key(0), *network.example())["params"]
    )


_remembered = functools.lru_cache(maxsize=32)(_abstract)
