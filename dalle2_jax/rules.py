"""Rules for the values of a config's sections: what fits, and how to say so."""

import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any

from dalle2_jax.errors import UserError, short

Rule = tuple[Callable[[Any], bool], str]  # what fits, and that in words


def number(
    low: float | int, high: float | int, *, above: bool = False, below: bool = False
) -> Rule:
    """Numbers in a range, of which ``above`` and ``below`` exclude the ends."""

    def fits(value: Any) -> bool:
        if not isinstance(value, Real) or isinstance(value, bool):
            return False
        inside = math.isfinite(value) and low <= value <= high
        return inside and not (above and value == low or below and value == high)

    start, end = "above" if above else "from", "to below" if below else "to"
    return fits, f"a number {start} {low:g} {end} {high:g}"


def whole(low: int, high: int) -> Rule:
    """Whole numbers in a range."""
    fits, _ = number(low, high)
    words = f"a whole number from {low} to {high}"
    return lambda value: isinstance(value, Integral) and fits(value), words


def one_of(*values: Any) -> Rule:
    """A few values."""
    # By type, too: 1 == True.
    known = {(type(value), value) for value in values}
    told = ", ".join("null" if value is None else str(value) for value in values)
    words = f"one of {told}"
    return lambda value: value.__hash__ and (type(value), value) in known, words


def optional(rule: Rule) -> Rule:
    """What fits a rule, or None."""
    fits, words = rule
    return lambda value: value is None or fits(value), f"{words}, or null"


def pair(rule: Rule, *, ordered: bool = False) -> Rule:
    """Two values, each of which fits a rule; ``ordered`` puts the smaller one first."""
    fits, words = rule

    def both(value: Any) -> bool:
        return (
            isinstance(value, list | tuple)
            and len(value) == 2
            and all(map(fits, value))
            and (not ordered or value[0] <= value[1])
        )

    return both, f"two of {words}{', the smaller one first' if ordered else ''}"


FLAG = one_of(True, False)
TEXT = (lambda value: isinstance(value, str), "text")
COUNT = whole(1, 1_000_000)  # of channels, examples and the like
INTERVAL = whole(0, 2**31 - 1)  # of steps, which are counted in int32; 0 for never
SEED = whole(0, 2**32 - 1)  # JAX's keys of larger ones are those of smaller ones again
SIDE = whole(1, 2**16)  # of pictures, in pixels
CHANCE = number(0, 1)


Rules = Mapping[str, Any]  # by key a Rule, or the Rules of a section


def problems(section: Any, rules: Rules, where: str) -> Iterator[str]:
    """Yield a line for each value of a section that is missing or breaks its rule."""
    if not isinstance(section, Mapping):
        yield f"{where} is {short(section)}: must be an object"
        return
    for key, rule in rules.items():
        if isinstance(rule, Mapping):
            yield from problems(section.get(key), rule, f"{where}.{key}")
            continue
        fits, words = rule
        if key not in section:
            yield f"{where} lacks {key}: must be {words}"
        elif not fits(section[key]):
            yield f"{where}.{key} is {short(section[key])}: must be {words}"


def check(section: Any, rules: Rules, where: str) -> None:
    """Raise a UserError unless a section is an object whose values fit the rules."""
    for problem in problems(section, rules, where):
        raise UserError(problem)
