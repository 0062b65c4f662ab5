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

import jax
from full_size import get_config

from dalle2_jax import parts
from dalle2_jax.planning import blueprint, estimate, topology
from dalle2_jax.train import mesh

ROWS = [
    f"{stage}:{size}"
    for stage in ("prior", "decoder", "upsampler")
    for size in ("karlo", "karlo_lean")
]


def measure(row: str, device: jax.Device) -> str:
    """A row of the table."""
    stage_name, size, *batch_size = row.split(":")
    config = get_config(stage_name, size)
    if batch_size:
        config.batch_size = int(batch_size[0])
    clip = parts.clip.arguments(get_config("clip", "vit_l_14"), None)
    program = blueprint.train(config, clip, mesh.make(devices=[device]), {})
    state, frozen, _ = program.arguments
    cells = [
        f"`{stage_name}.py:{size}`",
        f"{config.batch_size}",
        f"{total(state.params, lambda x: x.size) / 1e6:,.0f}M",
        *(gigabytes(x) for x in (state.params, state.ema, state.opt_state)),
        gigabytes(frozen),
    ]
    try:
        memory = (
            program.traced.lower()
            .compile(estimate.LOW_EFFORT[device.platform])
            .memory_analysis()
        )
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
        device = topology.devices(topology.parse(arguments.topology))[0]
    else:
        device = jax.devices("cpu")[0]
    print(f"Compiled for one {device.device_kind}; GB:\n")
    print("| row | batch | trained | params | EMA | optimiser | frozen | temp | all |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for row in arguments.rows:
        print(measure(row, device), flush=True)


if __name__ == "__main__":
    main()
