"""CLIP's two towers: a vision transformer and a causal text transformer.

Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision" (arXiv 2103.00020). Module and parameter layout hold OpenAI's weights.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dalle2_jax.nn.layers import (
    ACTIVATIONS,
    Dense,
    GroupNorm,
    LayerNorm,
    Transformer,
    causal_mask,
    text_mask,
)

_embedding = nn.initializers.normal(0.02)


class Caption(NamedTuple):
    """A caption as the later networks see it; a leading batch axis throughout."""

    tokens: Int[Array, "b l"]
    z_text: Float[Array, "b d"]
    states: Float[Array, "b l w"]  # CLIP's text states
    mask: Bool[Array, "b l"]  # True on the caption, False on the padding


def cosine(a: Float[Array, "b d"], b: Float[Array, "b d"]) -> Float[Array, " b"]:
    """Cosine of the angle between the vectors of each pair."""
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / norms


class VisionTower(nn.Module):
    """ViT with a class token; its final state, projected, is the image embedding.

    With a ``stem``, convolutions of stride 2 come before the patch embedding, which
    then spans what is left of a patch (Xiao et al. 2021, arXiv 2106.14881).
    """

    embed_dim: int
    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    stem: tuple[int, ...] = ()
    mlp_width: int | None = None
    activation: str = "gelu"
    eps: float = 1e-5
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b s s 3"]) -> Float[Array, "b d"]:
        b, p, width = image.shape[0], self.patch_size, self.width
        x = image
        for i, channels in enumerate(self.stem):
            x = nn.Conv(channels, (3, 3), (2, 2), dtype=self.dtype, name=f"stem_{i}")(x)
            x = GroupNorm(1, name=f"stem_norm_{i}")(x)
            x = ACTIVATIONS[self.activation](x)
            p //= 2
        x = nn.Conv(
            width,
            (p, p),
            strides=(p, p),
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            name="patch_embedding",
        )(x).reshape(b, -1, width)
        token = self.param("class_embedding", _embedding, (width,))
        # A stem's outputs are of size 1, beside which small positions hardly count.
        std = 0.5 if self.stem else 0.02
        positions = self.param(
            "position_embedding", nn.initializers.normal(std), (x.shape[1] + 1, width)
        )
        token = jnp.broadcast_to(token.astype(x.dtype), (b, 1, width))
        x = jnp.concatenate([token, x], axis=1) + positions.astype(x.dtype)
        x = LayerNorm(self.eps, name="ln_pre")(x)
        x = Transformer(
            self.layers,
            self.heads,
            self.activation,
            self.remat,
            self.dtype,
            self.mlp_width,
            self.eps,
            name="transformer",
        )(x)
        x = LayerNorm(self.eps, name="ln_post")(x[:, 0])
        return Dense(
            self.embed_dim, use_bias=False, dtype=self.dtype, name="projection"
        )(x).astype(jnp.float32)


class TextTower(nn.Module):
    """Causal transformer; its state at the end-of-text token is the text embedding."""

    embed_dim: int
    vocab_size: int
    context_length: int
    width: int
    layers: int
    heads: int
    eot: int
    mlp_width: int | None = None
    activation: str = "gelu"
    eps: float = 1e-5
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b d"], Float[Array, "b t w"]]:
        embed = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=_embedding,
            dtype=self.dtype,
            name="token_embedding",
        )
        positions = self.param(
            "position_embedding",
            nn.initializers.normal(0.01),
            (self.context_length, self.width),
        )
        length = tokens.shape[1]
        x = embed(tokens) + positions[:length].astype(self.dtype)
        x = Transformer(
            self.layers,
            self.heads,
            self.activation,
            self.remat,
            self.dtype,
            self.mlp_width,
            self.eps,
            name="transformer",
        )(x, causal_mask(length))
        x = LayerNorm(self.eps, name="ln_final")(x)
        end = jnp.argmax(tokens == self.eot, axis=-1)  # the first end-of-text
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        z_text = Dense(
            self.embed_dim, use_bias=False, dtype=self.dtype, name="projection"
        )(pooled)
        return z_text.astype(jnp.float32), x


class CLIP(nn.Module):
    """Both towers and the learned temperature, or one tower alone.

    Embeddings are the raw projections, not normalised to unit length; losses and
    scores normalise them.

    Attributes:
      embed_dim: dimension d of the shared embedding space.
      vocab_size, context_length: of the tokenizer; ``eot`` is its end-of-text id.
      text_width, text_layers, text_heads: the text transformer; these, ``vocab_size``,
        ``context_length`` and ``eot`` are None where there is no text tower.
      image_size, patch_size: side of the input picture and of one patch, in pixels;
        None where there is no image tower.
      vision_width, vision_layers, vision_heads: the image transformer.
      vision_stem: channels of the convolutions before it; () for none (the paper).
      text_mlp_width, vision_mlp_width: widths of the MLPs; None for four times the
        tower's width.
      activation: a key of `layers.ACTIVATIONS`, as "gelu" (exact) or "quick_gelu"
        (OpenAI's weights).
      vision_activation: of the image tower; None for ``activation``.
      text_eps, vision_eps: epsilon of the layer norms.
    """

    embed_dim: int
    vocab_size: int | None = None
    context_length: int | None = None
    text_width: int | None = None
    text_layers: int | None = None
    text_heads: int | None = None
    eot: int | None = None
    image_size: int | None = None
    patch_size: int | None = None
    vision_width: int | None = None
    vision_layers: int | None = None
    vision_heads: int | None = None
    vision_stem: tuple[int, ...] = ()
    text_mlp_width: int | None = None
    vision_mlp_width: int | None = None
    activation: str = "gelu"
    vision_activation: str | None = None
    text_eps: float = 1e-5
    vision_eps: float = 1e-5
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        shared = {
            "embed_dim": self.embed_dim,
            "remat": self.remat,
            "dtype": self.dtype,
        }
        if self.text_width is not None:
            self.text = TextTower(
                vocab_size=self.vocab_size,
                context_length=self.context_length,
                width=self.text_width,
                layers=self.text_layers,
                heads=self.text_heads,
                eot=self.eot,
                mlp_width=self.text_mlp_width,
                activation=self.activation,
                eps=self.text_eps,
                **shared,
            )
        if self.image_size is None:
            return
        self.vision = VisionTower(
            image_size=self.image_size,
            patch_size=self.patch_size,
            width=self.vision_width,
            layers=self.vision_layers,
            heads=self.vision_heads,
            stem=self.vision_stem,
            mlp_width=self.vision_mlp_width,
            activation=self.vision_activation or self.activation,
            eps=self.vision_eps,
            **shared,
        )
        if self.text_width is not None:
            self.logit_scale = self.param(
                "logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ()
            )

    def encode_image(self, image: Float[Array, "b s s 3"]) -> Float[Array, "b d"]:
        """Picture, normalised by CLIP's mean and deviation -> z_image (unscaled)."""
        return self.vision(image)

    def encode_text(
        self, tokens: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b d"], Float[Array, "b t w"]]:
        """Token ids -> (z_text, the final states of every position)."""
        return self.text(tokens)

    def encode_caption(self, tokens: Int[Array, "b t"]) -> Caption:
        """Token ids -> all that the prior and the decoder may read of a caption."""
        z_text, states = self.encode_text(tokens)
        return Caption(tokens, z_text, states, text_mask(tokens, self.eot))

    def example(self) -> tuple[Array | None, Array | None]:
        """Arguments of a call, for init and its shapes."""
        image = tokens = None
        if self.image_size is not None:
            image = jnp.zeros((1, self.image_size, self.image_size, 3))
        if self.text_width is not None:
            tokens = jnp.zeros((1, self.context_length), jnp.int32)
        return image, tokens

    def __call__(
        self, image: Float[Array, "b s s 3"] | None, tokens: Int[Array, "n t"] | None
    ) -> tuple[
        Float[Array, "b d"] | None,
        Float[Array, "n d"] | None,
        Float[Array, ""] | None,
    ]:
        """(z_image, z_text, temperature), the temperature clipped at 100.

        Where a tower is missing its argument and its embedding are None, and so is the
        temperature.
        """
        z_image = None if image is None else self.encode_image(image)
        z_text = None if tokens is None else self.encode_text(tokens)[0]
        if z_image is None or z_text is None:
            return z_image, z_text, None
        temperature = jnp.exp(jnp.minimum(self.logit_scale, math.log(100.0)))
        return z_image, z_text, temperature
