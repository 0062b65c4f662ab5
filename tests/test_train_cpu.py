"""What the CPU is told before training."""

import os
import platform
import subprocess
import sys

import pytest

from dalle2_jax.train import cpu


@pytest.mark.parametrize(
    "rows, cores, devices",
    [
        (128, 2, 2),
        (256, 6, 4),  # as many as divide the batch
        (512, 100, 8),  # with 64 rows each
        (127, 2, 1),
        (129, 2, 1),
        (0, 2, 1),
        (-128, 2, 1),
    ],
)
def test_core_devices(rows, cores, devices):
    assert cpu.core_devices(rows, cores) == devices


@pytest.mark.parametrize(
    "variables, devices",
    [
        ({}, cpu.core_devices(128, cpu.count_cores())),
        ({"JAX_NUM_CPU_DEVICES": "3"}, 3),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
    ],
)
def test_use_cores_keeps_what_the_user_says(variables, devices):
    code = "from dalle2_jax.train import cpu; cpu.use_cores(128); import jax; "
    run = subprocess.run(
        [sys.executable, "-c", code + "print(jax.device_count())"],
        env={**os.environ, "XLA_FLAGS": "", **variables},
        capture_output=True,
        text=True,
    )
    assert run.stdout == f"{devices}\n", run.stderr


FAULTS = """
import ctypes, resource
from dalle2_jax.train import cpu
{before}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = 30 << 20

def step():
    buffers = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size))) for _ in range(4)]
    for buffer in buffers:
        libc.memset(buffer, 1, ctypes.c_size_t(size))
    for buffer in buffers:
        libc.free(buffer)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
def test_freed_memory_is_kept():
    """A step that allocates what the one before has freed meets no page faults."""

    def faults(before):
        code = FAULTS.format(before=before)
        return int(subprocess.check_output([sys.executable, "-c", code]))

    assert faults("") > 10_000
    assert faults("cpu.keep_memory()") < 100
