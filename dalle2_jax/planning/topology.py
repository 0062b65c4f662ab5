"""Devices that need not be there, to compile for, and what each of them can do."""

import math
import os
import re
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax

from dalle2_jax.errors import UserError, first_line
from dalle2_jax.train.measure import PEAKS


class Chip(NamedTuple):
    """Published peaks of one device, as JAX counts them.

    Attributes:
      hbm: bytes of memory.
      flops: bfloat16 operations a second.
      bandwidth: of the memory, bytes a second.
      network: bytes a second that a device sends to its neighbours along one axis of a
        mesh.
    """

    name: str
    hbm: float
    flops: float
    bandwidth: float
    network: float


# cloud.google.com/tpu/docs/system-architecture; the network is that of one axis of the
# torus. NVIDIA's data sheets, dense and not sparse, and NVLink one way.
CHIPS = {
    "v5e": Chip("TPU v5e", 16 * 2**30, PEAKS["TPU v5 lite"], 0.819e12, 100e9),
    "v5p": Chip("TPU v5p", 95 * 2**30, PEAKS["TPU v5"], 2.765e12, 200e9),
    "v6e": Chip("TPU v6e", 32 * 2**30, PEAKS["TPU v6 lite"], 1.6e12, 200e9),
    "a100": Chip("A100 80 GB", 80e9, PEAKS["NVIDIA A100"], 2.039e12, 300e9),
    "h100": Chip("H100 SXM", 80e9, PEAKS["NVIDIA H100"], 3.35e12, 450e9),
    "h200": Chip("H200 SXM", 141e9, PEAKS["NVIDIA H200"], 4.8e12, 450e9),
}


# Devices. TPU pods have fewer; JAX needs ten seconds to stand in for so many GPUs.
MOST = {"tpu": 2**14, "gpu": 2**12}


class Topology(NamedTuple):
    """Devices that need not be there.

    Attributes:
      name: as it was given.
      chip: what each is.
      count: of the devices.
      tpu: whether they are TPUs.
    """

    name: str
    chip: Chip
    count: int
    tpu: bool


def parse(name: str) -> Topology:
    """Reads "v5e:16x16", "h100:8", or "gpu:8xh100".

    Raises:
      UserError: it is neither.
    """
    kind, count = "", 0
    if len(name) > 100:  # int() is slow, and refuses thousands of digits
        raise UserError(f"--topology={name:.40}...: this is no name of a topology")
    if match := re.fullmatch(r"(v\w+):(\d+(?:x\d+)*)", name):
        kind, count = match[1], math.prod(map(int, match[2].split("x")))
    elif match := re.fullmatch(r"(?:gpu:)?(\d+)x([ah]\w+)|([ah]\w+):(\d+)", name):
        kind, count = match[2] or match[3], int(match[1] or match[4])
    most = MOST["tpu" if kind.startswith("v") else "gpu"]
    if count > most:
        raise UserError(
            f"--topology={name:.40}: {most:,} devices are the most that can be planned"
        )
    if kind not in CHIPS or count < 1:
        raise UserError(
            f"--topology={name}: give a kind of chip and how many, as v5e:16x16 or "
            f"h100:8; the kinds are {', '.join(CHIPS)}"
        )
    return Topology(name, CHIPS[kind], count, kind.startswith("v"))


def devices(topology: Topology) -> list[Any]:
    """The devices to compile for: those of a TPU, or as many of the CPU.

    Raises:
      UserError: libtpu is missing, there is no such TPU, or too few CPU devices.
    """
    if not topology.tpu:
        found = jax.devices("cpu")[: topology.count]
        if len(found) < topology.count:
            raise UserError(
                f"--topology={topology.name}: JAX has only {len(found)} CPU devices to "
                f"compile for: set JAX_NUM_CPU_DEVICES={topology.count}"
            )
        return found
    if find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology.name}: compiling for TPUs needs libtpu, which is "
            "not installed: pip install libtpu (no TPU is needed)"
        )
    from jax.experimental import topologies

    # No chip is used: it need not look for one, nor keep other processes out, which it
    # also would where a process was killed and left its lock file.
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name
        ).devices
    except (RuntimeError, NotImplementedError, ValueError) as error:
        text = first_line(error)
        if "lockfile" in text or "already in use" in text:
            text += (
                ": end that process, or delete /tmp/libtpu_lockfile if there is none"
            )
        raise UserError(f"--topology={topology.name}: {text}") from error
