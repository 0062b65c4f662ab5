"""Checks a config, its data and its speed before a long run.

python -m dalle2_jax.doctor --config=configs/decoder.py:small [--config.key=value]

builds what train.py would build of the same flags, on the devices that are here, and
says in a line for each check that all is well ("ok"), that something could be better
("warning"), or that a run would fail or be in vain ("problem"), and what to do:

    config     what train.py would refuse, at its start or at its first preview
    memory     what a training step takes of a device, as the compiler says
    data       how many examples of a sample can be used; sizes, blanks, duplicates;
               captions; embeddings against the statistics of the base
    overfit    whether the loss of a few examples falls, see checks/learning.py, and
               whether all params have gradients
    speed      batches a second of the data alone, steps a second of the devices alone

It takes minutes, and writes nothing. The exit code is 0, or 1 if there is a problem.
"""

import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from dalle2_jax.checks.finding import Finding
from dalle2_jax.errors import UserError, first_line
from dalle2_jax.flags import run
from dalle2_jax.planning.estimate import told

PARTS = ("memory", "data", "overfit", "speed")

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/STAGE.py:SIZE; --config.key=value changes a key."
)
EXAMPLES = flags.DEFINE_integer("examples", 256, "Of the data that are looked at.", 1)
OVERFIT_STEPS = flags.DEFINE_integer("overfit_steps", 100, "On one batch.", 10)
SKIP = flags.DEFINE_list("skip", [], f"What not to check, of {', '.join(PARTS)}.")
JSON = flags.DEFINE_boolean("json", False, "Print the findings as JSON.")


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
      skip: of PARTS.
    """
    import jax

    from dalle2_jax import checkpoint
    from dalle2_jax.checks import config as checks
    from dalle2_jax.checks import data, memory
    from dalle2_jax.train import mesh as meshes

    def wanted(part: str) -> bool:
        return part not in skip

    load = functools.cache(checkpoint.load)
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
            there = memory.limit(setup.mesh.devices.ravel().tolist())
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
    import jax

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
    import jax

    from dalle2_jax import stages
    from dalle2_jax.checks import learning

    stage, mesh = setup.stage, setup.mesh
    if config.get("loss_chunk"):  # which need not divide so few rows
        changed = config.copy_and_resolve_references()
        changed.loss_chunk = 0
        stage = stages.make(changed, load)
    rows = math.ceil(learning.EXAMPLES / mesh.size) * mesh.size
    with contextlib.closing(stage.batches("train", 0)) as batches:
        batch = learning.fixed_batch(batches, rows)
    with jax.set_mesh(mesh):
        found = learning.overfit(stage, config, mesh, frozen, batch, steps)
    return learning.judge(config.stage, found, starts=stage.start is None)


def time(config: ConfigDict, setup: Any, compiled: Any, frozen: Any) -> list[Finding]:
    """Measures the data alone, then the compiled step alone."""
    import jax

    from dalle2_jax.checks import speed
    from dalle2_jax.train import cpu, measure
    from dalle2_jax.train import mesh as meshes

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


def main() -> None:
    if CONFIG.value is None:
        raise UserError("no --config: give one, as --config=configs/decoder.py:small")
    config = CONFIG.value
    if "stages" in config:
        raise UserError("this config is of several stages: check each by its own")
    if unknown := [name for name in SKIP.value if name not in PARTS]:
        raise UserError(f"--skip={unknown[0]}: choose of {', '.join(PARTS)}")

    from dalle2_jax.train import cpu

    cpu.keep_memory()
    cpu.use_cores(config.batch_size // max(config.accumulate, 1))
    findings = []
    for finding in examine(
        config,
        examples=EXAMPLES.value,
        overfit_steps=OVERFIT_STEPS.value,
        skip=SKIP.value,
    ):
        findings.append(finding)
        if not JSON.value:
            print(finding, flush=True)
    if JSON.value:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    if any(finding.level == "problem" for finding in findings):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
