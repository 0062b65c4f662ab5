"""What a caller asks for, checked: prompts, numbers, and how networks are sampled."""

import math
import numbers
import secrets
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dalle2_jax.diffusion import generate, schedule
from dalle2_jax.errors import UserError
from dalle2_jax.parts import part_of
from dalle2_jax.parts.component import Component
from dalle2_jax.pipeline.limits import LARGEST_SEED, MOST_GUIDANCE, MOST_PICTURES
from dalle2_jax.pipeline.models import Model, require

PRIOR_COMPONENTS = {"diffusion": "prior", "autoregressive": "ar_prior"}
PRIORS = ("none", "caption")  # beside those that a model has


class Settings(NamedTuple):
    """What the caller changes of a model's sampling; see `text_to_image`."""

    size: int | None = None
    steps: Any = None
    guidance: Any = None
    guidance_interval: Any = None
    sampler: Any = None
    noise: Mapping[str, Any] | None = None


class Groups(NamedTuple):
    """The components that run, by the names that a caller knows them by."""

    prior: tuple[str, ...] = ()
    decoder: tuple[str, ...] = ("decoder",)
    upsampler: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Model, prior: str | None = None) -> "Groups":
        """The picture makers of a model, and one of its priors or none."""
        rest = tuple(name for name in model.cascade if name != "decoder")
        return cls(() if prior is None else (prior,), ("decoder",), rest)


# Values


def check_number(
    name: str,
    value: Any,
    low: float | int = -math.inf,
    high: float | int = math.inf,
    *,
    above: bool = False,
) -> float:
    """Returns a number, of Python or of numpy, within [low, high].

    Args:
      above: whether `low` itself is too low.

    Raises:
      UserError: it is no number, not finite, or out of range.
    """
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UserError(f"{name}={value!r}: give a number")
    value = float(value)
    if not math.isfinite(value) or not low <= value <= high or (above and value == low):
        least = f"above {low:g}" if above else f"from {low:g}"
        span = f"{least} to {high:g}" if math.isfinite(high) else f"{least}, and finite"
        raise UserError(f"{name}={value:g}: must be {span}")
    return value


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """Returns a whole number, of Python or of numpy, within [low, high].

    Raises:
      UserError: it is not whole, or out of range.
    """
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UserError(f"{name}={value!r}: give a whole number")
    if not low <= value <= high:
        raise UserError(f"{name}={value}: must be from {low} to {high}")
    return int(value)


def check_num(num: Any) -> int:
    """Returns a number of pictures."""
    return check_integer("num", num, 1, MOST_PICTURES)


def check_seed(seed: Any) -> int:
    """Returns the seed; None draws one, which is printed on stderr."""
    if seed is None:
        seed = secrets.randbelow(LARGEST_SEED + 1)
        print(f"seed={seed}", file=sys.stderr)
    return check_integer("seed", seed, 0, LARGEST_SEED)


def check_fractions(name: str, values: Any) -> Float[np.ndarray, " n"]:
    """Returns numbers from 0 to 1, at least one."""
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{name} is {values!r}: give numbers from 0 to 1") from None
    if found.ndim != 1 or not len(found) or not ((found >= 0) & (found <= 1)).all():
        raise UserError(f"{name} is {found.tolist()}: must be from 0 to 1")
    return found


def check_prompts(prompts: Any, name: str = "prompt") -> list[str]:
    """Returns one caption or several as a list.

    Raises:
      UserError: there is none, or one that says nothing or is no text.
    """
    several = [prompts] if isinstance(prompts, str) else _items(prompts, name)
    if not several:
        raise UserError(f"no {name}: give at least one caption")
    for text in several:
        if not isinstance(text, str):
            raise UserError(f"the {name} {text!r} is no text: give captions")
        if not text.strip():
            raise UserError(f"the {name} {text!r} is empty: say what to show")
    return several


def check_negative(negative: Any, count: int) -> list[str]:
    """Returns a negative prompt for each of `count` prompts.

    One text is for all of them, a list has one for each, and None is "".

    Raises:
      UserError: a list of another length, or something that is no text.
    """
    if negative is None or isinstance(negative, str):
        return [negative or ""] * count
    several = [
        "" if text is None else text for text in _items(negative, "negative_prompt")
    ]
    for text in several:
        if not isinstance(text, str):
            raise UserError(f"negative_prompt has {text!r}: give text")
    if len(several) != count:
        raise UserError(
            f"{len(several)} negative prompts for {count} prompts: give one for each, "
            "or one text for all"
        )
    return several


def _items(values: Any, name: str) -> list[Any]:
    if isinstance(values, bytes) or not hasattr(values, "__iter__"):
        raise UserError(f"{name}={values!r}: give text, or a list of texts")
    return list(values)


def _scalar(value: Any) -> Any:
    """An array of one element, as numpy and JAX return them, as Python's number."""
    return value.item() if hasattr(value, "item") and np.size(value) == 1 else value


# Sampling


def which_prior(model: Model, prior: str | None) -> str:
    """Returns the prior asked for, or the first that the model has.

    Raises:
      UserError: the model has no such prior, or can't sample it as its config says.
    """
    has = [name for name, own in PRIOR_COMPONENTS.items() if own in model.components]
    if prior is None:
        if not has:
            require(model, "prior")
        prior = has[0]
    if prior not in (*has, *PRIORS):
        raise UserError(
            f"prior={prior!r}: the model {model.path} has {', '.join(has) or 'none'}; "
            f"choose one of {', '.join([*has, *PRIORS])}"
        )
    if (
        prior == "diffusion"
        and model.sampling["prior"]["variance"] == "analytic"
        and "prior_x0_error" not in model.statistics
    ):
        raise UserError(
            f"the prior of {model.path} is to be sampled with analytic variance, which "
            "hasn't been measured: run dalle2 analytic"
        )
    return prior


def cut(model: Model, size: Any) -> Model:
    """The model without what makes pictures beyond `size`; None leaves it as it is.

    Raises:
      UserError: the model makes no pictures of that side, or its networks don't follow
        each other.
    """
    if size is not None:
        size = check_integer("size", size, 1, 2**31)
        if size not in model.sizes:
            sizes = ", ".join(map(str, model.sizes))
            raise UserError(f"size={size}: this model makes pictures of side {sizes}")
    model = model.up_to(size)
    side = model.decoder.size
    for component in model.upsamplers:
        if component.low_size != side:
            raise UserError(
                f"the upsampler to {component.size} px takes pictures of "
                f"{component.low_size} px, and what comes before it in {model.path} "
                f"makes {side} px"
            )
        side = component.size
    return model


def resolve(
    model: Model,
    given: Settings,
    groups: Groups,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """How each component that runs is sampled: the model's own way, but for changes.

    Args:
      given: what the caller changes.
      groups: what runs.
      changes: what the task changes, by component; the caller's go before them.

    Raises:
      UserError: a setting for what doesn't run or doesn't have it, or a bad value.
    """
    found = {
        name: {**model.sampling[name], **(changes or {}).get(name, {})}
        for names in groups
        for name in names
    }
    for setting, check in _CHECKS.items():
        value = getattr(given, setting)
        for group, name, one in _each(model, groups, setting, value):
            found[name][setting] = check(model.components[name], one, group)
    return found


def _each(
    model: Model, groups: Groups, setting: str, value: Any
) -> list[tuple[str, str, Any]]:
    """(group, component, value) wherever a setting is changed."""
    if value is None:
        return []
    allowed = {
        group: names
        for group, names in groups._asdict().items()
        if all(setting in part_of(name).sampler.settings for name in names)
        and (names or group == "upsampler" and setting in ("steps", "sampler"))
    }
    if not isinstance(value, Mapping):
        return [(g, name, value) for g, names in allowed.items() for name in names]
    found = []
    for group, one in value.items():
        if group not in allowed:
            raise UserError(
                f"{setting} for {group!r}: give it for {', '.join(allowed)}"
            )
        names = allowed[group]
        several = (
            one if isinstance(one, list | tuple) and group == "upsampler" else None
        )
        each = [one] if several is None else list(several)
        if len(each) != len(names):
            raise UserError(
                f"{setting} for {len(each)} {group}s ({each}): there are "
                f"{len(names)} to run"
            )
        found += [(group, *pair) for pair in zip(names, each, strict=True)]
    return found


def _check_steps(component: Component, value: Any, group: str) -> Any:
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(
        value, int | str | Sequence | np.ndarray
    ):
        raise UserError(
            f"steps of the {group} is {value!r}: give how many, or which in a list"
        )
    if not isinstance(value, int | str):
        value = tuple(check_integer("a step", _scalar(k), 0, 10**6) for k in value)
    full = schedule.make(component.diffusion["schedule"], component.diffusion["steps"])
    try:
        schedule.respace(full, value)
    except UserError as error:
        raise UserError(f"steps of the {group}: {error}") from None
    return value


def _check_guidance(component: Component, value: Any, group: str) -> float:
    return check_number(f"guidance of the {group}", value, 0, MOST_GUIDANCE)


def _check_interval(
    component: Component, value: Any, group: str
) -> tuple[float, float]:
    last = component.diffusion["steps"] - 1
    name = f"guidance_interval of the {group}"
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != 2:
        raise UserError(f"{name} is {value!r}: give the least and the largest timestep")
    low, high = (check_number(name, x, 0, last) for x in value)
    if low > high:
        raise UserError(f"{name} is {value!r}: the first must be at most the second")
    return low, high


def _check_sampler(component: Component, value: Any, group: str) -> str:
    allowed = [name for name in generate.SAMPLERS if name != "repaint"]
    if value not in allowed:
        raise UserError(
            f"sampler of the {group} is {value!r}: must be one of {', '.join(allowed)}"
        )
    return value


_CHECKS = {
    "steps": _check_steps,
    "guidance": _check_guidance,
    "guidance_interval": _check_interval,
    "sampler": _check_sampler,
}


def given_noise(
    model: Model,
    noise: Mapping[str, Any] | None,
    count: int,
    groups: Groups,
    sampling: Mapping[str, Mapping[str, Any]],
) -> dict[str, Float[np.ndarray, "steps n ..."]]:
    """The noise that the caller gives, by component, checked."""
    given = {}
    allowed = {
        group: names
        for group, names in groups._asdict().items()
        if "ar_prior" not in names and (names or group == "upsampler")
    }
    for group, arrays in (noise or {}).items():
        if group not in allowed:
            raise UserError(f"noise for {group!r}: give it for {', '.join(allowed)}")
        names = allowed[group]
        arrays = arrays if group == "upsampler" else (arrays,)
        if len(arrays) != len(names):
            raise UserError(
                f"noise for {len(arrays)} upsamplers: there are {len(names)} to run"
            )
        for name, array in zip(names, arrays, strict=True):
            component, settings = model.components[name], sampling[name]
            array = np.asarray(array, np.float32)
            steps = generate.levels(component.diffusion, settings).steps
            for setting, plain in {"candidates": 1, "last_std": 0}.items():
                if group == "prior" and settings[setting] != plain:
                    raise UserError(
                        f"noise of a prior with {setting}={settings[setting]}: "
                        f"it must have {plain}"
                    )
            side = (component.size, component.size, 3)
            shape = (component.network.clip_dim,) if group == "prior" else side
            if array.shape != (steps, count, *shape):
                raise UserError(
                    f"noise of the {group} is {list(array.shape)}: must be "
                    f"{[steps, count, *shape]} (steps, pictures, ...)"
                )
            given[name] = array
    return given
