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

import contextlib
import json
import math
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from dalle2_jax import cost
from dalle2_jax.errors import UserError
from dalle2_jax.flags import run
from dalle2_jax.topology import Chip, Topology, devices, parse

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

# Compilers take long over how fast a program is and how little memory it takes.
LOW_EFFORT = {
    "tpu": {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0},
    "cpu": {"xla_backend_optimization_level": 0},
}
VERDICTS = {True: "it fits", False: "it does not fit", None: "it may fit"}
WIDTHS = (1, 2, 4, 8, 16, 32)  # of fsdp, that --search tries


class Plan(NamedTuple):
    """What a program takes of each device; in bytes, and seconds a step.

    Of a program that isn't compiled, as it doesn't fit or for no effort, no more is
    known of its memory than that it takes `needed` at least, and the times are those of
    its arithmetic alone.

    Attributes:
      parameters: trained, or sampled with.
      examples: in a step, on all devices.
      steps: of the run; 1 in sampling.
      fits: whether its memory suffices; None if it may.
      needed, limit: memory at its peak, and what there is.
      arguments, outputs, temporary: what it is made of; outputs without those that take
        an argument's place.
      flops: on all devices, with what is recomputed.
      touched: read from and written to the device's memory.
      sent: over the network, by kind of collective.
      roofline: the shortest that a step can take.
      compiler_seconds: the compiler's own estimate, at the peaks, without operations
        that it has none of; None if it gives none.
      seconds: the estimate, the longer of the two.
      utilisation: of the devices' peak, at that.
      compiled_in: seconds that planning took.
    """

    program: str
    topology: str
    mesh: dict[str, int]
    remat: bool
    parameters: int
    examples: int
    steps: int
    fits: bool | None
    needed: float
    limit: float
    arguments: int
    outputs: int | None
    temporary: int | None
    flops: int
    touched: float | None
    sent: dict[str, float] | None
    roofline: cost.Roofline
    compiler_seconds: float | None
    seconds: float
    utilisation: float
    compiled_in: float

    @property
    def days(self) -> float:
        """Of the whole run."""
        return self.steps * self.seconds / 86_400


def plan(
    config: ConfigDict,
    clip: Mapping[str, Any] | None,
    topology: Topology,
    *,
    pictures: int | None = None,
    effort: str = "low",
) -> Plan:
    """Compiles a program and tells what it takes.

    Args:
      config: of the stage.
      clip: arguments of the CLIP that it builds on, or None.
      pictures: how many to sample at once; None plans training.
      effort: of the compiler, "low" or "full"; "none" leaves it out.

    Raises:
      UserError: a config that can't be trained or sampled there.
    """
    import jax

    from dalle2_jax import blueprint, xla
    from dalle2_jax.train import mesh as meshes

    start = time.monotonic()
    chip = topology.chip
    mesh = meshes.make(**config.mesh, devices=devices(topology))
    own = {} if topology.tpu else xla.compiler_options()
    if pictures is None:
        program = blueprint.train(config, clip, mesh, own)
    else:
        program = blueprint.sample(config, clip, mesh, own, pictures)
    flops = cost.count_flops(program.traced.jaxpr)
    arguments = sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(program.arguments)
    )
    compiled, needed, limit = None, arguments, chip.hbm
    if needed <= limit and effort != "none":
        try:
            compiled = program.traced.lower().compile(
                LOW_EFFORT["tpu" if topology.tpu else "cpu"] if effort == "low" else {}
            )
        except jax.errors.JaxRuntimeError as error:
            needed, limit = exceeded(error)
    outputs = temporary = touched = sent = compiler_seconds = None
    if compiled is not None:
        memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
        temporary = memory.temp_size_in_bytes
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        needed = memory.argument_size_in_bytes + outputs + temporary
        # The compiler counts what is in a loop once.
        touched = costs["bytes accessed"] * program.repeats
        sent = cost.collective_bytes(compiled.as_text(), mesh.size)
        # Each operation that the compiler knows no time of takes a second off.
        optimal = costs.get("optimal_seconds", -1.0)
        compiler_seconds = optimal * program.repeats if optimal > 0 else None
    roofline = cost.roofline(
        chip,
        flops=flops / mesh.size,
        hbm_bytes=touched or 0,
        network_bytes=sum((sent or {}).values()),
    )
    seconds = max(roofline.seconds, compiler_seconds or 0)
    return Plan(
        program=f"{'training' if pictures is None else 'sampling'} {program.name}",
        topology=topology.name,
        mesh=dict(mesh.shape),
        remat=any(remat(config.net)),
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(program.params)),
        examples=program.examples,
        steps=config.steps if pictures is None else 1,
        fits=None if needed <= limit and compiled is None else needed <= limit,
        needed=needed,
        limit=limit,
        arguments=arguments,
        outputs=outputs,
        temporary=temporary,
        flops=flops,
        touched=touched,
        sent=sent,
        roofline=roofline,
        compiler_seconds=compiler_seconds,
        seconds=seconds,
        utilisation=flops / mesh.size / chip.flops / seconds,
        compiled_in=time.monotonic() - start,
    )


def exceeded(error: Exception) -> tuple[float, float]:
    """Memory that a program would take and that there is, by a TPU's compiler.

    Raises:
      The error, if it is about something else.
    """
    size = r"\(?([\d.]+)([KMGT])\)?"
    match = re.search(
        rf"{size} exceeds available HBM {size}|Used {size} of {size} hbm", str(error)
    )
    if match is None:
        raise error
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    needed, a, limit, b = filter(None, match.groups())
    return float(needed) * unit[a], float(limit) * unit[b]


def remat(section: ConfigDict, set_to: bool | None = None) -> list[bool]:
    """Whether each network of a config's section recomputes its blocks, or shall."""
    found = []
    for name, value in section.items():
        if isinstance(value, ConfigDict):
            found += remat(value, set_to)
        elif name == "remat":
            section[name] = value if set_to is None else set_to
            found.append(section[name])
    return found


def search(
    config: ConfigDict,
    clip: Mapping[str, Any] | None,
    topology: Topology,
    effort: str,
) -> Iterator[Plan]:
    """Plans of training on several meshes, each with recomputation and without.

    Of the meshes that fit, only the two with the narrowest fsdp: those beyond send more
    and gain nothing.
    """
    fitting = 0
    for fsdp in WIDTHS:
        if topology.count % fsdp or fitting == 2:
            continue
        config.mesh.update(dict(data=-1, fsdp=fsdp))
        remat(config.net, True)
        yield (first := plan(config, clip, topology, effort=effort))
        if first.fits:
            fitting += 1
            remat(config.net, False)
            yield plan(config, clip, topology, effort=effort)


def best(plans: Sequence[Plan]) -> Plan | None:
    """The fastest of the plans that fit; of equals that with the most memory left."""
    return min(
        (p for p in plans if p.fits), key=lambda p: (p.seconds, p.needed), default=None
    )


def table(plan: Plan, chip: Chip) -> str:
    """The plan for people, a line for each fact."""

    def size(count: float | int | None) -> str:
        """Of bytes."""
        if count is None:
            return "not known"
        power = min(3, max(0, int(math.log(max(count, 1), 1024))))
        return f"{count / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"

    mesh = " x ".join(f"{name} {n}" for name, n in plan.mesh.items())
    times, sent = plan.roofline, plan.sent or {}
    rows = [
        (plan.program, f"{plan.parameters:,} parameters, {plan.examples:,} a step"),
        ("devices", f"{plan.topology}, {chip.name}: {mesh}"),
        ("memory a chip", f"{size(plan.needed)} of {size(plan.limit)}"),
        ("  arguments", size(plan.arguments)),
        ("  outputs", size(plan.outputs)),
        ("  temporary", size(plan.temporary)),
        ("FLOPs a step", f"{plan.flops:.3e}, what is recomputed included"),
        ("memory traffic", size(plan.touched)),
        ("sent by a chip", size(None if plan.sent is None else sum(sent.values()))),
        *((f"  {kind}", size(count)) for kind, count in sent.items()),
        ("least time", f"{times.seconds:.4g} s, bound by {times.bound}"),
        ("  compute", f"{times.compute:.4g} s at {cost.COMPUTE:.0%} of the peak"),
        ("  memory", f"{times.memory:.4g} s at {cost.MEMORY:.0%}"),
        ("  network", f"{times.network:.4g} s at {cost.NETWORK:.0%}, beside the rest"),
    ]
    if plan.compiler_seconds:
        rows.append(("compiler's time", f"{plan.compiler_seconds:.4g} s"))
    rows.append(("a step", f"{plan.seconds:.4g} s, {plan.utilisation:.0%} of the peak"))
    if plan.steps > 1:
        rows.append(("the run", f"{plan.steps:,} steps, {plan.days:.1f} days"))
    if plan.sent is None:
        rows.append(
            ("not compiled", "at least this memory, and the arithmetic's time alone")
        )
    rows.append(("verdict", VERDICTS[plan.fits]))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def row(plan: Plan) -> str:
    """The plan in a line, for a search."""
    verdict = f"{plan.seconds:.3g} s a step" if plan.fits else VERDICTS[plan.fits]
    return (
        f"mesh.fsdp={plan.mesh['fsdp']:<3} remat={'on' if plan.remat else 'off':<3} "
        f"{plan.needed / 2**30:7.2f} GiB  {verdict}"
    )


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Says on stderr what is going on, and every minute that it still is."""
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(60):
            print(f"... {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    print(what, file=sys.stderr, flush=True)
    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def clip_net(config: ConfigDict) -> dict[str, Any] | None:
    """The net of the CLIP that a stage builds on; None for upsamplers.

    It is the stage's own, that of --clip, or of the base, or of the same row of the
    clip.py beside the config.

    Raises:
      UserError: there is none of these.
    """
    from dalle2_jax import blueprint, checkpoint, stages

    if config.stage == "upsampler":
        return None
    if config.stage == "clip":
        return blueprint.clip_net(config)
    if CLIP.value is None and (config.base or config.init_from):
        base, _ = stages.stage.load_models(
            config, lambda path: checkpoint.load(path, only=("clip",))
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
    return blueprint.clip_net(CLIP.value)


def main() -> None:
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
            for found in search(config, clip, topology, EFFORT.value):
                plans.append(found)
                print(row(found), flush=True)
        if (chosen := best(plans)) is None:
            raise UserError(
                f"nothing fits {topology.name}: give more devices, a smaller "
                "--config.batch_size, or a larger --config.accumulate"
            )
        print(f"\nrecommended: {row(chosen)}\n")
        print(table(chosen, topology.chip))
        return
    pictures = (PICTURES.value or topology.count) if SAMPLE.value else None
    with told(
        f"compiling {config.stage} for {where}: minutes, and gigabytes of memory"
    ):
        found = plan(config, clip, topology, pictures=pictures, effort=EFFORT.value)
    if JSON.value:
        values = found._asdict() | {"roofline": found.roofline._asdict()}
        print(json.dumps(values | {"days": found.days}, indent=1))
    else:
        print(table(found, topology.chip))


if __name__ == "__main__":
    run(main)
