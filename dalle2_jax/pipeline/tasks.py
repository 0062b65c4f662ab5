"""The tasks of the command line: what each needs, and the function that it is."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dalle2_jax.errors import UserError
from dalle2_jax.pipeline import limits, parse


class Task(NamedTuple):
    """What a task needs and what else it may be told, by the names of flags."""

    needs: tuple[str, ...]
    takes: tuple[str, ...]


_HOW = ("guidance_interval", "sampler")
TASKS = {
    "text_to_image": Task(
        ("prompt",), ("num", "best_of", "prior", "negative_prompt", *_HOW)
    ),
    "variations": Task(("image",), ("num", "eta", *_HOW)),
    "interpolate": Task(("image", "image2"), ("frames", "shared_noise")),
    "text_diff": Task(
        ("image", "prompt_from", "prompt"), ("frames", "theta", "direction")
    ),
    "inpaint": Task(
        ("image", "prompt"), ("mask", "mask_mode", "num", "repeats", *_HOW)
    ),
    "outpaint": Task(("image", "prompt"), ("num", "extend", "repeats", *_HOW)),
    "img2img": Task(("image", "prompt"), ("num", "strength", *_HOW)),
    "pca": Task(("image",), ("components",)),
    "reconstruct": Task(("image",), ()),
}
GUIDED = ("prior", "decoder")


def check(task: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a task's flags, checked and parsed.

    The prompt is a list for text_to_image alone, and `num` is always there if the task
    takes it.

    Args:
      task: one of TASKS.
      given: the flags that are given, by name.

    Raises:
      UserError: one is missing, is not the task's, or has no such value.
    """
    given, (needs, takes) = dict(given), TASKS[task]
    for name in needs:
        if name not in given:
            raise UserError(_without(task, name))
    for name in given:
        if name not in needs + takes:
            allowed = ", ".join(f"--{flag}" for flag in needs + takes)
            raise UserError(f"--task={task} takes no --{name}, only {allowed}")
    for name, value in given.items():
        if isinstance(value, float):
            above = name in ("strength", "extend")
            if not math.isfinite(value) or (above and value == 0):
                least = "above 0" if above else "a number"
                raise UserError(f"--{name}={value:g}: must be {least}")
    for name in ("prompt", "negative_prompt", "prompt_from"):
        for text in _listed(given.get(name, [])):
            _check_text(name, text)
    prompts = given.get("prompt", [])
    if task != "text_to_image" and prompts:
        if len(prompts) > 1:
            raise UserError(f"--task={task} takes one --prompt")
        given["prompt"] = prompts[0]
    if "num" in takes:
        given.setdefault("num", 4)
        _check_count(given, len(prompts) or 1)
    if "negative_prompt" in given:
        negative = given["negative_prompt"]
        if len(negative) not in (1, len(prompts)):
            raise UserError(
                f"--negative_prompt is given {len(negative)} times for {len(prompts)} "
                "prompts: give it once for all, or once for each"
            )
        given["negative_prompt"] = negative[0] if len(negative) == 1 else negative
    if "components" in given:
        if not all(k.strip().isdecimal() for k in given["components"]):
            raise UserError(
                f"--components={','.join(given['components'])}: write numbers, as 1,2,4"
            )
        given["components"] = [int(k) for k in given["components"]]
    for name, read, networks in (
        ("guidance_interval", parse.interval, GUIDED),
        ("sampler", parse.sampler, parse.NETWORKS),
    ):
        if name in given:
            given[name] = parse.by_network(name, given[name], read, networks)
    return given


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"--{name}={text!a} is not UTF-8") from None
    if name != "negative_prompt" and not text.strip():
        raise UserError(f"--{name}={text!r} is empty: say what to show")


def _check_count(given: Mapping[str, Any], prompts: int) -> None:
    num, made = given["num"], given.get("best_of", given["num"])
    if made < num:
        raise UserError(f"--best_of={made} is less than --num={num}: make more")
    if made * prompts > limits.MOST_PICTURES:
        raise UserError(
            f"{made * prompts:,} pictures: at most {limits.MOST_PICTURES:,} are made "
            "in a run"
        )


def _without(task: str, name: str) -> str:
    if name == "prompt":
        return 'no --prompt: say what to show, as --prompt="a red circle"'
    kind = "FILE" if name in ("image", "image2") else "..."
    return f"--task={task} needs --{name}={kind}"


def make(task: str, model: Any, values: Mapping[str, Any], **rest: Any) -> Any:
    """Call a task's function, whose arguments are named as the flags."""
    rename = {"image": "picture", "image2": "other"}
    if task == "text_to_image":
        rename["prompt"] = "prompts"
    if task == "reconstruct":
        rename["image"] = "pictures"
    arguments = {rename.get(name, name): value for name, value in values.items()}
    if task == "inpaint":
        arguments.setdefault("mask", None)
    return _function(task)(model, **arguments, **rest)


def _function(task: str) -> Callable[..., Any]:
    from dalle2_jax.pipeline import edit, generate, paint

    for module in (generate, edit, paint):
        if hasattr(module, task):
            return getattr(module, task)
    raise KeyError(task)
