"""The networks: linen modules that know neither diffusion nor losses."""

from typing import Any

import flax.linen as nn
import jax


def abstract(network: nn.Module) -> dict[str, Any]:
    """The shapes and dtypes of a network's params; nothing is computed."""
    return jax.eval_shape(
        lambda: network.init(jax.random.key(0), *network.example())["params"]
    )
