"""Fine-tuning: what a stage starts from, and how much of it is trained.

`train_only` and `hold_params` make a stage of a stage: neither the stages nor the
training loop know of them.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array
from ml_collections import ConfigDict

from dalle2_jax import checkpoint
from dalle2_jax.errors import UserError
from dalle2_jax.nn import build
from dalle2_jax.parts.stage import Batch, Stage, float32


def start_params(
    config: ConfigDict,
    origin: checkpoint.Export | None,
    name: str,
    module: type[nn.Module],
    net: Mapping[str, Any],
    init: Callable[[Array], Any],
) -> Any:
    """The params of a part of the model that a stage starts from; None without one.

    Args:
      origin: the model of ``config.init_from``.
      name, module, net, init: the part, its network's class and arguments, and
        Stage.init.

    Raises:
      UserError: the model has no such part, or one of another network.
    """
    if origin is None:
        return None
    if name not in origin.params:
        raise UserError(
            f"init_from={config.init_from} has no {name}, only "
            f"{', '.join(sorted(origin.params)) or 'nothing'}: give a model that has "
            "one, or train from nothing with --config.init_from="
        )
    where = f"the {name} of init_from={config.init_from}"
    abstract = jax.eval_shape(init, jax.random.key(0))
    checkpoint.check(origin.params[name], abstract, where)
    # What shapes don't tell, as heads and activations.
    ours, theirs = (
        _effective(build.complete(module, arguments))
        for arguments in (net, origin.config["parts"][name]["net"])
    )
    differences = [
        f"{key} {ours.get(key)} instead of {theirs.get(key)}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if differences:
        raise UserError(
            f"{where} was trained with another net: the config has "
            f"{', '.join(differences)}: change it back"
        )
    return float32(origin.params[name])


def _effective(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what of a network's complete arguments its answers depend on.

    Without those that the shapes tell, whose None stands for the same number.
    """
    flat = flatten_dict(arguments, sep=".")
    if "vision_activation" in flat:
        flat["vision_activation"] = flat["vision_activation"] or flat["activation"]
    apart = ("dropout", "remat", "text_mlp_width", "vision_mlp_width")
    return {k: v for k, v in flat.items() if k.rpartition(".")[2] not in apart}


def train_only(stage: Stage, expression: str) -> Stage:
    """The stage with fewer params to train: those whose path the expression is in.

    A path is written "net/up_0_res_1/conv_1/kernel". The others are frozen["rest"], so
    that they have neither gradients nor moments nor an average, and are exported as
    they were.

    Raises:
      UserError: the stage starts from nothing, or the expression can't be read or is
        in no path.
    """
    if stage.start is None:
        raise UserError(
            f"trainable={expression!r} would freeze params drawn at random: give a "
            "model to start from with --config.init_from=DIR"
        )
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UserError(
            f"trainable={expression!r} is no regular expression: {error}"
        ) from None

    def split(params: Any) -> tuple[Any, Any]:
        """What is trained, and the rest."""
        flat = flatten_dict(params, sep="/")
        chosen = {k: v for k, v in flat.items() if pattern.search(k)}
        rest = {k: v for k, v in flat.items() if k not in chosen}
        return unflatten_dict(chosen, sep="/"), unflatten_dict(rest, sep="/")

    def join(params: Any, rest: Any) -> Any:
        return unflatten_dict({**flatten_dict(params), **flatten_dict(rest)})

    def whole(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(params: Any, frozen: Any, batch: Batch, key: Array) -> Any:
            return function(join(params, frozen["rest"]), frozen, batch, key)

        return call

    start, rest = split(stage.start)
    if not start:
        names = sorted(flatten_dict(stage.start, sep="/"))
        raise UserError(
            f"trainable={expression!r} is in no param's path: they go from {names[0]} "
            f"to {names[-1]}"
        )
    return stage._replace(
        frozen={**stage.frozen, "rest": rest},
        init=lambda key: split(stage.init(key))[0],
        loss=whole(stage.loss),
        metrics=whole(stage.metrics),
        preview=whole(stage.preview),
        export=lambda params: stage.export(join(params, rest)),
        start=start,
    )


def hold_params(stage: Stage, dtype: jnp.dtype) -> Stage:
    """The stage with the params of networks, trained and frozen, in a dtype.

    What is frozen is exported as it was read, not rounded.
    """

    def cast(params: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype), params)

    if dtype == jnp.float32:
        return stage
    return stage._replace(
        # A network's are a dict; beside them are statistics, which stay as they are.
        frozen={
            name: cast(value) if isinstance(value, dict) else value
            for name, value in stage.frozen.items()
        },
        init=lambda key: cast(stage.init(key)),
        start=None if stage.start is None else cast(stage.start),
    )
