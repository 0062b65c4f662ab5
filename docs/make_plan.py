"""Plans every stage at the paper's size on three TPU pods, for docs/plan.md.

python docs/make_plan.py [--only=decoder] [--effort=none] [--timeout=1500]

needs `pip install libtpu`, minutes and gigabytes for each cell, and no TPU. What is
done is kept in docs/plan.json, and not done again; docs/plan.md is written anew after
each cell.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent
RESULTS = DOCS / "plan.json"
TOPOLOGIES = ("v5e:16x16", "v5p:4x4x4", "v6e:8x8")
# mesh.fsdp on each of them; the quickest to compile first. After "/" the micro-batches
# that a step is made of, where all of it at once does not fit.
ROWS = {
    "upsampler.py:paper_1024": ("1", "1", "1"),
    "upsampler.py:paper_256": ("2", "1", "1"),
    "prior.py:paper": ("8", "4", "8"),
    "ar_prior.py:paper": ("8", "4", "8"),
    "clip.py:paper": ("8", "4", "8"),
    "decoder.py:paper": ("16", "4", "16/2"),
}
HEADER = """# What the paper's models take

## Parameters

Table 3 of arXiv 2204.06125 gives sizes of one or two digits; `tests/test_configs.py`
holds these counts and each of the table's values.

| row | parameters | the paper's | off by | |
|---|---|---|---|---|
| `clip.py:paper` | 986,523,137 | – | – | ViT-H/16 and a text tower of 24 blocks |
| `prior.py:paper` | 1,225,925,632 | 1B | +23% | 24 blocks of 2048 are 1.21B |
| `ar_prior.py:paper` | 805,849,600 | 1B | −19% | has no text encoder, of 1.2B more |
| `decoder.py:paper` | 3,567,897,094 | 3.5B | +2% | 2.3B the U-Net, 1.2B the text |
| `upsampler.py:paper_256` | 691,579,523 | 700M | −1% | |
| `upsampler.py:paper_1024` | 267,146,691 | 300M | −11% | |

## Memory and time

The training step of each stage at the paper's size and batch on three TPU pods, by
[`docs/make_plan.py`](make_plan.py): compiled, not run. {bounds}A row is what

    python -m dalle2_jax.plan --config=configs/ROW --topology=TOPOLOGY \\
        --config.mesh.fsdp=FSDP

says ("16/2": 16, and --config.accumulate=2): parameters that are trained, examples a
step over all chips, memory that a chip needs and has (GiB), the seconds of a step, the
part of the chips' peak that it then uses, with what is recomputed, and the days of all
the config's steps. The time is an estimate: the longer of a roofline at {compute:.0%}
of the peak in arithmetic, {memory:.0%} of the memory's bandwidth and {network:.0%} of
the network's along one axis of the torus, and the compiler's own. The compiler made a
low effort (`--effort=full` makes more, and takes far longer), so that a row that does
not fit by little may fit after all. Reading the data is not in it.

| row | chips | fsdp | parameters | batch | memory | fits | step, s | peak | days |
|---|---|---|---|---|---|---|---|---|---|
"""
BOUNDS = """Those marked "≥" are not even compiled: they
have the memory of the state and the batch alone and the time of the arithmetic alone,
and really take more. A line without numbers is not planned yet. """


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="of the cells, those that have it")
    parser.add_argument("--effort", default="low", help="none compiles nothing")
    parser.add_argument("--timeout", type=int, default=1500, help="seconds for a cell")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for cell in cells():
        done = results.get(" ".join(cell), {})
        compiled = done.get("fits") is not None
        if arguments.only not in " ".join(cell) or compiled:
            continue
        if arguments.effort == "none" and "needed" in done:
            continue
        if found := plan(*cell, arguments.effort, arguments.timeout):
            results[" ".join(cell)] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            (DOCS / "plan.md").write_text(page(results))


def cells() -> list[tuple[str, str, str]]:
    """Row, topology and width of each line of the table."""
    return [
        (row, topology, width)
        for row, widths in ROWS.items()
        for topology, width in zip(TOPOLOGIES, widths, strict=True)
    ]


def plan(row: str, topology: str, width: str, effort: str, timeout: int) -> dict | None:
    """A cell: the plan's values; None, and why, if there are none."""
    fsdp, _, accumulate = width.partition("/")
    command = [sys.executable, "-m", "dalle2_jax.plan", f"--config=configs/{row}"]
    command += [f"--topology={topology}", f"--config.mesh.fsdp={fsdp}"]
    command += [f"--config.accumulate={accumulate or 1}"]
    command += [f"--effort={effort}", "--json"]
    print(" ".join(command[2:]), flush=True)
    try:
        done = subprocess.run(
            command, cwd=DOCS.parent, timeout=timeout, stdout=subprocess.PIPE, text=True
        )
    except subprocess.TimeoutExpired:
        print(f"not done in {timeout} s", flush=True)
        return None
    return json.loads(done.stdout) if done.returncode == 0 else None


def page(results: dict) -> str:
    """docs/plan.md of what there is."""
    sys.path.insert(0, str(DOCS.parent))
    from dalle2_jax.planning import cost

    found = [results.get(" ".join(cell)) for cell in cells()]
    whole = all(values and values["fits"] is not None for values in found)
    text = HEADER.format(
        compute=cost.COMPUTE,
        memory=cost.MEMORY,
        network=cost.NETWORK,
        bounds="" if whole else BOUNDS,
    )
    return text + "".join(map(line, cells(), found))


def line(cell: tuple[str, str, str], found: dict | None) -> str:
    """A row of the table."""
    row, *where = cell
    values = [f"`{row}`", *where, *["–"] * 7]
    if found is not None:
        # Of what isn't compiled, the least.
        least = "" if found["fits"] else "≥ "
        values[3:] = [
            f"{found['parameters'] / 1e6:,.0f}M",
            f"{found['examples']:,}",
            f"{least}{found['needed'] / 2**30:.1f} of {found['limit'] / 2**30:.1f}",
            {True: "yes", False: "no", None: "?"}[found["fits"]],
            f"{least}{found['seconds']:.2f}",
            f"{found['utilisation']:.0%}" if found["fits"] else "–",
            f"{least}{found['days']:.0f}",
        ]
    return f"| {' | '.join(values)} |\n"


if __name__ == "__main__":
    main()
