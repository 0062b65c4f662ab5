"""Check a config, its data and its speed before a long run.

    dalle2 doctor --config=decoder.py:small [--config.KEY=VALUE]

builds what `dalle2 train` would build from the same flags, on the devices of this
machine, and prints a line for each check: "ok", "warning" (something could be better)
or "problem" (a run would fail or be in vain), and what to do.

    config     what training would refuse, at its start or at its first preview
    memory     what a training step takes of a device, as the compiler says
    data       how many examples of a sample can be used; sizes, blanks, duplicates;
               captions; embeddings against the statistics of the base
    overfit    whether the loss of a few examples falls, and whether all params
               have gradients
    speed      batches per second of the data alone, steps per second of the devices

It takes minutes and writes nothing. The exit code is 1 if there is a problem, else 0.
"""

import json
import sys

from absl import flags

from dalle2_jax.checks.finding import PARTS
from dalle2_jax.errors import UserError
from dalle2_jax.flags import CONFIG_HELP, Flags

FLAGS = Flags()
_define = FLAGS.group("Flags")
CONFIG = _define(FLAGS.config, "config", None, CONFIG_HELP)
EXAMPLES = _define(
    flags.DEFINE_integer, "examples", 256, "Number of examples of the data to check.", 1
)
OVERFIT_STEPS = _define(
    flags.DEFINE_integer, "overfit_steps", 100, "Steps of training on one batch.", 10
)
SKIP = _define(
    flags.DEFINE_list, "skip", [], f"Checks to leave out, of {', '.join(PARTS)}."
)
JSON = _define(flags.DEFINE_boolean, "json", False, "Print the findings as JSON.")


def main() -> None:
    """Read the flags, make the checks, and print what they find."""
    if CONFIG.value is None:
        raise UserError("no --config: give one, as --config=decoder.py:small")
    config = CONFIG.value
    if "stages" in config:
        raise UserError("this config is of several stages: check each by its own")
    if unknown := [name for name in SKIP.value if name not in PARTS]:
        raise UserError(f"--skip={unknown[0]}: choose of {', '.join(PARTS)}")

    from dalle2_jax.checks.examine import examine
    from dalle2_jax.train import cpu

    cpu.keep_memory()
    cpu.use_cores(max(config.batch_size, 1) // max(config.accumulate, 1))
    findings = []
    for finding in examine(
        config,
        examples=EXAMPLES.value,
        overfit_steps=OVERFIT_STEPS.value,
        skip=SKIP.value,
    ):
        findings.append(finding)
        if not JSON.value:
            print(finding, flush=True)
    if JSON.value:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    if any(finding.level == "problem" for finding in findings):
        sys.exit(1)
