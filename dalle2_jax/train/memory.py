"""Whether a run's state fits into the devices' memory, before anything is compiled."""

import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from dalle2_jax.errors import UserError
from dalle2_jax.train import mesh as meshes


def limit(devices: Sequence[Any]) -> int:
    """Bytes of memory of a device of this process.

    CPU devices share the memory of the machine evenly.
    """
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return min(device.memory_stats()["bytes_limit"] for device in devices)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)


def check(state: Any, frozen: Any, mesh: Mesh, there: int | None = None) -> None:
    """Raise a UserError if the state and what is frozen alone are too large.

    Args:
      state: a TrainState of shapes.
      frozen: arrays, or shapes.
      mesh: over which both are split as `mesh.shardings` has it.
      there: bytes of memory of a device; None for those of the mesh.

    Raises:
      UserError: names the least mesh.fsdp that holds them, with the gradient.
    """
    there = limit(mesh.local_devices) if there is None else there
    parts = {
        "params": state.params,
        "EMA": state.ema,
        "optimiser": state.opt_state,
        "frozen": frozen,
    }
    taken = {name: _local(tree, mesh) for name, tree in parts.items()}
    if sum(taken.values()) <= there:
        return
    told = ", ".join(f"{name} {_size(n)}" for name, n in taken.items())
    raise UserError(
        f"with mesh.fsdp={mesh.shape['fsdp']} the state takes "
        f"{_size(sum(taken.values()))} of a device's {_size(there)} ({told}): "
        f"{_remedy(parts, mesh, there)}"
    )


def _remedy(parts: dict[str, Any], mesh: Mesh, there: int) -> str:
    devices, tensor = mesh.devices.ravel().tolist(), mesh.shape["tensor"]
    fsdp = 2 * mesh.shape["fsdp"]
    while len(devices) % (fsdp * tensor) == 0:
        other = meshes.make(fsdp=fsdp, tensor=tensor, devices=devices)
        # The gradient is as large as the average.
        needed = sum(_local(tree, other) for tree in (*parts.values(), parts["EMA"]))
        if needed <= there:
            return (
                f"--config.mesh.fsdp={fsdp} holds it and the gradient, in "
                f"{_size(needed)}"
            )
        fsdp *= 2
    return (
        f"no mesh.fsdp of {len(devices)} devices holds it: give more devices, "
        "--config.optim.name=adafactor, --config.param_dtype=bfloat16 or fewer "
        "--config.trainable"
    )


def _local(tree: Any, mesh: Mesh) -> int:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    return meshes.local_bytes(
        meshes.with_shardings(shapes, meshes.shardings(shapes, mesh))
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"
