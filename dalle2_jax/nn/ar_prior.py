"""The autoregressive prior: a caption's image embedding, written code by code.

Section 2.2 of arXiv 2204.06125. `codes` says what the codes are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from dalle2_jax.nn.clip import Caption
from dalle2_jax.nn.layers import Cache, Dense, LayerNorm, Transformer, causal_mask

_embedding = nn.initializers.normal(0.02)


class ARPrior(nn.Module):
    """Logits of each code of an image embedding, given the caption and those before.

    The sequence is [text states, text embedding, dot product, codes]. The dot product
    is that of the image's and the text's embedding at unit length, as the number of its
    quantile: what comes out can be asked to fit the caption better than most.

    Attributes:
      clip_dim: dimension d of CLIP's embeddings.
      context_length, text_width: number and width of CLIP's text states.
      width, layers, heads: the transformer.
      components: codes of an embedding, k.
      buckets: values of a code.
      dot_products: quantiles of the dot product.
    """

    clip_dim: int
    context_length: int
    text_width: int
    width: int
    layers: int
    heads: int
    components: int
    buckets: int
    dot_products: int
    activation: str = "gelu"
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @property
    def prefix(self) -> int:
        """Positions before the first code."""
        return self.context_length + 2

    @property
    def length(self) -> int:
        """All positions: nothing follows from the last code."""
        return self.prefix + self.components - 1

    def setup(self) -> None:
        self.text_states_in = Dense(self.width, dtype=self.dtype)
        self.z_text_in = Dense(self.width, dtype=self.dtype)
        self.dot_product_in = nn.Embed(
            self.dot_products, self.width, embedding_init=_embedding, dtype=self.dtype
        )
        self.code_in = nn.Embed(
            self.buckets, self.width, embedding_init=_embedding, dtype=self.dtype
        )
        self.position_embedding = self.param(
            "position_embedding",
            nn.initializers.normal(0.01),
            (self.length, self.width),
        )
        self.transformer = Transformer(
            self.layers, self.heads, self.activation, self.remat, self.dtype
        )
        self.ln_out = LayerNorm()
        self.logits_out = Dense(self.buckets, dtype=self.dtype)

    def example(self) -> tuple[Array, ...]:
        """Arguments of a call, for init and its shapes."""
        codes = jnp.zeros((1, self.components), jnp.int32)
        states = jnp.zeros((1, self.context_length, self.text_width))
        z_text, mask = jnp.zeros((1, self.clip_dim)), jnp.ones(states.shape[:2], bool)
        return codes, jnp.zeros(1, jnp.int32), z_text, states, mask

    def __call__(
        self,
        codes: Int[Array, "b k"],
        dot_product: Int[Array, " b"],
        z_text: Float[Array, "b d"],
        text_states: Float[Array, "b l w"],
        mask: Bool[Array, "b l"],
    ) -> Float[Array, "b k buckets"]:
        """The logits of all codes, each given those before it; float32.

        Args: ``dot_product`` counts the quantiles from the least, 0; ``mask`` is True
        on the caption's tokens and False on its padding.
        """
        before = self._before(dot_product, z_text, text_states)
        x = jnp.concatenate([before, self.code_in(codes[:, :-1])], axis=1)
        x = x + self.position_embedding.astype(x.dtype)
        x = self.transformer(x, causal_mask(self.length) & self._visible(mask))
        return self._logits(x[:, self.prefix - 1 :])

    def start(
        self,
        dot_product: Int[Array, " b"],
        z_text: Float[Array, "b d"],
        text_states: Float[Array, "b l w"],
        mask: Bool[Array, "b l"],
    ) -> tuple[Float[Array, "b buckets"], Sequence[Cache]]:
        """The first code's logits, and keys and values of all that comes before it."""
        x = self._before(dot_product, z_text, text_states)
        x = x + self.position_embedding[: self.prefix].astype(x.dtype)
        shape = len(x), self.length, self.heads, self.width // self.heads
        empty = Cache(jnp.zeros(shape, x.dtype), jnp.zeros(shape, x.dtype))
        causal = causal_mask(self.length)[:, :, : self.prefix]
        x, caches = self.transformer(
            x, causal & self._visible(mask), [empty] * self.layers, jnp.int32(0)
        )
        return self._logits(x[:, -1]), caches

    def step(
        self,
        code: Int[Array, " b"],
        i: Int[Array, ""],
        mask: Bool[Array, "b l"],
        caches: Sequence[Cache],
    ) -> tuple[Float[Array, "b buckets"], Sequence[Cache]]:
        """The logits of code i, from the code before it and what is cached."""
        position = self.prefix + i - 1
        x = self.code_in(code)[:, None]
        x = x + self.position_embedding[position].astype(x.dtype)
        past = jnp.arange(self.length) <= position
        x, caches = self.transformer(x, past & self._visible(mask), caches, position)
        return self._logits(x[:, 0]), caches

    def _before(self, dot_product: Array, z_text: Array, text_states: Array) -> Array:
        return jnp.concatenate(
            [
                self.text_states_in(text_states),
                self.z_text_in(z_text)[:, None],
                self.dot_product_in(dot_product)[:, None],
            ],
            axis=1,
        )

    def _visible(self, mask: Bool[Array, "b l"]) -> Bool[Array, "b 1 1 t"]:
        """The mask for all positions: of the others none is padding."""
        more = self.length - self.context_length
        return jnp.pad(mask, ((0, 0), (0, more)), constant_values=True)[:, None, None]

    def _logits(self, x: Array) -> Array:
        return self.logits_out(self.ln_out(x)).astype(jnp.float32)


class State(NamedTuple):
    """Between two codes.

    Attributes:
      logits: of the next code; with guidance [2b], each pair with and without caption.
      caches: keys and values of all positions before it.
      codes: those drawn so far; the others are 0.
    """

    logits: Float[Array, "n buckets"]
    caches: Sequence[Cache]
    codes: Int[Array, "b k"]


class Draw(NamedTuple):
    """How the codes of each image embedding are drawn.

    Attributes:
      keys: on each nothing but its own codes depends.
      temperature: by which the logits are divided; at 0 the likeliest code is taken.
      guidance: scale of classifier-free guidance, on the logits; None without it.
    """

    keys: Key[Array, " b"]
    temperature: Float[Array, " b"]
    guidance: Float[Array, " b"] | None


def begin(
    network: ARPrior, params: dict, caption: Caption, keys: Key[Array, " b"]
) -> State:
    """Reads captions, before the first code of their image embeddings is drawn.

    The dot product is drawn from the top half of the training set's (section 2.2).

    Args:
      caption: [b], or with guidance [2b] from `pair`.
    """
    half = network.dot_products // 2
    uniform = _draw(keys, network.components, "uniform")
    dot_product = half + jnp.int32(uniform * (network.dot_products - half))
    logits, caches = network.apply(
        {"params": params},
        jnp.repeat(dot_product, len(caption.z_text) // len(keys)),
        caption.z_text,
        caption.states,
        caption.mask,
        method="start",
    )
    return State(logits, caches, jnp.zeros((len(keys), network.components), jnp.int32))


def pair(caption: Caption, null: Caption) -> Caption:
    """[caption 0, null 0, caption 1, ...]: pairs stay on one device of a batch."""
    return jax.tree.map(
        lambda c, n: jnp.stack([c, n], axis=1).reshape(-1, *c.shape[1:]), caption, null
    )


def draw_code(state: State, i: Int[Array, ""] | int, draw: Draw) -> Int[Array, "b k"]:
    """The codes, with code i drawn by the logits of the state."""
    logits = state.logits
    if draw.guidance is not None:
        logits = logits.reshape(-1, 2, logits.shape[-1])
        with_caption, without = logits[:, 0], logits[:, 1]
        logits = without + draw.guidance[:, None] * (with_caption - without)
    warm = draw.temperature > 0
    divisor = jnp.where(warm, draw.temperature, 1)[:, None]
    drawn = _draw(draw.keys, i, "categorical", logits / divisor)
    code = jnp.where(warm, drawn, jnp.argmax(logits, axis=-1))
    return state.codes.at[:, i].set(code.astype(jnp.int32))


def step(
    network: ARPrior,
    params: dict,
    mask: Bool[Array, "n l"],
    state: State,
    i: Int[Array, ""],
    draw: Draw,
) -> State:
    """Draws code i, and makes the logits of the one that follows.

    ``mask`` is that of the captions given to `begin`.
    """
    codes = draw_code(state, i, draw)
    code = jnp.repeat(codes[:, i], len(mask) // len(codes))
    logits, caches = network.apply(
        {"params": params}, code, i + 1, mask, state.caches, method="step"
    )
    return State(logits, caches, codes)


def _draw(keys: Key[Array, " b"], i: int | Array, function: str, *rows: Array) -> Array:
    """Draws for each its own, of draw i."""
    return jax.vmap(
        lambda key, *x: getattr(jax.random, function)(jax.random.fold_in(key, i), *x)
    )(keys, *rows)
