"""Two processes of four devices train as one of eight does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from dalle2_jax import checkpoint
from dalle2_jax.train import checkpoints
from dalle2_jax.train.mesh import with_shardings

SCRIPT = Path(__file__).with_name("test_train_loop.py")


def start(workdir, devices, *cluster, **config):
    """A process that trains the stage of test_train_loop.py."""
    config = {"log_every": 1, "eval_every": 0, "save_every": 50, **config}
    environment = {
        **os.environ,
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, SCRIPT, workdir, json.dumps(config), *map(str, cluster)]
    return subprocess.Popen(command, env=environment)


def train_in_two(workdir, devices=4, **config):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    processes = [start(workdir, devices, coordinator, 2, i, **config) for i in range(2)]
    return [process.wait(timeout=120) for process in processes]


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 8, "fsdp": 1}, {"data": 2, "fsdp": 4}])
def test_two_processes_train_as_one(tmp_path, mesh):
    # SIGTERM to one of two stops both at the same step, and they go on from there.
    endless = {"mesh": mesh, "steps": 10**6, "signal": ["SIGTERM", 4]}
    assert train_in_two(tmp_path / "two", **endless) == [0, 0]
    stopped = max(losses(tmp_path / "two"))
    steps = stopped + 4
    assert train_in_two(tmp_path / "two", mesh=mesh, steps=steps) == [0, 0]
    two = losses(tmp_path / "two")
    assert list(two) == list(range(1, steps + 1))

    assert start(tmp_path / "one", 8, mesh=mesh, steps=steps).wait() == 0
    one = losses(tmp_path / "one")
    np.testing.assert_allclose([*two.values()], [*one.values()], rtol=1e-4)
    models = [checkpoint.load(tmp_path / n / "model") for n in ("one", "two")]
    kernels = [model.params["linear"]["kernel"] for model in models]
    np.testing.assert_allclose(*kernels, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_in_other_processes_and_on_another_mesh(tmp_path):
    """From two processes to one of two devices, which share the state, and back."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    split = {"mesh": {"data": 1, "fsdp": 2}}
    assert train_in_two(parts, devices=1, steps=8) == [0, 0]
    assert start(parts, 2, steps=14, **split).wait() == 0
    assert train_in_two(parts, devices=1, steps=20, **split) == [0, 0]
    assert start(whole, 2, steps=20).wait() == 0
    found, expected = losses(parts), losses(whole)
    assert list(found) == list(expected) == list(range(1, 21))
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-5)
    here = SingleDeviceSharding(jax.devices()[0])
    states = []
    for workdir in (parts, whole):
        with checkpoints.Run(workdir / "checkpoints") as run:
            shapes = run.shapes()
            places = jax.tree.map(lambda _: here, shapes)
            states.append(run.restore(with_shardings(shapes, places)))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), *states
    )
