"""Where arrays live: one mesh over all devices, axes `data`, `fsdp` and `tensor`.

A batch is split over `data` and `fsdp`, and replicated over `tensor`. Params and the
optimiser's state are replicated over `data`; over `fsdp` the large ones are split, and
XLA gathers each where it is used. Over `tensor` the products themselves are split, as
in Megatron (arXiv 1909.08053): a block's first kernel along its outputs and its last
along its inputs, so that between them each device has a part of the heads or channels,
and sums are exchanged once. With fsdp=1 and tensor=1 this is plain data parallelism,
one program per device, as `pmap` has it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dalle2_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # those over which a batch is split

# The axis of a layer's kernel that is split over `tensor`: of those that open a block
# that of its outputs, of those that close it that of its inputs. Of them only qkv and
# context_kv are gathered, as they hold several matrices, each to be split by its heads.
TENSOR_AXIS = {
    **dict.fromkeys(("qkv", "context_kv", "mlp_in", "conv_1"), -1),
    **dict.fromkeys(("out", "mlp_out", "conv_2"), -2),
}


def make(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The mesh over all devices of all processes; -1 for what the other axes leave.

    Args:
        data, fsdp, tensor: the number of devices along each axis.
        devices: others than all that there are.

    Raises:
        UserError: the axes don't multiply to the number of devices, or `tensor` doesn't
            divide the devices of a process.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name in AXES:
        if sizes[name] == -1:
            others = [max(n, 1) for other, n in sizes.items() if other != name]
            sizes[name] = len(devices) // math.prod(others)
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor} does not fit "
            f"{len(devices)} devices: their product must be the number of devices (-1 "
            "for the rest)"
        )
    shape = tuple(sizes.values())
    if sizes["tensor"] == 1:
        # jax.make_mesh refuses an axis that is a part of one of a TPU's torus.
        grid = mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
    else:
        # Neighbours along `tensor` are of one process: each has rows of its own.
        order = sorted(devices, key=lambda d: (d.process_index, d.id))
        grid = np.array(order).reshape(shape)
        local = len(devices) // len({d.process_index for d in devices})
        if local % sizes["tensor"]:
            raise UserError(
                f"mesh.tensor={tensor} must divide {local}, the devices of a process"
            )
    # Flax's layers don't work with the default, explicit axes.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(tree: Any, mesh: Mesh, min_size: int = 2**16) -> Any:
    """A NamedSharding for each array of a tree (of arrays or of their shapes).

    An array of at least `min_size` elements is split over `tensor` if it is a kernel of
    TENSOR_AXIS, and over `fsdp` along its longest other axis that divides evenly; all
    others are replicated. The rule sees shapes and the last two names of a path, so
    that a param, its average and its moments lie alike.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]

    def place(path, x):
        spec = [None] * np.ndim(x)
        if np.prod(x.shape) < min_size:
            return NamedSharding(mesh, P())
        axis = tensor_axis(path, x)
        if tensor > 1 and axis is not None and x.shape[axis] % tensor == 0:
            spec[axis] = "tensor"
        axes = [i for i, n in enumerate(x.shape) if not spec[i] and n % fsdp == 0]
        if fsdp > 1 and axes:
            spec[max(axes, key=lambda i: x.shape[i])] = "fsdp"
        while spec and spec[-1] is None:
            spec.pop()
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def tensor_axis(path: Sequence[Any], x: Any) -> int | None:
    """Of a kernel the axis of TENSOR_AXIS; None of all else.

    Adafactor's means over one axis have a kernel's path, but not as many axes.
    """
    layer, name = ([None] * 2 + [getattr(key, "key", None) for key in path])[-2:]
    return TENSOR_AXIS.get(layer) if name == "kernel" and x.ndim in (2, 4) else None


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes as from `jax.eval_shape`, with where each array shall lie."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        shardings,
    )


def local_bytes(tree: Any) -> int:
    """Bytes of one device that arrays take, or shapes with where each shall lie."""
    return sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(tree)
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
            spec = P(BATCH)
        else:
            spec = P(None, BATCH)
            x = x.reshape(accumulate, -1, *x.shape[1:])
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x)

    return {name: place(x) for name, x in batch.items()}
