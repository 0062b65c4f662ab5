"""The shapes of a network's params, remembered, as tracing a network takes seconds."""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

Shapes = dict[str, Any]


def abstract(network: nn.Module) -> Shapes:
    """Return the shapes and dtypes of a network's params; nothing is computed.

    The last results are kept, and all of them on disk where there is a directory for
    compiled programs. Params are float32 whatever the activations are.
    """
    if hasattr(network, "dtype"):
        network = network.clone(dtype=jnp.float32)
    try:
        hash(network)
    except TypeError:  # an argument is a list or a dict
        return _trace(network)
    return _remembered(network)


def _trace(network: nn.Module) -> Shapes:
    return jax.eval_shape(
        lambda: network.init(jax.random.key(0), *network.example())["params"]
    )


@functools.lru_cache(maxsize=32)
def _remembered(network: nn.Module) -> Shapes:
    folder = jax.config.jax_compilation_cache_dir
    if not folder or "://" in folder:
        return _trace(network)
    digest = hashlib.sha256(f"{_sources()} {network!r}".encode()).hexdigest()
    path = Path(folder) / f"shapes-{digest}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        return _parse(path.read_text())
    found = _trace(network)
    with contextlib.suppress(OSError):
        _write(path, found)
    return found


@functools.cache
def _sources() -> str:
    """What shapes follow from beside a network's arguments."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files))
    return f"{jax.__version__} {flax.__version__} {digest.hexdigest()}"


def _parse(text: str) -> Shapes:
    """The shapes in a file that `_write` wrote."""
    flat = {
        name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
        for name, (shape, dtype) in json.loads(text).items()
    }
    return unflatten_dict(flat, sep="/")


def _write(path: Path, shapes: Shapes) -> None:
    """Writes a file at once: another process may be reading it."""
    flat = flatten_dict(shapes, sep="/")
    text = json.dumps({k: (x.shape, jnp.dtype(x.dtype).name) for k, x in flat.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
