"""What the devices do with their time: a step's operations, and JAX's profile."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from dalle2_jax.errors import UserError

# Products of bfloat16 matrices, in operations a second of one of JAX's devices, as
# their makers publish them (dense). The names begin as `device_kind` does.
PEAKS = {
    "TPU v3": 61.5e12,  # a core, half of a chip
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak(kind: str) -> float | None:
    """Operations a second of a device of that kind; None if it isn't known."""
    names = [name for name in PEAKS if re.match(rf"{name}\b", kind)]
    return PEAKS[max(names, key=len)] if names else None


def least_seconds(
    update: Callable[..., Any], state: Any, frozen: Any, batch: Any
) -> float | None:
    """How long a step would take if all devices multiplied at their peak throughout.

    Steps per second times this is the model FLOPs utilisation (Chowdhery et al. 2022,
    arXiv 2204.02311, appendix B), where what is computed twice to save memory counts
    twice.

    Args:
        update: the jitted training step; it is traced, not compiled.
        state, frozen, batch: its arguments.

    Returns:
        Seconds; None where the peak of the devices isn't known, as for CPUs.
    """
    speed = peak(jax.devices()[0].device_kind)
    if speed is None:
        return None
    traced = update.trace(state, frozen, batch, np.int32(0))
    return count_flops(traced.jaxpr) / (speed * jax.device_count())


def count_flops(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """Operations of the products and convolutions of a program, on all its devices.

    A multiplication and an addition are two. The body of a `scan` counts as often as it
    runs, that of a `shard_map` for each device, of a `cond` the longest branch, and the
    body of a `while` once. What is recomputed in a backward pass counts again, also by
    cuDNN's attention.
    """
    total = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            size = math.prod(shape[i] for i in contracted)
            total += 2 * size * equation.outvars[0].aval.size
        elif name == "conv_general_dilated":
            numbers = params["dimension_numbers"]
            kernel = equation.invars[1].aval.shape
            # For each output a kernel's worth of products, less those with the zeros
            # between the pixels of a dilated input.
            size = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            size /= math.prod(params["lhs_dilation"])
            total += round(2 * size * equation.outvars[0].aval.size)
        elif name.startswith("dot_product_attention_"):  # cuDNN's
            q, k = (x.aval.shape for x in equation.invars[:2])  # [b, positions, h, d]
            # q kᵀ and its product with v; back, q kᵀ again and four gradients.
            products = 5 if "bwd" in name else 2
            total += products * 2 * math.prod(q) * k[1]
        elif name == "cond":
            total += max(map(count_flops, params["branches"]))
        else:
            times = 1
            if name == "scan":
                times = params["length"]
            elif name == "shard_map":
                times = params["mesh"].size
            total += times * sum(map(count_flops, _programs(params)))
    return total


def _programs(params: dict[str, Any]) -> list[Jaxpr | ClosedJaxpr]:
    """The programs inside an equation."""
    return [x for x in params.values() if isinstance(x, Jaxpr | ClosedJaxpr)]


def span(steps: str, start: int) -> range:
    """The steps to profile: those of "A:B", or "N" from the third after the start on.

    Raises:
        UserError: it is neither, or empty.
    """
    if not steps:
        return range(0)
    found = re.fullmatch(r"(?:(\d+):)?(\d+)", steps)
    if not found:
        raise UserError(f"profile={steps!r}: write steps as A:B, or their number")
    first = start + 3 if found[1] is None else int(found[1])
    end = first + int(found[2]) if found[1] is None else int(found[2])
    if first >= end:
        raise UserError(f"profile={steps!r} has no steps: write A:B with A below B")
    return range(first, end)


@contextlib.contextmanager
def profiling(workdir: Path, steps: str, start: int) -> Iterator[Callable[..., None]]:
    """Yields what is called with each step before it; writes WORKDIR/profile.

    Its other argument is what the step before gave, which is waited for at the end.
    """
    chosen = span(steps, start)
    running = False

    def at(step: int, before: Any) -> None:
        nonlocal running
        if running and step not in chosen:
            jax.block_until_ready(before)
            jax.profiler.stop_trace()
            running = False
        elif step in chosen and not running:
            jax.profiler.start_trace(workdir / "profile")
            running = True

    try:
        yield at
    finally:
        if running:
            jax.profiler.stop_trace()
