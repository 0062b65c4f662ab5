"""What the loop's own values of a config may be."""

from collections.abc import Iterator
from typing import Any

from dalle2_jax import rules
from dalle2_jax.errors import UserError
from dalle2_jax.train import measure, optim

RULES = {
    "seed": rules.SEED,
    "steps": rules.whole(1, 2**31 - 1),
    "batch_size": rules.whole(1, 2**31 - 1),
    "accumulate": rules.whole(1, 2**31 - 1),
    "ema_decay": rules.CHANCE,
    **dict.fromkeys(
        ("log_every", "eval_every", "eval_batches", "preview_every", "save_every"),
        rules.INTERVAL,
    ),
    "keep": rules.whole(1, 2**31 - 1),
    "keep_every": rules.INTERVAL,
    "tensorboard": rules.FLAG,
    "wandb": rules.TEXT,
    "profile": rules.TEXT,
}


def problems(config: Any) -> Iterator[str]:
    """Yield a line for each value of a config that the loop can't train with."""
    values = config.to_dict()
    found = list(rules.problems(values, RULES, "config"))
    given = {key: rule for key, rule in optim.RULES.items() if key in values["optim"]}
    found += rules.problems(values["optim"], given, "config.optim")
    yield from found
    if found:
        return
    if config.keep_every % (config.save_every or 2**31):
        yield (
            f"keep_every={config.keep_every} must be a multiple of save_every="
            f"{config.save_every}: what isn't saved can't be kept"
        )
    try:
        measure.span(config.profile, 0)
    except UserError as error:
        yield str(error)


def check(config: Any) -> None:
    """Raise a UserError unless the loop can train with the values of a config."""
    for problem in problems(config):
        raise UserError(problem)
