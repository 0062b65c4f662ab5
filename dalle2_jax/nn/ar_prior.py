"""The autoregressive prior: a caption's image embedding, written code by code.

Section 2.2 of arXiv 2204.06125. `codes` says what the codes are.
"""

from collections.abc import Sequence

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


def sample(
    network: ARPrior,
    params: dict,
    caption: Caption,
    null: Caption,
    keys: Key[Array, " b"],
    *,
    guidance: float | int = 1.0,
    temperature: float | int = 1.0,
) -> Int[Array, "b k"]:
    """Draws the codes of image embeddings, one after the other, in one `lax.scan`.

    The dot product is drawn from the top half of the training set's (section 2.2).

    Args:
      caption, null: what to show, and the empty caption, for guidance.
      keys: a key for each, on which nothing but its own codes depends.
      guidance: scale of classifier-free guidance, on the logits; 1 for none.
      temperature: by which the logits are divided; at 0 the likeliest code is taken.
    """
    guided = guidance != 1

    def draw(i: int | Array, function: str, *arguments: object) -> Array:
        return jax.vmap(
            lambda key, *x: getattr(jax.random, function)(
                jax.random.fold_in(key, i), *x
            )
        )(keys, *arguments)

    def choose(i: int | Array, logits: Array) -> Array:
        if guided:
            logits = logits.reshape(-1, 2, network.buckets)
            with_caption, without = logits[:, 0], logits[:, 1]
            logits = without + guidance * (with_caption - without)
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return draw(i, "categorical", logits / temperature)

    def pair(code: Array) -> Array:
        return jnp.repeat(code, 2, axis=0) if guided else code

    def run(method: str, *arguments: object) -> tuple[Array, Sequence[Cache]]:
        return network.apply({"params": params}, *arguments, method=method)

    if guided:  # Pairs stay together on their device of a sharded batch.
        caption = jax.tree.map(
            lambda c, n: jnp.stack([c, n], axis=1).reshape(-1, *c.shape[1:]),
            caption,
            null,
        )
    half = network.dot_products // 2
    uniform = draw(network.components, "uniform")
    dot_product = half + jnp.int32(uniform * (network.dot_products - half))
    logits, caches = run(
        "start", pair(dot_product), caption.z_text, caption.states, caption.mask
    )
    first = choose(0, logits)

    def step(state: tuple, i: Array) -> tuple[tuple, Array]:
        code, caches = state
        logits, caches = run("step", pair(code), i, caption.mask, caches)
        code = choose(i, logits)
        return (code, caches), code

    _, rest = jax.lax.scan(step, (first, caches), jnp.arange(1, network.components))
    return jnp.concatenate([first[:, None], rest.T], axis=1)
