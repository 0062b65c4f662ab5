"""train.py and sample.py as a user runs them: their files, and every mistake."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

import dalle2_jax
import sample
from dalle2_jax import checkpoint
from dalle2_jax.data import image
from dalle2_jax.errors import UserError

ROOT = Path(__file__).parent.parent
CLIP = "--config=configs/clip.py:tiny"


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def refused(script, *arguments):
    """What it says of a mistake, which is to be one line and exit code 2."""
    code, out, err = finish(start(script, *arguments))
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "Traceback" not in out + err
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no --config"),
        ([CLIP], "no --workdir"),
        (["--config=configs/clip.py:huge", "--workdir=w"], "choose tiny, small, base"),
        (["--config=configs/nothing.py", "--workdir=w"], "no such config file"),
        ([CLIP, "--workdir=w", "--config.stepz=3"], "has no key 'stepz'"),
        ([CLIP, "--workdir=w", "--config.optim.rate=3"], "--config.optim.rate"),
        ([CLIP, "--workdir=w", "--config.steps=many"], "many"),
        ([CLIP, "--workdir=w", "--speed=9"], "speed"),
        ([CLIP, "--workdir=w", "extra"], "extra"),
        ([CLIP, "--workdir=w", "--process_id=0"], "--num_processes missing"),
    ],
)
def test_flags_that_train_refuses(arguments, message):
    assert message in refused("train.py", *arguments)


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
def test_data_that_train_refuses(tmp_path, prepare, message):
    data = tmp_path / "data"
    data.mkdir()
    prepare(data)
    said = refused(
        "train.py",
        CLIP,
        f"--workdir={tmp_path / 'run'}",
        "--config.data.source=folder",
        f"--config.data.path={data}",
    )
    assert message in said


def sample_here(*arguments):
    """Runs sample.py's main in this process, which takes no time to start."""
    with flagsaver.flagsaver():
        flags.FLAGS(["sample.py", *map(str, arguments)])
        sample.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no --prompt"),
        (["--prompt="], "is empty"),
        (["--prompt=a", "--model=/nothing"], "is not a model"),
        (["--prompt=a", "--num=0"], "num=0"),
        (["--prompt=a", "--num=1000000000"], "num=1000000000"),
        (["--prompt=a", "--prompt=b", "--num=9000"], "18,000 pictures: at most 10,000"),
        (["--prompt=a", "--best_of=1000000000"], "best_of=1000000000"),
        (["--prompt=a", "--size=99"], "size=99: this model makes"),
        (["--prompt=a", "--seed=-1"], "seed=-1"),
        (["--prompt=a", "--steps=50"], "write NETWORK=NUMBER"),
        (["--prompt=a", "--steps=decoder="], "write NETWORK=NUMBER"),
        (["--prompt=a", "--steps=upsampler=2+"], "write NETWORK=NUMBER"),
        (["--prompt=a", "--steps=decoder=fast"], "fast"),
        (["--prompt=a", "--steps=decoder=2+50"], "give the decoder one number"),
        (["--prompt=a", "--steps=decoder=2,decoder=3"], "decoder is given twice"),
        (["--prompt=a", "--guidance=prior=2,prior=2"], "prior is given twice"),
        (["--prompt=a", "--guidance=prior=high"], "'high'"),
        (["--prompt=a", "--num=many"], "many"),
        (["--prompt=a", "--tile=15"], "tile=15: must be a multiple of 2"),
        (["--prompt=a", "--mask=b.png"], "text_to_image takes no --mask"),
        (["--prompt=caf\udce9"], r"--prompt=['caf\udce9'] is not UTF-8"),
        (["--prompt=a", "--negative_prompt=\udce9"], "is not UTF-8"),
        (["--task=variations"], "--task=variations needs --image=FILE"),
        (["--task=interpolate", "--image=a.png"], "needs --image2=FILE"),
        (["--task=interpolate", "--frames=1000000000"], "frames=1000000000"),
        (["--task=text_diff", "--image=a", "--prompt=b"], "needs --prompt_from"),
        (["--task=reconstruct", "--image=a.png"], "there is no file a.png"),
        (["--task=reconstruct", "--image=\udcff.png"], "there is no file \udcff.png"),
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
        (["--prompt=a", "--out=gs://a/b"], "local folders"),
    ],
)
def test_flags_that_sample_refuses(arguments, message, tiny_models, tmp_path):
    names = {"{star}": ROOT / "docs" / "edits" / "star.png", "{file}": __file__}
    defaults = [f"--model={tiny_models['upsampler']}", f"--out={tmp_path}"]
    for name, path in names.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    with pytest.raises((UserError, flags.Error)) as raised:
        sample_here(*defaults, *arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value).strip()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--task=dream"], ["--prompt=\udcff"]])
def test_sample_says_what_it_refuses_in_a_line(arguments):
    refused("sample.py", *arguments)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        sample.make_directory(str(tmp_path))


def test_a_directory_may_begin_with_home_and_have_any_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("new", "\udcff", "ü #%20[1]"):
        assert sample.make_directory(f"~/{name}") == tmp_path / name
        assert list((tmp_path / name).iterdir()) == []


@pytest.fixture
def sample_fakes(monkeypatch, tmp_path):
    """sample.py without a model: batches of 8 pictures of 4 px."""
    monkeypatch.setattr(dalle2_jax, "load", lambda *_, **__: SimpleNamespace(path=""))

    def make(model, values, progress, **rest):
        pictures = np.arange(values["num"], dtype=np.uint8)[:, None, None, None]
        pictures = pictures.repeat(4, 1).repeat(4, 2).repeat(3, 3)
        for start in range(0, len(pictures), 8):
            progress.finished(pictures[start : start + 8])
        return pictures

    monkeypatch.setattr(sample, "make", make)
    return lambda num: sample_here("--prompt=a", f"--num={num}", f"--out={tmp_path}")


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
    with pytest.raises((UserError, SystemExit)) as raised:
        sample_fakes(20)
    said = f"9 pictures are in {tmp_path}: 000.png to 008.png"
    if isinstance(error, OSError):
        assert said in str(raised.value) and "No space left" in str(raised.value)
    else:
        assert raised.value.code == 130
        assert capsys.readouterr().err == f"interrupted: {said}\n"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{number:03d}.png" for number in range(9)]


def test_pictures_of_earlier_runs_stay(sample_fakes, tmp_path, capsys):
    (tmp_path / "000.png").mkdir()
    (tmp_path / "007.png").write_bytes(b"mine")
    (tmp_path / "notes.txt").touch()
    sample_fakes(2)
    sample_fakes(1)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"1 picture is in {tmp_path}: 010.png, and grid_002.png"
    assert f"2 pictures are in {tmp_path}: 008.png to 009.png, and grid.png" in said
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("000.png", "007.png", "008.png", "009.png", "010.png"),
        *("grid.png", "grid_002.png", "notes.txt"),
    }
    assert (tmp_path / "007.png").read_bytes() == b"mine"


def test_a_truncated_weights_file_is_refused(tiny_models, tmp_path):
    checkpoint.copy(tiny_models["upsampler"], tmp_path / "model")
    file = tmp_path / "model" / "prior.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    said = refused("sample.py", "--prompt=a", f"--model={tmp_path / 'model'}")
    assert "prior.safetensors" in said


def test_sample_writes_pictures_and_a_grid(tiny_models, tmp_path):
    code, out, err = finish(
        start(
            "sample.py",
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


def test_a_task_writes_its_path_and_tells_what_it_was_given(tiny_models, tmp_path):
    for name, colour in {"a": "red", "b": "blue"}.items():
        Image.new("RGB", (40, 24), colour).save(tmp_path / f"{name}.png")
    code, out, err = finish(
        start(
            "sample.py",
            "--task=interpolate",
            f"--image={tmp_path / 'a.png'}",
            f"--image2={tmp_path / 'b.png'}",
            "--frames=3",
            "--steps=decoder=3,upsampler=2",
            f"--model={tiny_models['upsampler']}",
            f"--out={tmp_path / 'out'}",
        )
    )
    assert code == 0, err
    assert "3 pictures" in out
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
