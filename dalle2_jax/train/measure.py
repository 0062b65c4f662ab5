"""What the devices do with their time: a step's operations, and JAX's profile."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

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


def least_seconds(update: Callable[..., Any], state: Any, frozen: Any, batch: Any):
    """How long a step would take if all devices multiplied at their peak throughout.

    Steps per second times this is the model FLOPs utilisation (Chowdhery et al. 2022,
    arXiv 2204.02311, appendix B), where what is computed twice to save memory counts
    twice, and what a network has in a loop counts once.

    Args:
        update: the jitted training step; it is lowered, not compiled.
        state, frozen, batch: its arguments, the batch [accumulate, b, ...].

    Returns:
        Seconds; None where the peak of the devices isn't known, as for CPUs.
    """
    speed = peak(jax.devices()[0].device_kind)
    if speed is None:
        return None
    # A loop over micro-batches would count as one of them.
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype, sharding=x.sharding),
        batch,
    )
    cost = update.lower(state, frozen, shapes, 0).cost_analysis() or {}
    flops = cost.get("flops", 0.0) * len(jax.tree.leaves(batch)[0])
    return flops / (speed * jax.device_count()) or None


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
