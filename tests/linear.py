"""A small stage for the training loop, its data, and comparisons of its states."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 256


class Stage(NamedTuple):
    """The fields of a stage that the loop reads."""

    name: str
    frozen: Any
    init: Any
    loss: Any
    metrics: Any
    preview: Any
    export: Any
    start: Any = None
    compares: bool = False


def linear(width=WIDTH, noise=0.01):
    """A stage that learns a frozen matrix from what it does to random vectors."""
    matrix = np.random.default_rng(0).normal(size=(width, width)) / np.sqrt(width)

    def init(key):
        kernel = jax.random.normal(key, (width, width)) / jnp.sqrt(width)
        return {"kernel": kernel, "bias": jnp.zeros(width)}

    def errors(params, frozen, x):
        y = x @ params["kernel"] + params["bias"]
        return jnp.mean((y - x @ frozen["matrix"]) ** 2, axis=-1)

    def loss(params, frozen, batch, key):
        x = batch["x"] + noise * jax.random.normal(key, batch["x"].shape)
        mean = errors(params, frozen, x).mean()
        return mean, {"root": jnp.sqrt(mean)}

    def metrics(params, frozen, batch, key):
        return {"error": errors(params, frozen, batch["x"])}

    def preview(params, frozen, batch, key):
        kernel = params["kernel"][:8, :8, None]
        picture = jnp.clip(128 + 500 * kernel, 0, 255).astype(jnp.uint8)
        images = jnp.broadcast_to(picture, (5, 8, 8, 3))
        return {"kernel": images, "largest": jnp.abs(kernel).max()}

    def export(params):
        return {"params": {"linear": params}, "config": {"parts": {"linear": {}}}}

    frozen = {"matrix": matrix.astype(np.float32)}
    return Stage("linear", frozen, init, loss, metrics, preview, export)


def make_batches(rows=16, process=0, events=None, width=WIDTH):
    """Batches that follow from the step; at a step in `events` that is called first."""

    def batches(step):
        while True:
            for event in (events or {}).get(step, ()):
                event()
            x = np.random.default_rng([step]).normal(size=(16, width))
            yield {"x": x.astype(np.float32)[process * rows : (process + 1) * rows]}
            step += 1

    return batches


def assert_equal(one, other):
    """The same tree, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_close(one, other):
    """The same tree but for rounding."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), one, other
    )
