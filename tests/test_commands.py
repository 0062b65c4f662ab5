"""The commands together: their help, their names, and what importing them leaves."""

import importlib
import pkgutil
import runpy
import sys

import pytest

import dalle2_jax
from dalle2_jax import commands, flags

MODULES = {  # of `python -m`, and the command that each is
    **{f"dalle2_jax.{n}": n for n in ("analytic", "doctor", "embed", "filter", "plan")},
    "dalle2_jax.evaluate.shapes": "evaluate",
    "dalle2_jax.convert.karlo": "convert",
    "dalle2_jax.convert.openai_clip": "convert",
}


@pytest.fixture
def call(monkeypatch, capsys):
    """Return a function call(argv): commands.main's exit code, stdout and stderr."""
    monkeypatch.setattr(flags, "prepare_process", lambda: None)

    def call(*argv, main=commands.main):
        monkeypatch.setattr(sys, "argv", ["dalle2", *argv])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return call


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_a_command_explains_itself(name, call):
    module = importlib.import_module(f"dalle2_jax.commands.{name}")
    assert module.__doc__.splitlines()[0] == commands.COMMANDS[name]
    for flag in ("--help", "-h", "--helpfull"):
        code, out, err = call(name, flag)
        assert (code, err) == (0, "") and out.startswith(f"usage: dalle2 {name} ")
    assert max(map(len, out.splitlines())) <= 88
    shown = out.partition(f"{list(module.FLAGS.groups)[0]}:")[2]
    flags = [name for name in module.FLAGS.values if "." not in name]  # no config's key
    for flag in flags:
        assert f"  --{flag}=" in shown or f"  --[no]{flag} " in shown
    assert "repeat this option" not in out and "--verbosity" not in out


def test_without_a_command_all_are_listed(call):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        code, out, err = call(*arguments)
        assert (code, err) == (0, "")
        for name, what in commands.COMMANDS.items():
            assert f"  {name:8}  {what}\n" in out


def test_an_unknown_command_is_one_line(call):
    code, out, err = call("trian", "--help")
    assert (code, out) == (2, "")
    assert err == (
        "error: there is no command 'trian': choose train, sample, doctor, plan, "
        "embed, filter, analytic, evaluate, convert\n"
    )


@pytest.mark.parametrize(("module", "name"), MODULES.items())
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_modules_of_earlier_versions_are_the_commands(module, name, call):
    def main():
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    code, out, _ = call("--help", main=main)
    assert code == 0 and out.startswith(f"usage: python -m {module} ")
    assert commands.COMMANDS[name] in out and f"dalle2 {name}" not in out


def test_the_scripts_of_a_clone_are_the_commands(call):
    for name in ("train", "sample"):
        code, out, _ = call(
            "--help",
            main=lambda name=name: runpy.run_path(f"{name}.py", run_name="__main__"),
        )
        assert code == 0 and commands.COMMANDS[name] in out


def test_an_interruption_is_one_line(call, monkeypatch):
    from dalle2_jax.commands import convert

    def main(folders):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "main", main)
    assert call("convert", "a", "b") == (130, "", "interrupted\n")


def test_arguments_of_commands_that_take_none_and_some(call):
    assert call("convert", "a")[0] == 2
    code, _, err = call("doctor", "a", "--json")
    assert (code, err) == (2, "error: unknown argument 'a': options begin with --\n")


def test_no_module_hides_a_public_name():
    found = pkgutil.walk_packages(dalle2_jax.__path__, "dalle2_jax.")
    names = [module.name for module in found]
    assert "dalle2_jax.embed" in names
    for name in names:
        importlib.import_module(name)
    for name, module in dalle2_jax._WHERE.items():
        public = getattr(importlib.import_module(module), name)
        assert getattr(dalle2_jax, name) is public and callable(public)
