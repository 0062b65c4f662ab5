"""Whether the data keeps up with the devices."""

import datetime
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dalle2_jax.checks.finding import Finding, ok

SECONDS = 10.0  # that each measurement takes, about
MOST = 200  # batches or steps of one


def arrivals(batches: Iterator[Any], seconds: float, ahead: int) -> list[float]:
    """When batches come, in seconds from the first request, if none is waited with.

    Args:
      seconds: how long to read, but never less than `ahead` and one more.
    """
    start, times = time.monotonic(), []
    while len(times) <= ahead or (times[-1] < seconds and len(times) < MOST):
        next(batches)
        times.append(time.monotonic() - start)
    return times


def rate(times: Sequence[float], ahead: int) -> float:
    """Batches a second, of arrivals, once as many as are made at a time have come."""
    return (len(times) - ahead) / max(times[-1] - times[ahead - 1], 1e-9)


def step_rate(
    update: Any, state: Any, frozen: Any, batch: Any, seconds: float
) -> float:
    """Steps a second of a jitted training step on one batch, all on the devices.

    As in training, one step is in flight while the next is asked for.

    Args:
      update: of `train.update.Step`; it is given the state to be changed in place.
    """
    state, values = update(state, frozen, batch, np.int32(0))
    jax.block_until_ready(values)
    start, done = time.monotonic(), 0
    while not done or (time.monotonic() - start < seconds and done < MOST):
        done, before = done + 1, values
        state, values = update(state, frozen, batch, np.int32(done))
        jax.block_until_ready(before)
    jax.block_until_ready(values)
    return done / (time.monotonic() - start)


def judge(
    data: float,
    steps: float,
    *,
    batch_size: int,
    wanted: int,
    workers: int,
    threads: int,
    cores: int,
    least: float | None = None,
) -> Finding:
    """Says which of the two is the slower, and what to do.

    Args:
      data, steps: batches and steps a second.
      wanted: steps of the run.
      workers, threads: as the config has them.
      cores: of this machine's CPU.
      least: seconds of a step at the devices' peak, where that is known.
    """
    duration = datetime.timedelta(seconds=math.ceil(wanted / min(data, steps)))
    peak = "" if least is None else f", at {steps * least:.0%} of their peak"
    found = (
        f"the data gives {data:.3g} batches/s ({data * batch_size:,.0f} pictures/s), "
        f"the devices take {steps:.3g}{peak}; {wanted:,} steps need about {duration}"
    )
    if data >= steps:
        return ok("speed", f"{found}; the devices are the slower")
    needed = math.ceil(max(workers, 1) * steps / data * 1.2)
    if workers >= cores:
        remedy = (
            "the data is the slower, and all cores are at work on it; store smaller "
            "pictures or, for the later stages, embeddings (dalle2 embed)"
        )
    else:
        number = min(max(needed, workers + 1), cores)
        remedy = (
            f"the data is the slower; --config.data.workers={number} in place of "
            f"{workers}, --config.data.threads=1 in place of {threads}"
        )
    return Finding("warning", "speed", found, remedy)
