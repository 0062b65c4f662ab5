"""Our params and a peer's weights: one table of names, used in both directions.

A table says, for each layer or single parameter of a network of ours, which layers of
the peer hold it:

    {"text/ln_final": "text_model.final_layer_norm",
     "text/transformer/block_0/qkv": "….q_proj ….k_proj ….v_proj",
     "vision/class_embedding": "vision_model.embeddings.class_embedding"}

Several names are layers that stand side by side in ours. What a layer consists of, and
every shape, follows from the network itself. The peers are PyTorch modules: kernels are
[out, in] there and [in, out] here, those of convolutions [out, in, h, w] and
[h, w, in, out].
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dalle2_jax import checkpoint, tensors
from dalle2_jax.nn import abstract
from dalle2_jax.tensors import Weights

Table = Mapping[str, str]

# What the parameters of a layer are called there.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
}


class _Source(NamedTuple):
    """Names of the peer's that hold a parameter of ours, and its shape there."""

    names: tuple[str, ...]
    shape: tuple[int, ...]  # with all of them side by side along the first axis


def to_ours(
    table: Table,
    network: nn.Module,
    weights: Weights,
    *,
    place: checkpoint.Place = np.asarray,
    leading: Mapping[str, int] = {},
    ignore: Collection[str] = (),
) -> dict[str, Any]:
    """A network's params from a peer's weights.

    Args:
      table: of the network.
      network: ours; every parameter must be in the table.
      weights: the peer's. Each is read once, and none before all are accounted for.
      place: called with each param as soon as it is read.
      leading: how many leading axes of length one some of the peer's have.
      ignore: names of the peer's that are no weights of this network.

    Returns:
      nested dicts of what `place` returned.

    Raises:
      UserError: names are missing or left over, or shapes differ: a list of them.
    """
    sources = _sources(table, network)
    shapes = {
        name: shape[leading.get(name, 0) :]
        for name, shape in weights.shapes.items()
        if name not in ignore
    }
    wanted = _shapes(sources.values())
    checkpoint.check(_structs(shapes), _structs(wanted), weights.where)

    def param(path: str, source: _Source) -> Any:
        arrays = [weights.read(name) for name in source.names]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        array = array.reshape(source.shape)  # without leading axes
        array = array.transpose(_axes(path, array.ndim))
        return tensors.place(place, np.asarray(array, order="C"), path, weights.where)

    return unflatten_dict({k: param(k, v) for k, v in sources.items()}, sep="/")


def to_theirs(
    table: Table,
    network: nn.Module,
    params: Mapping[str, Any],
    leading: Mapping[str, int] = {},
) -> dict[str, np.ndarray]:
    """The inverse of `to_ours`: the peer's weights by their names."""
    flat, weights = flatten_dict(dict(params), sep="/"), {}
    for path, source in _sources(table, network).items():
        array = np.asarray(flat[path])
        array = array.transpose(np.argsort(_axes(path, array.ndim)))
        parts = np.split(array, len(source.names)) if array.ndim else [array]
        for name, part in zip(source.names, parts, strict=True):
            part = part.reshape((1,) * leading.get(name, 0) + part.shape)
            weights[name] = np.asarray(part, order="C")
    return weights


def nest(prefix: str, table: Table, theirs: str = "") -> dict[str, str]:
    """A table one level down: below `prefix` in ours, and behind `theirs` there."""
    return {
        f"{prefix}/{name}": " ".join(f"{theirs}{word}" for word in names.split())
        for name, names in table.items()
    }


def _sources(table: Table, network: nn.Module) -> dict[str, _Source]:
    """The table parameter by parameter, with what shape the peer's have."""
    sources = {}
    for path, leaf in flatten_dict(dict(abstract(network)), sep="/").items():
        layer, _, name = path.rpartition("/")
        if path in table:
            names = tuple(table[path].split())
        else:
            names = tuple(f"{word}.{_LEAVES[name]}" for word in table[layer].split())
        axes = np.argsort(_axes(path, len(leaf.shape)))
        shape = tuple(leaf.shape[axis] for axis in axes)
        sources[path] = _Source(names, shape)
    return sources


def _axes(path: str, ndim: int) -> tuple[int, ...]:
    """The peer's axes in our order."""
    if not path.endswith("kernel"):
        return tuple(range(ndim))
    return {2: (1, 0), 4: (2, 3, 1, 0)}[ndim]


def _shapes(sources: Iterable[_Source]) -> dict[str, tuple[int, ...]]:
    """The shape of each of the peer's; those side by side have equal parts."""
    shapes = {}
    for names, shape in sources:
        part = (shape[0] // len(names), *shape[1:]) if shape else ()
        shapes |= dict.fromkeys(names, part)
    return shapes


def _structs(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.ShapeDtypeStruct]:
    return {k: jax.ShapeDtypeStruct(v, np.float32) for k, v in shapes.items()}
