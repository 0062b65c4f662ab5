"""The files that `--config` names: a path, or one of those that ship."""

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from dalle2_jax.errors import UserError, cut, first_line


class Parser(flags.ArgumentParser):
    """Parse FILE or FILE:ROW as the config that the file makes, locked."""

    def parse(self, argument: str) -> Any:
        """Return get_config() of FILE, or get_config(ROW)."""
        file, colon, row = argument.partition(":")
        path = find(file)
        _provide_configs(path)
        try:
            config = _run(path).get_config(*([row] if colon else []))
        except UserError:
            raise
        except Exception as error:  # whatever the code of a config raises
            frames = traceback.extract_tb(error.__traceback__)
            lines = [f.lineno for f in frames if f.filename == str(path.absolute())]
            where = f"{path}, line {lines[-1]}" if lines else str(path)
            raise UserError(
                f"{where}: {type(error).__name__}: {first_line(error)}"
            ) from error
        if not isinstance(config, ConfigDict):
            raise UserError(
                f"{path}: get_config must return an ml_collections.ConfigDict"
            )
        config.lock()
        return config

    def flag_type(self) -> str:
        return "config file"


def shipped() -> Path:
    """Return the folder of the configs that ship.

    An installed package has it inside, a clone beside the package.
    """
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find(file: str) -> Path:
    """Return the path of a config file.

    Args:
      file: a path; or the name of a file that ships, as "decoder.py" or
        "configs/decoder.py".

    Raises:
      UserError: there is no such file.
    """
    path, folder = Path(file), shipped()
    if path.is_file():
        return path
    names = sorted(
        p.name
        for p in folder.glob("*.py")
        if p.name not in ("__init__.py", "common.py")
    )
    if path.name in names and path.parent in (Path(), Path("configs")):
        return folder / path.name
    raise UserError(
        f"--config={cut(file, 200)}: there is no such config file; give a path, or one "
        f"of {', '.join(names)}"
    )


def _provide_configs(path: Path) -> None:
    """Make `import configs.common` work in the config file at `path`.

    It is the `configs` that the file lies in or beside, else the one that Python finds,
    else the one that ships.
    """
    parent = path.absolute().parent
    for folder in (parent, parent / "configs"):
        if folder.name == "configs" and (folder / "common.py").is_file():
            break
    else:
        if _importable("configs.common"):
            return
        folder = shipped()
    loaded = sys.modules.get("configs")
    if any(Path(p).absolute() == folder for p in getattr(loaded, "__path__", ())):
        return
    for name in [n for n in sys.modules if n.partition(".")[0] == "configs"]:
        del sys.modules[name]
    package = ModuleType("configs")
    package.__path__ = [str(folder)]
    sys.modules["configs"] = package


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def _run(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_config_file", path.absolute())
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
