"""The reference arrays, and the peers' weights laid out as our networks' params."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.numpy import save_file

from dalle2_jax.convert import table, weights
from dalle2_jax.data import tokenizer
from dalle2_jax.nn import abstract

Weights = dict[str, np.ndarray]
Params = dict[str, Any]


def load(name: str) -> Weights:
    """The arrays that make.py stored under a name."""
    with np.load(Path(__file__).with_name(f"{name}.npz")) as file:
        return dict(file)


def write_pipeline(folder: Path, name: str) -> Weights:
    """Writes a stored pipeline as diffusers does, and returns all stored arrays.

    Args:
      folder: where to.
      name: "text_to_image" or "variations".
    """
    arrays = load("pipeline")
    for path, text in below(arrays, f"configs/{name}/").items():
        path = folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
        found = below(arrays, f"weights/{path.parent.name}.")
        if found:
            kind = json.loads(path.read_text()).get("model_type", "")
            stem = "model" if kind.startswith("clip") else "diffusion_pytorch_model"
            save_file(found, path.with_name(f"{stem}.safetensors"))
    tokenizer.train([""], tokenizer.SMALLEST, 16).save(folder / "tokenizer")
    return arrays


def unpack(
    arrays: Weights,
) -> tuple[Weights, dict[str, Array], dict[str, Array]]:
    """Weights, inputs and outputs, in the dtypes that JAX works in."""
    stored = below(arrays, "weights/")
    stored = {name: value.astype(np.float32) for name, value in stored.items()}
    inputs, outputs = (
        {name: jnp.asarray(value) for name, value in below(arrays, group).items()}
        for group in ("inputs/", "outputs/")
    )
    return stored, inputs, outputs


def below(arrays: Weights, prefix: str) -> Weights:
    """The arrays whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def params(names: table.Table, network: Any, arrays: Weights, **options: Any) -> Params:
    """A peer's weights as the params of our network, by a table of dalle2_jax.convert.

    Every weight is used, and every parameter found, or it is a UserError.
    """
    found = weights.of(Path("the peer"), arrays)
    return table.to_ours(names, network, found, **options)


def size(tree: Any) -> int:
    """How many numbers a tree of arrays or of shapes holds."""
    return sum(x.size for x in jax.tree.leaves(tree))


def assert_fits(model: Any, params: Params) -> None:
    """The params have the names, shapes and dtypes of the network's own."""
    described = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype), abstract(model))


def assert_close(actual: Array, expected: Array, tolerance: float) -> None:
    """float32, and the largest error is small beside the largest expected value."""
    assert actual.dtype == jnp.float32
    assert actual.shape == expected.shape
    error = float(jnp.abs(actual - expected).max() / jnp.abs(expected).max())
    assert error <= tolerance, f"relative error {error:.1e}"
