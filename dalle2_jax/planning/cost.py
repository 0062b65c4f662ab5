"""What a compiled program costs: what its devices send, and the time of a step.

Collectives are counted in the text of the program, which is that of one device of many.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

from dalle2_jax.planning.topology import Chip

# What part of its peak each can be expected to reach in a long, well-shaped program.
COMPUTE, MEMORY, NETWORK = 0.6, 0.8, 0.8


class Roofline(NamedTuple):
    """Seconds of a step, if nothing but one thing took time.

    Each at its peak times COMPUTE, MEMORY or NETWORK.
    """

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """The longest of them: what there is of the others goes on beside it."""
        return max(self)

    @property
    def bound(self) -> str:
        """What takes the longest."""
        return max(self._asdict(), key=self._asdict().get)


def roofline(
    chip: Chip,
    *,
    flops: float | int,
    hbm_bytes: float | int,
    network_bytes: float | int,
) -> Roofline:
    """The time of a step in which each device does so much (Williams et al. 2009)."""
    return Roofline(
        flops / (chip.flops * COMPUTE),
        hbm_bytes / (chip.bandwidth * MEMORY),
        network_bytes / (chip.network * NETWORK),
    )


_BITS = {"pred": 8, "bf": 16, "s": 0, "u": 0, "f": 0, "c": 0}
_SHAPE = re.compile(r"\b(pred|bf|s|u|f|c)(\d*)(?:e\w+)?\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALL = re.compile(
    r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(-start)?\("
)


def collective_bytes(hlo: str, devices: int) -> dict[str, int]:
    """Bytes that each device sends in a compiled program, by the kind of collective.

    An array of s bytes that g devices share takes each of them s (g - 1) / g to gather
    or to reduce and scatter, twice that to reduce for all, and a permutation s (Thakur
    et al. 2005). What is in a loop counts as often as it runs, where the compiler
    tells.

    Args:
      hlo: the text of the compiled program.
      devices: that the program runs on.
    """
    calls: dict[str, list[tuple[str, int]]] = {}
    found, entry, computation = [], "", ""
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            computation = head[2]
            calls[computation] = []
            entry = computation if head[1] else entry
        if match := _COLLECTIVE.search(line):
            kind, sent = _sent(line, match, computation, devices)
            # A TPU's asynchronous collective is written in each of its parts.
            channel = re.search(r"channel_id=(\d+)", line)
            found.append((computation, kind, channel[1] if channel else line, sent))
        trips = _TRIPS.search(line) if " while(" in line else None
        for called in _CALL.findall(line):
            calls[computation].append((called, int(trips[1]) if trips else 1))

    runs = Counter({entry: 1})
    for computation in reversed(calls):  # callers come after what they call
        for called, times in calls[computation]:
            runs[called] += times * runs[computation]
    each: Counter[tuple[str, str]] = Counter()
    for computation, kind, channel, sent in found:
        each[kind, channel] = max(each[kind, channel], sent * runs[computation])
    total: Counter[str] = Counter()
    for (kind, _), sent in each.items():
        total[kind] += sent
    return dict(total)


def _sent(
    line: str, match: re.Match, computation: str, devices: int
) -> tuple[str, int]:
    """The kind of a collective, and the bytes that each device sends in it."""
    result, kind, start = match.groups()
    size = _size(result)
    g = _group(line, devices)
    if kind == "collective-permute":
        return kind, size // 2 if start else size  # its input and its output
    if kind == "all-gather" and start:  # its input, a g-th, and its output
        size = size * g // (g + 1)
    if kind == "reduce-scatter":
        size *= g  # the result is a g-th of what is reduced
    if computation.startswith("all-reduce-scatter"):  # a TPU's name and form of it
        kind = "reduce-scatter"
    return kind, size * (g - 1) // g * (2 if kind == "all-reduce" else 1)


def _size(shapes: str) -> int:
    """Bytes of arrays, without the counters that go with asynchronous operations."""
    total = 0
    for kind, bits, dims in _SHAPE.findall(shapes):
        if kind == "u" and not dims:
            continue
        bits = int(bits or _BITS[kind])
        total += bits * math.prod(map(int, dims.split(",") if dims else ())) // 8
    return total


def _group(line: str, devices: int) -> int:
    """How many devices take part in a collective with each other."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(
            int(part or sizes[axis])
            for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        )
    return devices
