"""What XLA is told, and that it does the same."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax import xla


def test_convolutions_are_left_to_xla():
    """Where it knows the option; with the results that it has without."""
    options = xla.compiler_options()
    assert options == xla._CONVOLUTIONS  # of the JAX that the tests run on
    x, kernel = jnp.ones((2, 8, 8, 4)), jnp.linspace(-1, 1, 144).reshape(3, 3, 4, 4)

    def loss(kernel):
        axes = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", None, None, axes)
        return (y**2).sum()

    plain, told = (
        jax.jit(jax.grad(loss), compiler_options=o)(kernel) for o in ({}, options)
    )
    np.testing.assert_allclose(told, plain, rtol=1e-5)


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    for unknown in (
        {"xla_cpu_no_such_option": "1"},
        dict.fromkeys(xla._CONVOLUTIONS, "?"),
    ):
        monkeypatch.setattr(xla, "_CONVOLUTIONS", unknown)
        assert xla.compiler_options.__wrapped__() == {}


def test_jit_compiles_once():
    traced = []

    @xla.jit
    def double(x):
        traced.append(x)
        return 2 * x

    assert double(jnp.float32(2)) == 4 and double(jnp.float32(3)) == 6
    assert len(traced) == 1


@pytest.mark.parametrize(
    "error, reason",
    [
        (AssertionError(), "there are none"),
        (RuntimeError("Unable to initialize 'cuda'\nat line 3"), "Unable to init.*da'"),
    ],
)
def test_devices_that_are_not_here(monkeypatch, error, reason):
    devices, before = jax.devices, jax.config.jax_platforms

    def find():
        if jax.config.jax_platforms == "cuda":
            raise error
        return devices()

    monkeypatch.setattr(jax, "devices", find)
    assert xla.backend_problem() is None
    jax.config.update("jax_platforms", "cuda")
    try:
        said = xla.backend_problem()
    finally:
        jax.config.update("jax_platforms", before)
    found = (
        f"JAX_PLATFORMS=cuda: JAX finds cpu here and can't use these .{reason}.: unset"
    )
    assert re.match(found, said) and "\n" not in said
