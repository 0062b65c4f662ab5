"""Compiled programs are kept on disk, so that the next start finds them."""

import logging
import os
import tempfile
from pathlib import Path

import jax

from dalle2_jax.errors import first_line

log = logging.getLogger(__name__)


def use_compilation_cache() -> None:
    """Keeps them in ~/.cache/dalle2_jax, unless JAX_COMPILATION_CACHE_DIR says where.

    Where there is no home, or nothing can be written, programs are compiled at every
    start, and a warning says so.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache) / "dalle2_jax" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        log.warning(
            "compiled programs are not kept (%s): JAX_COMPILATION_CACHE_DIR can name a "
            "directory for them",
            first_line(error),
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
