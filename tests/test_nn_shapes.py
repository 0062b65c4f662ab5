"""Shapes of params: those of init, traced once, and again when anything has changed."""

import jax
import jax.numpy as jnp
import pytest

from dalle2_jax.nn import abstract, shapes
from dalle2_jax.nn.prior import DiffusionPrior

ARGUMENTS = dict(
    clip_dim=8, context_length=5, text_width=6, width=12, layers=1, heads=2
)


@pytest.fixture
def traced(monkeypatch, tmp_path):
    """Counts traces; nothing is remembered from before."""
    calls = []
    trace = shapes._trace
    monkeypatch.setattr(shapes, "_trace", lambda n: calls.append(n) or trace(n))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    shapes._remembered.cache_clear()
    yield calls
    shapes._remembered.cache_clear()
    jax.config.update("jax_compilation_cache_dir", before)


def test_shapes_are_those_of_init_and_traced_once(traced):
    network = DiffusionPrior(**ARGUMENTS, dtype=jnp.bfloat16)
    params = network.init(jax.random.key(0), *network.example())["params"]
    first = abstract(network)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), first) == expected
    shapes._remembered.cache_clear()  # as in another process
    assert abstract(DiffusionPrior(**ARGUMENTS)) == first
    assert len(traced) == 1
    wider = abstract(DiffusionPrior(**{**ARGUMENTS, "width": 24}))
    assert wider["query"].shape == (24,) and len(traced) == 2


@pytest.mark.parametrize("text", ["", "[]", "{", '{"query": 3}', '{"query": [[3]]}'])
def test_a_damaged_file_is_made_anew(traced, tmp_path, text):
    first = abstract(DiffusionPrior(**ARGUMENTS))
    (file,) = tmp_path.glob("shapes-*.json")
    good = file.read_text()
    file.write_text(text)
    shapes._remembered.cache_clear()
    assert abstract(DiffusionPrior(**ARGUMENTS)) == first
    assert file.read_text() == good


def test_other_sources_are_traced_anew(traced, monkeypatch):
    abstract(DiffusionPrior(**ARGUMENTS))
    monkeypatch.setattr(shapes, "_sources", lambda: "changed")
    shapes._remembered.cache_clear()
    abstract(DiffusionPrior(**ARGUMENTS))
    assert len(traced) == 2
