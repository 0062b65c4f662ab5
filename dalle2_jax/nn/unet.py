"""The U-Net of GLIDE and ADM, for the decoder and the upsamplers.

Dhariwal & Nichol (arXiv 2105.05233) and Nichol et al. (GLIDE, arXiv 2112.10741): two
convolutions a residual block, resampling inside residual blocks, and attention in
which the context's keys and values stand beside the image's own.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from dalle2_jax.errors import UserError
from dalle2_jax.nn.layers import (
    Dense,
    GroupNorm,
    Heads,
    attention,
    downsample,
    from_patches,
    timestep_embedding,
    to_patches,
    upsample,
)

_RESAMPLE = {"none": lambda x: x, "up": upsample, "down": downsample}


class ResBlock(nn.Module):
    """norm, silu, [resample], conv; conditioning; norm, silu, dropout, conv; + skip.

    Attributes:
      channels: output channels.
      resample: "none", "up" (nearest) or "down" (2×2 mean), applied to both branches.
      scale_shift: whether the embedding modulates the second norm, or is added.
    """

    channels: int
    resample: str = "none"
    scale_shift: bool = True
    groups: int = 32
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"], train: bool
    ) -> Float[Array, "b h2 w2 c2"]:
        def conv(size: int, name: str, **options: Any) -> nn.Conv:
            return nn.Conv(
                self.channels, (size, size), dtype=self.dtype, name=name, **options
            )

        resample = _RESAMPLE[self.resample]
        h = nn.silu(GroupNorm(self.groups, name="norm_1")(x))
        h = conv(3, "conv_1")(resample(h))
        x = resample(x)
        width = self.channels * (2 if self.scale_shift else 1)
        e = Dense(width, dtype=self.dtype, name="embedding")(nn.silu(embedding))
        norm = GroupNorm(self.groups, name="norm_2")
        if self.scale_shift:
            h = norm(h, *jnp.split(e.astype(jnp.float32), 2, axis=-1))
        else:
            h = norm(h + e[:, None, None])
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        h = conv(3, "conv_2", kernel_init=nn.initializers.zeros)(h)
        if x.shape[-1] != self.channels:
            x = conv(1, "skip")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over pixels, with the context as additional keys and values."""

    head_channels: int = 64
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        context: Float[Array, "b t d"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        heads = c // self.head_channels

        def project(y: Array, kinds: int, name: str) -> list[Array]:
            return Heads(kinds, heads, self.head_channels, self.dtype, name=name)(y)

        y = GroupNorm(self.groups, name="norm")(x).reshape(b, h * w, c)
        q, k, v = project(y, 3, "qkv")
        seen = None
        if context is not None:
            context_k, context_v = project(context, 2, "context_kv")
            k = jnp.concatenate([k, context_k], axis=1)
            v = jnp.concatenate([v, context_v], axis=1)
            if mask is not None:
                seen = h * w + mask.sum(-1)
        y = attention(q, k, v, seen=seen).reshape(b, h * w, c)
        y = Dense(c, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="out")(y)
        return x + y.reshape(b, h, w, c)


class UNet(nn.Module):
    """ADM's U-Net.

    Attributes:
      channels, multipliers: channels of level l are channels · multipliers[l]; level
        l works at 1/2^l of the input's side, less the patches.
      blocks: residual blocks a level.
      in_channels: 3, or 6 with a low-resolution picture beside the noised one.
      out_channels: 3, or 6 with a learned variance.
      attention_levels: levels that attend; the middle does if any level does.
      head_channels: channels of one attention head.
      scale_shift: how the embedding enters (see ResBlock).
      dropout: rate in the residual blocks, in training.
      groups: of the group norms; must divide the channels of every level.
      patch_size: side of the squares of pixels that are the first level's positions.
        1 is GLIDE; more costs detail and saves a laptop most of the arithmetic
        (Hoogeboom et al. 2023, arXiv 2301.11093).
      remat: recompute residual and attention blocks in the backward pass.
    """

    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    in_channels: int
    out_channels: int
    attention_levels: tuple[int, ...] = ()
    head_channels: int = 64
    scale_shift: bool = True
    dropout: float = 0.0
    groups: int = 32
    patch_size: int = 1
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @property
    def unit(self) -> int:
        """Pixels along a side of the deepest level's positions."""
        return self.patch_size * 2 ** (len(self.multipliers) - 1)

    def example(self) -> tuple[Array, ...]:
        """Arguments of a call, for init and its shapes."""
        x = jnp.zeros((1, self.unit, self.unit, self.in_channels))
        return x, jnp.zeros(1)

    def check_widths(self) -> None:
        """Raise a UserError unless groups and heads divide the channels."""
        for level, multiplier in enumerate(self.multipliers):
            channels = self.channels * multiplier
            attends = level in self.attention_levels
            if channels % self.groups or attends and channels % self.head_channels:
                raise UserError(
                    f"level {level} of the U-Net has {channels} channels: must divide "
                    f"by groups={self.groups}, and where it attends by "
                    f"head_channels={self.head_channels}"
                )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Num[Array, " b"],
        vector: Float[Array, "b e"] | None = None,
        context: Float[Array, "b t d"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b h w o"]:
        """Denoise.

        Args:
          x: noised image (and what is concatenated to it), [-1, 1] scale; h and w must
            be divisible by `unit`.
          t: timesteps as the training schedule counts them.
          vector: added to the timestep's embedding; its width is 4 · channels.
          context: more keys and values for every attention.
          mask: True where the context may be seen: its first tokens, and no others.
          train: whether dropout is on (needs the "dropout" rng).

        Returns:
          float32, the network's raw output.
        """
        self.check_widths()
        width = 4 * self.channels
        block = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
        attend = nn.remat(AttentionBlock) if self.remat else AttentionBlock

        def res(x: Array, channels: int, name: str, resample: str = "none") -> Array:
            return block(
                channels,
                resample,
                self.scale_shift,
                self.groups,
                self.dropout,
                self.dtype,
                name=name,
            )(x, embedding, train)

        def attn(x: Array, name: str) -> Array:
            return attend(self.head_channels, self.groups, self.dtype, name=name)(
                x, context, mask
            )

        embedding = timestep_embedding(t, self.channels).astype(self.dtype)
        embedding = Dense(width, dtype=self.dtype, name="time_in")(embedding)
        embedding = nn.silu(embedding)
        embedding = Dense(width, dtype=self.dtype, name="time_out")(embedding)
        if vector is not None:
            embedding = embedding + vector.astype(self.dtype)

        last = len(self.multipliers) - 1
        x = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv_in")(
            to_patches(x.astype(self.dtype), self.patch_size)
        )
        skips = [x]
        for level, multiplier in enumerate(self.multipliers):
            channels = self.channels * multiplier
            for i in range(self.blocks):
                x = res(x, channels, f"down_{level}_res_{i}")
                if level in self.attention_levels:
                    x = attn(x, f"down_{level}_attn_{i}")
                skips.append(x)
            if level < last:
                x = res(x, channels, f"down_{level}_downsample", "down")
                skips.append(x)

        x = res(x, channels, "mid_res_0")
        if self.attention_levels:
            x = attn(x, "mid_attn")
        x = res(x, channels, "mid_res_1")

        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            channels = self.channels * multiplier
            for i in range(self.blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = res(x, channels, f"up_{level}_res_{i}")
                if level in self.attention_levels:
                    x = attn(x, f"up_{level}_attn_{i}")
            if level > 0:
                x = res(x, channels, f"up_{level}_upsample", "up")

        x = nn.silu(GroupNorm(self.groups, name="norm_out")(x))
        x = nn.Conv(
            self.out_channels * self.patch_size**2,
            (3, 3),
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros,
            name="conv_out",
        )(x)
        return from_patches(x, self.patch_size).astype(jnp.float32)
