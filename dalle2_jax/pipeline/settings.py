"""How a caller wants networks to be sampled, checked against the model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from dalle2_jax.diffusion import generate, schedule
from dalle2_jax.errors import UserError, short
from dalle2_jax.parts import part_of
from dalle2_jax.parts.component import Component
from dalle2_jax.pipeline import values
from dalle2_jax.pipeline.limits import MOST_GUIDANCE
from dalle2_jax.pipeline.models import Model, require

PRIOR_COMPONENTS = {"diffusion": "prior", "autoregressive": "ar_prior"}
PRIORS = ("none", "caption")  # beside those that a model has


class Settings(NamedTuple):
    """What the caller changes of a model's sampling, unchecked; see `text_to_image`."""

    size: Any = None
    steps: Any = None
    guidance: Any = None
    guidance_interval: Any = None
    sampler: Any = None
    noise: Any = None


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


def check_model(model: Any, *names: str) -> None:
    """Check that the first argument is a model, with a tokenizer or components.

    Raises:
      UserError: it is something else, as where arguments are swapped, or lacks one.
    """
    if not isinstance(model, Model):
        raise UserError(
            f"model={short(model)}: the first argument must be a model, as "
            "dalle2_jax.load() returns it"
        )
    require(model, *names)


def which_prior(model: Model, prior: Any = None) -> str:
    """Returns the prior asked for, or the first that the model has.

    Raises:
      UserError: the model has no such prior, or can't sample it as its config says.
    """
    has = [name for name, own in PRIOR_COMPONENTS.items() if own in model.components]
    if prior is None:
        if not has:
            require(model, "prior")
        prior = has[0]
    prior = values.scalar(prior)
    if not isinstance(prior, str) or prior not in (*has, *PRIORS):
        raise UserError(
            f"prior={short(prior)}: the model {model.path} has "
            f"{', '.join(has) or 'none'}; choose one of {', '.join([*has, *PRIORS])}"
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
        size = values.check_integer("size", size, 1, 2**31)
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
    # Of a small size no upsampler runs, although the model has some.
    sized = ("upsampler",) if groups.decoder else ()
    allowed = {
        group: names
        for group, names in groups._asdict().items()
        if all(setting in part_of(name).sampler.settings for name in names)
        and (names or group in sized and setting in ("steps", "sampler"))
    }
    if not isinstance(value, Mapping):
        return [(g, name, value) for g, names in allowed.items() for name in names]
    found = []
    for group, one in value.items():
        if group not in allowed:
            raise UserError(
                f"{setting} for {short(group)}: give it for {', '.join(allowed)}"
            )
        names = allowed[group]
        if isinstance(one, list | tuple) and group == "upsampler":
            each = _for_upsamplers(setting, one, names)
        elif names:
            each = [one] * len(names)
        else:
            raise UserError(f"{setting} for the upsampler: there is none to run")
        found += [(group, *pair) for pair in zip(names, each, strict=True)]
    return found


def _for_upsamplers(setting: str, given: Any, names: Sequence[str]) -> list[Any]:
    """The value of each upsampler that runs."""
    each = values.items(
        f"{setting} for the upsampler", given, "a list with one for each"
    )
    if len(each) != len(names):
        raise UserError(
            f"{setting} for {len(each)} upsamplers: there are {len(names)} to run"
        )
    return each


def _check_steps(component: Component, value: Any, group: str) -> Any:
    name, value = f"the {group}'s steps", values.scalar(value)
    last = component.diffusion["steps"] - 1
    if isinstance(value, Sequence | np.ndarray | jax.Array) and not isinstance(
        value, str | bytes
    ):
        value = tuple(values.check_integers(name, value, 0, last))
    elif not isinstance(value, str):
        value = values.check_integer(name, value, 1, last + 1)
    elif len(value) > 100:
        raise UserError(f"{name}={short(value)}: it is too long")
    full = schedule.make(component.diffusion["schedule"], component.diffusion["steps"])
    try:
        schedule.respace(full, value)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return value


def _check_guidance(component: Component, value: Any, group: str) -> float:
    return values.check_number(f"the {group}'s guidance", value, 0, MOST_GUIDANCE)


def _check_interval(
    component: Component, value: Any, group: str
) -> tuple[float, float]:
    last = component.diffusion["steps"] - 1
    name = f"the {group}'s guidance_interval"
    found = values.check_numbers(name, value, 0, last)
    if len(found) != 2 or found[0] > found[1]:
        raise UserError(
            f"{name}={short(value)}: give the least and the largest timestep"
        )
    return float(found[0]), float(found[1])


def _check_sampler(component: Component, value: Any, group: str) -> str:
    allowed = [name for name in generate.SAMPLERS if name != "repaint"]
    return values.check_choice(f"the {group}'s sampler", value, allowed)


_CHECKS = {
    "steps": _check_steps,
    "guidance": _check_guidance,
    "guidance_interval": _check_interval,
    "sampler": _check_sampler,
}


def given_noise(
    model: Model,
    noise: Any,
    count: int,
    groups: Groups,
    sampling: Mapping[str, Mapping[str, Any]],
) -> dict[str, Float[np.ndarray, "steps n ..."]]:
    """Return the noise that the caller gives, by component."""
    if noise is None:
        return {}
    if not isinstance(noise, Mapping):
        raise UserError(
            f'noise={short(noise)}: give it by network, as {{"decoder": array}}'
        )
    given = {}
    allowed = {
        group: names
        for group, names in groups._asdict().items()
        if "ar_prior" not in names and (names or group == "upsampler")
    }
    for group, arrays in noise.items():
        if group not in allowed:
            raise UserError(
                f"noise for {short(group)}: give it for {', '.join(allowed)}"
            )
        names = allowed[group]
        if group == "upsampler":
            arrays = _for_upsamplers("noise", arrays, names)
        else:
            arrays = [arrays]
        for name, array in zip(names, arrays, strict=True):
            component, settings = model.components[name], sampling[name]
            steps = generate.levels(component.diffusion, settings).steps
            for setting, plain in {"candidates": 1, "last_std": 0}.items():
                if group == "prior" and settings[setting] != plain:
                    raise UserError(
                        f"noise of a prior with {setting}={settings[setting]}: "
                        f"it must have {plain}"
                    )
            side = (component.size, component.size, 3)
            shape = (component.network.clip_dim,) if group == "prior" else side
            # Of steps, pictures, and what each is.
            given[name] = values.check_array(
                f"the {group}'s noise", array, (steps, count, *shape)
            )
    return given
