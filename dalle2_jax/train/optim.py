"""The optimiser: AdamW or Muon, with warm-up, a schedule and clipped gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dalle2_jax.errors import UserError

NAMES = ("adamw", "muon")
# What is left of the learning rate after a fraction p of the steps past warm-up.
SCHEDULES = {
    "constant": lambda p: jnp.ones_like(p),
    "cosine": lambda p: 0.5 * (1 + jnp.cos(jnp.pi * p)),
    "linear": lambda p: 1 - p,
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
) -> optax.GradientTransformation:
    """AdamW as the paper trains with (Table 3 gives the values), or Muon.

    Muon (Jordan et al. 2024) makes the update of a kernel orthogonal, with the kernel
    seen as a matrix from its inputs to its outputs. Its entries are as large as Adam's
    (root mean square 1, times the learning rate), so that one learning rate serves
    both. AdamW is left what is not a kernel, and a U-Net's first and last convolution.

    Args:
        steps: length of the run, over which the schedule falls.
        name: "adamw" or "muon".
        learning_rate: the highest, reached after warm-up.
        schedule: "constant", "cosine" or "linear" (both to 0).
        warmup: steps over which the learning rate grows linearly.
        b1, b2, eps: Adam's.
        weight_decay: of kernels and, with AdamW, embeddings; not of biases and scales.
        clip_norm: largest norm of the gradient; 0 for no limit.

    Raises:
        UserError: an unknown name or schedule, or a value that is out of range.
    """
    if name not in NAMES:
        raise UserError(f"optim.name is {name!r}: it must be one of {', '.join(NAMES)}")
    for option, value in {
        "learning_rate": learning_rate,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip_norm": clip_norm,
    }.items():
        if value < 0:
            raise UserError(f"optim.{option} is {value}: it must not be negative")
    lr = rate(steps, learning_rate=learning_rate, schedule=schedule, warmup=warmup)
    if name == "adamw":
        optimizer = optax.adamw(
            lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed
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
    return optax.chain(clip, optimizer)


def rate(
    steps: int, *, learning_rate: float, schedule: str, warmup: int
) -> optax.Schedule:
    """The learning rate of each step, a function of the steps done before it."""
    if schedule not in SCHEDULES:
        raise UserError(
            f"optim.schedule is {schedule!r}: it must be one of {', '.join(SCHEDULES)}"
        )

    def at(count):
        ramp = jnp.minimum(1.0, (count + 1) / max(warmup, 1))
        progress = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return learning_rate * ramp * SCHEDULES[schedule](progress)

    return at


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
