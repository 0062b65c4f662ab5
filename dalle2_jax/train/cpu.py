"""Training on a CPU: a device for each core that has enough to do."""

import ctypes
import os

import jax

# Options of glibc's mallopt, by the numbers in malloc.h.
_KEEP = {
    -8: 1,  # M_ARENA_MAX: one heap for all threads, as others are small and trimmed
    -3: 1 << 25,  # M_MMAP_THRESHOLD: the largest that is allowed
    -2: 1 << 28,  # M_TOP_PAD: grow by so many bytes at once
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: never shrink
}
LEAST_ROWS = 64  # of a batch for a core to be worth a device of its own


def use_cores(rows: int) -> None:
    """Makes a device of each CPU core, or of some; to be called before JAX is used.

    XLA runs a small network's step on little more than one core for each device, but a
    step of few rows loses more by being shared. Where there are GPUs or TPUs, they are
    used all the same. A number that JAX_NUM_CPU_DEVICES or XLA_FLAGS gives is kept.

    Args:
        rows: of a batch, which the devices share.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.config.jax_num_cpu_devices > 0 or "host_platform_device_count" in flags:
        return
    jax.config.update("jax_num_cpu_devices", core_devices(rows, count_cores()))


def keep_memory() -> None:
    """Makes the C library keep freed memory for the next step, where it is glibc.

    It would give the buffers of every step back to the system, and have them filled
    with zeros again at the next, a page fault for each page.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for option, value in _KEEP.items():
        mallopt(option, value)


def count_cores() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # where the system tells
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def core_devices(rows: int, cores: int) -> int:
    """The most of the cores that share rows evenly, with `LEAST_ROWS` each."""
    most = min(cores, rows // LEAST_ROWS)
    return next((n for n in range(most, 1, -1) if rows % n == 0), 1)
