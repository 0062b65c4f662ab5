"""The autoregressive prior: from a caption to codes of an image embedding."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Key
from ml_collections import ConfigDict

from dalle2_jax import checkpoint, rules
from dalle2_jax.errors import UserError
from dalle2_jax.nn import ar_prior as nn
from dalle2_jax.nn import build, codes
from dalle2_jax.nn.ar_prior import ARPrior
from dalle2_jax.nn.clip import Caption, cosine
from dalle2_jax.parts import part
from dalle2_jax.parts.component import PRIOR, Component, Inputs, fold, make_component
from dalle2_jax.parts.finetune import start_params
from dalle2_jax.parts.part import Part, Sampler
from dalle2_jax.parts.prior import choose_best, repeat_candidates
from dalle2_jax.parts.stage import (
    TRANSFORMER,
    Base,
    Batch,
    Load,
    Stage,
    add_part,
    check_statistics,
    check_width,
    dtype_of,
    encode_caption,
    load_base,
    make_batches,
    see,
    upon_clip,
)
from dalle2_jax.runtime import jit

static = partial(flax.struct.field, pytree_node=False)


def arguments(config: ConfigDict, clip: Mapping[str, Any] | None) -> dict[str, Any]:
    """ARPrior's arguments: ``config.net`` with the numbers of CLIP's net."""
    return upon_clip(config.net.to_dict(), clip)


# Sampling


@flax.struct.dataclass
class Sampling:
    """The settings of each picture of a batch, as data, [b].

    Attributes:
      guidance: scale of classifier-free guidance.
      temperature: by which the logits are divided; at 0 the likeliest code is taken.
      guided: whether any scale is not 1.
      candidates: embeddings for each picture, of which the one that fits best is kept.
    """

    guidance: Any
    temperature: Any
    guided: bool = static()
    candidates: int = static()


def make_sampling(component: Component, given: Sequence[Mapping[str, Any]]) -> Sampling:
    """The settings of each picture as data; UserError if candidates differ."""
    counts = {each["candidates"] for each in given}
    if len(counts) > 1:
        raise UserError(
            f"candidates is {sorted(counts)} in one batch: it must be the same"
        )
    return Sampling(
        guidance=np.float32([each["guidance"] for each in given]),
        temperature=np.float32([each["temperature"] for each in given]),
        guided=any(each["guidance"] != 1 for each in given),
        candidates=counts.pop(),
    )


def count_steps(prior: Component, sampling: Sampling) -> int:
    """How many codes there are, less the last, which leads to no other."""
    return prior.network.components - 1


class Prepared(NamedTuple):
    """What the loop needs for each code, of all candidates.

    Attributes:
      caption: of each; with guidance each pair with and without caption.
      keys: of the draws.
      z_text: of the captions.
      codes: what the codes mean.
    """

    caption: Caption
    keys: Key[Array, " n"]
    z_text: Float[Array, "n d"]
    codes: codes.Codes


@jit
def begin(
    prior: Component, sampling: Sampling, inputs: Inputs
) -> tuple[Prepared, nn.State]:
    """Reads the captions of each picture's candidates; see part.Sampler."""
    caption, null, keys = repeat_candidates(
        inputs.caption, inputs.null, inputs.randomness, sampling.candidates
    )
    keys, z_text = fold(keys, PRIOR), caption.z_text
    if sampling.guided:
        caption = nn.pair(caption, null)
    state = nn.begin(prior.network, prior.params, caption, keys)
    return Prepared(caption, keys, z_text, inputs.codes), state


@jit
def advance(
    prior: Component,
    sampling: Sampling,
    prepared: Prepared,
    state: nn.State,
    start: Any,
    stop: Any,
) -> nn.State:
    """Draws codes; see part.Sampler."""
    draw, mask = _draw(sampling, prepared), prepared.caption.mask

    def step(i: Array, state: nn.State) -> nn.State:
        return nn.step(prior.network, prior.params, mask, state, i, draw)

    return jax.lax.fori_loop(start, stop, step, state)


@jit
def finish(
    prior: Component, sampling: Sampling, prepared: Prepared, state: nn.State
) -> Float[Array, "b d"]:
    """z_image of each picture: its best candidate; see part.Sampler."""
    last = prior.network.components - 1
    drawn = nn.draw_code(state, last, _draw(sampling, prepared))
    z = codes.decode(prepared.codes, drawn, prior.network.buckets)
    return choose_best(z, prepared.z_text, sampling.candidates)


def _draw(sampling: Sampling, prepared: Prepared) -> nn.Draw:
    """How the codes of all candidates are drawn."""
    guidance, temperature = (
        jnp.repeat(jnp.asarray(x), sampling.candidates)
        for x in (sampling.guidance, sampling.temperature)
    )
    return nn.Draw(prepared.keys, temperature, guidance if sampling.guided else None)


# Training


def make_stage(config: ConfigDict, load: Load) -> Stage:
    """The stage that ``configs/ar_prior.py`` describes."""
    base = load_base(config, load)
    clip = base.clip
    net = arguments(config, base.model.config["parts"]["clip"]["net"])
    model = build.build(ARPrior, net, None, "config.net", dtype_of(config))
    section = {"net": net, "sampling": config.sampling.to_dict()}
    batches = make_batches(
        config,
        {"clip_image": clip.image_size},
        base.text,
        clip.context_length,
        clip_params=base.clip_params,
    )
    if base.origin is not None:
        table, edges = stored_tables(base.origin, config.init_from, model)
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
        z = part.sample(
            SAMPLER,
            make_component(model, section, params),
            [section["sampling"]] * len(z_image),
            Inputs(
                caption=caption,
                null=empty,
                randomness=jax.random.split(key, len(z_image)),
                codes=frozen["codes"],
            ),
        )
        return {"cosine_to_true": centred_cosine(frozen, z, z_image).mean()}

    def export(params: Any) -> dict[str, Any]:
        statistics = {"ar_prior": {**table._asdict(), "dot_products": edges}}
        return add_part(base.model, "ar_prior", section, params, base.text, statistics)

    return Stage(
        name="ar_prior",
        frozen=frozen,
        init=init,
        loss=loss,
        metrics=metrics,
        preview=preview,
        batches=batches,
        export=export,
        start=start_params(config, base.origin, "ar_prior", ARPrior, net, init),
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
    model: checkpoint.Export, where: str, network: ARPrior
) -> tuple[codes.Codes, Float[np.ndarray, " q"]]:
    """What `fit_tables` gave when a model's prior was trained."""
    if "ar_prior" not in model.statistics:
        raise UserError(
            f"init_from={where} has no statistics of an ar_prior, without which its "
            "codes can't be read: export the model again, or train one from nothing "
            "with --config.init_from="
        )
    check_statistics(model.statistics, zero_statistics(network), f"init_from={where}")
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


def read_statistics(
    statistics: Mapping[str, Any], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """What the codes mean."""
    stored = statistics["ar_prior"]
    return {"codes": codes.Codes(*(stored[name] for name in codes.Codes._fields))}


def zero_statistics(network: ARPrior) -> dict[str, Any]:
    """Statistics of the codes, all zero."""

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    d, k = network.clip_dim, network.components
    table = codes.Codes(zeros(d), zeros(d, k), zeros(k), zeros(k))
    edges = zeros(network.dot_products - 1)
    return {"ar_prior": {**table._asdict(), "dot_products": edges}}


SAMPLING = {
    "candidates": rules.whole(1, 1000),
    "guidance": rules.number(-1000, 1000),
    "temperature": rules.number(0, 1000),
}
RULES = {
    "net": {
        **TRANSFORMER,
        "components": rules.COUNT,
        "buckets": rules.whole(2, 1_000_000),
        "dot_products": rules.COUNT,
    },
    "drop_caption": rules.CHANCE,
    "statistics_examples": rules.whole(1, 100_000_000),
}
SAMPLER = Sampler(
    SAMPLING, ("guidance",), make_sampling, count_steps, begin, advance, finish
)
PART = Part(
    "ar_prior",
    ARPrior,
    arguments,
    make_stage,
    most_left=0.3,
    rules=RULES,
    check=lambda config: check_width(config.net.to_dict(), "config.net"),
    makes="embedding",
    sampler=SAMPLER,
    read_statistics=read_statistics,
    zero_statistics=zero_statistics,
)
