"""Networks from what a file says of them, checked and bounded by its weights.

A config may come from anywhere. Its values are compared with the weights beside it
before a network is traced: a width of 10^12 or 10^6 layers would take all memory, or
for ever.
"""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax.core import freeze
from jax.typing import DTypeLike

from dalle2_jax.errors import UserError, first_line, short
from dalle2_jax.nn import abstract
from dalle2_jax.nn.decoder import TextEncoder
from dalle2_jax.nn.layers import ACTIVATIONS
from dalle2_jax.nn.unet import UNet

MOST_TENSORS = 4_000  # of one network; Karlo's largest has some 1,000
_MOST = 1_000_000  # what any number of a config may be, however small the network
# Arguments that are themselves the arguments of a network.
_NESTED = {"unet": UNet, "text_encoder": TextEncoder}
_NOT_ARGUMENTS = ("parent", "name", "dtype")


class _Bounds(NamedTuple):
    number: int
    length: int  # of a list, as of the channels of layers


Shapes = Mapping[str, tuple[int, ...]]


def build(
    kind: type[nn.Module],
    arguments: Any,
    shapes: Shapes | None,
    where: str,
    dtype: DTypeLike = jnp.float32,
) -> nn.Module:
    """Return the network of a config, of which `nn.abstract` is known to succeed.

    Args:
      kind: the module's class.
      arguments: what the config holds for it; should be an object.
      shapes: of the weights beside the config, by their names in any layout. They bound
        the network's numbers and layers; that they fit is not checked here. None for
        a network that is yet to be trained.
      where: the config and the part, for messages.
      dtype: of the activations.

    Raises:
      UserError: arguments are unknown, missing, or of a wrong type or size, or the
        network can't be traced.
    """
    weights = MOST_TENSORS if shapes is None else len(shapes)
    if weights > MOST_TENSORS:
        raise UserError(
            f"{where}: has {weights} weights, a network has at most {MOST_TENSORS}"
        )
    most = max(_MOST, sum(map(math.prod, (shapes or {}).values())))
    _check(kind, arguments, _Bounds(most, weights), where)
    # Networks call fewer modules than they have weights, twice with rematerialisation.
    limit, calls = 20 + 2 * weights, 0

    def count(call: Any, args: Any, kwargs: Any, _: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise UserError(
                f"{where}: describes more layers than {weights} weights are for"
            )
        return call(*args, **kwargs)

    with describing(where), nn.intercept_methods(count):
        network = kind(**freeze(_tuples(arguments)), dtype=dtype)
        abstract(network)
    return network


def complete(kind: type[nn.Module], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a network with the defaults of those that are left out.

    Sequences are tuples, and the arguments of networks within are complete, too.
    """
    made = {
        field.name: field.default
        for field in dataclasses.fields(kind)
        if field.name not in _NOT_ARGUMENTS and field.default is not dataclasses.MISSING
    } | {name: _tuples(value) for name, value in arguments.items()}
    for name, nested in _NESTED.items():
        if isinstance(made.get(name), Mapping):
            made[name] = complete(nested, made[name])
    return made


@contextlib.contextmanager
def describing(where: Any) -> Iterator[None]:
    """Turn what a senseless config raises, whatever it is, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{where}: no network has these values "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _check(kind: type[nn.Module], arguments: Any, most: _Bounds, where: str) -> None:
    """Raise a UserError unless the arguments are a network's, of the right types."""
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where}: must be an object, is {short(arguments)}")
    fields = {
        field.name: field
        for field in dataclasses.fields(kind)
        if field.name not in _NOT_ARGUMENTS
    }
    unknown = [str(name) for name in arguments if name not in fields]
    if unknown:
        raise UserError(
            f"{where}: {kind.__name__} has no argument {short(unknown[0])}; its "
            f"arguments are {', '.join(fields)}"
        )
    needed = [k for k, v in fields.items() if v.default is dataclasses.MISSING]
    missing = [name for name in needed if name not in arguments]
    if missing:
        raise UserError(f"{where}: {kind.__name__} lacks {', '.join(missing)}")
    for name, value in arguments.items():
        if name in _NESTED and isinstance(value, Mapping):
            _check(_NESTED[name], value, most, f"{where}.{name}")
        elif not _fits(value, fields[name].type, most):
            raise UserError(
                f"{where}: {name} is {short(value)}: must be "
                f"{_told(fields[name].type, most)}"
            )


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any, most: _Bounds) -> bool:
    """Whether a JSON value is of a type, and in its range."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    for option in _options(hint):
        if option is int:
            fits = number and isinstance(value, int) and 0 <= value <= most.number
        elif option is float:
            fits = number and math.isfinite(value) and value >= 0
        elif option is str:
            fits = isinstance(value, str) and value in ACTIVATIONS
        elif typing.get_origin(option) is tuple:
            fits = isinstance(value, list | tuple) and len(value) <= most.length
            fits = fits and all(_fits(item, int, most) for item in value)
        else:
            fits = isinstance(value, typing.get_origin(option) or option)
        if fits:
            return True
    return False


def _told(hint: Any, most: _Bounds) -> str:
    """The values of a type in words."""
    words = {
        int: f"a whole number from 0 to {most.number}",
        float: "a number from 0 on",
        str: f"one of {', '.join(ACTIVATIONS)}",
        bool: "true or false",
        type(None): "null",
        tuple: f"a list of at most {most.length} whole numbers",
        Mapping: "an object",
    }
    told = [words.get(typing.get_origin(o) or o, str(o)) for o in _options(hint)]
    return " or ".join(told)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, at any depth, so that a network can be hashed."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
