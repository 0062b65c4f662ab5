"""Train a stage, or all of them in order.

    dalle2 train --config=clip.py:small --workdir=runs/clip [--config.KEY=VALUE]

A run that was interrupted continues with the same command.

On several machines, which all see the workdir, run the same command on each. On a TPU
pod, under SLURM or Open MPI and in a Kubernetes Job they find each other; elsewhere
give each --coordinator, --num_processes and --process_id.
"""

import math
import os

from absl import flags
from ml_collections import ConfigDict

from dalle2_jax.errors import UserError
from dalle2_jax.flags import CONFIG_HELP, Flags

FLAGS = Flags()
_run = FLAGS.group("What to train")
CONFIG = _run(FLAGS.config, "config", None, CONFIG_HELP)
WORKDIR = _run(
    flags.DEFINE_string,
    "workdir",
    None,
    "Directory or gs://BUCKET/PATH for checkpoints, metrics, previews and the model.",
)
_several = FLAGS.group("Several processes, started by hand")
COORDINATOR = _several(
    flags.DEFINE_string, "coordinator", None, "HOST:PORT of process 0."
)
PROCESSES = _several(
    flags.DEFINE_integer,
    "num_processes",
    None,
    "Number of processes; 1 for this one alone.",
)
PROCESS = _several(
    flags.DEFINE_integer, "process_id", None, "Number of this process, from 0."
)


def train(config: ConfigDict, workdir: str | os.PathLike) -> bool:
    """Train what the config describes; return False if it was interrupted (and saved).

    A config with ``stages`` trains each in WORKDIR/STAGE, upon the model of the one
    before it; the last one's model is the whole, and is copied to WORKDIR/model.
    """
    # Imported late, so that a mistake in the flags is told at once.
    import jax

    from dalle2_jax import checkpoint, parts, storage
    from dalle2_jax.train import loop

    if "stages" in config:
        base = ""
        for name in config.stages:
            config[name].base = base
            if not train(config[name], storage.join(workdir, name)):
                return False
            base = storage.join(workdir, name, "model")
        if jax.process_index() == 0:
            checkpoint.copy(base, storage.join(workdir, "model"))
        return True
    stage = parts.make_stage(config)
    state = loop.train(
        stage,
        config,
        lambda step: stage.batches("train", step),
        lambda step: stage.batches("heldout", step),
        workdir,
    )
    return int(state.step) >= config.steps


def main() -> None:
    """Read the flags and train."""
    if CONFIG.value is None:
        raise UserError("no --config: give one, as --config=clip.py:small")
    if not WORKDIR.value:
        raise UserError("no --workdir: give a directory for this run")
    import jax

    from dalle2_jax.checks import values
    from dalle2_jax.runtime import use_compilation_cache
    from dalle2_jax.train import cluster, cpu

    values.check(CONFIG.value)
    cluster.join(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    cpu.keep_memory()
    use_compilation_cache()
    config = CONFIG.value
    stages = [config[name] for name in config.get("stages", ())] or [config]
    if not jax.distributed.is_initialized():
        cpu.use_cores(math.gcd(*(s.batch_size // max(s.accumulate, 1) for s in stages)))
    with cluster.leaving():
        train(config, WORKDIR.value)
