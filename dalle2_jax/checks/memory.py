"""Whether a training step fits into the memory of the devices that are here."""

from typing import Any, NamedTuple

import jax

from dalle2_jax.checks.finding import Finding, ok, size
from dalle2_jax.errors import first_line
from dalle2_jax.train import mesh as meshes

FULL = 0.9  # of the memory: metrics, previews and batches in flight need some, too


class Memory(NamedTuple):
    """Bytes of one device that a step takes, by what takes them.

    Attributes:
      params, ema, optimiser: the state.
      frozen: read and not trained.
      batch: one.
      temporary: while the step runs.
    """

    params: int
    ema: int
    optimiser: int
    frozen: int
    batch: int
    temporary: int


def measure(compiled: Any, state: Any, frozen: Any, batch: Any) -> Memory:
    """What a compiled step takes.

    Args:
      compiled: the step.
      state, frozen, batch: its arguments, as shapes with shardings.
    """
    analysis = compiled.memory_analysis()
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(
        params=meshes.local_bytes(state.params),
        ema=meshes.local_bytes(state.ema),
        optimiser=meshes.local_bytes(state.opt_state),
        frozen=meshes.local_bytes(frozen),
        batch=meshes.local_bytes(batch),
        temporary=analysis.temp_size_in_bytes + outputs,
    )


def check(
    traced: Any, arguments: tuple[Any, Any, Any], there: int
) -> tuple[Finding, Any]:
    """Compiles the step and compares what it takes with what there is.

    Args:
      traced: the step.
      arguments: its state, what is frozen and a batch, as shapes with shardings.
      there: bytes of memory of a device.

    Returns:
      The finding, and the compiled step; None if the compiler has refused.
    """
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return too_much(first_line(error)), None
    return judge(measure(compiled, *arguments), there), compiled


def judge(memory: Memory, there: int) -> Finding:
    """Says whether it fits."""
    parts = ", ".join(f"{name} {size(n)}" for name, n in memory._asdict().items())
    found = f"{size(sum(memory))} of the {size(there)} of a device ({parts})"
    if sum(memory) > there:
        return too_much(found)
    if sum(memory) > FULL * there:
        return Finding("warning", "memory", found, f"little is left; {ADVICE}")
    return ok("memory", found)


ADVICE = (
    "raise accumulate or mesh.fsdp, lower batch_size, or recompute with net.remat; "
    "dalle2 plan --search tries them"
)


def too_much(found: str) -> Finding:
    """The problem of a step that does not fit."""
    return Finding("problem", "memory", found, f"it does not fit; {ADVICE}")
