"""Plans training or sampling on TPUs or GPUs that are not there.

python -m dalle2_jax.plan --config=configs/decoder.py:paper --topology=v5e:16x16 \
    --config.mesh.fsdp=8

compiles the training step for those chips (with --sample, the sampling loop) and tells
what it takes of their memory, what it computes and sends, and how long a step would
take. That takes minutes and gigabytes of memory; --effort=none does not compile, and
tells in seconds what the state takes and the arithmetic. --search tries meshes and
recomputation.

TPUs are v5e, v5p or v6e, as v5e:2x2 or v5p:4x4x4; compiling for them needs libtpu
(pip install libtpu), but no TPU. GPUs are a100, h100 or h200, as h100:8, and are
estimated from what the CPU's compiler makes of the program for as many devices.

A stage without --config.base is planned upon the CLIP of the same row in the clip.py
beside its config, or the one of --clip.
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from dalle2_jax.errors import UserError
from dalle2_jax.flags import run, told
from dalle2_jax.planning import estimate
from dalle2_jax.planning.topology import parse

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/STAGE.py:SIZE; --config.key=value changes a key."
)
CLIP = config_flags.DEFINE_config_file(
    "clip", None, "configs/clip.py:SIZE, the CLIP that the stage builds on."
)
TOPOLOGY = flags.DEFINE_string("topology", "", "v5e:16x16, or h100:8.")
SAMPLE = flags.DEFINE_boolean("sample", False, "Plan sampling in place of training.")
PICTURES = flags.DEFINE_integer("pictures", 0, "Sampled at once; 0 is one a device.")
SEARCH = flags.DEFINE_boolean("search", False, "Try meshes, with and without remat.")
EFFORT = flags.DEFINE_enum("effort", "low", ["none", "low", "full"], "Of the compiler.")
JSON = flags.DEFINE_boolean("json", False, "Print the plan as JSON.")


def clip_net(config: ConfigDict) -> dict[str, Any] | None:
    """The net of the CLIP that a stage builds on; None for upsamplers.

    It is the stage's own, that of --clip, or of the base, or of the same row of the
    clip.py beside the config.

    Raises:
      UserError: there is none of these.
    """
    from dalle2_jax import parts

    if config.stage == "upsampler":
        return None
    if config.stage == "clip":
        return parts.clip.arguments(config, None)
    if CLIP.value is None and (config.base or config.init_from):
        base, _ = parts.stage.load_models(
            config, lambda path: parts.load(path, only=("clip",))
        )
        return base.config["parts"]["clip"]["net"]
    if CLIP.value is None:
        file = config_flags.get_config_filename(flags.FLAGS["config"])
        path, _, row = file.partition(":")
        try:
            flags.FLAGS["clip"].parse(f"{Path(path).with_name('clip.py')}:{row}")
        except flags.IllegalFlagValueError as error:
            raise UserError(
                f"{file} doesn't say which CLIP it builds on: give one, as "
                "--clip=configs/clip.py:vit_l_14, or a trained one with --config.base"
            ) from error
    return parts.clip.arguments(CLIP.value, None)


def main() -> None:
    """The command: reads the flags, compiles, and prints the plan."""
    if CONFIG.value is None:
        raise UserError("no --config: give one, as --config=configs/decoder.py:paper")
    if not TOPOLOGY.value:
        raise UserError("no --topology: give one, as --topology=v5e:16x16 or h100:8")
    if SEARCH.value and (SAMPLE.value or EFFORT.value == "none"):
        raise UserError("--search compiles training: no --sample or --effort=none")
    config, topology = CONFIG.value, parse(TOPOLOGY.value)
    if "stages" in config:
        raise UserError("this config is of several stages: plan each by its own")
    import jax

    from dalle2_jax.checks import values

    values.check(config)

    # No accelerator that is here is touched. Of one CPU device alone programs are
    # written otherwise (see nn.layers).
    jax.config.update("jax_platforms", "cpu")
    jax.config.update(
        "jax_num_cpu_devices", max(2, 0 if topology.tpu else topology.count)
    )
    clip = clip_net(config)
    where = f"{topology.count} x {topology.chip.name}"
    if not topology.tpu:
        print(
            "what follows is estimated from the CPU's compiler, which shares memory "
            "less well than a GPU's and has no fused attention",
            file=sys.stderr,
        )
    if SEARCH.value:
        plans = []
        with told(f"planning {config.stage} for {where}, minutes for each line"):
            for found in estimate.search(config, clip, topology, EFFORT.value):
                plans.append(found)
                print(estimate.row(found), flush=True)
        if (chosen := estimate.best(plans)) is None:
            raise UserError(
                f"nothing fits {topology.name}: give more devices, a smaller "
                "--config.batch_size, or a larger --config.accumulate"
            )
        print(f"\nrecommended: {estimate.row(chosen)}\n")
        print(estimate.table(chosen, topology.chip))
        return
    pictures = (PICTURES.value or topology.count) if SAMPLE.value else None
    compiling = f"compiling {config.stage} for {where}: minutes, gigabytes of memory"
    planning = f"planning {config.stage} for {where}"
    with told(planning if EFFORT.value == "none" else compiling):
        found = estimate.plan(
            config, clip, topology, pictures=pictures, effort=EFFORT.value
        )
    if JSON.value:
        values = found._asdict() | {"roofline": found.roofline._asdict()}
        print(json.dumps(values | {"days": found.days}, indent=1))
    else:
        print(estimate.table(found, topology.chip))


if __name__ == "__main__":
    run(main)
