"""Layers shared by the networks: normalisation, attention, the transformer, resampling.

Parameters, softmax and normalisation statistics are float32; activations have the
module's ``dtype``.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),  # by tanh
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's CLIP
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
_LONG = 1 << 19  # weights of a head from which on a CPU takes the heads one by one


def timestep_embedding(
    t: Num[Array, " b"], width: int, max_period: float = 10_000.0
) -> Float[Array, "b width"]:
    """Sinusoidal features of the timestep: cosines first, then sines (as in GLIDE)."""
    half = width // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, width - 2 * half)))


def attention(
    q: Float[Array, "b tq h d"],
    k: Float[Array, "b tk h d"],
    v: Float[Array, "b tk h d"],
    mask: Bool[Array, "#b #h #tq tk"] | None = None,
    seen: Int[Array, " b"] | None = None,
) -> Float[Array, "b tq h d"]:
    """softmax(q kᵀ / √d) v, with a float32 softmax.

    ``mask`` is True where q may see k; or every q sees the first ``seen`` of the keys.

    On a GPU in half precision it is cuDNN's fused kernel, but for a single q; ``seen``
    costs it nothing, a mask is as large as the weights. Elsewhere it is written with
    the heads moved forward, which XLA's CPU backend runs as plain matrix products. On
    one CPU long sequences are taken head by head, so that the weights stay in cache.
    """
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if jax.default_backend() == "gpu" and half and q.shape[1] > 1:
        return _fused(q, k, v, mask, seen)
    if seen is not None:
        mask = (jnp.arange(k.shape[1]) < seen[:, None])[:, None, None]
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    if _on_one_cpu() and q.shape[2] * k.shape[2] >= _LONG:
        shape = q.shape
        if mask is not None:
            mask = jnp.broadcast_to(mask, (*shape[:2], *mask.shape[2:]))
        q, k, v, mask = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), (q, k, v, mask)
        )
        y = jax.lax.map(lambda head: _attend(*head), (q, k, v, mask)).reshape(shape)
    else:
        y = _attend(q, k, v, mask)
    return y.transpose(0, 2, 1, 3)


def _fused(
    q: Array, k: Array, v: Array, mask: Array | None, seen: Array | None
) -> Array:
    """attention by cuDNN: its gradient wants even sizes, and a mask is to be full."""
    b, tq, h, _ = q.shape
    tk = k.shape[1]
    if mask is not None:
        mask = jnp.broadcast_to(mask, (b, h, tq, tk))
        mask = jnp.pad(mask, [(0, 0), (0, 0), (0, tq % 2), (0, tk % 2)])
    elif seen is None and tk % 2:
        seen = jnp.full(b, tk)
    q, k, v = (
        jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)]) for x in (q, k, v)
    )
    y = jax.nn.dot_product_attention(
        q, k, v, mask=mask, key_value_seq_lengths=seen, implementation="cudnn"
    )
    return y[:, :tq]


def _on_one_cpu() -> bool:
    """Whether no batch can be split over devices, which a loop over it would gather."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def _attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """attention of arrays that end in positions and a head's channels."""
    logits = jnp.einsum(
        "...qd,...kd->...qk",
        q / math.sqrt(q.shape[-1]),
        k,
        preferred_element_type=jnp.float32,
    )
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("...qk,...kd->...qd", weights, v)


@jax.custom_vjp
def product(
    x: Float[Array, "*b c"], kernel: Float[Array, "c ..."]
) -> Float[Array, "..."]:
    """x kernel; on a CPU the kernel's gradient is the product xᵀ g.

    JAX writes it as (gᵀ x)ᵀ. XLA's CPU backend then copies gᵀ, and to do so sums anew
    all that a residual's gradient is summed of: a tenth of a transformer's step.
    """
    return jnp.tensordot(x, kernel, 1)


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel), (x, kernel)


def _product_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rows, columns = tuple(range(x.ndim - 1)), tuple(range(x.ndim - 1, g.ndim))

    def flat(x: Array, g: Array) -> Array:
        x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, *kernel.shape[1:])
        return jnp.tensordot(x.T, g, 1)

    def whole(x: Array, g: Array) -> Array:  # as a TPU would copy to make it flat
        return jnp.tensordot(x, g, (rows, rows))

    into_x = jnp.tensordot(g, kernel, (columns, tuple(range(1, kernel.ndim))))
    return into_x, jax.lax.platform_dependent(x, g, cpu=flat, default=whole)


product.defvjp(_product_forward, _product_backward)


# A dense layer that multiplies so.
Dense = functools.partial(
    nn.Dense, dot_general=lambda x, kernel, *_, **__: product(x, kernel)
)


class Heads(nn.Module):
    """A dense layer whose outputs are heads of several kinds, as queries and keys.

    Its params are those of Dense(kinds · heads · d). The kernel is cut into kinds
    before the product: where the heads are split over devices, parts of it move and not
    parts of the far larger outputs.
    """

    kinds: int
    heads: int
    d: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> list[Float[Array, "b t h d"]]:
        shape = self.kinds, self.heads, self.d
        flat = math.prod(shape)
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (x.shape[-1], flat))
        bias = self.param("bias", nn.initializers.zeros, (flat,))
        kernel = jnp.asarray(kernel, self.dtype).reshape(-1, *shape)
        y = product(x.astype(self.dtype), kernel)
        y = y + bias.astype(self.dtype).reshape(shape)
        return [y[:, :, i] for i in range(self.kinds)]


class LayerNorm(nn.Module):
    """Layer normalisation computed in float32, returned in the input's dtype."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(x.dtype)


class GroupNorm(nn.Module):
    """Group normalisation, optionally modulated: (1 + scale) · norm(x) + shift.

    Everything after the statistics is folded into one multiply-add per channel, which
    on a CPU is several times faster than normalising the regrouped array.
    """

    groups: int = 32
    eps: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        scale: Float[Array, "b c"] | None = None,
        shift: Float[Array, "b c"] | None = None,
    ) -> Float[Array, "b h w c"]:
        b, _, _, c = x.shape
        gamma = self.param("scale", nn.initializers.ones, (c,))
        beta = self.param("bias", nn.initializers.zeros, (c,))
        x32 = x.astype(jnp.float32)

        def per_group(y: Array) -> Array:
            """The mean over each group's pixels and channels, repeated per channel."""
            means = y.mean((1, 2)).reshape(b, self.groups, -1).mean(-1)
            return jnp.repeat(means, c // self.groups, axis=-1)

        mean = per_group(x32)
        variance = jnp.maximum(per_group(x32 * x32) - mean * mean, 0.0)
        a = gamma * jax.lax.rsqrt(variance + self.eps)
        offset = beta - mean * a
        if scale is not None:
            a, offset = a * (1 + scale), offset * (1 + scale) + shift
        return (x32 * a[:, None, None] + offset[:, None, None]).astype(x.dtype)


class Cache(NamedTuple):
    """The keys and values of a block's attention, of all positions that there will be.

    Those that aren't there yet are to be masked.
    """

    k: Float[Array, "b s h d"]
    v: Float[Array, "b s h d"]

    def write(self, k: Array, v: Array, start: Int[Array, ""]) -> "Cache":
        """With those of the positions from ``start`` on."""
        write = jax.lax.dynamic_update_slice_in_dim
        return Cache(write(self.k, k, start, 1), write(self.v, v, start, 1))


class Block(nn.Module):
    """A pre-norm transformer block: x + attn(ln_1(x)), then x + mlp(ln_2(x)).

    The MLP is ``mlp_width`` wide, or four times the block's width; ``eps`` is of the
    norms. With a cache, x are
    the positions from ``start`` on; they see the cached ones, which the mask is of, and
    the cache with themselves is returned, too.
    """

    heads: int
    activation: str = "gelu"
    dtype: DTypeLike = jnp.float32
    mlp_width: int | None = None
    eps: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t c"],
        mask: Bool[Array, "#b #h #t s"] | None = None,
        cache: Cache | None = None,
        start: Int[Array, ""] | None = None,
    ) -> Float[Array, "b t c"] | tuple[Float[Array, "b t c"], Cache]:
        b, t, c = x.shape

        def dense(features: int, name: str) -> nn.Dense:
            return Dense(features, dtype=self.dtype, name=name)

        project = Heads(3, self.heads, c // self.heads, self.dtype, name="qkv")
        q, k, v = project(LayerNorm(self.eps, name="ln_1")(x))
        if cache is not None:
            k, v = cache = cache.write(k, v, start)
        x = x + dense(c, "out")(attention(q, k, v, mask).reshape(b, t, c))
        h = LayerNorm(self.eps, name="ln_2")(x)
        h = dense(self.mlp_width or 4 * c, "mlp_in")(h)
        x = x + dense(c, "mlp_out")(ACTIVATIONS[self.activation](h))
        return x if cache is None else (x, cache)


class Transformer(nn.Module):
    """Pre-norm blocks; ``remat`` recomputes each one in the backward pass.

    With a cache for each block, the caches are returned, too: see Block.
    """

    layers: int
    heads: int
    activation: str = "gelu"
    remat: bool = False
    dtype: DTypeLike = jnp.float32
    mlp_width: int | None = None
    eps: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t c"],
        mask: Bool[Array, "#b #h #t s"] | None = None,
        caches: Sequence[Cache] | None = None,
        start: Int[Array, ""] | None = None,
    ) -> Float[Array, "b t c"] | tuple[Float[Array, "b t c"], list[Cache]]:
        block, written = nn.remat(Block) if self.remat else Block, []
        for i in range(self.layers):
            name = f"block_{i}"
            layer = block(
                self.heads,
                self.activation,
                self.dtype,
                self.mlp_width,
                self.eps,
                name=name,
            )
            if caches is None:
                x = layer(x, mask)
            else:
                x, cache = layer(x, mask, caches[i], start)
                written.append(cache)
        return x if caches is None else (x, written)


def causal_mask(length: int) -> Bool[Array, "1 1 t t"]:
    """True where a position may look: at itself and what came before it."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def text_mask(tokens: Int[Array, "b t"], eot: int) -> Bool[Array, "b t"]:
    """True up to and including the first end-of-text token; False on the padding."""
    ended = jnp.cumsum(tokens == eot, axis=-1)
    return (ended == 0) | ((tokens == eot) & (ended == 1))


def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Nearest-neighbour doubling."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def to_patches(
    x: Float[Array, "b h w c"], p: int
) -> Float[Array, "b h//{p} w//{p} {p}*{p}*c"]:
    """Squares of p × p pixels as the channels of one (space to depth)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // p, w // p, p * p * c)


def from_patches(
    x: Float[Array, "b h w c"], p: int
) -> Float[Array, "b {p}*h {p}*w c//{p}**2"]:
    """The inverse of to_patches."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, p, p, c // p**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * p, w * p, c // p**2)


def downsample(x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 c"]:
    """Halving by the mean of 2×2 pixels."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
