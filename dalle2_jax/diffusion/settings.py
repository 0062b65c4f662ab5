"""The two sections that say how a network is sampled, as a file holds them: checked.

`generate` explains their keys.
"""

from collections.abc import Mapping
from typing import Any

from dalle2_jax.diffusion import generate, process
from dalle2_jax.errors import UserError, first_line, short
from dalle2_jax.rules import check, number, one_of, optional, pair, whole

MOST_STEPS = 10_000  # of a schedule, whose tables are made whole

DIFFUSION = {
    "schedule": one_of("cosine", "linear"),
    "steps": whole(1, MOST_STEPS),
    "predict": one_of(*process.PREDICTS),
    "variance": one_of(*process.VARIANCES),
}
SAMPLING = {
    "sampler": one_of(*generate.SAMPLERS),
    "guidance": number(-1000, 1000),
    "guidance_interval": optional(pair(number(0, MOST_STEPS))),
    "eta": number(0, 1),
    "clip": optional(number(1e-6, 1e6)),
    "threshold": optional(number(0, 100)),
}


def check_part(part: Mapping[str, Any], where: str) -> None:
    """Check the sections `diffusion` and `sampling` of a part.

    Raises:
      UserError: one is missing, or a value of it is.
    """
    check(part.get("diffusion"), DIFFUSION, f"{where}.diffusion")
    sampling = part.get("sampling")
    if isinstance(sampling, Mapping):
        sampling = generate.DEFAULTS | dict(sampling)
    check(sampling, SAMPLING, f"{where}.sampling")
    steps = part["sampling"].get("steps")
    listed = steps if isinstance(steps, list | tuple) else [steps]
    fits, words = whole(0, MOST_STEPS)
    if not isinstance(steps, str) and not all(map(fits, listed)):
        raise UserError(
            f"{where}.sampling.steps is {short(steps)}: must be {words}, a list of "
            'them, or as "10,10,3"'
        )
    try:
        generate.levels(part["diffusion"], part["sampling"])
    except (UserError, ValueError, OverflowError) as error:
        raise UserError(f"{where}.sampling.steps: {first_line(error)}") from error
