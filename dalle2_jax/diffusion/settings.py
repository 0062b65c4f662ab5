"""The two sections that say how a network is sampled, as a file holds them: checked.

`generate` explains their keys.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from dalle2_jax.diffusion import generate, process
from dalle2_jax.errors import UserError, first_line, short

MOST_STEPS = 10_000  # of a schedule, whose tables are made whole

Rule = tuple[Callable[[Any], bool], str]  # what fits, and that in words


def number(low: float | int, high: float | int) -> Rule:
    """Numbers in a range."""

    def fits(value: Any) -> bool:
        known = isinstance(value, int | float) and not isinstance(value, bool)
        return known and math.isfinite(value) and low <= value <= high

    return fits, f"a number from {low:g} to {high:g}"


def whole(low: int, high: int) -> Rule:
    """Whole numbers in a range."""
    fits, _ = number(low, high)
    words = f"a whole number from {low} to {high}"
    return lambda value: isinstance(value, int) and fits(value), words


def one_of(*values: Any) -> Rule:
    """A few values."""
    # By type, too: 1 == True.
    known = {(type(value), value) for value in values}
    told = ", ".join("null" if value is None else str(value) for value in values)
    return lambda value: value.__hash__ and (type(value), value) in known, told


def optional(rule: Rule) -> Rule:
    """What fits a rule, or None."""
    fits, words = rule
    return lambda value: value is None or fits(value), f"{words}, or null"


def pair(rule: Rule) -> Rule:
    """Two values, each of which fits a rule."""
    fits, words = rule

    def both(value: Any) -> bool:
        return (
            isinstance(value, list | tuple)
            and len(value) == 2
            and all(map(fits, value))
        )

    return both, f"two of {words}"


SIDE = whole(1, 2**16)  # of pictures, in pixels
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


def check(section: Any, rules: Mapping[str, Rule], where: str) -> None:
    """Raise a UserError unless a section is an object whose values fit the rules."""
    if not isinstance(section, Mapping):
        raise UserError(f"{where} is {short(section)}: must be an object")
    for key, (fits, words) in rules.items():
        if key not in section:
            raise UserError(f"{where} lacks {key}: must be {words}")
        if not fits(section[key]):
            raise UserError(f"{where}.{key} is {short(section[key])}: must be {words}")


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
