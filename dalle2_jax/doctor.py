"""Checks a config, its data and its speed before a long run.

python -m dalle2_jax.doctor --config=configs/decoder.py:small [--config.key=value]

builds what train.py would build of the same flags, on the devices that are here, and
says in a line for each check that all is well ("ok"), that something could be better
("warning"), or that a run would fail or be in vain ("problem"), and what to do:

    config     what train.py would refuse, at its start or at its first preview
    memory     what a training step takes of a device, as the compiler says
    data       how many examples of a sample can be used; sizes, blanks, duplicates;
               captions; embeddings against the statistics of the base
    overfit    whether the loss of a few examples falls, see checks/learning.py, and
               whether all params have gradients
    speed      batches a second of the data alone, steps a second of the devices alone

It takes minutes, and writes nothing. The exit code is 0, or 1 if there is a problem.
"""

import json
import sys

from absl import flags
from ml_collections import config_flags

from dalle2_jax.checks.finding import PARTS
from dalle2_jax.errors import UserError
from dalle2_jax.flags import run

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/STAGE.py:SIZE; --config.key=value changes a key."
)
EXAMPLES = flags.DEFINE_integer("examples", 256, "Of the data that are looked at.", 1)
OVERFIT_STEPS = flags.DEFINE_integer("overfit_steps", 100, "On one batch.", 10)
SKIP = flags.DEFINE_list("skip", [], f"What not to check, of {', '.join(PARTS)}.")
JSON = flags.DEFINE_boolean("json", False, "Print the findings as JSON.")


def main() -> None:
    """The command: reads the flags, makes the checks and prints what they find."""
    if CONFIG.value is None:
        raise UserError("no --config: give one, as --config=configs/decoder.py:small")
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


if __name__ == "__main__":
    run(main)
