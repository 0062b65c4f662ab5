"""The gradients of our convolution are those of XLA's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.nn.conv import Conv


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("bfloat16", 0.01)])
def test_gradients(size, dtype, atol):
    x, dy = jax.random.normal(jax.random.key(0), (2, 3, 6, 8, 4))
    dy = jnp.concatenate([dy, dy[..., :1]], axis=-1)
    ours, theirs = Conv(5, (size, size), dtype=dtype), nn.Conv(5, (size, size))
    params = theirs.init(jax.random.key(1), x)

    def gradients(layer):
        def loss(params, x):
            return (layer.apply(params, x) * dy).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)

    (params_found, x_found), (params_expected, x_expected) = map(
        gradients, (ours, theirs)
    )
    for found, expected in [
        (params_found["params"]["kernel"], params_expected["params"]["kernel"]),
        (x_found, x_expected),
    ]:
        assert found.dtype == jnp.float32
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found / scale, expected / scale, atol=atol)
