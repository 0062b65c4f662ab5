"""Whether train.py would accept a config, now and at its first preview."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dalle2_jax import parts
from dalle2_jax.checks.finding import Finding, ok
from dalle2_jax.data.examples import Source
from dalle2_jax.errors import UserError, first_line
from dalle2_jax.train import log, loop, optim, settings, update
from dalle2_jax.train import mesh as meshes

T = TypeVar("T")


class Setup(NamedTuple):
    """What a config describes; what it describes wrongly is None.

    Attributes:
      source: the examples to train on.
      stage: as `parts.make_stage` gives it.
      mesh: over the devices that are here.
      step: the training step.
      batch: its first, on the host.
      traced: the step, to be compiled.
      arguments: the state, what is frozen and a batch, as shapes.
    """

    source: Source | None = None
    stage: parts.Stage | None = None
    mesh: Mesh | None = None
    step: update.Step | None = None
    batch: dict[str, np.ndarray] | None = None
    traced: Any = None
    arguments: tuple[Any, Any, Any] | None = None


def check(config: ConfigDict, load: parts.Load) -> tuple[list[Finding], Setup]:
    """Builds all that training builds but its state, and traces all that it compiles.

    Args:
      config: of one stage.
      load: reads the models that the config names.

    Returns:
      A problem for each error that train.py would stop with, at its start or later, or
      else that there is none; and what could be built.
    """
    findings: list[Finding] = []

    def attempt(name: str, function: Callable[[], T]) -> T | None:
        try:
            return function()
        except UserError as error:
            found = str(error)
        # A network's arguments are checked by what it is built of, with any exception.
        except Exception as error:
            found = f"{type(error).__name__}: {first_line(error)}"
        if found not in (finding.found for finding in findings):
            findings.append(Finding("problem", name, found))
        return None

    for problem in settings.problems(config):
        findings.append(Finding("problem", "config", problem))
    attempt("config", lambda: parts.check(config))
    if findings:
        return findings, Setup()
    mesh = attempt("mesh", lambda: meshes.make(**config.mesh))
    if mesh is not None:
        attempt("batch", lambda: loop.check_batch_size(config, mesh))
    optimizer = attempt("optimiser", lambda: optim.make(config.steps, **config.optim))
    attempt("log", lambda: log.check_writers(config.tensorboard, config.wandb))
    open_source = functools.partial(parts.stage.open_source, config)
    source = attempt("data", lambda: open_source("train"))
    attempt("data", lambda: open_source("heldout"))
    setup = Setup(source=source, mesh=mesh)
    stage = (
        None
        if source is None
        else attempt("stage", lambda: parts.make_stage(config, load))
    )
    if stage is None or mesh is None or optimizer is None or _failed("batch", findings):
        return findings, setup._replace(stage=stage)

    def trace(batch: dict[str, np.ndarray], heldout: dict[str, np.ndarray]) -> Any:
        step = update.make_step(stage, config, mesh, optimizer)
        arguments = update.abstract_arguments(step, stage, config, mesh, batch)
        seen = step.abstract.ema, stage.frozen, heldout, jax.random.key(0)
        jax.eval_shape(stage.metrics, *seen)
        if config.preview_every:
            jax.eval_shape(stage.preview, *seen)
        return step, step.update.trace(*arguments, np.int32(0)), arguments

    batch = attempt("data", lambda: first_batch(stage, "train"))
    heldout = attempt("data", lambda: first_batch(stage, "heldout"))
    if batch is None or heldout is None:
        return findings, setup._replace(stage=stage)
    with jax.set_mesh(mesh):
        built = attempt("stage", lambda: trace(batch, heldout))
    if built is None:
        return findings, setup._replace(stage=stage)
    step, traced, arguments = built
    if not findings:
        params = sum(x.size for x in jax.tree.leaves(step.abstract.params))
        kind = mesh.devices.flat[0].device_kind
        found = (
            f"{stage.name}, {params:,} parameters to train, batch {config.batch_size}, "
            f"on {mesh.size} x {kind}"
        )
        findings.append(ok("config", found))
    return findings, Setup(source, stage, mesh, step, batch, traced, arguments)


def first_batch(stage: parts.Stage, split: str) -> dict[str, np.ndarray]:
    """The first of a split, read and no other."""
    batches = stage.batches(split, 0)
    try:
        return next(batches)
    finally:
        batches.close()


def _failed(check: str, findings: list[Finding]) -> bool:
    return any(finding.check == check for finding in findings)
