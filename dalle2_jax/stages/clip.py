"""The CLIP stage: pictures and captions into one space, by contrast."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from dalle2_jax import checkpoint
from dalle2_jax.data import image, sources, tokenizer
from dalle2_jax.errors import UserError
from dalle2_jax.nn.clip import CLIP
from dalle2_jax.stages.finetune import start_params
from dalle2_jax.stages.stage import (
    Batch,
    Load,
    Stage,
    add_part,
    dtype_of,
    load_models,
    make_batches,
    open_source,
)


def network(config: ConfigDict, text: tokenizer.Tokenizer) -> dict[str, Any]:
    """CLIP's constructor arguments: ``config.net`` with the tokenizer's numbers."""
    return {**config.net, "vocab_size": text.vocab_size, "eot": text.eot}


def contrastive_loss(
    z_image: Float[Array, "b d"],
    z_text: Float[Array, "b d"],
    temperature: Float[Array, ""],
    tokens: Int[Array, "b l"],
) -> tuple[Float[Array, " b"], Float[Array, "b b"]]:
    """Symmetric InfoNCE (figure 3 of arXiv 2103.00020) over the whole batch.

    Two examples with the same caption are no negatives of each other.

    Returns:
      The loss of each example, and the logits (rows: pictures, columns: captions).
    """
    z_image = z_image / jnp.linalg.norm(z_image, axis=-1, keepdims=True)
    z_text = z_text / jnp.linalg.norm(z_text, axis=-1, keepdims=True)
    logits = temperature * z_image @ z_text.T
    twins = _same_caption(tokens) & ~jnp.eye(len(tokens), dtype=bool)
    masked = jnp.where(twins, -jnp.inf, logits)
    to_text = -jnp.diagonal(jax.nn.log_softmax(masked, axis=1))
    to_image = -jnp.diagonal(jax.nn.log_softmax(masked, axis=0))
    return (to_text + to_image) / 2, logits


def _same_caption(tokens: Int[Array, "b l"]) -> Array:
    return jnp.all(tokens[:, None] == tokens[None], axis=-1)


def similarity_picture(logits: Float[Array, "b b"]) -> UInt8[Array, "1 s s 3"]:
    """The first 16 × 16 similarities in gray, a square each; the diagonal is right."""
    shown = logits[:16, :16]
    low, high = shown.min(), shown.max()
    gray = ((shown - low) / (high - low + 1e-6) * 255).astype(jnp.uint8)
    gray = jnp.repeat(jnp.repeat(gray, 12, axis=0), 12, axis=1)
    return jnp.repeat(gray[None, :, :, None], 3, axis=-1)


def make(config: ConfigDict, load: Load = checkpoint.load) -> Stage:
    """The stage that ``configs/clip.py`` describes."""
    base, origin = load_models(config, load)
    text = make_tokenizer(config, origin)
    net = network(config, text)
    model = CLIP(**net, dtype=dtype_of(config))

    def init(key: Array) -> Any:
        return model.init(key, *model.example())["params"]

    def compare(params: Any, batch: Batch) -> tuple[Array, Array]:
        pictures = image.clip_normalize(image.to_float(batch["clip_image"]))
        tokens = batch["tokens"]
        outputs = model.apply({"params": params}, pictures, tokens)
        return contrastive_loss(*outputs, tokens)

    def loss(params: Any, frozen: Any, batch: Batch, key: Array):
        losses, _ = compare(params, batch)
        temperature = jnp.exp(params["logit_scale"])
        return losses.mean(), {"temperature": jnp.minimum(temperature, 100.0)}

    def metrics(params: Any, frozen: Any, batch: Batch, key: Array):
        losses, logits = compare(params, batch)
        same = _same_caption(batch["tokens"])
        rows = jnp.arange(len(same))
        return {
            "loss": losses,
            "picture_to_caption": 1.0 * same[rows, logits.argmax(1)],
            "caption_to_picture": 1.0 * same[logits.argmax(0), rows],
        }

    def preview(params: Any, frozen: Any, batch: Batch, key: Array):
        _, logits = compare(params, batch)
        return {"similarity": similarity_picture(logits)}

    def export(params: Any) -> dict[str, Any]:
        return add_part(base, "clip", {"net": net}, params, text)

    return Stage(
        name="clip",
        frozen={},
        init=init,
        loss=loss,
        metrics=metrics,
        preview=preview,
        batches=make_batches(
            config, {"clip_image": model.image_size}, text, model.context_length
        ),
        export=export,
        start=start_params(config, origin, "clip", net, init),
    )


def make_tokenizer(
    config: ConfigDict, origin: checkpoint.Export | None
) -> tokenizer.Tokenizer:
    """A stored tokenizer, or one trained on the first captions of the data.

    Where ``config`` names none, it is that of the model that the stage starts from.
    """
    options = config.tokenizer
    if options.path:
        return tokenizer.load(options.path)
    if origin is not None:
        if origin.tokenizer_dir is None:
            raise UserError(
                f"init_from={config.init_from} has no tokenizer: give the one that its "
                "CLIP was trained with, as --config.tokenizer.path=DIR"
            )
        return tokenizer.load(origin.tokenizer_dir)
    captions = sources.captions(open_source(config, "train"), options.captions)
    return tokenizer.train(captions, options.vocab_size, config.net.context_length)
