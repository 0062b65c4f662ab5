"""What the CPU is told before training."""

import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.train import cpu


@pytest.mark.parametrize(
    "rows, cores, devices",
    [
        (64, 2, 2),
        (64, 6, 4),  # as many as divide the batch
        (64, 100, 8),  # with eight rows each
        (15, 2, 1),
        (17, 2, 1),
        (0, 2, 1),
        (-64, 2, 1),
    ],
)
def test_core_devices(rows, cores, devices):
    assert cpu.core_devices(rows, cores) == devices


@pytest.mark.parametrize(
    "variables, devices",
    [
        ({}, cpu.core_devices(64, cpu.count_cores())),
        ({"JAX_NUM_CPU_DEVICES": "3"}, 3),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
    ],
)
def test_use_cores_keeps_what_the_user_says(variables, devices):
    code = "from dalle2_jax.train import cpu; cpu.use_cores(64); import jax; "
    run = subprocess.run(
        [sys.executable, "-c", code + "print(jax.device_count())"],
        env={**os.environ, "XLA_FLAGS": "", **variables},
        capture_output=True,
        text=True,
    )
    assert run.stdout == f"{devices}\n", run.stderr


def test_convolutions_are_left_to_xla():
    """Where it knows the option; with the results that it has without."""
    options = cpu.compiler_options()
    assert options == cpu._CONVOLUTIONS  # of the JAX that the tests run on
    x, kernel = jnp.ones((2, 8, 8, 4)), jnp.linspace(-1, 1, 144).reshape(3, 3, 4, 4)

    def loss(kernel):
        axes = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", None, None, axes)
        return (y**2).sum()

    plain, told = (
        jax.jit(jax.grad(loss), compiler_options=o)(kernel) for o in ({}, options)
    )
    np.testing.assert_allclose(told, plain, rtol=1e-5)


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    for unknown in (
        {"xla_cpu_no_such_option": "1"},
        dict.fromkeys(cpu._CONVOLUTIONS, "?"),
    ):
        monkeypatch.setattr(cpu, "_CONVOLUTIONS", unknown)
        assert cpu.compiler_options() == {}


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
