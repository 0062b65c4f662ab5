"""The commands train and sample as a user runs them: their files, every mistake."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import dalle2_jax
from dalle2_jax import checkpoint, commands
from dalle2_jax.data import image, picture_files
from dalle2_jax.errors import UserError
from dalle2_jax.pipeline import tasks
from dalle2_jax.train import cpu

ROOT = Path(__file__).parent.parent
CLIP = "--config=configs/clip.py:tiny"


# What sampling needs none of; and some systems have no array_record.
WITHOUT = """
import runpy, sys
for name in ("array_record", "grain", "orbax", "tensorflow_datasets"):
    sys.modules[name] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(*command):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def refused(capfd, command, *arguments):
    """What a command says of a mistake: one line, with exit code 2.

    It is run in this process, which takes no time to start.
    """
    with pytest.raises(SystemExit) as stop:
        commands.run(command, list(map(str, arguments)))
    err = capfd.readouterr().err
    assert stop.value.code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no --config"),
        ([CLIP], "no --workdir"),
        (["--config=configs/clip.py:huge", "--workdir=w"], "choose tiny, small, base"),
        (["--config=configs/nothing.py", "--workdir=w"], "clip.py, decoder.py, prior"),
        (["--config.steps=3"], "--config.steps changes a key of --config, which is"),
        ([CLIP, CLIP.replace("tiny", "small")], "clip.py:tiny and configs/clip.py:sm"),
        (
            [CLIP, *(f"--config.data.path=a-{i}.tar" for i in range(3))],
            "path is given 3 times: a-0.tar and a-1.tar and a-2.tar; give it once",
        ),
        ([CLIP, "--config.steps", "3", "--config.steps=4"], "3 and 4"),
        ([CLIP, "--config.data.flip", "--noconfig.data.flip"], "true and false"),
        ([CLIP, "--workdir=w", "--config.stepz=3"], "has no key 'stepz'"),
        ([CLIP, "--workdir=w", "--config.optim.rate=3"], "--config.optim.rate"),
        ([CLIP, "--workdir=w", "--config.steps=many"], "many"),
        ([CLIP, "--workdir=w", "--speed=9"], "speed"),
        ([CLIP, "--workdir=w", "extra"], "extra"),
        ([CLIP, "--workdir=w", "--process_id=0"], "--num_processes missing"),
    ],
)
def test_flags_that_train_refuses(arguments, message, capfd):
    assert message in refused(capfd, "train", *arguments)


def test_a_flag_may_be_given_twice_with_one_value(capfd):
    assert "no --workdir" in refused(capfd, "train", CLIP, CLIP, "--workdir=")


def folder_without_picture(path):
    Image.new("RGB", (8, 8)).save(path / "b.png")
    (path / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "a"}\n')


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: path.rmdir(), "there is no folder"),
        (lambda path: None, "no pictures"),
        (folder_without_picture, "a.png"),
    ],
)
def test_data_that_train_refuses(tmp_path, prepare, message, capfd, monkeypatch):
    monkeypatch.setattr(cpu, "keep_memory", lambda: None)
    data = tmp_path / "data"
    data.mkdir()
    prepare(data)
    said = refused(
        capfd,
        "train",
        CLIP,
        f"--workdir={tmp_path / 'run'}",
        "--num_processes=1",
        "--config.data.source=folder",
        f"--config.data.path={data}",
    )
    assert message in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no --prompt"),
        (["--prompt="], "is empty"),
        (["--prompt=a", "--model=/nothing"], "is not a model"),
        (["--prompt=a", "--num=0"], "num=0"),
        (["--prompt=a", "--num=1000000000"], "num=1000000000"),
        (["--prompt=a"] * 2 + ["--num=90000"], "180,000 pictures: at most 100,000"),
        (["--prompt=a", "--best_of=2"], "--best_of=2 is less than --num=4"),
        (["--prompt=a", "--best_of=1000000000"], "best_of=1000000000"),
        (["--prompt=a", "--size=99"], "size=99: this model makes pictures of side 16"),
        (["--prompt=a", "--seed=-1"], "seed=-1"),
        (["--prompt=a", "--seed=4294967296"], "must be from 0 to 4294967295, or rand"),
        (["--prompt=a", "--steps=0"], "'0' is no number of steps"),
        (["--prompt=a", "--steps=decoder"], "write VALUE or NETWORK=VALUE"),
        (["--prompt=a", "--steps=27+15"], "+ is between upsamplers"),
        (["--prompt=a", "--steps=decoder="], "write VALUE or NETWORK=VALUE"),
        (["--prompt=a", "--steps=upsampler=2+"], "write VALUE or NETWORK=VALUE"),
        (["--prompt=a", "--steps=decoder=fast"], "fast"),
        (["--prompt=a", "--steps=clip=3"], "'clip' is no network that has it"),
        (["--prompt=a", "--steps=decoder=2+50"], "give the decoder one value"),
        (["--prompt=a", "--guidance=upsampler=2"], "choose prior, decoder"),
        (["--prompt=a", "--guidance=inf"], "'inf' is no scale from 0 to 1000"),
        (["--prompt=a", "--guidance_interval=700"], "LEAST:LARGEST"),
        (["--prompt=a", "--guidance_interval=decoder=9:3"], "LEAST:LARGEST"),
        (["--prompt=a", "--sampler=decoder=euler"], "sampler of ddpm, ddim, dpm_solv"),
        (["--prompt=a", "--sampler=repaint"], "sampler of ddpm, ddim, dpm_solver, uni"),
        (["--prompt=a"] + ["--negative_prompt=b"] * 2, "given 2 times for 1 prompts"),
        (["--prompt=a", "--num=2", "--num=3"], "--num is given 2 times: 2 and 3"),
        (["--prompt=a", "--overlap=4"], "give --tile, too"),
        (["--task=img2img", "--strength=0"], "needs --image=FILE"),
        (
            ["--task=img2img", "--strength=0", "--image=a", "--prompt=b"],
            "strength=0: must be above 0",
        ),
        (["--task=variations", "--image=a", "--eta=nan"], "eta=nan: must be a number"),
        (["--prompt=a", "--steps=decoder=2,decoder=3"], "decoder is given twice"),
        (["--prompt=a", "--guidance=prior=2,prior=2"], "prior is given twice"),
        (["--prompt=a", "--guidance=prior=high"], "'high'"),
        (["--prompt=a", "--num=many"], "many"),
        (["--prompt=a", "--tile=15"], "tile=15: must be a multiple of 2"),
        (["--prompt=a", "--mask=b.png"], "text_to_image takes no --mask"),
        (["--prompt=caf\udce9"], r"--prompt='caf\udce9' is not UTF-8"),
        (["--prompt=a", "--negative_prompt=\udce9"], "is not UTF-8"),
        (["--task=variations"], "--task=variations needs --image=FILE"),
        (["--task=interpolate", "--image=a.png"], "needs --image2=FILE"),
        (["--task=interpolate", "--frames=1000000000"], "frames=1000000000"),
        (["--task=text_diff", "--image=a", "--prompt=b"], "needs --prompt_from"),
        (["--task=reconstruct", "--image=a.png"], "there is no file a.png"),
        (["--task=reconstruct", "--image=\udcff.png"], "there is no file"),
        (["--task=pca", "--image=a", "--components=1,b"], "--components=1,b"),
        (["--task=inpaint", "--image={star}", "--prompt=a"], "no mask"),
        (["--task=inpaint", "--image={star}", "--mask=b", "--prompt=a"], "no file b"),
        (["--task=inpaint", "--mask_mode=white"], "mask_mode"),
        (["--task=inpaint", "--repeats=1000000000"], "repeats"),
        (["--task=dream"], "dream"),
        (["--prompt=a", "--out={file}"], "is a file: give a folder"),
        (["--prompt=a", "--out={file}/b"], "cannot write to --out"),
        (["--prompt=a", "--out=/proc"], "cannot write to --out=/proc"),
        (["--prompt=a", "--out=/proc/b"], "cannot write to --out=/proc/b"),
        (["--prompt=a", "--out=gs://a/b"], "is a URL: give a directory"),
        (["--prompt=a", "--out="], "--out='' is no folder: give one"),
        (["--prompt=a", "--out=~nouser/b"], "write the path without ~"),
    ],
)
def test_flags_that_sample_refuses(
    arguments, message, tiny_models, tmp_path, capfd, monkeypatch
):
    names = {"{star}": ROOT / "docs" / "edits" / "star.png", "{file}": __file__}
    defaults = [f"--model={tiny_models['upsampler']}", f"--out={tmp_path}"]
    for name, path in names.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    for flag in ("--model", "--out"):
        if any(argument.startswith(flag) for argument in arguments):
            defaults = [given for given in defaults if not given.startswith(flag)]
    loads = []
    load = dalle2_jax.load
    monkeypatch.setattr(
        dalle2_jax, "load", lambda *a, **k: loads.append(a) or load(*a, **k)
    )
    assert message in refused(capfd, "sample", *defaults, *arguments)
    assert list(tmp_path.iterdir()) == []
    # What follows from the model alone is told when it is loaded.
    assert len(loads) == ("/nothing" in str(arguments) or "--tile=15" in arguments)


def test_sample_is_refused_in_a_line_of_its_process():
    code, out, err = finish(start("sample.py", "--prompt=\udcff"))
    assert code == 2 and "Traceback" not in out + err
    assert err.startswith("error: ") and err.count("\n") == 1, err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        picture_files.make_directory(str(tmp_path))


def test_a_directory_may_begin_with_home_and_have_any_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("new", "\udcff", "ü #%20[1]"):
        assert picture_files.make_directory(f"~/{name}") == tmp_path / name
        assert list((tmp_path / name).iterdir()) == []


@pytest.fixture
def sample_fakes(monkeypatch, tmp_path):
    """The command without a model: batches of 8 pictures of 4 px."""
    monkeypatch.setattr(dalle2_jax, "load", lambda *_, **__: SimpleNamespace(path=""))

    def make(task, model, values, progress, **rest):
        pictures = np.arange(values["num"], dtype=np.uint8)[:, None, None, None]
        pictures = pictures.repeat(4, 1).repeat(4, 2).repeat(3, 3)
        for start in range(0, len(pictures), 8):
            progress.finished(pictures[start : start + 8])
        return pictures

    monkeypatch.setattr(tasks, "make", make)
    given = ["--prompt=a", f"--out={tmp_path}"]
    return lambda *rest: commands.run("sample", [*given, *rest])


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_pictures_are_saved_as_they_are_made(
    error, sample_fakes, tmp_path, monkeypatch, capsys
):
    save = image.save_png

    def fail(path, *rest, **options):
        if path.name == "009.png":
            raise error
        save(path, *rest, **options)

    monkeypatch.setattr(image, "save_png", fail)
    with pytest.raises(SystemExit) as raised:
        sample_fakes("--num=20")
    said = f"9 pictures are in {tmp_path}: 000.png to 008.png"
    err = capsys.readouterr().err
    if isinstance(error, OSError):
        assert raised.value.code == 2
        assert err == f"error: cannot write {tmp_path}/009.png: No space left; {said}\n"
    else:
        assert raised.value.code == 130
        assert err == f"interrupted: {said}\n"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{number:03d}.png" for number in range(9)]


def test_pictures_of_earlier_runs_stay(sample_fakes, tmp_path, capsys):
    (tmp_path / "000.png").mkdir()
    (tmp_path / "007.png").write_bytes(b"mine")
    (tmp_path / "notes.txt").touch()
    sample_fakes("--num=2")
    sample_fakes("--num=1")
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"1 picture is in {tmp_path}: 010.png, and grid_002.png"
    assert f"2 pictures are in {tmp_path}: 008.png to 009.png, and grid.png" in said
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("000.png", "007.png", "008.png", "009.png", "010.png"),
        *("grid.png", "grid_002.png", "notes.txt"),
    }
    assert (tmp_path / "007.png").read_bytes() == b"mine"


def test_settings_reach_the_model(sample_fakes, tmp_path, monkeypatch, capsys):
    calls, fake = [], tasks.make

    def make(task, model, values, **rest):
        calls.append({**values, **rest})
        return fake(task, model, values, **rest)

    monkeypatch.setattr(tasks, "make", make)
    sample_fakes(
        *("--prompt=b", "--num=1", "--steps=10", "--guidance=4.0", "--seed="),
        *("--sampler=decoder=ddim,prior=ddpm", "--guidance_interval=100:700"),
        *("--negative_prompt=c", "--negative_prompt="),
    )
    call = calls[0]
    assert call["prompt"] == ["a", "b"] and call["negative_prompt"] == ["c", ""]
    assert (call["steps"], call["guidance"]) == (10, 4.0)
    assert call["sampler"] == {"decoder": "ddim", "prior": "ddpm"}
    assert call["guidance_interval"] == (100, 700)
    assert f"seed={call['seed']}\n" in capsys.readouterr().err
    assert Image.open(tmp_path / "000.png").text["seed"] == str(call["seed"])

    sample_fakes(
        *("--num=1", "--steps=decoder=9,upsampler=27+ddim5", "--sampler=ddim"),
        *("--negative_prompt=c", "--guidance_interval=decoder=0:5"),
    )
    call = calls[1]
    assert call["steps"] == {"decoder": 9, "upsampler": (27, "ddim5")}
    assert (call["sampler"], call["negative_prompt"]) == ("ddim", "c")
    assert call["guidance"] is None and call["seed"] == 0
    assert call["guidance_interval"] == {"decoder": (0, 5)}


def test_a_truncated_weights_file_is_refused(tiny_models, tmp_path, capfd):
    checkpoint.copy(tiny_models["upsampler"], tmp_path / "model")
    file = tmp_path / "model" / "prior.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    given = [f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'out'}"]
    said = refused(capfd, "sample", "--prompt=a", *given)
    assert "prior.safetensors" in said


def test_sample_writes_pictures_and_a_grid(tiny_models, tmp_path):
    code, out, err = finish(
        start(
            *("-c", WITHOUT, "sample.py"),
            "--prompt=a small red circle",
            "--prompt=a large blue star",
            f"--model={tiny_models['upsampler']}",
            "--num=2",
            "--seed=7",
            "--steps=decoder=3,upsampler=2",
            f"--out={tmp_path}",
        )
    )
    assert code == 0, err
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["000.png", "001.png", "002.png", "003.png", "grid.png"]
    picture = Image.open(tmp_path / "002.png")
    assert picture.size == (32, 32)
    assert picture.text["prompt"] == "a large blue star"
    assert picture.text["seed"] == "7"
    assert picture.text["model"] == str(tiny_models["upsampler"])
    assert "decoder=3" in picture.text["settings"]


def test_a_task_writes_its_path_and_tells_what_it_was_given(
    tiny_models, tmp_path, capfd
):
    for name, colour in {"a": "red", "b": "blue"}.items():
        Image.new("RGB", (40, 24), colour).save(tmp_path / f"{name}.png")
    commands.run(
        "sample",
        [
            "--task=interpolate",
            f"--image={tmp_path / 'a.png'}",
            f"--image2={tmp_path / 'b.png'}",
            "--frames=3",
            "--steps=decoder=3,upsampler=2",
            f"--model={tiny_models['upsampler']}",
            f"--out={tmp_path / 'out'}",
        ],
    )
    assert "3 pictures" in capfd.readouterr().out
    told = Image.open(tmp_path / "out" / "001.png").text
    assert told["task"] == "interpolate" and told["frames"] == "3"
    assert told["image2"] == str(tmp_path / "b.png")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "prior", "ar_prior", "decoder", "upsampler"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    name, how, tiny_models, tmp_path
):
    def command(workdir):
        base = "" if name == "clip" else tiny_models["clip"]
        return start(
            "train.py",
            f"--config=configs/{name}.py:tiny",
            f"--workdir={workdir}",
            f"--config.base={base}",
            "--config.steps=30",
            "--config.save_every=5",
            "--config.log_every=1",
        )

    code, _, err = finish(command(tmp_path / "whole"))
    assert code == 0, err
    process = command(tmp_path / "cut")
    log = tmp_path / "cut" / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < 12:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(how)
    code, out, _ = finish(process)
    assert code == (0 if how == signal.SIGTERM else -signal.SIGKILL), out
    assert not (tmp_path / "cut" / "model").exists()
    code, out, err = finish(command(tmp_path / "cut"))
    assert code == 0 and "resuming from step" in out, err

    models = [checkpoint.load(tmp_path / run / "model") for run in ("whole", "cut")]
    for part, params in models[0].params.items():
        assert params.keys() == models[1].params[part].keys()
        same(params, models[1].params[part])


def same(a, b):
    for key in a:
        if isinstance(a[key], dict):
            same(a[key], b[key])
        else:
            np.testing.assert_array_equal(a[key], b[key])
