"""Where arrays live: one mesh over all devices, with the axes `data` and `fsdp`.

A batch is split over both axes. Params and the optimiser's state are replicated over
`data`; over `fsdp` the large ones are split, and XLA gathers each where it is used.
With fsdp=1 this is plain data parallelism, one program per device, as `pmap` has it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dalle2_jax.errors import UserError

AXES = ("data", "fsdp")


def make(
    data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh over all devices of all processes; -1 for what the other axis leaves.

    Args:
        data, fsdp: the number of devices along each axis.
        devices: others than all that there are.

    Raises:
        UserError: the axes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp}
    for name, other in (("data", "fsdp"), ("fsdp", "data")):
        if sizes[name] == -1:
            sizes[name] = len(devices) // max(sizes[other], 1)
    if min(sizes.values()) < 1 or sizes["data"] * sizes["fsdp"] != len(devices):
        raise UserError(
            f"mesh.data={data}, mesh.fsdp={fsdp} does not fit {len(devices)} devices: "
            "their product must be the number of devices (-1 for the rest)"
        )
    # jax.make_mesh refuses an axis that is a part of one of a TPU's torus.
    grid = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    # Flax's layers don't work with the default, explicit axes.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(tree: Any, mesh: Mesh, min_size: int = 2**16) -> Any:
    """A NamedSharding for each array of a tree (of arrays or of their shapes).

    An array of at least `min_size` elements is split over `fsdp` along its longest axis
    that divides evenly; all others are replicated. The rule sees shapes only, so that a
    param, its average and its moments lie alike.
    """
    fsdp = mesh.shape["fsdp"]

    def place(x):
        axes = [i for i, n in enumerate(x.shape) if n % fsdp == 0]
        if fsdp == 1 or not axes or np.prod(x.shape) < min_size:
            return NamedSharding(mesh, P())
        longest = max(axes, key=lambda i: x.shape[i])
        return NamedSharding(mesh, P(*[None] * longest, "fsdp"))

    return jax.tree.map(place, tree)


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes as from `jax.eval_shape`, with where each array shall lie."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        shardings,
    )


def put(tree: Any, mesh: Mesh) -> Any:
    """Places arrays that every process has in full by the rule of `shardings`."""

    def place(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    tree = jax.tree.map(np.asarray, tree)
    return jax.tree.map(place, tree, shardings(tree, mesh))


def put_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, accumulate: int | None = None
) -> dict[str, jax.Array]:
    """Makes global arrays [b, ...] of each process's rows [b / processes, ...].

    With `accumulate` the result is [accumulate, b / accumulate, ...]: the rows are
    grouped here, on the host, so that no device has to send any to another.
    """

    def place(x):
        if accumulate is None:
            spec = P(AXES)
        else:
            spec = P(None, AXES)
            x = x.reshape(accumulate, -1, *x.shape[1:])
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x)

    return {name: place(x) for name, x in batch.items()}
