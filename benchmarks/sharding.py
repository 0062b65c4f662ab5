"""What a device holds of a training run, against the widths of fsdp and tensor.

    python benchmarks/sharding.py state [STAGE:SIZE ...]
    python benchmarks/sharding.py step [STAGE:SIZE ...]

print tables of sharding.md, for 8 devices that the CPU simulates: `state` from shapes
alone, in seconds and at any size; `step` compiles the training step and runs nothing,
a minute for each line.
"""

import argparse
import os
from collections.abc import Iterator
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from full_size import get_config

from dalle2_jax.planning import blueprint, cost, estimate
from dalle2_jax.train import mesh as meshes

STAGES = ("clip", "prior", "ar_prior", "decoder", "upsampler")
STATE = [
    *("clip:paper", "prior:paper", "ar_prior:paper", "decoder:paper"),
    *("upsampler:paper_256", "prior:karlo", "decoder:karlo", "upsampler:karlo"),
]
MESHES = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2)]  # fsdp and tensor
CLIPS = {"karlo": "vit_l_14", "paper_256": "paper"}


def program(row: str, mesh: jax.sharding.Mesh) -> blueprint.Program:
    stage, size = row.split(":")
    clip = blueprint.clip_net(get_config("clip", CLIPS.get(size, size)))
    config = get_config(stage, size)
    config.base = ""
    return blueprint.train(config, clip, mesh, {})


def local(tree: Any, mesh: jax.sharding.Mesh) -> int:
    """Bytes of a device."""
    placed = meshes.with_shardings(tree, meshes.shardings(tree, mesh))
    return meshes.local_bytes(placed)


def state(row: str) -> Iterator[list[str]]:
    """GB of what is kept between steps, a line for each mesh."""
    values, frozen, _ = program(row, meshes.make()).arguments
    for fsdp, tensor in MESHES:
        mesh = meshes.make(fsdp=fsdp, tensor=tensor)
        trees = values.params, values.ema, values.opt_state, frozen
        sizes = [local(tree, mesh) / 1e9 for tree in trees]
        sizes.append(sum(sizes))
        yield [f"`{row}`", f"{fsdp}", f"{tensor}", *(f"{size:.2f}" for size in sizes)]


def step(row: str) -> Iterator[list[str]]:
    """MB, GFLOPs and MB sent of the compiled step, a line for each mesh."""
    for fsdp, tensor in MESHES:
        mesh = meshes.make(fsdp=fsdp, tensor=tensor)
        lowered = program(row, mesh).traced.lower()
        compiled = lowered.compile(estimate.LOW_EFFORT["cpu"])
        memory = compiled.memory_analysis()
        sent = cost.collective_bytes(compiled.as_text(), mesh.size)
        numbers = (
            memory.argument_size_in_bytes / 1e6,
            memory.temp_size_in_bytes / 1e6,
            compiled.cost_analysis()["flops"] / 1e9,
            sum(sent.values()) / 1e6,
        )
        yield [f"`{row}`", f"{fsdp}", f"{tensor}", *(f"{n:.1f}" for n in numbers)]


TABLES = {
    "state": (state, STATE, "params | EMA | optimiser | frozen | all"),
    "step": (
        step,
        [f"{stage}:small" for stage in STAGES],
        "arguments | temporary | GFLOPs | sent",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("rows", nargs="*", metavar="STAGE:SIZE")
    arguments = parser.parse_args()
    make, rows, columns = TABLES[arguments.table]
    print(f"| row | fsdp | tensor | {columns} |")
    print("|---" * (4 + columns.count("|")) + "|", flush=True)
    for row in arguments.rows or rows:
        for cells in make(row):
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
