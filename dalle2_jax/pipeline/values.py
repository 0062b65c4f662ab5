"""What a caller passes, checked: numbers, texts and arrays.

Each function returns its value as the one type that the rest of the code takes, or
raises a UserError of one line with the argument's name, its value and what is allowed.
"""

import itertools
import numbers
import secrets
import sys
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dalle2_jax.errors import UserError, short
from dalle2_jax.pipeline.limits import LARGEST_SEED, MOST_PICTURES


def check_number(
    name: str,
    value: Any,
    low: float | int,
    high: float | int,
    *,
    above: bool = False,
) -> float:
    """Return a number, of Python, numpy or JAX, within the finite range [low, high].

    Args:
      above: whether `low` itself is too low.

    Raises:
      UserError: it is no number, or out of range.
    """
    value = scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UserError(f"{name}={short(value)}: give a number")
    if not low <= value <= high or (above and value == low):
        least = f"above {low:g}, up to" if above else f"from {low:g} to"
        raise UserError(f"{name}={short(value)}: must be {least} {high:g}")
    return float(value)


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """Return a whole number, of Python, numpy or JAX, within [low, high].

    Raises:
      UserError: it is not whole, or out of range.
    """
    value = scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UserError(f"{name}={short(value)}: give a whole number")
    if not low <= value <= high:
        raise UserError(f"{name}={short(value)}: must be from {low} to {high}")
    return int(value)


def check_bool(name: str, value: Any) -> bool:
    """Return True or False, of Python, numpy or JAX."""
    value = scalar(value)
    if not isinstance(value, bool):
        raise UserError(f"{name}={short(value)}: must be True or False")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return one of a few words."""
    value = scalar(value)
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{name}={short(value)}: must be one of {', '.join(choices)}")
    return str(value)


def check_num(num: Any, prompts: int = 1) -> int:
    """Return a number of pictures of each prompt."""
    return check_integer("num", num, 1, max(1, MOST_PICTURES // prompts))


def check_frames(frames: Any) -> int:
    """Return a number of frames of a path, which has two ends."""
    return check_integer("frames", frames, 2, MOST_PICTURES)


def check_seed(seed: Any) -> int:
    """Return the seed; None draws one, which is printed on stderr."""
    if seed is None:
        seed = secrets.randbelow(LARGEST_SEED + 1)
        print(f"seed={seed}", file=sys.stderr)
    return check_integer("seed", seed, 0, LARGEST_SEED)


def check_progress(progress: Any) -> None:
    """Check that a progress is None or can be called."""
    if progress is not None and not callable(progress):
        raise UserError(
            f"progress={short(progress)}: give a function, which is called as "
            "progress(stage, pictures done, pictures in all)"
        )


def check_numbers(
    name: str,
    values: Any,
    low: float | int,
    high: float | int,
    *,
    above: bool = False,
) -> Float[np.ndarray, " n"]:
    """Return a list of numbers within [low, high], at least one; see `check_number`."""
    found = items(name, values, "a list of numbers")
    if not found:
        raise UserError(f"{name} is empty: give at least one number")
    return np.asarray([check_number(name, x, low, high, above=above) for x in found])


def check_integers(name: str, values: Any, low: int, high: int) -> list[int]:
    """Return a list of whole numbers within [low, high], at least one."""
    found = items(name, values, "a list of whole numbers")
    if not found:
        raise UserError(f"{name} is empty: give at least one whole number")
    return [check_integer(name, x, low, high) for x in found]


def check_array(
    name: str, value: Any, shape: Sequence[int | str]
) -> Float[np.ndarray, "..."]:
    """Return finite numbers as a float32 array of a shape; a name is for any length.

    Raises:
      UserError: of another shape, not finite, or no numbers.
    """
    try:
        array = np.asarray(value)
    except Exception as error:  # of lists of unequal lengths, for one
        raise UserError(f"{name}={short(value)}: give an array") from error
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (np.floating, np.integer)):
        raise UserError(f"{name} is an array of {array.dtype}: give float32")
    lengths = zip(array.shape, shape, strict=False)
    if array.ndim != len(shape) or not all(
        n > 0 if isinstance(m, str) else n == m for n, m in lengths
    ):
        allowed = ", ".join(map(str, shape))
        raise UserError(f"{name} has shape {list(array.shape)}: must be [{allowed}]")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{name} has values that are not finite in float32")
    return array


def check_texts(texts: Any, name: str, least: int = 1) -> list[str]:
    """Return one text or several as a list.

    Raises:
      UserError: there are fewer than ``least``, or one is no text.
    """
    texts = scalar(texts)
    found = (
        [texts]
        if isinstance(texts, str)
        else items(name, texts, "a text, or a list of texts")
    )
    if len(found) < least:
        raise UserError(f"no {name}: give at least one")
    for text in found:
        if not isinstance(text, str):
            raise UserError(
                f"the {name} {short(text)} is of type {type(text).__name__}: give a "
                "text, or a list of texts"
            )
    return [str(text) for text in found]


def check_prompts(prompts: Any, name: str = "prompt", least: int = 1) -> list[str]:
    """Return one caption or several as a list.

    Raises:
      UserError: there are fewer than ``least``, or one says nothing or is no text.
    """
    found = check_texts(prompts, name, least)
    for text in found:
        if not text.strip():
            raise UserError(f"the {name} {short(text)} is empty: say what to show")
    return found


def check_prompt(prompt: Any, name: str = "prompt") -> str:
    """Return the one caption; UserError if there are none or several."""
    found = check_prompts(prompt, name)
    if len(found) != 1:
        raise UserError(f"{name} is {len(found)} captions: give one")
    return found[0]


def check_negative(negative: Any, count: int) -> list[str]:
    """Return a negative prompt for each of `count` prompts.

    One text is for all of them, a list has one for each, and None is "".

    Raises:
      UserError: a list of another length, or something that is no text.
    """
    name = "negative_prompt"
    negative = scalar(negative)
    if negative is None or isinstance(negative, str):
        return [str(negative or "")] * count
    found = [
        "" if text is None else text
        for text in items(name, negative, "a text, or a list of texts")
    ]
    found = check_texts(found, name, least=0)
    if len(found) != count:
        raise UserError(
            f"{len(found)} negative prompts for {count} prompts: give one for each, "
            "or one text for all"
        )
    return found


# Of a list, which may come from an iterator without an end.
MOST_ITEMS = 10_000_000


def items(name: str, values: Any, kind: str) -> list[Any]:
    """Return the elements of a list, or of what else has an order."""
    values = np.asarray(values) if isinstance(values, jax.Array) else scalar(values)
    unordered = isinstance(values, str | bytes | bytearray | Mapping | Set)
    record = hasattr(values, "_fields")  # of which a model is one
    if unordered or record or not hasattr(values, "__iter__"):
        raise UserError(f"{name}={short(values)}: give {kind}")
    found = list(itertools.islice(values, MOST_ITEMS + 1))
    if len(found) > MOST_ITEMS:
        raise UserError(f"{name}: there may be at most {MOST_ITEMS:,}")
    return found


def scalar(value: Any) -> Any:
    """Return a number or text of numpy or JAX, of no axes, as Python's."""
    return value.item() if getattr(value, "shape", None) == () else value
