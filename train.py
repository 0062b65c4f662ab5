"""Trains a stage, or all of them in order.

python train.py --config=configs/STAGE.py:SIZE --workdir=DIR [--config.key=value]

On several machines, which all see the workdir, the same command runs on each: on a TPU
pod, under SLURM or Open MPI and in a Kubernetes Job they find each other, elsewhere
they are told --coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

import math
import os

from absl import flags
from ml_collections import ConfigDict, config_flags

from dalle2_jax.errors import UserError
from dalle2_jax.flags import run

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/STAGE.py:SIZE; --config.key=value changes a key."
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where checkpoints, metrics, previews and the model go; gs://BUCKET/PATH, too.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where several are started by hand."
)
PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many there are; 1 for this one alone, wherever it is."
)
PROCESS = flags.DEFINE_integer("process_id", None, "Which this is, from 0.")


def train(config: ConfigDict, workdir: str | os.PathLike) -> bool:
    """Trains what the config describes; False if it was interrupted (and saved).

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
    if CONFIG.value is None:
        raise UserError("no --config: give one, as --config=configs/clip.py:small")
    if not WORKDIR.value:
        raise UserError("no --workdir: give a directory for this run")
    import jax

    from dalle2_jax.checks import values
    from dalle2_jax.train import cluster, cpu
    from dalle2_jax.train.cache import use_compilation_cache

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


if __name__ == "__main__":
    run(main)
