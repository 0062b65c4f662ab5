"""What a GPU (or CPU) spent its time on, by a profile of JAX's.

    python benchmarks/kernels.py DIR            any that jax.profiler.trace wrote to DIR

Kernels that differ in their numbers alone are summed. With the text of the compiled
program they are also summed by what the program's source calls them.
"""

import argparse
import collections
import re
from collections.abc import Iterator
from pathlib import Path

from jax.profiler import ProfileData


def read(folder: Path) -> Iterator[tuple[str, str, float]]:
    """(kernel, instruction or "", milliseconds) of the newest profile."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = list(ProfileData.from_file(str(files[-1])).planes)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in gpus or planes:
        for line in plane.lines:
            if not (line.name.startswith("Stream") if gpus else "XLA" in line.name):
                continue
            for event in line.events:
                stats = {name: value for name, value in event.stats if name}
                if gpus or "hlo_op" in stats:
                    instruction = str(stats.get("hlo_op", ""))
                    yield event.name, instruction, event.duration_ns / 1e6


def sources(program: str) -> dict[str, str]:
    """The names of instructions, as kernels spell them -> in the source."""
    found = re.findall(
        r"^\s*(?:ROOT )?%?([\w.-]+) = .*op_name=\"([^\"]*)\"", program, re.MULTILINE
    )
    return {re.sub(r"[.-]", "_", name): source for name, source in found}


def place(source: str) -> str:
    """A source's name, with which pass it is of, and * for its numbers."""
    if "jvp" not in source:
        return "update: " + source.rpartition("/")[2]
    which = "backward" if "transpose" in source else "forward"
    if "remat" in source and which == "backward":
        which += " or again"
    path = re.sub(r"^.*?jvp\([^/]*\)+/|checkpoint/|rematted_computation/", "", source)
    return f"{which}: " + re.sub(r"\d+", "*", path)


def table(title: str, totals: dict[str, list[float]], steps: int, top: int) -> str:
    """Rows of the largest sums: milliseconds a step, their share, calls a step."""
    whole = sum(map(sum, totals.values()))
    rows = sorted(totals.items(), key=lambda item: -sum(item[1]))[:top]
    lines = [f"| {title} | ms | % | calls |", "| --- | --- | --- | --- |"]
    for name, times in rows:
        ms, share = sum(times) / steps, 100 * sum(times) / whole
        lines.append(
            f"| {name[:100]} | {ms:.2f} | {share:.1f} | {len(times) / steps:g} |"
        )
    lines.append(f"| all | {whole / steps:.2f} | 100 | |")
    return "\n".join(lines)


def report(folder: Path, program: str = "", steps: int = 1, top: int = 25) -> str:
    """Tables of kernels and, with the compiled program's text, of their sources."""
    kernels = collections.defaultdict(list)
    places = collections.defaultdict(list)
    names = sources(program)
    for kernel, instruction, ms in read(folder):
        kernels[re.sub(r"([_.]\d+)+$", "", kernel)].append(ms)
        spelled = re.sub(r"[.-]", "_", instruction or kernel)
        places[place(names[spelled]) if spelled in names else "unknown"].append(ms)
    tables = [table("kernel", kernels, steps, top)]
    if program:
        tables.append(table("where", places, steps, top))
    return "\n\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--top", type=int, default=25)
    flags = parser.parse_args()
    print(report(flags.folder, top=flags.top))


if __name__ == "__main__":
    main()
