"""The CLIP stage: pictures and captions into one space, by contrast."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt8
from ml_collections import ConfigDict

from dalle2_jax import checkpoint, rules
from dalle2_jax.data import image, sources, tokenizer
from dalle2_jax.errors import UserError
from dalle2_jax.nn import build
from dalle2_jax.nn.clip import CLIP
from dalle2_jax.parts.finetune import start_params
from dalle2_jax.parts.part import Part
from dalle2_jax.parts.stage import (
    TRANSFORMER,
    Batch,
    Load,
    Stage,
    add_part,
    check_width,
    dtype_of,
    load_models,
    make_batches,
    open_source,
)

SHOWN = 16  # pictures, whose similarities are previewed


def arguments(config: ConfigDict, clip: Mapping[str, Any] | None) -> dict[str, Any]:
    """CLIP's arguments: ``config.net`` with the numbers of its tokenizer.

    Those are in ``clip``, or if that is None of a vocabulary as large as it may be.
    """
    size = config.tokenizer.vocab_size
    numbers = clip or {"vocab_size": size, "eot": size - 1}
    return {**config.net.to_dict()} | {k: numbers[k] for k in ("vocab_size", "eot")}


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


def chunked_contrastive_loss(
    z_image: Float[Array, "b d"],
    z_text: Float[Array, "b d"],
    temperature: Float[Array, ""],
    tokens: Int[Array, "b l"],
    chunk: int,
) -> tuple[Float[Array, " b"], Bool[Array, " b"], Bool[Array, " b"]]:
    """The same loss without the [b, b] logits in memory, here or in its gradient.

    Each device has its own rows' embeddings and gathers the others', and nothing else.
    It goes through its rows in chunks, whose logits it makes again for the gradient:
    [chunk, b] of them are in memory at a time.

    Args:
      chunk: rows; must divide those of each device.

    Returns:
      The loss of each example, and whether the caption nearest to its picture is its
      own, and the picture nearest to its caption.

    Raises:
      UserError: the rows don't divide by chunk.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Over any other axis the rows are replicated.
    axes = tuple(name for name in mesh.axis_names if name in ("data", "fsdp"))
    rows = len(tokens) // math.prod(mesh.shape[name] for name in axes)
    if rows % chunk:
        raise UserError(
            f"loss_chunk={chunk} must divide the {rows} rows that each device has of "
            f"a batch of {len(tokens)}"
        )

    def losses(z_image, z_text, temperature, tokens):
        mine = tuple(
            z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (z_image, z_text)
        )
        *all_z, all_tokens = (_gather(x, axes) for x in (*mine, tokens))
        first = jax.lax.axis_index(axes) * rows if axes else 0

        @jax.checkpoint
        def compare(z, tokens, rows, others):
            """Of rows and all columns: the loss, and whether its own is nearest."""
            logits = temperature * z @ others.T
            same = jnp.all(tokens[:, None] == all_tokens, axis=-1)
            own = rows[:, None] == jnp.arange(len(others))
            masked = jnp.where(same & ~own, -jnp.inf, logits)
            log_p = jax.nn.log_softmax(masked, axis=1)
            at = jnp.arange(len(z))
            return -log_p[at, rows], same[at, logits.argmax(1)]

        def step(_, chunk):
            z_image, z_text, tokens, rows = chunk
            to_text, found_text = compare(z_image, tokens, rows, all_z[1])
            to_image, found_image = compare(z_text, tokens, rows, all_z[0])
            return None, ((to_text + to_image) / 2, found_text, found_image)

        chunks = jax.tree.map(
            lambda x: x.reshape(-1, chunk, *x.shape[1:]),
            (*mine, tokens, first + jnp.arange(rows)),
        )
        _, outputs = jax.lax.scan(step, None, chunks)
        return jax.tree.map(lambda x: x.reshape(-1), outputs)

    if axes:
        split, everywhere = P(axes), P()
        losses = jax.shard_map(
            losses,
            in_specs=(split, split, everywhere, split),
            out_specs=split,
        )
    return losses(z_image, z_text, temperature, tokens)


def _gather(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.all_gather(x, axes, tiled=True) if axes else x


def _same_caption(tokens: Int[Array, "b l"]) -> Array:
    return jnp.all(tokens[:, None] == tokens[None], axis=-1)


def _rows(tree: Any) -> Any:
    """All rows of [accumulate, b, ...], ordered so that none leaves its device."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def similarity_picture(logits: Float[Array, "b b"]) -> UInt8[Array, "1 s s 3"]:
    """The similarities in gray, a square each; the diagonal is right."""
    low, high = logits.min(), logits.max()
    gray = ((logits - low) / (high - low + 1e-6) * 255).astype(jnp.uint8)
    gray = jnp.repeat(jnp.repeat(gray, 12, axis=0), 12, axis=1)
    return jnp.repeat(gray[None, :, :, None], 3, axis=-1)


def make_stage(config: ConfigDict, load: Load) -> Stage:
    """The stage that ``configs/clip.py`` describes."""
    base, origin = load_models(config, load)
    text = make_tokenizer(config, origin)
    net = arguments(config, {"vocab_size": text.vocab_size, "eot": text.eot})
    model = build.build(CLIP, net, None, "config.net", dtype_of(config))

    def init(key: Array) -> Any:
        return model.init(key, *model.example())["params"]

    def embed(params: Any, batch: Batch) -> tuple[Array, Array, Array]:
        pictures = image.clip_normalize(image.to_float(batch["clip_image"]))
        return model.apply({"params": params}, pictures, batch["tokens"])

    def compare(z_image: Array, z_text: Array, temperature: Array, tokens: Array):
        """The losses, and whether picture and caption find each other."""
        if config.loss_chunk:
            arguments = z_image, z_text, temperature, tokens, config.loss_chunk
            return chunked_contrastive_loss(*arguments)
        losses, logits = contrastive_loss(z_image, z_text, temperature, tokens)
        same = _same_caption(tokens)
        rows = jnp.arange(len(same))
        return losses, same[rows, logits.argmax(1)], same[logits.argmax(0), rows]

    def loss(params: Any, frozen: Any, batch: Batch, key: Array):
        """Over all micro-batches, each embedded alone and once more for its gradient.

        So that many negatives need no more memory (Gao et al. 2021, arXiv 2101.06983).
        """
        if len(batch["tokens"]) == 1:
            z_image, z_text, temperature = embed(params, _rows(batch))
        else:
            one = jax.checkpoint(lambda micro: embed(params, micro))
            z_image, z_text, temperature = jax.lax.map(one, batch)
            z_image, z_text, temperature = *_rows((z_image, z_text)), temperature[0]
        losses, *_ = compare(z_image, z_text, temperature, _rows(batch["tokens"]))
        temperature = jnp.exp(params["logit_scale"])
        return losses.mean(), {"temperature": jnp.minimum(temperature, 100.0)}

    def metrics(params: Any, frozen: Any, batch: Batch, key: Array):
        losses, text, picture = compare(*embed(params, batch), batch["tokens"])
        return {
            "loss": losses,
            "picture_to_caption": 1.0 * text,
            "caption_to_picture": 1.0 * picture,
        }

    def preview(params: Any, frozen: Any, batch: Batch, key: Array):
        few = {name: x[:SHOWN] for name, x in batch.items()}
        _, logits = contrastive_loss(*embed(params, few), few["tokens"])
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
        start=start_params(config, origin, "clip", CLIP, net, init),
        compares=True,
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
    captions = list(sources.captions(open_source(config, "train"), options.captions))
    if len(captions) > 1 and len(set(captions)) == 1:
        raise UserError(
            f"the first {len(captions)} captions are all {captions[0]!r}: CLIP learns "
            "by telling captions apart"
        )
    return tokenizer.train(captions, options.vocab_size, config.net.context_length)


def check(config: ConfigDict) -> None:
    """Checks what CLIP's config must agree on."""
    if config.batch_size == 1:
        raise UserError(
            "batch_size=1: CLIP learns by telling the examples of a batch apart, and "
            "the loss of one alone is always 0: give at least 2, better hundreds"
        )
    net = config.net.to_dict()
    reduced = 2 ** len(net["vision_stem"])
    size, patch = net["image_size"], net["patch_size"]
    if size % patch or patch % reduced:
        raise UserError(
            f"config.net.patch_size is {patch}: must divide image_size={size}, and be "
            f"a multiple of {reduced}, by which vision_stem reduces the picture"
        )
    for tower in ("vision_", "text_"):
        check_width(net, "config.net", tower)


RULES = {
    "loss_chunk": rules.whole(0, 2**31 - 1),
    "tokenizer": {
        "path": rules.TEXT,
        "vocab_size": rules.whole(tokenizer.SMALLEST, 1_000_000),
        "captions": rules.whole(1, 1_000_000_000),
    },
    "net": {
        "embed_dim": rules.COUNT,
        "image_size": rules.SIDE,
        "patch_size": rules.SIDE,
        "context_length": rules.whole(3, 100_000),  # start, end, and a word in between
        "activation": TRANSFORMER["activation"],
        "remat": rules.FLAG,
        **{
            f"{tower}_{key}": rules.COUNT
            for tower in ("vision", "text")
            for key in ("width", "layers", "heads")
        },
    },
}
PART = Part("clip", CLIP, arguments, make_stage, 0.2, RULES, check=check)
