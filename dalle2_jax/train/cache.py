"""Compiled programs are kept on disk, so that the next start finds them."""

import os
from pathlib import Path

import jax


def use_compilation_cache() -> None:
    """Keeps them in ~/.cache/dalle2_jax, unless JAX_COMPILATION_CACHE_DIR says where.

    Where nothing can be written, programs are compiled at every start.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache) / "dalle2_jax" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
