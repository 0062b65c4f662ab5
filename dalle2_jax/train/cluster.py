"""Several processes as one run: found out, or told by flags; how they meet and part."""

import atexit
import contextlib
import functools
import importlib.util
import itertools
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from dalle2_jax.errors import UserError, first_line


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of a run; to be called before JAX is first used.

    With no argument, JAX asks what has started this process: a TPU pod (Cloud TPU VMs
    or GKE), SLURM, Open MPI, a Kubernetes indexed Job, or JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. Where there is none of these, or with
    num_processes=1, the process is alone.

    Args:
        coordinator: HOST:PORT of process 0, where it listens.
        num_processes: how many there are.
        process_id: which this one is, from 0.

    Raises:
        UserError: some of the three are missing or can't be, or the others aren't met.
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if num_processes == 1 and len(missing) == 2:
        return
    if len(missing) in (1, 2):
        raise UserError(
            f"{' and '.join(missing)} missing: a process of several is told "
            "--coordinator=HOST:PORT, --num_processes=N and --process_id=I"
        )
    if missing and _in_pod():
        return
    if not missing:
        _check(**given)
        # Where one can't, JAX takes the process down without a word for its user.
        (_reach if process_id else _listen)(coordinator)
    method = _method() if missing else "deactivate"
    try:
        with warnings.catch_warnings(action="ignore"):
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                cluster_detection_method=method,
            )
    # Kubernetes and MPI raise errors of their own.
    except Exception as error:
        alone = missing and "coordinator_address should be defined" in str(error)
        if not alone:
            raise UserError(
                f"cannot join the processes of this run: {first_line(error)}; a "
                "process that is to run alone is told so with --num_processes=1"
            ) from error


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Lets a process that fails end at once, though the others go on.

    JAX would have it wait for them for minutes. They end when they miss it.
    """
    try:
        yield
    except BaseException:
        if jax.process_count() > 1:
            atexit.register(_leave)  # and so called before JAX's
        raise


def _leave() -> None:
    try:
        # If all of them fail, each is to say why.
        _wait("leaving", timeout_ms=10_000)
    except jax.errors.JaxRuntimeError:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


_PATIENCE_MS = 3_600_000  # an hour: the largest networks compile for minutes
_meetings = itertools.count()


def meet() -> None:
    """Waits until every process of the run has come here.

    Raises:
        UserError: another process has ended, or does not come within an hour.
    """
    try:
        _wait(f"meeting {next(_meetings)}", _PATIENCE_MS)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            "another process of this run has ended, or has not come along for an hour; "
            f"it may have said why: {first_line(error)}"
        ) from error


def compiled_by_all(function: Any) -> Callable[..., Any]:
    """A jitted function that no process begins before all of them have compiled it.

    One may take minutes longer than another, and CPUs that are to exchange something
    for the first time wait for each other for 30 seconds only.
    """
    if jax.process_count() == 1:
        return function
    compiled = False

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        nonlocal compiled
        if not compiled:
            function.lower(*arguments).compile()
            meet()
            compiled = True
        return function(*arguments)

    return call


def _wait(key: str, timeout_ms: int) -> None:
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _in_pod() -> bool:
    """Whether JAX would take a pod of Kubernetes that is no part of a Job for one."""
    return "KUBERNETES_SERVICE_HOST" in os.environ and not (
        {"JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES"} & os.environ.keys()
    )


def _method() -> str | None:
    """How JAX is to find the processes out; None for all ways that it tries by itself.

    Those that Open MPI has started since its version 5 are to ask MPI.

    Raises:
        UserError: a package is missing, without which each would run alone.
    """
    variables = os.environ.keys()
    if "JAX_COORDINATOR_ADDRESS" in variables:
        return None
    several = int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    if several and "OMPI_MCA_orte_hnp_uri" not in variables:
        _require("mpi4py", "mpi", "several that Open MPI has started")
        return "mpi4py"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= variables:
        if "TPU_WORKER_HOSTNAMES" not in variables:
            _require("kubernetes", "k8s", "an indexed Job of Kubernetes")
    return None


def _require(package: str, extra: str, group: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"this process is one of {group}, which find each other by {package}: pip "
            f"install 'dalle2_jax[{extra}]', or tell it --num_processes=1"
        )


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    if not re.fullmatch(r"\S+:\d+", coordinator):
        raise UserError(
            f"--coordinator={coordinator}: write HOST:PORT, as 10.0.0.1:1234"
        )
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must be from 0 to {num_processes - 1}, below "
            f"--num_processes={num_processes}"
        )


def _listen(coordinator: str) -> None:
    """A UserError where process 0 can't listen."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--coordinator={coordinator}: process 0 cannot listen at port {port}: "
                f"{first_line(error)}; give another one"
            ) from error


def _reach(coordinator: str, patience: float = 300.0, silence: float = 5.0) -> None:
    """Waits until process 0 listens, and says so after a silence.

    Raises:
        UserError: it doesn't in so many seconds.
    """
    host, _, port = coordinator.rpartition(":")
    start, told = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except (OSError, OverflowError) as error:
            waited, problem = time.monotonic() - start, first_line(error)
        if waited >= patience:
            raise UserError(
                f"--coordinator={coordinator}: process 0 is not there after "
                f"{waited:.0f} s: {problem}"
            )
        if waited >= silence and not told:
            told = True
            print(f"waiting for process 0 at {coordinator}: {problem}", file=sys.stderr)
        time.sleep(0.5)
