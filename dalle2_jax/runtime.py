"""What is set in JAX: how XLA compiles, and where compiled programs are kept."""

import functools
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dalle2_jax.errors import first_line

log = logging.getLogger(__name__)

# What is left to YNNPACK: products of matrices, and sums.
_CONVOLUTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,"
    "LIBRARY_FUSION_TYPE_REDUCE"
}


@functools.cache
def compiler_options() -> dict[str, str]:
    """What XLA is told where it compiles for a CPU: to make convolutions itself.

    It would give them to YNNPACK, which takes twice as long where kernels are large and
    up to five times as long for a kernel's gradient. Empty for other devices, and where
    this XLA has no such option.
    """
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=_CONVOLUTIONS).lower().compile()
    except (ValueError, RuntimeError):
        return {}
    return _CONVOLUTIONS


def backend_problem() -> str | None:
    """Return why JAX has no devices, in one line, or None if it has."""
    try:
        jax.devices()
        return None
    # AssertionError for a GPU that is not there, RuntimeError for an unknown platform.
    except (AssertionError, RuntimeError) as error:
        problem = first_line(error) if str(error) else "there are none"
    wanted = jax.config.jax_platforms
    if not wanted:
        return f"JAX finds no devices: {problem}"
    jax.config.update("jax_platforms", "")
    try:
        there = ", ".join(sorted({device.platform for device in jax.devices()}))
    except (AssertionError, RuntimeError):
        there = "none"
    return (
        f"JAX_PLATFORMS={wanted}: JAX finds {there} here and can't use these "
        f"({problem}): unset JAX_PLATFORMS, or install what they need, as with pip "
        "install 'jax[cuda12]'"
    )


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` with these options, which depend on the device: known at a call.

    Within another jitted function it is the plain function: options are for the whole
    program.
    """

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return jax.jit(function, compiler_options=compiler_options())

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        leaves = jax.tree.leaves(arguments)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return function(*arguments)
        return compiled()(*arguments)

    return call


def use_compilation_cache(quiet: bool = False) -> None:
    """Keep compiled programs in ~/.cache/dalle2_jax for the next process.

    A directory that the user has set, by JAX_COMPILATION_CACHE_DIR or jax.config, stays
    in use. Without a home directory, or without permission to write there, programs are
    compiled in every process; a warning says so unless ``quiet``.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache) / "dalle2_jax" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        if not quiet:
            log.warning(
                "compiled programs are not kept (%s): JAX_COMPILATION_CACHE_DIR can "
                "name a directory for them",
                first_line(error),
            )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
