"""A model as sampling uses it: its networks, their parameters and settings."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, freeze
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from dalle2_jax import checkpoint
from dalle2_jax.data import tokenizer
from dalle2_jax.diffusion import tiles
from dalle2_jax.errors import UserError
from dalle2_jax.nn import abstract
from dalle2_jax.nn.ar_prior import ARPrior
from dalle2_jax.nn.clip import CLIP
from dalle2_jax.nn.codes import Codes
from dalle2_jax.nn.decoder import Decoder
from dalle2_jax.nn.prior import DiffusionPrior
from dalle2_jax.nn.unet import UNet

static = partial(flax.struct.field, pytree_node=False)


@flax.struct.dataclass
class Part:
    """A network with its parameters, and how it is sampled.

    A pytree of the parameters: all else is static, so that a part can be an argument of
    a jitted function.

    ``diffusion`` and ``sampling`` are the sections that diffusion.generate explains;
    ``size`` is the side of the pictures it makes, ``low_size`` of those it is given.
    ``last`` are the params of a second network of the kind for the last step, if any.
    With a ``tile`` the network is run on tiles of so many pixels with that ``overlap``;
    with ``strips``, a sharding of [b, h, w, c] over h, each device makes a strip.
    """

    params: Any
    network: nn.Module = static()
    diffusion: FrozenDict = static()
    sampling: FrozenDict = static()
    size: int | None = static()
    low_size: int | None = static()
    last: Any = None
    tile: int | None = static(default=None)
    overlap: int = static(default=0)
    strips: NamedSharding | None = static(default=None)


class Model(NamedTuple):
    """What `load` returns; parts that the model lacks are None.

    Attributes:
      path: where it came from.
      upsamplers: from the smallest to the largest.
      z_image_mean, z_image_std: [d], the space in which the prior works.
      x0_error: [timesteps], the prior's measured error, for its analytic variance.
      codes: what the autoregressive prior writes.
      devices: the mesh over which pictures are spread.
    """

    path: str
    tokenizer: tokenizer.Tokenizer | None
    clip: Part | None
    prior: Part | None
    ar_prior: Part | None
    decoder: Part | None
    upsamplers: tuple[Part, ...]
    z_image_mean: Any
    z_image_std: Any
    x0_error: Any
    codes: Codes | None
    devices: Mesh

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the pictures it can make, in pixels."""
        parts = (self.decoder, *self.upsamplers)
        return tuple(part.size for part in parts if part is not None)


_NETWORKS = {
    "clip": CLIP,
    "prior": DiffusionPrior,
    "ar_prior": ARPrior,
    "decoder": Decoder,
}


def mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """All devices, or those given, over which pictures are spread."""
    devices = jax.devices() if devices is None else devices
    auto = (AxisType.Auto,)
    return jax.make_mesh((len(devices),), ("data",), axis_types=auto, devices=devices)


def placer(
    devices: Mesh, dtype: DTypeLike = jnp.float32, offload: bool = False
) -> checkpoint.Place:
    """Where params go as they are read: cast, and onto every device.

    With ``offload`` they stay in the host's memory, from which each network goes to the
    devices when it runs, and leaves them when it is done.
    """
    everywhere = NamedSharding(devices, PartitionSpec())

    def place(array: np.ndarray) -> Any:
        array = np.asarray(array, dtype)
        return array if offload else jax.device_put(array, everywhere)

    return place


def assemble(
    exports: Sequence[tuple[str, checkpoint.Export]],
    devices: Mesh,
    dtype: DTypeLike = jnp.float32,
) -> Model:
    """A model of what was read.

    Args:
      exports: where each is from, and itself; several are put together, and of parts
        that more than one has the last is taken. But a CLIP with both towers goes
        before one that has only the text's.
      devices: where pictures are made.
      dtype: of the networks' activations.

    Raises:
      UserError: names and shapes do not fit the networks that a config describes.
    """
    model = checkpoint.merge([export for _, export in exports])
    path = " + ".join(where for where, _ in exports)
    parts = {
        name: _part(name, section, model.params[name], dtype, path)
        for name, section in model.config["parts"].items()
    }
    upsamplers = [
        part.replace(last=parts[f"{name}_last"].params)
        if f"{name}_last" in parts
        else part
        for name, part in parts.items()
        if name.startswith("upsampler") and not name.endswith("_last")
    ]
    text = model.tokenizer_dir
    return Model(
        path=path,
        tokenizer=tokenizer.load(text) if text else None,
        clip=parts.get("clip"),
        prior=parts.get("prior"),
        ar_prior=parts.get("ar_prior"),
        decoder=parts.get("decoder"),
        upsamplers=tuple(sorted(upsamplers, key=lambda part: part.size)),
        z_image_mean=model.statistics.get("z_image_mean"),
        z_image_std=model.statistics.get("z_image_std"),
        x0_error=model.statistics.get("prior_x0_error"),
        codes=_codes(model, path),
        devices=devices,
    )


def tiled(model: Model, tile: int, overlap: int) -> Model:
    """The model with its upsamplers run on tiles; see `load`."""
    if not model.upsamplers:
        raise UserError(f"tile={tile}: the model {model.path} has no upsampler")
    for part in model.upsamplers:
        tiles.check(tile, overlap, part.network.unit)
    parts = [part.replace(tile=tile, overlap=overlap) for part in model.upsamplers]
    return model._replace(upsamplers=tuple(parts))


def require(model: Model, *names: str) -> None:
    """A UserError if the model lacks a part."""
    missing = [name for name in names if getattr(model, name) is None]
    if "tokenizer" in missing:
        raise UserError(
            f"the model {model.path} has no tokenizer, which is its CLIP's: export or "
            "copy the whole model again, or load it together with one that has it"
        )
    if missing:
        raise UserError(
            f"the model {model.path} has no {' and no '.join(missing)}: train it with "
            f"configs/{missing[0]}.py, or load it together with one that has it"
        )


def in_batches(
    some: Callable[[np.ndarray], np.ndarray], count: int, devices: int, most: int
) -> np.ndarray:
    """Calls ``some`` with the numbers of the rows to make, a batch at a time."""
    return np.concatenate([some(rows) for rows in batches(count, devices, most)])[
        :count
    ]


def batches(count: int, devices: int, most: int) -> Iterator[np.ndarray]:
    """The numbers of the rows of each batch, of at most ``most`` a device.

    All have one size, so that each network is compiled once; where the rows do not fill
    the last one, the last row is repeated.
    """
    batch = min(most * devices, -(-count // devices) * devices)
    for start in range(0, count, batch):
        yield np.minimum(np.arange(start, start + batch), count - 1)


def _codes(model: checkpoint.Export, path: str) -> Codes | None:
    if "ar_prior" not in model.params:
        return None
    stored = model.statistics.get("ar_prior")
    if stored is None:
        raise UserError(
            f"the model {path} has no statistics of its ar_prior, without which its "
            "codes can't be read: export it again"
        )
    return Codes(*(stored[name] for name in Codes._fields))


def _part(
    name: str, section: Mapping[str, Any], params: Any, dtype: DTypeLike, path: str
) -> Part:
    network = _NETWORKS.get(name, UNet)(**freeze(section["net"]), dtype=dtype)
    checkpoint.check(params, abstract(network), f"{name} of {path}")
    return Part(
        network=network,
        params=params,
        diffusion=freeze(section.get("diffusion", {})),
        sampling=freeze(section.get("sampling", {})),
        size=section.get("size"),
        low_size=section.get("low_size"),
    )
