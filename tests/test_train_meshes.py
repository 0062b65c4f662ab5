"""Every stage has the same losses on any mesh and in any number of processes.

Run as a script, it trains a tiny stage in a process of its own:
WORKDIR JSON [COORDINATOR PROCESSES PROCESS], where JSON has changes to the config.
"""

import functools
import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dalle2_jax import parts
from dalle2_jax.train import loop
from dalle2_jax.train import mesh as meshes

STAGES = ["clip", "prior", "ar_prior", "decoder", "upsampler"]
# Processes, devices of each, and the mesh over all of them.
LAYOUTS = [
    (1, 8, {"data": 8, "fsdp": 1}),
    (1, 8, {"data": 1, "fsdp": 8}),
    (1, 8, {"data": 2, "fsdp": 4}),
    (1, 8, {"data": 2, "fsdp": 2, "tensor": 2}),
    (1, 4, {"data": 1, "fsdp": 1, "tensor": 4}),
    (2, 1, {"data": 1, "fsdp": 2}),
    (4, 1, {"data": 2, "fsdp": 2}),
    (2, 2, {"data": 1, "fsdp": 2, "tensor": 2}),
]
# As many heads as the widest `tensor`.
HEADS = {
    "clip": {"net.text_heads": 4, "net.vision_heads": 4},
    "prior": {"net.heads": 4},
    "ar_prior": {"net.heads": 4},
    "decoder": {"net.unet.head_channels": 8, "net.text_encoder.heads": 4},
    "upsampler": {},
}
STEPS = 20


def train(workdir, stage, processes, devices, mesh, until=STEPS):
    """The losses of a run's first steps."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    changes = {"stage": stage, "mesh": mesh, "steps": until}
    command = [sys.executable, __file__, str(workdir), json.dumps(changes)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    running = []
    for i in range(processes):
        cluster = [coordinator, str(processes), str(i)] if processes > 1 else []
        running.append(subprocess.Popen([*command, *cluster], env=environment))
    assert [process.wait() for process in running] == [0] * processes
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The losses of a stage on one device."""

    @functools.cache
    def run(stage):
        mesh = {"data": 1, "fsdp": 1}
        return train(tmp_path_factory.mktemp(stage), stage, 1, 1, mesh)

    return run


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_on_another_mesh(tmp_path, expected, stage):
    train(tmp_path, stage, 1, 8, {"data": 2, "fsdp": 2, "tensor": 2}, STEPS // 2)
    found = train(tmp_path, stage, 1, 4, {"data": 1, "fsdp": 2, "tensor": 2})
    np.testing.assert_allclose(found, expected(stage), rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("processes, devices, mesh", LAYOUTS)
def test_the_same_losses(tmp_path, expected, stage, processes, devices, mesh):
    found = train(tmp_path, stage, processes, devices, mesh)
    assert len(found) == STEPS
    np.testing.assert_allclose(found, expected(stage), rtol=1e-5)


def main(workdir, changes, coordinator=None, processes=1, process=0):
    if coordinator:
        jax.distributed.initialize(coordinator, int(processes), int(process))
    changes = json.loads(changes)
    config = importlib.import_module(f"configs.{changes['stage']}").get_config("tiny")
    config.update(changes)
    config.update_from_flattened_dict(HEADS[config.stage])
    config.base = "" if config.stage == "clip" else "bundled"
    config.optim.schedule = "constant"  # wherever a run is to end
    config.update(batch_size=16, log_every=1, eval_every=0, preview_every=0)
    # These networks have no array that is large.
    meshes.shardings = functools.partial(meshes.shardings, min_size=256)
    stage = parts.make_stage(config)
    loop.train(
        stage,
        config,
        lambda step: stage.batches("train", step),
        lambda step: stage.batches("heldout", step),
        workdir,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
