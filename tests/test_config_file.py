"""Which file --config names, and what it may import."""

import shutil
import sys
from pathlib import Path

import pytest

from dalle2_jax import config_file
from dalle2_jax.errors import UserError

ROOT = Path(__file__).parents[1]
OWN = """
from configs.common import common

def get_config(row="x"):
    config = common("clip")
    config.base = row
    config.wandb = common.__code__.co_filename
    return config
"""


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Return Parser().parse, in an empty directory from which no configs are found."""
    before = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "configs"}
    for name in before:
        del sys.modules[name]
    path = [entry for entry in sys.path if not Path(entry, "configs").is_dir()]
    monkeypatch.setattr(sys, "path", path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield config_file.Parser().parse
    for name in [n for n in sys.modules if n.partition(".")[0] == "configs"]:
        del sys.modules[name]
    sys.modules.update(before)


def installed(monkeypatch, folder):
    """Make the package look as a wheel leaves it, with its configs inside."""
    package = folder / "site-packages" / "dalle2_jax"
    shutil.copytree(ROOT / "configs", package / "configs")
    monkeypatch.setattr(config_file, "__file__", str(package / "config_file.py"))
    return package / "configs"


def test_names_of_those_that_ship(load, monkeypatch, tmp_path):
    assert config_file.shipped() == ROOT / "configs"
    folder = installed(monkeypatch, tmp_path)
    for name in ("decoder.py:tiny", "configs/decoder.py:tiny", f"{folder}/decoder.py"):
        assert load(name).stage == "decoder"
    assert load("quickstart.py:tiny").stages == (
        "clip",
        "prior",
        "decoder",
        "upsampler",
    )
    assert sys.modules["configs"].__path__ == [str(folder)]


def test_a_folder_configs_of_another_project_is_not_taken(load, monkeypatch, tmp_path):
    installed(monkeypatch, tmp_path)
    Path("configs").mkdir()
    Path("configs/__init__.py").touch()
    monkeypatch.syspath_prepend(".")
    assert load("configs/decoder.py:tiny").stage == "decoder"


def test_own_files(load, monkeypatch, tmp_path):
    folder = installed(monkeypatch, tmp_path)
    Path("decoder.py").write_text(OWN)  # goes before the one that ships
    config = load("decoder.py:a:b")
    assert (config.base, config.wandb) == ("a:b", str(folder / "common.py"))
    assert load("decoder.py").base == "x" and config.is_locked
    assert load("configs/decoder.py:tiny").stage == "decoder"


def test_own_files_in_and_beside_a_clone_have_its_configs(load, monkeypatch, tmp_path):
    installed(monkeypatch, tmp_path)
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "configs", clone / "configs")
    for name in ("own.py", "configs/own.py"):
        (clone / name).write_text(OWN)
        assert load(f"{clone}/{name}").wandb == str(clone / "configs" / "common.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            None,
            "--config=own.py: there is no such config file; give a path, or one of ",
        ),
        ("import nothing_at_all\n", "own.py, line 1: ModuleNotFoundError: No module"),
        ("def get_config():\n    return 1 / 0\n", "own.py, line 2: ZeroDivisionError"),
        ("x = 1\n", "own.py: AttributeError: module '_config_file' has no attribute"),
        ("def get_config():\n    return {}\n", "own.py: get_config"),
        ("def (\n", "own.py: SyntaxError: invalid syntax"),
    ],
)
def test_mistakes_are_one_line(text, message, load):
    if text is not None:
        Path("own.py").write_text(text)
    with pytest.raises(UserError) as error:
        load("own.py")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    if text is None:
        assert str(error.value).endswith("prior.py, quickstart.py, upsampler.py")
