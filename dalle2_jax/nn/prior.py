"""The diffusion prior: a causal transformer from a caption to an image embedding.

Section 2.2 of arXiv 2204.06125, laid out as in Karlo.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from dalle2_jax.nn.layers import (
    Dense,
    LayerNorm,
    Transformer,
    causal_mask,
    timestep_embedding,
)


class DiffusionPrior(nn.Module):
    """Predicts the unnoised image embedding from a noised one and the caption.

    The sequence is [text states, text embedding, timestep, noised image embedding,
    learned query]; the query's output is the prediction (x0).

    Attributes:
      clip_dim: dimension d of CLIP's embeddings.
      context_length, text_width: number and width of CLIP's text states.
      width, layers, heads: the transformer.
    """

    clip_dim: int
    context_length: int
    text_width: int
    width: int
    layers: int
    heads: int
    activation: str = "gelu"
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    def example(self) -> tuple[Array, ...]:
        """Arguments of a call, for init and its shapes."""
        z = jnp.zeros((1, self.clip_dim))
        states = jnp.zeros((1, self.context_length, self.text_width))
        return z, jnp.zeros(1), z, states, jnp.ones(states.shape[:2], bool)

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "b d"],
        t: Num[Array, " b"],
        z_text: Float[Array, "b d"],
        text_states: Float[Array, "b l w"],
        mask: Bool[Array, "b l"],
    ) -> Float[Array, "b d"]:
        """Args: ``mask`` is True on the caption's tokens and False on its padding."""
        b = x_t.shape[0]

        def dense(features: int, name: str) -> nn.Dense:
            return Dense(features, dtype=self.dtype, name=name)

        time = timestep_embedding(t, self.width).astype(self.dtype)
        time = dense(self.width, "time_in")(time)
        time = dense(self.width, "time_out")(nn.silu(time))
        query = self.param("query", nn.initializers.normal(0.02), (self.width,))
        tokens = [
            dense(self.width, "text_states_in")(text_states),
            dense(self.width, "z_text_in")(z_text)[:, None],
            time[:, None],
            dense(self.width, "z_image_in")(x_t)[:, None],
            jnp.broadcast_to(query.astype(self.dtype), (b, 1, self.width)),
        ]
        x = jnp.concatenate(tokens, axis=1)
        positions = self.param(
            "position_embedding",
            nn.initializers.normal(0.01),
            (self.context_length + 4, self.width),
        )
        x = x + positions.astype(x.dtype)
        visible = jnp.pad(mask, ((0, 0), (0, 4)), constant_values=True)
        x = Transformer(
            self.layers,
            self.heads,
            self.activation,
            self.remat,
            self.dtype,
            name="transformer",
        )(x, causal_mask(x.shape[1]) & visible[:, None, None])
        x = LayerNorm(name="ln_out")(x[:, -1])
        return dense(self.clip_dim, "z_image_out")(x).astype(jnp.float32)
