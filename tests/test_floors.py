"""Imports point down the floors, and importing the package costs next to nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dalle2_jax"

FLOORS = {
    "errors": -1,
    "files": 0,
    "rules": 0,
    "runtime": 0,
    "storage": 0,
    "tensors": 0,
    "config_file": 1,
    "flags": 2,
    "nn": 1,
    "diffusion": 1,
    "data": 1,
    "safety": 1,
    "checkpoint": 1,
    "parts": 2,
    "pipeline": 3,
    "convert": 3,
    "hub": 4,
    "train": 4,
    "evaluate": 5,
    "app": 5,
    "checks": 6,
    "planning": 6,
    # The package's face and its commands may use everything.
    "__init__": 7,
    "commands": 8,
    # Of `python -m dalle2_jax.NAME`.
    "analytic": 7,
    "plan": 7,
    "doctor": 7,
    "embed": 7,
    "filter": 7,
}
# A network doesn't know that it is denoising, nor the loop what it trains.
FORBIDDEN = {("nn", "diffusion"), ("train", "parts")}
HEAVY = ("tensorflow_datasets", "tensorflow", "torch", "transformers", "grain")


def imported(tree: ast.Module) -> Iterator[str]:
    """What a module imports, anywhere in it, by full name; "." if relative.

    What it imports as a script, where __name__ is "__main__", is left out.
    """
    nodes = [tree]
    for node in nodes:
        below = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.If) and "'__main__'" in ast.unparse(node.test):
            below = node.orelse
        nodes += below
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "."
            elif node.module == "dalle2_jax":
                yield from (f"dalle2_jax.{alias.name}" for alias in node.names)
            else:
                yield node.module


def violations(unit: str, source: str) -> list[str]:
    """What is wrong with the imports of a module that belongs to `unit`."""
    if unit not in FLOORS:
        return [f"{unit} has no floor"]
    found = []
    for name in imported(ast.parse(source)):
        root, _, rest = name.partition(".")
        other = rest.partition(".")[0] or "__init__"
        if name == ".":
            found.append("relative import")
        elif root in ("train", "sample", "configs", "tests"):
            found.append(f"{unit} imports the script or folder {root}")
        elif root != "dalle2_jax" or other == unit:
            continue
        elif other not in FLOORS:
            found.append(f"{unit} imports {other}, which has no floor")
        elif FLOORS[other] >= FLOORS[unit] or (unit, other) in FORBIDDEN:
            found.append(f"{unit} imports {other}")
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_point_down(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    assert len(parts) <= 2, "there is one level of packages"
    assert violations(parts[0], path.read_text()) == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_scripts_import_absolutely(path):
    assert "." not in imported(ast.parse(path.read_text()))


@pytest.mark.parametrize(
    "unit, source, message",
    [
        ("nn", "from dalle2_jax.diffusion import sample", "nn imports diffusion"),
        ("nn", "from dalle2_jax import diffusion", "nn imports diffusion"),
        ("nn", "import dalle2_jax", "nn imports __init__"),
        ("train", "import dalle2_jax.parts.clip", "train imports parts"),
        ("data", "def f():\n    import dalle2_jax.train", "data imports train"),
        ("parts", "from dalle2_jax.pipeline import models", "parts imports pipeline"),
        ("data", "from . import image", "relative import"),
        ("parts", "import train", "parts imports the script or folder train"),
        ("utils", "", "utils has no floor"),
        ("nn", "import dalle2_jax.utils", "nn imports utils, which has no floor"),
        ("nn", "from dalle2_jax.nn import layers\nimport jax", None),
        ("nn", "if __name__ == '__main__':\n    import dalle2_jax.commands", None),
        ("parts", "from dalle2_jax import diffusion, nn", None),
    ],
)
def test_a_violation_is_found(unit, source, message):
    assert violations(unit, source) == ([message] if message else [])


def test_importing_the_package_is_quick_and_light():
    code = f"""
import sys, time
start = time.process_time()
import dalle2_jax
print(time.process_time() - start, *(set({HEAVY}) & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        text=True,
        capture_output=True,
    )
    seconds, *heavy = done.stdout.split()
    assert heavy == []
    assert float(seconds) < 1.5
