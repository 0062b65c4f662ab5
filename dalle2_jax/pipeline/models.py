"""A model as sampling uses it: its networks, their parameters and settings."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.core import FrozenDict, freeze
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dalle2_jax import checkpoint
from dalle2_jax.data import tokenizer
from dalle2_jax.errors import UserError
from dalle2_jax.nn.clip import CLIP
from dalle2_jax.nn.decoder import Decoder
from dalle2_jax.nn.prior import DiffusionPrior
from dalle2_jax.nn.unet import UNet

static = partial(flax.struct.field, pytree_node=False)


@flax.struct.dataclass
class Part:
    """A network with its parameters, on the devices, and how it is sampled.

    A pytree of the parameters: all else is static, so that a part can be an argument of
    a jitted function.

    ``diffusion`` and ``sampling`` are the sections that diffusion.generate explains;
    ``size`` is the side of the pictures it makes, ``low_size`` of those it is given.
    """

    params: Any
    network: nn.Module = static()
    diffusion: FrozenDict = static()
    sampling: FrozenDict = static()
    size: int | None = static()
    low_size: int | None = static()


class Model(NamedTuple):
    """What `load` returns; parts that the model lacks are None.

    Attributes:
      path: where it came from.
      upsamplers: from the smallest to the largest.
      z_image_mean, z_image_std: [d], the space in which the prior works.
      devices: the mesh over which pictures are spread.
    """

    path: str
    tokenizer: tokenizer.Tokenizer | None
    clip: Part | None
    prior: Part | None
    decoder: Part | None
    upsamplers: tuple[Part, ...]
    z_image_mean: Any
    z_image_std: Any
    devices: Mesh

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the pictures it can make, in pixels."""
        parts = (self.decoder, *self.upsamplers)
        return tuple(part.size for part in parts if part is not None)


_NETWORKS = {"clip": CLIP, "prior": DiffusionPrior, "decoder": Decoder}


def load(*paths: str | Path) -> Model:
    """Loads a model that train.py exported.

    Args:
      paths: none for the bundled model, or a model's directory; several are put
        together, and of parts that more than one has the last is taken.

    Raises:
      UserError: a path is not a model, a file is damaged, or names and shapes do not
        fit the networks that its config describes.
    """
    read = [checkpoint.load(path) for path in paths or (checkpoint.BUNDLED,)]
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    parts: dict[str, Part] = {}
    statistics: dict[str, Any] = {}
    text = None
    for model, path in zip(read, paths or (checkpoint.BUNDLED,), strict=True):
        for name, section in model.config["parts"].items():
            parts[name] = _part(name, section, model.params[name], mesh, path)
        statistics |= model.statistics
        text = model.tokenizer_dir or text
    upsamplers = [part for name, part in parts.items() if name.startswith("upsampler")]
    return Model(
        path=" + ".join(map(str, paths)) or "bundled",
        tokenizer=tokenizer.load(text) if text else None,
        clip=parts.get("clip"),
        prior=parts.get("prior"),
        decoder=parts.get("decoder"),
        upsamplers=tuple(sorted(upsamplers, key=lambda part: part.size)),
        z_image_mean=statistics.get("z_image_mean"),
        z_image_std=statistics.get("z_image_std"),
        devices=mesh,
    )


def require(model: Model, *names: str) -> None:
    """A UserError if the model lacks a part."""
    missing = [name for name in names if getattr(model, name) is None]
    if missing:
        raise UserError(
            f"the model {model.path} has no {' and no '.join(missing)}: train it with "
            f"configs/{missing[0]}.py, or load it together with one that has it"
        )


def _part(
    name: str, section: Mapping[str, Any], params: Any, mesh: Mesh, path: str | Path
) -> Part:
    network = _NETWORKS.get(name, UNet)(**freeze(section["net"]))
    abstract = jax.eval_shape(
        lambda: network.init(jax.random.key(0), *network.example())["params"]
    )
    checkpoint.check(params, abstract, Path(path) / f"{name}.safetensors")
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    return Part(
        network=network,
        params=jax.device_put(params, NamedSharding(mesh, PartitionSpec())),
        diffusion=freeze(section.get("diffusion", {})),
        sampling=freeze(section.get("sampling", {})),
        size=section.get("size"),
        low_size=section.get("low_size"),
    )
