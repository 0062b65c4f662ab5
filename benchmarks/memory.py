"""What fine-tuning Karlo takes in memory: its training steps compiled, and not run.

    python benchmarks/memory.py [STAGE:SIZE[:BATCH_SIZE] ...] [--topology=v6e:1x1]

prints a line of README's table for each row. With --topology (pip install libtpu, no
TPU needed) it compiles for one chip of a TPU: v5e:1x1 has 16 GB, v6e:1x1 32 GB and
v5p:2x2x1 95 GB. Else it compiles for the CPU, whose compiler shares memory between
temporary arrays less well than a GPU's or TPU's does. The networks are at full size and
take minutes to compile.
"""

import argparse
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np
from full_size import get_config, karlo
from jax.sharding import Sharding, SingleDeviceSharding

from dalle2_jax import checkpoint, stages
from dalle2_jax.train import loop, optim

ROWS = [
    f"{stage}:{size}"
    for stage in ("prior", "decoder", "upsampler")
    for size in ("karlo", "karlo_lean")
]
# Compilers take long over how fast the step is, which is not asked here.
QUICKLY = {
    "tpu": {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0},
    "cpu": {"xla_backend_optimization_level": 0},
}


def zero(path: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
    """A param that takes no memory: all its numbers are one."""
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)


def measure(row: str, place: Sharding) -> str:
    """A row of the table."""
    stage_name, size, *batch_size = row.split(":")
    config = get_config(stage_name, size)
    config.init_from = "karlo"
    if batch_size:
        config.batch_size = int(batch_size[0])
    with mock.patch.object(checkpoint, "load", lambda path: karlo(zero)):
        stage = stages.make(config)

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
        )

    optimizer = optim.make(config.steps, **config.optim)
    state = jax.eval_shape(lambda p: loop.first_state(p, optimizer), stage.start)
    batch = jax.tree.map(lambda x: x[None], next(stage.batches("train", 0)))
    update = loop.make_update(
        stage.loss, optimizer, jax.random.key(0), config.ema_decay
    )
    cells = [
        f"`{stage_name}.py:{size}`",
        f"{config.batch_size}",
        f"{total(state.params, lambda x: x.size) / 1e6:,.0f}M",
        *(gigabytes(x) for x in (state.params, state.ema, state.opt_state)),
        gigabytes(stage.frozen),
    ]
    lowered = jax.jit(update, donate_argnums=0).lower(
        *map(placed, (state, stage.frozen, batch, np.int32(0)))
    )
    try:
        memory = lowered.compile(
            compiler_options=QUICKLY[next(iter(place.device_set)).platform]
        ).memory_analysis()
        whole = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
        cells += [f"{memory.temp_size_in_bytes / 1e9:.1f}", f"{whole / 1e9:.1f}"]
    except jax.errors.JaxRuntimeError as error:  # more than the chip has
        cells += ["–", str(error).partition("\n")[0]]
    return f"| {' | '.join(cells)} |"


def total(tree: Any, of: Callable[[Any], int]) -> int:
    return sum(map(of, jax.tree.leaves(tree)))


def gigabytes(tree: Any) -> str:
    return f"{total(tree, lambda x: x.size * x.dtype.itemsize) / 1e9:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", default=ROWS, metavar="STAGE:SIZE[:BATCH]")
    parser.add_argument("--topology", help="a TPU's, as v6e:1x1")
    arguments = parser.parse_args()
    if arguments.topology:
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=arguments.topology
        ).devices
    else:
        devices = jax.devices("cpu")
    print(f"Compiled for one {devices[0].device_kind}; GB:\n")
    print("| row | batch | trained | params | EMA | optimiser | frozen | temp | all |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for row in arguments.rows:
        print(measure(row, SingleDeviceSharding(devices[0])), flush=True)


if __name__ == "__main__":
    main()
