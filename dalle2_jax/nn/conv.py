"""Convolution of stride 1, with a kernel gradient that is quick on a CPU."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k c o"],
    strides: tuple[int, int],
    padding: str,
    **options: Any,
) -> Float[Array, "b h w o"]:
    """lax.conv_general_dilated of stride 1 with "SAME" padding, as flax calls it.

    On a CPU XLA takes twice as long for the gradient of a kernel as for the convolution
    itself; here that gradient is one product of matrices there.
    """

    def plain(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)

    odd_square = kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1
    if jax.default_backend() != "cpu" or not odd_square:
        return plain(x, kernel)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return plain(x, kernel), (x, kernel)

    def backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
        x, kernel = saved
        _, pull = jax.vjp(lambda x: plain(x, kernel), x)
        return *pull(dy), kernel_gradient(x, dy, kernel.shape[0]).astype(kernel.dtype)

    quick = jax.custom_vjp(plain)
    quick.defvjp(forward, backward)
    return quick(x, kernel)


def kernel_gradient(
    x: Float[Array, "b h w c"], dy: Float[Array, "b h w o"], k: int
) -> Float[Array, "k k c o"]:
    """The gradient of a k × k kernel, given that of the output: xᵀ · (dy, shifted)."""
    b, h, w, o = dy.shape
    edge, c = k // 2, x.shape[-1]
    padded = jnp.pad(dy, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    shifts = [(i, j) for i in reversed(range(k)) for j in reversed(range(k))]
    shifted = [padded[:, i : i + h, j : j + w] for i, j in shifts]
    gradient = jnp.matmul(
        x.reshape(-1, c).T,
        jnp.concatenate(shifted, axis=-1).reshape(-1, k * k * o),
        preferred_element_type=jnp.float32,
    )
    return gradient.reshape(c, k, k, o).transpose(1, 2, 0, 3)


# flax's Conv, computed by `conv`; for stride 1 and "SAME" padding, its defaults.
Conv = functools.partial(nn.Conv, conv_general_dilated_cls=lambda: conv)
