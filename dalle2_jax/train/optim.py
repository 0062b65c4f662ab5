"""The optimiser: AdamW, Muon or Adafactor, with warm-up, a schedule and clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32

from dalle2_jax import rules

NAMES = ("adamw", "muon", "adafactor")
# What is left of the learning rate after a fraction p of the steps past warm-up.
SCHEDULES = {
    "constant": lambda p: jnp.ones_like(p),
    "cosine": lambda p: 0.5 * (1 + jnp.cos(jnp.pi * p)),
    "linear": lambda p: 1 - p,
}
RULES = {
    "name": rules.one_of(*NAMES),
    "schedule": rules.one_of(*SCHEDULES),
    "warmup": rules.INTERVAL,
    "b1": rules.number(0, 1, below=True),
    "b2": rules.number(0, 1, below=True),
    **dict.fromkeys(
        ("learning_rate", "eps", "weight_decay", "clip_norm", "sam_rho"),
        rules.number(0, 1e6),
    ),
}


def make(
    steps: int,
    *,
    name: str = "adamw",
    learning_rate: float,
    schedule: str = "constant",
    warmup: int = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    sam_rho: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW as the paper trains with (Table 3 gives the values), Muon or Adafactor.

    Muon (Jordan et al. 2024) makes the update of a kernel orthogonal, with the kernel
    seen as a matrix from its inputs to its outputs. Its entries are as large as Adam's
    (root mean square 1, times the learning rate), so that one learning rate serves
    both. AdamW is left what is not a kernel, and a U-Net's first and last convolution.

    Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) keeps of the squared gradients of
    a large array the means over its two longest axes and no first moment: next to
    nothing beside the params. Its updates, too, have a root mean square of at most the
    learning rate; section 6's clipping at 1 and section 7.2's decay are as published.

    Args:
        steps: length of the run, over which the schedule falls.
        name: "adamw", "muon" or "adafactor".
        learning_rate: the highest, reached after warm-up.
        schedule: "constant", "cosine" or "linear" (both to 0).
        warmup: steps over which the learning rate grows linearly.
        b1, b2, eps: Adam's; Adafactor has none of them.
        weight_decay: of kernels and, but with Muon, embeddings; not of biases and
            scales.
        clip_norm: largest norm of the gradient; 0 for no limit.
        sam_rho: the radius of `sam`, 0.1 for the paper's CLIP; 0 for none.

    Raises:
        UserError: an unknown name or schedule, or a value that is out of range.
    """
    given = {
        "name": name,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup": warmup,
        "b1": b1,
        "b2": b2,
        "eps": eps,
        "weight_decay": weight_decay,
        "clip_norm": clip_norm,
        "sam_rho": sam_rho,
    }
    rules.check(given, RULES, "config.optim")
    lr = rate(steps, learning_rate=learning_rate, schedule=schedule, warmup=warmup)
    if name == "adamw":
        optimizer = optax.adamw(
            lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed
        )
    elif name == "adafactor":
        # optax.adafactor would decay by weight_decay alone, whatever the learning rate.
        optimizer = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(weight_decay, mask=decayed),
            optax.scale_by_learning_rate(lr),
        )
    else:
        optimizer = optax.contrib.muon(
            lr,
            eps=eps,
            weight_decay=weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=1.0,
        )
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    optimizer = optax.with_extra_args_support(optax.chain(clip, optimizer))
    return sam(optimizer, sam_rho) if sam_rho else optimizer


def sam(
    optimizer: optax.GradientTransformationExtraArgs, rho: float
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware minimisation (Foret et al. 2021, arXiv 2010.01412, algorithm 1).

    The optimiser gets the gradient of where the loss is about highest within a distance
    of rho, so that it finds minima with flat surroundings. A step takes twice the time.

    Its update needs `gradient`, params -> the gradient there, of the same batch.
    """

    def update(grads, state, params, *, gradient, **extra):
        ascent = rho / (optax.tree.norm(grads) + 1e-12)  # equation 2, with p = 2
        highest = jax.tree.map(lambda p, g: p + ascent * g, params, grads)
        return optimizer.update(gradient(highest), state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def rate(
    steps: int, *, learning_rate: float, schedule: str, warmup: int
) -> optax.Schedule:
    """The learning rate of each step, a function of the steps done before it."""

    def at(count):
        ramp = jnp.minimum(1.0, (count + 1) / max(warmup, 1))
        progress = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return learning_rate * ramp * SCHEDULES[schedule](progress)

    return at


def round_at_random(x: Float32[Array, "*n"], key: Array) -> BFloat16[Array, "*n"]:
    """The bfloat16 above or below, the nearer the likelier: x on average.

    To the nearest, the small updates of fine-tuning would all be lost.
    """
    # A bfloat16 is the upper half of a float32.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (bits >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def decayed(params: Any) -> Any:
    """Tree of booleans: which params decay, those with two axes or more."""
    return jax.tree.map(lambda x: x.ndim >= 2, params)


def matrices(params: Any) -> Any:
    """Which axes of a kernel are its inputs and its outputs; None for other params."""

    def axes(path, x):
        *layers, name = (str(getattr(key, "key", key)) for key in path)
        if name != "kernel" or layers and layers[-1] in ("conv_in", "conv_out"):
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)
