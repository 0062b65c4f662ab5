"""How the processes of a run find each other; two real ones, through train.py."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dalle2_jax import checkpoint
from dalle2_jax.errors import UserError
from dalle2_jax.train import cluster

ROOT = Path(__file__).parents[1]


@pytest.fixture
def initialize(monkeypatch):
    """Records what JAX is asked for, in place of waiting for other processes."""
    calls = []

    def record(*arguments, **options):
        calls.append((arguments, options))

    monkeypatch.setattr(jax.distributed, "initialize", record)
    return calls


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("a:1", None, None), "--num_processes and --process_id missing"),
        (("a:1", 2, None), "--process_id missing"),
        ((None, 2, 0), "--coordinator missing"),
        ((None, 2, None), "--coordinator and --process_id missing"),
        (("a", 2, 0), "--coordinator=a: write HOST:PORT"),
        (("a:1", 0, 0), "--num_processes=0 must be at least 1"),
        (("a:1", 2, 2), "--process_id=2 must be from 0 to 1"),
        (("a:1", 2, -1), "--process_id=-1 must be from 0 to 1"),
    ],
)
def test_what_cannot_be_joined(arguments, message, initialize):
    with pytest.raises(UserError, match=message):
        cluster.join(*arguments)
    assert not initialize


def test_three_flags_leave_nothing_to_be_found_out(initialize):
    coordinator = f"localhost:{free_port()}"
    cluster.join(coordinator, 2, 0)
    options = {"cluster_detection_method": "deactivate"}
    assert initialize == [((coordinator, 2, 0), options)]


def test_a_port_that_is_taken(initialize):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = f"process 0 cannot listen at port {port}: .*; give another"
        with pytest.raises(UserError, match=message):
            cluster.join(f"localhost:{port}", 2, 0)
        assert not initialize
        cluster.join(f"localhost:{port}", 2, 1)  # where somebody listens
    assert len(initialize) == 1
    with pytest.raises(UserError, match="cannot listen at port 99999"):
        cluster.join("localhost:99999", 2, 0)


def test_process_0_may_come_late_or_never(capsys):
    port = free_port()
    with pytest.raises(UserError, match="process 0 is not there after . s: .*refused"):
        cluster._reach(f"localhost:{port}", patience=0.2)
    capsys.readouterr()

    def appear():
        time.sleep(0.5)
        late.bind(("localhost", port))
        late.listen()

    with socket.socket() as late:
        late.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thread = threading.Thread(target=appear)
        thread.start()
        cluster._reach(f"localhost:{port}", patience=30.0, silence=0.0)
        thread.join()
    said = capsys.readouterr().err
    assert re.fullmatch(f"waiting for process 0 at localhost:{port}: .*\n", said)


def test_alone_by_a_flag(initialize):
    cluster.join(num_processes=1)
    assert not initialize


def join_anew(**variables):
    """What a process of its own says, in which JAX has not been used before."""
    code = (
        "import jax\nfrom dalle2_jax.train import cluster\ncluster.join()\n"
        "print(jax.distributed.is_initialized())"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def test_alone_where_nothing_has_started_it():
    assert join_anew().stdout == "False\n"


@pytest.mark.parametrize("job", [{}, {"JOB_COMPLETION_INDEX": "0"}])
def test_a_pod_of_kubernetes_is_alone_unless_in_a_job(job, monkeypatch, initialize):
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)  # of a topology
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    for name, value in {"KUBERNETES_SERVICE_HOST": "10.0.0.1", **job}.items():
        monkeypatch.setenv(name, value)
    cluster.join()
    assert len(initialize) == len(job)


OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2"}
A_JOB = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(
    "variables, package, method",
    [
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None, None),
        (OPEN_MPI, "dalle2_jax.mpi", "mpi4py"),
        ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "4096.0"}, None, None),
        ({**OPEN_MPI, "JAX_COORDINATOR_ADDRESS": "host:1"}, None, None),
        (A_JOB, "dalle2_jax.k8s", None),
        ({**A_JOB, "TPU_WORKER_HOSTNAMES": "a,b"}, None, None),
    ],
)
def test_what_needs_a_package_to_be_found_out(
    variables, package, method, monkeypatch, initialize
):
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)  # of a topology
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if package:
        with pytest.raises(UserError, match=f"pip install '{package}.'"):
            cluster.join()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    cluster.join()
    ((_, options),) = initialize
    assert options == {"cluster_detection_method": method}


def test_what_is_found_out_may_fail_in_any_way(monkeypatch):
    def refuse(*arguments, **options):
        raise LookupError("Service host/port is not set.\nMore of it")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(UserError, match="cannot join .*host/port is not set.; .*"):
        cluster.join()


def test_half_of_jaxs_variables():
    said = join_anew(JAX_COORDINATOR_ADDRESS="localhost:1").stderr
    assert re.search("UserError: .*Number of processes must .*--num_processes=1", said)


def train(workdir, *flags, devices, variables=None, steps=6, **options):
    command = [
        *(sys.executable, "train.py", "--config=configs/clip.py:tiny"),
        f"--workdir={workdir}",
        f"--config.steps={steps}",
        "--config.log_every=1",
        *flags,
    ]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, **(variables or {})}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **options)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flags", "slurm"])
def test_two_processes_train_as_one(tmp_path, how):
    port = free_port()

    def one_of_two(i):
        if how == "flags":
            flags = f"--coordinator=localhost:{port}", "--num_processes=2"
            return train(tmp_path / how, *flags, f"--process_id={i}", devices=1)
        variables = {
            "JAX_COORDINATOR_PORT": str(port),
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(i),
            "SLURM_LOCALID": str(i),
        }
        return train(tmp_path / how, devices=1, variables=variables)

    processes = [one_of_two(i) for i in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert train(tmp_path / "one", devices=2).wait(timeout=300) == 0
    expected = losses(tmp_path / "one")
    assert len(expected) == 6
    np.testing.assert_allclose(losses(tmp_path / how), expected, rtol=1e-5)
    kernels = [
        checkpoint.load(tmp_path / name / "model").params["clip"]["text"]["projection"]
        for name in ("one", how)
    ]
    np.testing.assert_allclose(*(k["kernel"] for k in kernels), rtol=1e-3, atol=1e-5)


# Sums 0, 1, ..., 7 over both processes, of which the second compiles for a while.
LATE = """
import sys, time
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from dalle2_jax.train import cluster, mesh as meshes

port, process, seconds = map(int, sys.argv[1:])
cluster.join(f"localhost:{port}", 2, process)
mesh = meshes.make(data=2, fsdp=1)
x = meshes.put_batch({"x": np.arange(4.0) + 4 * process}, mesh)["x"]
everywhere = NamedSharding(mesh, PartitionSpec())
total = jax.jit(lambda x: x.sum(), out_shardings=everywhere)

def late(*arguments):
    return total(*arguments)

def lower(*arguments):
    time.sleep(process * seconds)
    return total.lower(*arguments)

late.lower = lower
print(float(cluster.compiled_by_all(late)(x)))
"""


@pytest.mark.slow
def test_a_process_that_compiles_for_long_is_waited_for():
    port, seconds = free_port(), 40  # the CPU's transport waits for 30
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LATE, str(port), str(process), str(seconds)],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": ""},  # one device each
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    said = [process.communicate(timeout=300)[0].split()[-1] for process in processes]
    assert said == ["28.0", "28.0"]


@pytest.mark.slow
def test_processes_that_fail_together_all_say_why(tmp_path):
    port = free_port()
    flags = f"--coordinator=localhost:{port}", "--num_processes=2"
    processes = [
        train(
            tmp_path,
            *(*flags, f"--process_id={process}", "--config.batch_size=3"),
            devices=1,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    for process in processes:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 2
        assert re.fullmatch("error: batch_size=3 must be a multiple of 2.*\n", said)


# The first process, with which the others are in touch, fails.
FAILS = """
import sys
from dalle2_jax.train import cluster

port, process = map(int, sys.argv[1:])
cluster.join(f"localhost:{port}", 2, process)
with cluster.leaving():
    if process == 0:
        raise ValueError("this disk is full")
    cluster.meet()
"""


@pytest.mark.slow
def test_a_process_that_fails_ends_the_run(tmp_path):
    command = [sys.executable, "-c", FAILS, str(free_port())]
    processes = [
        subprocess.Popen(
            [*command, str(process)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for process in range(2)
    ]
    # JAX's own way takes 300 seconds.
    said = [process.communicate(timeout=100)[1] for process in processes]
    assert processes[0].returncode == 2 and "this disk is full" in said[0]
    assert processes[1].returncode != 0 and "another task died" in said[1]


def test_nothing_is_waited_for_alone():
    function = jax.jit(lambda x: x)
    assert cluster.compiled_by_all(function) is function
    cluster.meet()
