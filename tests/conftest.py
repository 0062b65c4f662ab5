"""Sets up JAX for the tests: 8 simulated CPU devices and a compilation cache.

The environment is set before JAX is imported, and is inherited by the processes that
tests start.
"""

import os
import tempfile
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock
from jaxtyping import install_import_hook

DEVICES = "--xla_force_host_platform_device_count=8"


def cache_dir() -> Path:
    """A folder for compiled programs that outlives the run, if there is one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "dalle2_jax" / "tests"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / "dalle2_jax_tests"
        folder.mkdir(parents=True, exist_ok=True)
    return folder


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# Every annotated function of the package checks the shapes it is given and returns.
install_import_hook("dalle2_jax", "beartype.beartype")


def pytest_addoption(parser):
    parser.addoption("--hostile", type=int, help="Hostile inputs of each kind: 10000.")


def pytest_configure(config):
    many = config.getoption("--hostile")
    hypothesis.settings.register_profile(
        "hostile",
        max_examples=many or 30,
        derandomize=not many,  # without the option the same inputs each time
        database=None,
        deadline=None,
        print_blob=bool(many),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("hostile")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """The exported model of each stage after a few steps of `quickstart.py:tiny`."""
    from configs import quickstart
    from dalle2_jax.commands.train import train

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers: the first one trains
    workdir = folder / "quickstart"
    config = quickstart.get_config("tiny")
    for name in config.stages:  # programs that take long to compile, tested elsewhere
        config[name].update(eval_every=0, preview_every=0)
    with FileLock(f"{workdir}.lock"):
        if not (workdir / "model").exists():
            assert train(config, workdir)
    return {name: workdir / name / "model" for name in config.stages}
