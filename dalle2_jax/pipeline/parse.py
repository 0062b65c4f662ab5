"""How networks are sampled, and seeds, as text on a command line."""

import math
import re
from collections.abc import Callable
from typing import Any

from dalle2_jax.errors import UserError
from dalle2_jax.pipeline import limits

NETWORKS = ("prior", "decoder", "upsampler")


def by_network(
    flag: str,
    text: str | None,
    parse: Callable[[str], Any],
    networks: tuple[str, ...] = NETWORKS,
) -> Any:
    """Return what "prior=25,decoder=50,upsampler=8+4" means: a dict; None for "".

    A value without a network, as "25", is for all of them, and returned as it is.

    Args:
      flag, text: the flag's name and what it is given.
      parse: makes a value of its text, or raises ValueError that says what it must be.
      networks: those that have the setting.

    Raises:
      UserError: it can't be read.
    """

    def read(value: str) -> Any:
        try:
            return parse(value)
        except ValueError as error:
            raise UserError(
                f"--{flag}={text}: {value!r} is no {error}; write VALUE or "
                "NETWORK=VALUE, as decoder=VALUE,prior=VALUE"
            ) from None

    if not text:
        return None
    if "=" not in text:
        if "+" in text or "," in text:
            raise UserError(
                f"--{flag}={text}: say which networks, as decoder=VALUE,prior=VALUE; + "
                "is between upsamplers"
            )
        return read(text)
    result = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        if name not in networks:
            raise UserError(
                f"--{flag}={text}: {name!r} is no network that has it: choose "
                f"{', '.join(networks)}"
            )
        if name in result:
            raise UserError(f"--{flag}={text}: {name} is given twice")
        values = tuple(map(read, value.split("+")))
        if len(values) > 1 and name != "upsampler":
            raise UserError(
                f"--{flag}={text}: give the {name} one value; + is between upsamplers"
            )
        result[name] = values if name == "upsampler" else values[0]
    return result


def steps(text: str) -> int | str:
    """Return a number of steps, or the name of a choice of them."""
    if re.fullmatch("ddim[0-9]+|fast27", text):
        return text
    if not re.fullmatch("0*[1-9][0-9]{0,5}", text):
        raise ValueError("number of steps")
    return int(text)


def scale(text: str) -> float:
    """Return a guidance scale."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= limits.MOST_GUIDANCE:
        raise ValueError(f"scale from 0 to {limits.MOST_GUIDANCE:g}")
    return value


def interval(text: str) -> tuple[int, int]:
    """Return the least and the largest timestep of "100:700"."""
    found = re.fullmatch("([0-9]{1,6}):([0-9]{1,6})", text)
    if not found or int(found[1]) > int(found[2]):
        raise ValueError("interval LEAST:LARGEST of timesteps")
    return int(found[1]), int(found[2])


def sampler(text: str) -> str:
    """Return the name of a sampler."""
    from dalle2_jax.diffusion.generate import SAMPLERS

    allowed = [name for name in SAMPLERS if name != "repaint"]
    if text not in allowed:
        raise ValueError(f"sampler of {', '.join(allowed)}")
    return text


def seed(text: str) -> int | None:
    """Return the seed that --seed gives; None, which draws one, for "" and "random"."""
    if text in ("", "random"):
        return None
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > limits.LARGEST_SEED:
        raise UserError(
            f"--seed={text}: must be from 0 to {limits.LARGEST_SEED}, or random"
        )
    return int(text)
