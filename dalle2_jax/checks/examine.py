"""All checks of a config, one after the other."""

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from dalle2_jax import parts
from dalle2_jax.checks import config as checks
from dalle2_jax.checks import data, learning, memory, speed
from dalle2_jax.checks.finding import Finding
from dalle2_jax.errors import UserError, first_line
from dalle2_jax.flags import told
from dalle2_jax.train import cpu, measure
from dalle2_jax.train import mesh as meshes
from dalle2_jax.train.memory import limit


def examine(
    config: ConfigDict,
    *,
    examples: int = 256,
    overfit_steps: int = 100,
    skip: Collection[str] = (),
) -> Iterator[Finding]:
    """The findings of all checks, as they come.

    Args:
      config: of one stage.
      examples: how many of the data to look at.
      overfit_steps: on one batch.
      skip: of checks.finding.PARTS.
    """

    def wanted(part: str) -> bool:
        return part not in skip

    load = functools.cache(parts.load)
    with told("building the stage"):
        findings, setup = checks.check(config, load)
    yield from findings
    if wanted("data") and setup.source is not None:
        said = {finding.found for finding in findings}  # as of a base that isn't there
        with told(f"looking at {examples} examples"):
            findings = attempt(
                "data",
                lambda: data.check(config, setup.source, setup.stage, load, examples),
            )
        yield from (finding for finding in findings if finding.found not in said)
    if setup.traced is None or set(skip) >= {"memory", "overfit", "speed"}:
        return
    compiled = None
    if wanted("memory") or wanted("speed"):
        with told("compiling the training step"), jax.set_mesh(setup.mesh):
            there = limit(setup.mesh.local_devices)
            finding, compiled = memory.check(setup.traced, setup.arguments, there)
        if wanted("memory") or compiled is None:
            yield finding
        if finding.level == "problem":
            return
    frozen = meshes.put(setup.stage.frozen, setup.mesh)
    if wanted("overfit"):
        with told(f"training {overfit_steps} steps on one batch"):
            findings = attempt(
                "overfit", lambda: learn(config, setup, load, frozen, overfit_steps)
            )
        yield from findings
    if wanted("speed"):
        with told("measuring the data and the step"):
            findings = attempt("speed", lambda: time(config, setup, compiled, frozen))
        yield from findings


def attempt(check: str, function: Callable[[], list[Finding]]) -> list[Finding]:
    """What a check finds; that it can't be done is a problem."""
    try:
        return function()
    except UserError as error:
        return [Finding("problem", check, str(error))]
    except jax.errors.JaxRuntimeError as error:  # no memory is left, most likely
        return [Finding("problem", check, first_line(error))]


def learn(
    config: ConfigDict, setup: Any, load: Any, frozen: Any, steps: int
) -> list[Finding]:
    """Overfits a batch that the devices can share."""
    stage, mesh = setup.stage, setup.mesh
    if config.get("loss_chunk"):  # which need not divide so few rows
        changed = config.copy_and_resolve_references()
        changed.loss_chunk = 0
        stage = parts.make_stage(changed, load)
    rows = math.ceil(learning.EXAMPLES / mesh.size) * mesh.size
    with contextlib.closing(stage.batches("train", 0)) as batches:
        batch = learning.fixed_batch(batches, rows)
    with jax.set_mesh(mesh):
        found = learning.overfit(stage, config, mesh, frozen, batch, steps)
    return learning.judge(config.stage, found, starts=stage.start is None)


def time(config: ConfigDict, setup: Any, compiled: Any, frozen: Any) -> list[Finding]:
    """Measures the data alone, then the compiled step alone."""
    ahead = max(config.data.threads, 1) * max(config.data.workers, 1)
    with contextlib.closing(setup.stage.batches("train", 0)) as batches:
        times = speed.arrivals(batches, speed.SECONDS, ahead)
    with jax.set_mesh(setup.mesh):
        batch = meshes.put_batch(setup.batch, setup.mesh, config.accumulate)
        least = measure.least_seconds(setup.step.update, *setup.arguments)
        steps = speed.step_rate(
            compiled, setup.step.begin(), frozen, batch, speed.SECONDS
        )
    return [
        speed.judge(
            speed.rate(times, ahead),
            steps,
            batch_size=config.batch_size,
            wanted=config.steps,
            workers=config.data.workers,
            threads=config.data.threads,
            cores=cpu.count_cores(),
            least=least,
        )
    ]
