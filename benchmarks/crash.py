"""What kill -9 costs a run: killed again and again, it must end as if it never was.

    python benchmarks/crash.py [--kills=20] [--seed=0]

trains configs/clip.py:tiny in one process and in two, kills all of them or one at a
random moment, half of the time while a checkpoint is being written, and starts them
again until the run is done. Each start must resume from the last complete checkpoint,
and the state at the end must be, bit for bit, that of a run which nobody killed. A line
of the table for each kind of kill; exits with 1 if a state differs.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dalle2_jax.train import checkpoints

ROOT = Path(__file__).parents[1]
SAVE_EVERY = 5
LIMIT_S = 300  # for anything to happen
CASES = [(1, "all"), (2, "all"), (2, "one")]  # processes, and which are killed


def start(workdir: Path, processes: int, steps: int) -> list[subprocess.Popen]:
    """Starts or resumes the run, as a user does; what it says goes to WORKDIR.log."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [
        *(sys.executable, "train.py", "--config=configs/clip.py:tiny"),
        f"--workdir={workdir}",
        f"--config.steps={steps}",
        f"--config.save_every={SAVE_EVERY}",
        "--config.log_every=1",
        "--config.eval_every=0",
        "--config.preview_every=0",
    ]
    found = []
    for i in range(processes):
        flags = [f"--num_processes={processes}"]
        if processes > 1:
            flags += [f"--coordinator={coordinator}", f"--process_id={i}"]
        with open(f"{workdir}.log", "w" if i == 0 else "a") as log:
            found.append(
                subprocess.Popen(
                    [*command, *flags],
                    cwd=ROOT,
                    env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
                    stdout=log,
                    stderr=log,
                )
            )
    return found


def saved(workdir: Path) -> int:
    """The step of the last complete checkpoint, 0 if there is none."""
    names = (path.name for path in (workdir / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def unfinished(workdir: Path) -> set[int]:
    """Inodes of the checkpoints being written, or that were when a run was killed."""
    found = (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")
    with contextlib.suppress(FileNotFoundError):  # finished between the two
        return {path.stat().st_ino for path in found}
    return set()


def trained(workdir: Path) -> int:
    """The last step in the log."""
    log = workdir / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except ValueError:  # is being written
            continue
    return 0


def wait(until: Callable[[], bool], processes: list[subprocess.Popen]) -> bool:
    """Waits; False if the processes end before."""
    end = time.monotonic() + LIMIT_S
    while not until():
        if any(process.poll() is not None for process in processes):
            return False
        if time.monotonic() > end:
            raise TimeoutError(f"nothing happened in {LIMIT_S} s")
        time.sleep(0.002)
    return True


def state(workdir: Path) -> Any:
    """What the last checkpoint holds."""
    here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    with checkpoints.Run(workdir / "checkpoints") as run:
        shapes = run.shapes()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes
        )
        return jax.device_get(run.restore(abstract))


def same(one: Any, other: Any) -> bool:
    equal = jax.tree.map(lambda x, y: np.array_equal(x, y), one, other)
    return all(jax.tree.leaves(equal))


def run_to_end(workdir: Path, processes: int, steps: int) -> None:
    codes = [p.wait(timeout=LIMIT_S) for p in start(workdir, processes, steps)]
    if any(codes):
        raise RuntimeError(Path(f"{workdir}.log").read_text())


def check_resumed(workdir: Path, step: int) -> None:
    said = re.search(r"resuming from step (\d+)", Path(f"{workdir}.log").read_text())
    found = int(said[1]) if said else 0
    if found != step:
        raise AssertionError(f"resumed from step {found}, and {step} was saved")


def crash(
    workdir: Path, processes: int, who: str, kills: int, steps: int, seed: int
) -> str:
    """Kills a run again and again, and lets it end; a row of the table but for its end.

    Raises:
        AssertionError: it did not resume from the last complete checkpoint.
    """
    rng = np.random.default_rng([seed, processes, who == "one"])
    resumed, lost, survived = [], [], []
    torn = 0
    for kill in range(kills):
        before = saved(workdir)
        # The steps in the log are then those of this start.
        (workdir / "metrics.jsonl").unlink(missing_ok=True)
        left = unfinished(workdir)  # by earlier kills; orbax lets it lie
        group = start(workdir, processes, steps)
        # Far enough for saves to be complete: the next one waits for the one before.
        target = before + rng.integers(1, 4 * SAVE_EVERY)
        alive = wait(lambda n=target: trained(workdir) >= n, group)
        if alive and kill % 2:
            alive = wait(lambda old=left: bool(unfinished(workdir) - old), group)
        if not alive:
            raise RuntimeError(Path(f"{workdir}.log").read_text())
        check_resumed(workdir, before)
        time.sleep(rng.uniform(0, 0.1))
        chosen = group if who == "all" else [group[rng.integers(processes)]]
        for process in chosen:
            process.send_signal(signal.SIGKILL)
        then = time.monotonic()
        for process in group:  # one that is left alone ends by itself
            process.wait(timeout=LIMIT_S)
        if who == "one":
            survived.append(time.monotonic() - then)
        torn += bool(unfinished(workdir) - left)
        resumed.append(saved(workdir))
        lost.append(trained(workdir) - resumed[-1])
        print(f"  killed at {trained(workdir)}, saved {resumed[-1]}", flush=True)
    run_to_end(workdir, processes, steps)
    check_resumed(workdir, resumed[-1])
    cells = [
        f"{processes}",
        who,
        f"{kills}",
        f"{torn}",
        ", ".join(map(str, resumed)),
        f"{np.mean(lost):.1f}, at most {max(lost)}",
        f"{max(survived):.0f} s" if survived else "–",
    ]
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # A kill comes at most 5 saves after the one before, and a little later.
    steps = 6 * SAVE_EVERY * (arguments.kills + 1)
    rows, good = [], True
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for processes, who in CASES:
            whole = folder / f"whole_{processes}"
            if not whole.exists():
                run_to_end(whole, processes, steps)
            workdir = folder / f"{processes}_{who}"
            print(f"{processes} processes, kills of {who}:", flush=True)
            row = crash(workdir, processes, who, arguments.kills, steps, arguments.seed)
            equal = same(state(workdir), state(whole))
            good &= equal
            rows.append(f"| {row} | {'equal' if equal else 'DIFFERENT'} |")
    head = "processes | killed | kills | while saving | resumed from | steps lost"
    print(f"\n| {head} | the other ended after | state at the end |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    sys.exit(not good)


if __name__ == "__main__":
    main()
