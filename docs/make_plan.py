"""Plans every stage at the paper's size on three TPU pods, for docs/plan.md.

python docs/make_plan.py [--only=decoder] [--timeout=1500]

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
# mesh.fsdp on each of them; the quickest to compile first.
ROWS = {
    "upsampler.py:paper_1024": (1, 1, 1),
    "upsampler.py:paper_256": (2, 1, 1),
    "prior.py:paper": (8, 4, 8),
    "ar_prior.py:paper": (8, 4, 8),
    "clip.py:paper": (8, 4, 8),
    "decoder.py:paper": (16, 4, 16),
}
HEADER = """# What the paper's models take

The training step of each stage at the paper's size and batch, compiled for three TPU
pods by [`docs/make_plan.py`](make_plan.py) and not run. A row is what

    python -m dalle2_jax.plan --config=configs/ROW --topology=TOPOLOGY \\
        --config.mesh.fsdp=FSDP

says: parameters that are trained, examples a step over all chips, memory that a chip
needs and has (GiB), the seconds of a step, the part of the chips' peak that it then
uses, with what is recomputed, and the days of all the steps of the paper. The time is
an estimate: the longer of a roofline at {compute:.0%} of the peak in arithmetic,
{memory:.0%} of the memory's bandwidth and {network:.0%} of the network's along one axis
of the torus, and of the compiler's own. It is low effort that the compiler made
(`--effort=full` makes more, and takes far longer), so a row that doesn't fit by little
may fit. Reading the data is not in it.

| row | chips | fsdp | parameters | batch | memory | fits | step, s | peak | days |
|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="of the rows, those that have it")
    parser.add_argument("--timeout", type=int, default=1500, help="seconds for a cell")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for row, widths in ROWS.items():
        for topology, fsdp in zip(TOPOLOGIES, widths, strict=True):
            cell = f"{row} {topology} {fsdp}"
            if arguments.only in cell and "needed" not in results.get(cell, {}):
                results[cell] = plan(row, topology, fsdp, arguments.timeout)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                (DOCS / "plan.md").write_text(page(results))


def plan(row: str, topology: str, fsdp: int, timeout: int) -> dict:
    """A cell: the plan's values, or why there are none."""
    command = [sys.executable, "-m", "dalle2_jax.plan", f"--config=configs/{row}"]
    command += [f"--topology={topology}", f"--config.mesh.fsdp={fsdp}", "--json"]
    print(" ".join(command[2:]), flush=True)
    try:
        done = subprocess.run(
            command, cwd=DOCS.parent, timeout=timeout, stdout=subprocess.PIPE, text=True
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not compiled in {timeout // 60} min"}
    return json.loads(done.stdout) if done.returncode == 0 else {"failed": "an error"}


def page(results: dict) -> str:
    """docs/plan.md of what there is."""
    sys.path.insert(0, str(DOCS.parent))
    from dalle2_jax import cost

    text = HEADER.format(compute=cost.COMPUTE, memory=cost.MEMORY, network=cost.NETWORK)
    for row, widths in ROWS.items():
        for topology, fsdp in zip(TOPOLOGIES, widths, strict=True):
            cell = results.get(
                f"{row} {topology} {fsdp}", {"failed": "not yet planned"}
            )
            text += line(row, topology, fsdp, cell)
    return text


def line(row: str, topology: str, fsdp: int, cell: dict) -> str:
    """A row of the table."""
    if "failed" in cell:
        rest = f"– | – | – | {cell['failed']} | – | – | –"
    else:
        rest = (
            f"{cell['parameters'] / 1e6:,.0f}M | {cell['examples']:,} | "
            f"{cell['needed'] / 2**30:.1f} of {cell['limit'] / 2**30:.1f} | "
            f"{'yes' if cell['fits'] else 'no'} | "
        )
        # What doesn't fit isn't compiled: only its arithmetic is known.
        rest += (
            f"{cell['seconds']:.2f} | {cell['utilisation']:.0%} | {cell['days']:.0f}"
            if cell["fits"]
            else "– | – | –"
        )
    return f"| `{row}` | {topology} | {fsdp} | {rest} |\n"


if __name__ == "__main__":
    main()
