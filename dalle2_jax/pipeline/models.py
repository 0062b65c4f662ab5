"""A model as sampling uses it: its components, statistics and settings."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import freeze
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from dalle2_jax import checkpoint
from dalle2_jax.data import tokenizer
from dalle2_jax.diffusion import tiles
from dalle2_jax.errors import UserError
from dalle2_jax.nn import abstract
from dalle2_jax.nn.codes import Codes
from dalle2_jax.parts import PARTS, part_of
from dalle2_jax.parts.component import Component, make_component


class Model(NamedTuple):
    """What `load` returns.

    Attributes:
      path: where it came from.
      tokenizer: of its CLIP, or None.
      components: its networks by name, such as "prior" and "upsampler_128".
      sampling: how each is sampled unless the caller says otherwise; see
        diffusion.generate.
      statistics: z_image_mean and z_image_std, [d], the space in which the prior works;
        prior_x0_error, [timesteps], the prior's measured error, for its analytic
        variance; ar_prior, what the autoregressive prior writes.
      devices: the mesh over which pictures are spread.
    """

    path: str
    tokenizer: tokenizer.Tokenizer | None
    components: Mapping[str, Component]
    sampling: Mapping[str, Mapping[str, Any]]
    statistics: Mapping[str, Any]
    devices: Mesh

    @property
    def clip(self) -> Component | None:
        """CLIP, or None."""
        return self.components.get("clip")

    @property
    def prior(self) -> Component | None:
        """The diffusion prior, or None."""
        return self.components.get("prior")

    @property
    def ar_prior(self) -> Component | None:
        """The autoregressive prior, or None."""
        return self.components.get("ar_prior")

    @property
    def decoder(self) -> Component | None:
        """The decoder, or None."""
        return self.components.get("decoder")

    @property
    def upsamplers(self) -> tuple[Component, ...]:
        """The upsamplers, from the smallest to the largest."""
        return tuple(
            self.components[name] for name in self.cascade if name != "decoder"
        )

    @property
    def cascade(self) -> tuple[str, ...]:
        """Names of what makes pictures, in the order in which they run."""
        names = [n for n in self.components if part_of(n).makes == "picture"]
        return tuple(sorted(names, key=lambda name: self.components[name].size))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the pictures it can make, in pixels."""
        return tuple(self.components[name].size for name in self.cascade)

    @property
    def codes(self) -> Codes | None:
        """What the autoregressive prior writes, or None."""
        stored = self.statistics.get("ar_prior")
        return stored and Codes(*(stored[name] for name in Codes._fields))

    def replace(self, **components: Component | None) -> "Model":
        """The model with other components; None takes one out."""
        changed = {**self.components, **components}
        kept = {name: c for name, c in changed.items() if c is not None}
        return self._replace(components=kept)

    def with_sampling(self, **changes: Mapping[str, Any]) -> "Model":
        """The model with settings of components changed; see diffusion.generate."""
        changed = {n: {**self.sampling.get(n, {}), **c} for n, c in changes.items()}
        return self._replace(sampling={**self.sampling, **changed})

    def up_to(self, size: int | None) -> "Model":
        """The model without what makes larger pictures; None leaves it as it is."""
        if size is None:
            return self
        large = [n for n in self.cascade if self.components[n].size > size]
        return self.replace(**dict.fromkeys(large))

    def __repr__(self) -> str:
        """The path, a line for each component, the dtype and the devices."""
        rows = [(name, *_described(c)) for name, c in self.components.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"Model {self.path}"]
        for row in rows:
            cells = (f"{x:{w}}" for x, w in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(cells).rstrip())
        dtypes = {str(x.dtype) for c in self.components.values() for x in _leaves(c)}
        devices = self.devices.devices.ravel()
        lines.append(
            f"  {', '.join(sorted(dtypes))} on {devices.size} x {devices[0].platform}"
        )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What a notebook shows: the same as a table."""
        from html import escape

        rows = "".join(
            f"<tr><td>{escape(name)}</td>"
            + "".join(f"<td>{escape(x)}</td>" for x in _described(component))
            + "</tr>"
            for name, component in self.components.items()
        )
        first, *_, last = repr(self).splitlines()
        return f"<b>{escape(first)}</b><table>{rows}</table>{escape(last.strip())}"


def _leaves(component: Component) -> list[Any]:
    return jax.tree.leaves((component.params, component.last))


def _described(component: Component) -> tuple[str, str]:
    """The parameters of a component, and the size of what it makes."""
    count = sum(math.prod(x.shape) for x in _leaves(component))
    size = "" if component.size is None else f"{component.size} px"
    if component.low_size is not None:
        size = f"{component.low_size} to {size}"
    return f"{count / 1e6:.2f}M parameters", size


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
    sections = model.config["parts"]
    components = {
        name: _component(name, section, model.params[name], dtype, path)
        for name, section in sections.items()
    }
    for name in [name for name in components if name.endswith("_last")]:
        first = name.removesuffix("_last")
        last = components.pop(name).params
        components[first] = components[first].replace(last=last)
    text = model.tokenizer_dir
    return Model(
        path=path,
        tokenizer=tokenizer.load(text) if text else None,
        components=components,
        sampling={n: sections[n].get("sampling", {}) for n in components},
        statistics=model.statistics,
        devices=devices,
    )


def tiled(model: Model, tile: int, overlap: int) -> Model:
    """The model with its upsamplers run on tiles; see `load`."""
    if not model.upsamplers:
        raise UserError(f"tile={tile}: the model {model.path} has no upsampler")
    names = [name for name in model.cascade if name != "decoder"]
    for name in names:
        tiles.check(tile, overlap, model.components[name].network.unit)
    return model.replace(
        **{
            name: model.components[name].replace(tile=tile, overlap=overlap)
            for name in names
        }
    )


def require(model: Model, *names: str) -> None:
    """A UserError if the model lacks a tokenizer or a component."""
    if "tokenizer" in names and model.tokenizer is None:
        raise UserError(
            f"the model {model.path} has no tokenizer, which is its CLIP's: export or "
            "copy the whole model again, or load it together with one that has it"
        )
    names = tuple(name for name in names if name != "tokenizer")
    missing = [name for name in names if name not in model.components]
    if missing:
        raise UserError(
            f"the model {model.path} has no {' and no '.join(missing)}: train it with "
            f"configs/{missing[0]}.py, or load it together with one that has it"
        )


def in_batches(
    some: Callable[[np.ndarray], np.ndarray], count: int, devices: int, most: int
) -> np.ndarray:
    """Calls ``some`` with the numbers of the rows to make, a batch at a time."""
    made = [
        np.asarray(some(rows))[: len(np.unique(rows))]
        for rows in batches(count, devices, most)
    ]
    return np.concatenate(made)


def batches(count: int, devices: int, most: int) -> Iterator[np.ndarray]:
    """The numbers of the rows of each batch, of at most ``most`` a device.

    A batch has a power of two of rows a device, so that there are few programs to
    compile: 9 rows are a batch of 8 and one of 1. Where rows do not fill the last
    batch, its last row is repeated.
    """
    start = 0
    for size in buckets(-(-count // devices), most):
        rows = np.arange(start, start + size * devices)
        yield np.minimum(rows, count - 1)
        start += size * devices


def buckets(count: int, most: int) -> list[int]:
    """Powers of two up to ``most`` that together hold ``count``, the largest first.

    What is left after full batches of ``most`` is one padded batch or several smaller
    ones, whichever is less work, where a batch costs as much as its rows and one more.
    """
    full, rest = divmod(count, most)
    return [most] * full + _split(rest)


def _split(count: int) -> list[int]:
    if count == 0:
        return []
    above = 1 << (count - 1).bit_length()
    below = above if above == count else above // 2
    several = [below, *_split(count - below)]
    return several if sum(several) + len(several) < above + 1 else [above]


def _component(
    name: str, section: Mapping[str, Any], params: Any, dtype: DTypeLike, path: str
) -> Component:
    part = part_of(name)
    if part is None:
        raise UserError(
            f"{path} has a part {name!r}, which this version of dalle2_jax doesn't "
            f"know: it knows {', '.join(PARTS)}"
        )
    network = part.module(**freeze(section["net"]), dtype=dtype)
    checkpoint.check(params, abstract(network), f"{name} of {path}")
    return make_component(network, section, params)
