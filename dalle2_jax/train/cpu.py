"""Training on a CPU: a device for each core."""

import os

import jax

LEAST_ROWS = 8  # of a batch for a core to be worth a device of its own


def use_cores(rows: int) -> None:
    """Makes a device of each CPU core; to be called before JAX is first used.

    XLA runs a small network's step on little more than one core for each device. Where
    there are GPUs or TPUs, they are used all the same. A number that
    JAX_NUM_CPU_DEVICES or XLA_FLAGS gives is kept.

    Args:
        rows: of a batch, which the devices share.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.config.jax_num_cpu_devices > 0 or "host_platform_device_count" in flags:
        return
    jax.config.update("jax_num_cpu_devices", core_devices(rows, count_cores()))


def count_cores() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # where the system tells
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def core_devices(rows: int, cores: int) -> int:
    """The most of the cores that share rows evenly, with `LEAST_ROWS` each."""
    most = min(cores, rows // LEAST_ROWS)
    return next((n for n in range(most, 1, -1) if rows % n == 0), 1)
