"""The commands, a module each: `dalle2 NAME`, and of each `dalle2 NAME --help`.

A module has its FLAGS, and a main() that does what they say.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from dalle2_jax import flags

COMMANDS = {
    "train": "Train a stage, or all of them in order.",
    "sample": "Make pictures: of captions, or from pictures.",
    "doctor": "Check a config, its data and its speed before a long run.",
    "plan": "Plan training or sampling on TPUs or GPUs that are not there.",
    "embed": "Write CLIP's embeddings of captioned pictures, for stages to train on.",
    "filter": "Choose which captioned pictures to train on, and say why.",
    "analytic": "Measure a prior's errors, for its analytic variance.",
    "evaluate": "Tell how often a model's pictures of shapes show their captions.",
    "convert": "Convert Karlo, CLIP and models of their shape, and back to diffusers.",
}


def main(name: str | None = None) -> None:
    """Be the command `name`; by default the one that the command line names."""
    flags.prepare_process()
    if name is not None:
        module = sys.modules["__main__"].__spec__
        script = f"-m {module.name}" if module else os.path.basename(sys.argv[0])
        run(name, sys.argv[1:], f"python {script}")
        return
    given = sys.argv[1:] or ["--help"]
    if given[0] in COMMANDS:
        run(given[0], given[1:])
    elif given[0] in ("help", "-h", "-help", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: dalle2 COMMAND [--flag=value ...]\n")
        for command, what in COMMANDS.items():
            print(f"  {command:{width}}  {what}")
        print("\ndalle2 COMMAND --help tells the flags of a command.")
    else:
        print(
            f"error: there is no command {given[0]!r}: choose {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        sys.exit(2)


def run(name: str, arguments: Sequence[str], program: str | None = None) -> None:
    """Run a command with these arguments; exit with 1, 2 or 130 if it fails."""
    command = f"dalle2 {name}"
    program = program or command
    module = importlib.import_module(f"dalle2_jax.commands.{name}")
    words = f"{program} {module.FLAGS.arguments}".strip()
    explained = module.__doc__.replace(command, program)
    about = f"usage: {words} [--flag=value ...]\n\n{explained}"
    flags.run(module.FLAGS, module.main, [program, *arguments], about)
