"""The autoregressive prior's stage: from a caption to codes of an image embedding."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from dalle2_jax import checkpoint
from dalle2_jax.errors import UserError
from dalle2_jax.nn import codes
from dalle2_jax.nn.ar_prior import ARPrior, sample
from dalle2_jax.nn.clip import Caption, cosine
from dalle2_jax.stages.finetune import start_params
from dalle2_jax.stages.stage import (
    Base,
    Batch,
    Load,
    Stage,
    add_part,
    dtype_of,
    encode_caption,
    load_base,
    make_batches,
    see,
    upon_clip,
)


def network(config: ConfigDict, clip: Mapping[str, Any]) -> dict[str, Any]:
    """ARPrior's arguments: ``config.net`` with the numbers of CLIP's net."""
    return upon_clip(config.net.to_dict(), clip)


def make(config: ConfigDict, load: Load = checkpoint.load) -> Stage:
    """The stage that ``configs/ar_prior.py`` describes."""
    base = load_base(config, load)
    clip = base.clip
    net = network(config, base.model.config["parts"]["clip"]["net"])
    model = ARPrior(**net, dtype=dtype_of(config))
    sampling = config.sampling.to_dict()
    batches = make_batches(
        config,
        {"clip_image": clip.image_size},
        base.text,
        clip.context_length,
        clip_params=base.clip_params,
    )
    if base.origin is not None:
        table, edges = stored_tables(base.origin, config.init_from)
    else:
        table, edges = fit_tables(
            base,
            batches("train", 0, whole=True),
            config.statistics_examples,
            model.components,
            model.dot_products,
        )
    frozen = {"clip": base.clip_params, "codes": table, "dot_products": edges}

    def read(frozen: Any, batch: Batch) -> tuple[Array, Caption, Caption]:
        """z_image, the captions, and the empty one as often."""
        caption = encode_caption(clip, frozen["clip"], batch["tokens"])
        empty = encode_caption(clip, frozen["clip"], base.empty[None])
        empty = jax.tree.map(lambda e, c: jnp.broadcast_to(e, c.shape), empty, caption)
        return see(clip, frozen["clip"], batch), caption, empty

    def logits(
        params: Any, frozen: Any, z_image: Array, caption: Caption, shown: Caption
    ) -> tuple[Array, Array]:
        """Of all codes, and the true ones. ``shown`` is the caption or the empty one.

        The dot product is with the caption even where that isn't shown.
        """
        true = codes.encode(frozen["codes"], z_image, model.buckets)
        fit = codes.quantile(frozen["dot_products"], cosine(z_image, caption.z_text))
        conditions = shown.z_text, shown.states, shown.mask
        return model.apply({"params": params}, true, fit, *conditions), true

    def init(key: Array) -> Any:
        return model.init(key, *model.example())["params"]

    def loss(params: Any, frozen: Any, batch: Batch, key: Array):
        z_image, caption, empty = read(frozen, batch)
        drop = jax.random.bernoulli(key, config.drop_caption, z_image.shape[:1])
        shown = drop_caption(caption, empty, drop)
        found, true = logits(params, frozen, z_image, caption, shown)
        return cross_entropy(found, true).mean(), {}

    def metrics(params: Any, frozen: Any, batch: Batch, key: Array):
        z_image, caption, _ = read(frozen, batch)
        found, true = logits(params, frozen, z_image, caption, caption)
        likeliest = codes.decode(frozen["codes"], found.argmax(-1), model.buckets)
        return {
            "loss": cross_entropy(found, true),
            # Of the likeliest codes, each given the true ones before it.
            "cosine": centred_cosine(frozen, likeliest, z_image),
        }

    def preview(params: Any, frozen: Any, batch: Batch, key: Array):
        z_image, caption, empty = read(frozen, batch)
        drawn = sample(
            model,
            params,
            caption,
            empty,
            jax.random.split(key, len(z_image)),
            guidance=sampling["guidance"],
            temperature=sampling["temperature"],
        )
        z = codes.decode(frozen["codes"], drawn, model.buckets)
        return {"cosine_to_true": centred_cosine(frozen, z, z_image).mean()}

    def export(params: Any) -> dict[str, Any]:
        part = {"net": net, "sampling": sampling}
        statistics = {"ar_prior": {**table._asdict(), "dot_products": edges}}
        return add_part(base.model, "ar_prior", part, params, base.text, statistics)

    return Stage(
        name="ar_prior",
        frozen=frozen,
        init=init,
        loss=loss,
        metrics=metrics,
        preview=preview,
        batches=batches,
        export=export,
        start=start_params(config, base.origin, "ar_prior", net, init),
    )


def cross_entropy(
    logits: Float[Array, "b k buckets"], true: Array
) -> Float[Array, " b"]:
    """In nats a code."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, true).mean(-1)


def centred_cosine(frozen: Any, z: Array, z_image: Array) -> Float[Array, " b"]:
    """Cosine less the mean embedding, which all have in common."""
    mean = frozen["codes"].mean
    return cosine(z - mean, z_image - mean)


def drop_caption(caption: Caption, empty: Caption, drop: Bool[Array, " b"]) -> Caption:
    """The empty caption in place of those that ``drop`` picks."""
    return jax.tree.map(
        lambda c, e: jnp.where(drop.reshape(-1, *[1] * (c.ndim - 1)), e, c),
        caption,
        empty,
    )


def stored_tables(
    model: checkpoint.Export, where: str
) -> tuple[codes.Codes, Float[np.ndarray, " q"]]:
    """What `fit_tables` gave when a model's prior was trained."""
    if "ar_prior" not in model.statistics:
        raise UserError(
            f"init_from={where} has no statistics of an ar_prior, without which its "
            "codes can't be read: export the model again, or train one from nothing "
            "with --config.init_from="
        )
    stored = dict(model.statistics["ar_prior"])
    edges = stored.pop("dot_products")
    return codes.Codes(**stored), edges


def fit_tables(
    base: Base, batches: Any, examples: int, components: int, dot_products: int
) -> tuple[codes.Codes, Float[np.ndarray, " q"]]:
    """The codes of the first examples, and quantiles of how well captions fit them."""

    @jax.jit
    def encode(params: Any, batch: Batch) -> tuple[Array, Array]:
        z = see(base.clip, params, batch)
        z_text = encode_caption(base.clip, params, batch["tokens"]).z_text
        return z, cosine(z, z_text)

    seen: list[tuple[np.ndarray, np.ndarray]] = []
    while sum(len(z) for z, _ in seen) < examples:
        seen.append(jax.device_get(encode(base.clip_params, next(batches))))
    z, fit = (np.concatenate(x) for x in zip(*seen, strict=True))
    return codes.fit(z, components), codes.fit_quantiles(fit, dot_products)
