r"""Plan training or sampling on TPUs or GPUs that are not there.

    dalle2 plan --config=decoder.py:paper --topology=v5e:16x16 --config.mesh.fsdp=8

compiles the training step for those chips (with --sample, the sampling loop) and tells
what it takes of their memory, what it computes and sends, and how long a step would
take. That takes minutes and gigabytes of memory. --effort=none does not compile: it
tells in seconds the size of the state, and the arithmetic. --search tries meshes and
recomputation.

TPUs are v5e, v5p or v6e, as v5e:2x2 or v5p:4x4x4; compiling for them needs libtpu
(pip install libtpu), but no TPU. GPUs are a100, h100 or h200, as h100:8, and are
estimated from what the CPU's compiler makes of the program for as many devices.

A stage without --config.base is planned with the CLIP of --clip, or of the same row in
the clip.py beside its config.
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from dalle2_jax.errors import UserError
from dalle2_jax.flags import CONFIG_HELP, Flags, told

FLAGS = Flags()
_what = FLAGS.group("What to plan")
CONFIG = _what(FLAGS.config, "config", None, CONFIG_HELP)
CLIP = _what(
    FLAGS.config, "clip", None, "The CLIP that the stage builds on, as clip.py:small."
)
TOPOLOGY = _what(
    flags.DEFINE_string, "topology", "", "The devices, as v5e:16x16 or h100:8."
)
SAMPLE = _what(
    flags.DEFINE_boolean, "sample", False, "Plan sampling in place of training."
)
PICTURES = _what(
    flags.DEFINE_integer,
    "pictures",
    0,
    "Number of pictures sampled at once; 0 for one per device.",
    0,
)
_how = FLAGS.group("How")
SEARCH = _how(
    flags.DEFINE_boolean, "search", False, "Try meshes, with and without remat."
)
EFFORT = _how(
    flags.DEFINE_enum,
    "effort",
    "low",
    ["none", "low", "full"],
    "Effort of the compiler; none does not compile.",
)
JSON = _how(flags.DEFINE_boolean, "json", False, "Print the plan as JSON.")


def clip_net(config: ConfigDict) -> dict[str, Any] | None:
    """Return the net of the CLIP that a stage builds on; None for upsamplers.

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
        file = config_flags.get_config_filename(FLAGS.values["config"])
        path, _, row = file.partition(":")
        try:
            FLAGS.values["clip"].parse(f"{Path(path).with_name('clip.py')}:{row}")
        except flags.IllegalFlagValueError as error:
            raise UserError(
                f"{file} doesn't say which CLIP it builds on: give one, as "
                "--clip=clip.py:vit_l_14, or a trained one with --config.base"
            ) from error
    return parts.clip.arguments(CLIP.value, None)


def main() -> None:
    """Read the flags, compile, and print the plan."""
    if CONFIG.value is None:
        raise UserError("no --config: give one, as --config=decoder.py:paper")
    if not TOPOLOGY.value:
        raise UserError("no --topology: give one, as --topology=v5e:16x16 or h100:8")
    if SEARCH.value and (SAMPLE.value or EFFORT.value == "none"):
        raise UserError("--search compiles training: no --sample or --effort=none")
    config = CONFIG.value
    if "stages" in config:
        raise UserError("this config is of several stages: plan each by its own")
    import jax

    from dalle2_jax.checks import values
    from dalle2_jax.planning import estimate
    from dalle2_jax.planning.topology import parse

    values.check(config)
    topology = parse(TOPOLOGY.value)
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
        told_of = found._asdict() | {"roofline": found.roofline._asdict()}
        print(json.dumps(told_of | {"days": found.days}, indent=1))
    else:
        print(estimate.table(found, topology.chip))
