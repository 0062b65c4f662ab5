"""The decoder: the U-Net conditioned on a CLIP image embedding and a caption.

Section 2.1 of arXiv 2204.06125. The image embedding enters both ways of the paper:
projected and added to the timestep's embedding, and projected to extra tokens of the
context. The caption comes through a transformer of the decoder's own (the paper, as
GLIDE does) or as CLIP's text states (Karlo).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

from dalle2_jax.nn.clip import Caption
from dalle2_jax.nn.layers import Dense, LayerNorm, Transformer, text_mask
from dalle2_jax.nn.unet import UNet


class Context(NamedTuple):
    """What the U-Net is told besides x_t and t; the same at every sampling step."""

    vector: Float[Array, "b e"]
    tokens: Float[Array, "b k w"]
    mask: Bool[Array, "b k"]


class TextEncoder(nn.Module):
    """GLIDE's text transformer, trained with the decoder: every position sees all.

    Padding is replaced by a learned embedding, as in GLIDE.
    """

    vocab_size: int
    context_length: int
    width: int
    layers: int
    heads: int
    eot: int
    activation: str = "gelu"
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b l"]
    ) -> tuple[Float[Array, "b l w"], Float[Array, "b w"]]:
        """Token ids -> (states, the state at the first end-of-text token)."""
        init = nn.initializers.normal(0.02)
        embed = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=init,
            dtype=self.dtype,
            name="token_embedding",
        )
        shape = (self.context_length, self.width)
        positions = self.param("position_embedding", init, shape)
        padding = self.param("padding_embedding", init, shape)
        mask = text_mask(tokens, self.eot)[..., None]
        x = embed(tokens) + positions.astype(self.dtype)
        x = jnp.where(mask, x, padding.astype(self.dtype))
        x = Transformer(
            self.layers,
            self.heads,
            self.activation,
            self.remat,
            self.dtype,
            name="transformer",
        )(x)
        x = LayerNorm(name="ln_final")(x)
        end = jnp.argmax(tokens == self.eot, axis=-1)
        return x, jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]


def with_known(
    x_t: Float[Array, "b h w 3"],
    known: tuple[Float[Array, "#b h w 3"], Float[Array, "#b h w 1"]] | None,
) -> Float[Array, "b h w 7"]:
    """What a decoder that was trained to inpaint is given (GLIDE, section 3.3).

    Args:
      x_t: noised pictures.
      known: pictures in [-1, 1], and a mask: 0 where they are known, 1 where they are
        to be painted, and not shown. None where nothing is known.

    Returns:
      x_t, the known pixels (0 elsewhere), and the mask.
    """
    if known is None:
        zeros = jnp.zeros_like(x_t)
        return jnp.concatenate([x_t, zeros, zeros[..., :1] + 1], axis=-1)
    picture, mask = known
    told = jnp.concatenate([picture * (1 - mask), mask], axis=-1)
    told = jnp.broadcast_to(told.astype(x_t.dtype), (*x_t.shape[:-1], 4))
    return jnp.concatenate([x_t, told], axis=-1)


class Decoder(nn.Module):
    """ε, x0 or v (and a variance) of a noised picture, given z_image and a caption.

    Attributes:
      unet: arguments of UNet.
      clip_dim: dimension d of the CLIP embeddings.
      context_length, text_width: number and width of CLIP's text states.
      context_width: width of the context tokens.
      image_tokens: tokens that z_image becomes (4 in the paper).
      text_encoder: arguments of TextEncoder, or None to read CLIP's text states.
    """

    unet: Mapping[str, Any]
    clip_dim: int
    context_length: int
    text_width: int
    context_width: int
    image_tokens: int = 4
    text_encoder: Mapping[str, Any] | None = None
    dtype: DTypeLike = jnp.float32

    @property
    def inpaints(self) -> bool:
        """Whether it is also told what is known of the picture (see `with_known`)."""
        return self.unet["in_channels"] == 7

    def setup(self) -> None:
        def dense(features: int) -> nn.Dense:
            return Dense(features, dtype=self.dtype)

        width = 4 * self.unet["channels"]
        self.net = UNet(**self.unet, dtype=self.dtype)
        self.null_z_image = self.param(
            "null_z_image", nn.initializers.normal(0.02), (self.clip_dim,)
        )
        self.z_image_to_vector = dense(width)
        self.z_image_to_tokens = dense(self.image_tokens * self.context_width)
        self.text_to_vector = dense(width)
        self.states_to_tokens = dense(self.context_width)
        self.ln_tokens = LayerNorm()
        if self.text_encoder is not None:
            self.text = TextEncoder(**self.text_encoder, dtype=self.dtype)

    def example(self) -> tuple[Any, ...]:
        """Arguments of a call, for init and its shapes."""
        x_t, t = UNet(**self.unet, parent=None).example()
        z = jnp.zeros((1, self.clip_dim))
        states = jnp.zeros((1, self.context_length, self.text_width))
        mask = jnp.ones(states.shape[:2], bool)
        caption = Caption(mask.astype(jnp.int32), z, states, mask)
        return x_t, t, z, jnp.ones(1, bool), caption

    def context(
        self,
        z_image: Float[Array, "b d"],
        has_image: Bool[Array, " b"],
        caption: Caption,
    ) -> Context:
        """What conditions the U-Net; computed once, whatever the number of steps.

        Args:
          z_image: CLIP image embedding, unscaled.
          has_image: False puts the learned null embedding in place of z_image.
          caption: the empty caption for none.
        """
        b = z_image.shape[0]
        z_image = jnp.where(has_image[:, None], z_image, self.null_z_image)
        if self.text_encoder is None:
            states, pooled, mask = caption.states, caption.z_text, caption.mask
        else:
            states, pooled = self.text(caption.tokens)
            mask = jnp.ones(states.shape[:2], bool)
        vector = self.z_image_to_vector(z_image) + self.text_to_vector(pooled)
        # Channel-major, the token last: Karlo's order.
        image_tokens = self.z_image_to_tokens(z_image)
        image_tokens = image_tokens.reshape(b, self.context_width, self.image_tokens)
        text_tokens = self.ln_tokens(self.states_to_tokens(states))
        tokens = jnp.concatenate([image_tokens.transpose(0, 2, 1), text_tokens], axis=1)
        mask = jnp.pad(mask, ((0, 0), (self.image_tokens, 0)), constant_values=True)
        return Context(vector, tokens, mask)

    def denoise(
        self,
        x_t: Float[Array, "b h w c"],
        t: Num[Array, " b"],
        context: Context,
        train: bool = False,
    ) -> Float[Array, "b h w o"]:
        """The U-Net's raw output (float32) for noised pictures, timesteps, context."""
        return self.net(x_t, t, context.vector, context.tokens, context.mask, train)

    def __call__(
        self,
        x_t: Float[Array, "b h w c"],
        t: Num[Array, " b"],
        z_image: Float[Array, "b d"],
        has_image: Bool[Array, " b"],
        caption: Caption,
        train: bool = False,
    ) -> Float[Array, "b h w o"]:
        """context, then denoise."""
        return self.denoise(x_t, t, self.context(z_image, has_image, caption), train)
