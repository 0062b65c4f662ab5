"""What XLA is told, and where compiled programs are kept."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax import runtime


def test_convolutions_are_left_to_xla():
    """Where it knows the option; with the results that it has without."""
    options = runtime.compiler_options()
    assert options == runtime._CONVOLUTIONS  # of the JAX that the tests run on
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
        dict.fromkeys(runtime._CONVOLUTIONS, "?"),
    ):
        monkeypatch.setattr(runtime, "_CONVOLUTIONS", unknown)
        assert runtime.compiler_options.__wrapped__() == {}


def test_jit_compiles_once():
    traced = []

    @runtime.jit
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
    assert runtime.backend_problem() is None
    jax.config.update("jax_platforms", "cuda")
    try:
        said = runtime.backend_problem()
    finally:
        jax.config.update("jax_platforms", before)
    found = (
        f"JAX_PLATFORMS=cuda: JAX finds cpu here and can't use these .{reason}.: unset"
    )
    assert re.match(found, said) and "\n" not in said


@pytest.fixture
def no_cache(monkeypatch):
    """JAX as in a process that has set nothing about the cache."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_cache_that_the_user_has_set_stays(no_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "anywhere")
    runtime.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == "anywhere"
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_user(no_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runtime.use_compilation_cache()
    folder = tmp_path / "dalle2_jax" / "compiled"
    assert jax.config.jax_compilation_cache_dir == str(folder) and folder.is_dir()


def test_no_folder_no_cache(no_cache, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    runtime.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("quiet", [False, True])
def test_a_user_without_a_home(no_cache, monkeypatch, caplog, quiet):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", fail)
    runtime.use_compilation_cache(quiet)
    assert jax.config.jax_compilation_cache_dir is None
    told = "programs are not kept (Could not determine home" in caplog.text
    assert told is not quiet
