"""What training or sampling takes of devices that are not there."""

import contextlib
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dalle2_jax.errors import UserError
from dalle2_jax.planning import cost
from dalle2_jax.planning.topology import Chip, Topology, devices

# Compilers take long over how fast a program is and how little memory it takes.
LOW_EFFORT = {
    "tpu": {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0},
    "cpu": {"xla_backend_optimization_level": 0},
}
VERDICTS = {True: "it fits", False: "it does not fit", None: "it may fit"}
WIDTHS = (1, 2, 4, 8, 16, 32)  # of fsdp, and of tensor, that --search tries


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

    Its arithmetic is taken as evenly split; over `tensor` norms and a network's ends
    are not, which only the compiler's own estimate of the time has in it.

    Args:
      config: of the stage.
      clip: arguments of the CLIP that it builds on, or None.
      pictures: how many to sample at once; None plans training.
      effort: of the compiler, "low" or "full"; "none" leaves it out.

    Raises:
      UserError: a config that can't be trained or sampled there.
    """
    import jax

    from dalle2_jax import runtime
    from dalle2_jax.planning import blueprint
    from dalle2_jax.train import measure
    from dalle2_jax.train import mesh as meshes

    start = time.monotonic()
    chip = topology.chip
    mesh = meshes.make(**config.mesh, devices=devices(topology))
    own = {} if topology.tpu else runtime.compiler_options()
    if pictures is None:
        program = blueprint.train(config, clip, mesh, own)
    else:
        program = blueprint.sample(config, clip, mesh, own, pictures)
    flops = measure.count_flops(program.traced.jaxpr)
    arguments = meshes.local_bytes(program.arguments)
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
    and gain nothing. `tensor` is the narrowest with which each device has a row of a
    micro-batch; with the first fsdp that fits it is tried twice as wide, too.
    """

    def at(fsdp: int, tensor: int, recompute: bool) -> Plan:
        config.mesh.update(dict(data=-1, fsdp=fsdp, tensor=tensor))
        remat(config.net, recompute)
        return plan(config, clip, topology, effort=effort)

    count, rows = topology.count, config.batch_size // config.accumulate
    narrowest = next((n for n in WIDTHS if rows * n % count == 0), 1)
    fitting = []
    for fsdp in WIDTHS:
        if count % (fsdp * narrowest) or len(fitting) == 2:
            continue
        yield (first := at(fsdp, narrowest, True))
        if first.fits:
            fitting.append(fsdp)
            yield at(fsdp, narrowest, False)
    wider = 2 * narrowest
    if fitting and count % (fitting[0] * wider) == 0:
        with contextlib.suppress(UserError):  # it may not divide the heads
            yield at(fitting[0], wider, True)


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
        f"mesh.fsdp={plan.mesh['fsdp']:<3} mesh.tensor={plan.mesh['tensor']:<2} "
        f"remat={'on' if plan.remat else 'off':<3} "
        f"{plan.needed / 2**30:7.2f} GiB  {verdict}"
    )
