"""Training: what a run leaves, what survives an interruption, and what stops it.

Run as a script, it trains the stage of linear.py in a process of its own:
WORKDIR JSON [COORDINATOR PROCESSES PROCESS]. JSON has changes to the config, and maybe
{"signal": [NAME, STEP]}, which the first process gets when it asks for that batch.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from PIL import Image

from dalle2_jax import checkpoint
from dalle2_jax.errors import UserError
from dalle2_jax.train import checkpoints, loop, mesh, update
from dalle2_jax.train.log import Log
from tests.linear import WIDTH, assert_close, assert_equal, linear, make_batches


def make_config(**changes):
    config = ConfigDict(
        {
            "stage": "linear",
            "seed": 3,
            "steps": 20,
            "batch_size": 16,
            "accumulate": 1,
            "ema_decay": 0.9,
            "log_every": 5,
            "eval_every": 10,
            "eval_batches": 2,
            "preview_every": 0,
            "save_every": 5,
            "keep": 2,
            "keep_every": 0,
            "tensorboard": False,
            "wandb": "",
            "profile": "",
            "optim": {"learning_rate": 1e-3, "warmup": 4, "weight_decay": 0.01},
            "mesh": {"data": -1, "fsdp": 1},
        }
    )
    config.update(changes)
    return config


heldout = make_batches()


def train(workdir, config=None, batches=None, stage=None):
    return loop.train(
        stage or linear(),
        config or make_config(),
        batches or make_batches(),
        heldout,
        workdir,
    )


def train_elsewhere(workdir, **changes):
    """Trains in a process of its own."""
    command = [sys.executable, __file__, str(workdir), json.dumps(changes)]
    root = Path(__file__).parents[1]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)})


def read_metrics(workdir):
    """The lines of metrics.jsonl without the times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    times = {"steps_per_s", "images_per_s", "data_wait"}
    return [
        {k: v for k, v in json.loads(line).items() if k not in times} for line in lines
    ]


def latest(workdir):
    with checkpoints.Run(workdir / "checkpoints") as run:
        return run.latest_step()


def losses(workdir):
    return np.array([line["loss"] for line in read_metrics(workdir) if "loss" in line])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, to compare with: its workdir and its final state."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(workdir)


def test_a_run_learns_and_leaves_a_model(tmp_path):
    state = train(tmp_path, make_config(steps=12, preview_every=6, save_every=0))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [5, 6, 10, 10, 12, 12, 12]
    names = {"step", "loss", "root", "grad_norm", "ema_distance"}
    assert lines[0].keys() == names
    assert lines[1].keys() == {"step", "preview/largest"}
    assert lines[3].keys() == {"step", "heldout/error"}
    assert lines[4]["loss"] < lines[0]["loss"]
    norm = optax.tree.norm
    behind = norm(optax.tree.sub(state.params, state.ema)) / norm(state.params)
    assert behind > 0
    assert lines[4]["ema_distance"] == pytest.approx(float(behind), rel=1e-5)
    for step in (6, 12):
        with Image.open(tmp_path / "previews" / f"kernel_{step:07d}.png") as grid:
            assert grid.size == (3 * 8 + 2 * 2, 2 * 8 + 2)
    assert latest(tmp_path) == state.step == 12
    assert_equal(checkpoint.load(tmp_path / "model").params["linear"], state.ema)


def test_the_ema_and_not_the_params_are_evaluated(whole):
    workdir, state = whole
    stage = linear()
    expected = np.mean(
        [
            stage.metrics(state.ema, stage.frozen, next(heldout(i)), None)["error"]
            for i in range(2)
        ]
    )
    found = [line for line in read_metrics(workdir) if "heldout/error" in line]
    np.testing.assert_allclose(found[-1]["heldout/error"], expected, rtol=1e-5)


def start_from(seed, dtype=np.float32):
    """The stage with params to start from, which its init doesn't give."""
    stage = linear()
    start = jax.tree.map(
        lambda x: np.asarray(x, dtype), stage.init(jax.random.key(seed))
    )
    init = stage.init
    return stage._replace(
        start=start,
        init=lambda key: jax.tree.map(lambda x: x.astype(dtype), init(key)),
    )


def test_a_run_starts_from_params_it_is_given():
    stage = start_from(seed=7)
    program = update.make_step(stage, make_config(), mesh.make(), optax.sgd(1.0))
    state = program.begin()
    assert_equal(state.params, stage.start)
    assert_equal(state.ema, stage.start)


def test_params_in_bfloat16_learn_as_much(tmp_path):
    """Most updates are below their precision: rounded to the nearest, they'd be lost.

    All else in the state is float32.
    """
    config = make_config(steps=40, optim={"learning_rate": 1e-4, "warmup": 0})
    falls = []
    for dtype in (jnp.float32, jnp.bfloat16):
        state = train(tmp_path / dtype.__name__, config, stage=start_from(7, dtype))
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(dtype)}
        others = {x.dtype for x in jax.tree.leaves((state.ema, state.opt_state))}
        assert others == {jnp.dtype("float32"), jnp.dtype("int32")}
        first, *_, last = losses(tmp_path / dtype.__name__)
        falls.append(first - last)
    assert falls[0] > 0 and falls[1] == pytest.approx(falls[0], rel=0.1)


# Interruptions


def test_a_resumed_run_ignores_what_it_would_start_from(tmp_path):
    dtype = jnp.bfloat16
    whole = train(tmp_path / "whole", stage=start_from(7, dtype))
    with pytest.raises(Crash):
        train(
            tmp_path / "parts",
            batches=make_batches(events={13: [crash]}),
            stage=start_from(7, dtype),
        )
    assert_equal(train(tmp_path / "parts", stage=start_from(8, dtype)), whole)


class Crash(BaseException):
    """What nobody catches."""


def crash():
    raise Crash


def fail():
    raise RuntimeError("out of pictures")


@pytest.mark.parametrize("step", [3, 10, 13])
def test_a_crashed_run_resumes_exactly(whole, tmp_path, step, capsys):
    workdir, state = whole
    with pytest.raises(Crash):
        train(tmp_path, batches=make_batches(events={step: [crash]}))
    # Not the steps since the last save, which are done again.
    saved = latest(tmp_path)
    assert saved == (step // 5 * 5 or None)
    assert_equal(train(tmp_path), state)
    assert read_metrics(tmp_path) == read_metrics(workdir)
    assert (f"resuming from step {saved}" in capsys.readouterr().out) == bool(saved)


@pytest.mark.parametrize("where", ["batches", "heldout", "preview", "log"])
def test_a_run_is_saved_when_something_else_fails(
    whole, tmp_path, where, capsys, monkeypatch
):
    """Each at step 13, or upon it."""
    config, stage = make_config(eval_every=13, save_every=0), linear()
    if where == "preview":
        config.preview_every = 13
        stage = stage._replace(preview=lambda *_: fail())
    elif where == "log":
        config.log_every = 13
        monkeypatch.setattr(Log, "scalars", lambda *_: fail())
    with pytest.raises(RuntimeError, match="out of pictures"):
        loop.train(
            stage,
            config,
            make_batches(events={13: [fail]} if where == "batches" else {}),
            make_batches(events={0: [fail]} if where == "heldout" else {}),
            tmp_path,
        )
    assert latest(tmp_path) == 13
    assert "step 13 is saved; the same command resumes" in capsys.readouterr().out
    monkeypatch.undo()
    assert_equal(train(tmp_path), whole[1])


def test_a_failure_that_cannot_be_saved_is_still_told(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.Run, "save", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="out of pictures"):
        train(tmp_path, batches=make_batches(events={3: [fail]}))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_it_came_in(whole, tmp_path, number, capsys):
    workdir, state = whole
    before = signal.getsignal(number)
    events = {7: [lambda: signal.raise_signal(number)]}
    stopped = train(tmp_path, batches=make_batches(events=events))
    assert signal.getsignal(number) == before
    assert latest(tmp_path) == stopped.step == 8
    assert (
        f"{number.name}: stopped at step 8, which is saved" in capsys.readouterr().out
    )
    assert not (tmp_path / "model").exists()
    assert_equal(train(tmp_path), state)


def test_a_signal_in_the_last_step_comes_too_late(whole, tmp_path):
    events = {19: [lambda: signal.raise_signal(signal.SIGTERM)]}
    assert_equal(train(tmp_path, batches=make_batches(events=events)), whole[1])
    assert (tmp_path / "model").exists()


def test_a_second_signal_stops_at_once(tmp_path):
    events = {7: [lambda: signal.raise_signal(signal.SIGINT)] * 2}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist has none
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, batches=make_batches(events=events))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_killed_run_resumes_exactly(whole, tmp_path):
    workdir, state = whole
    # This batch is asked for while the checkpoint of step 10 is being written.
    done = train_elsewhere(tmp_path, signal=["SIGKILL", 10])
    assert done.returncode == -signal.SIGKILL
    assert latest(tmp_path) in (5, 10)
    assert_equal(train(tmp_path), state)
    assert read_metrics(tmp_path) == read_metrics(workdir)


def test_a_finished_run_only_exports_again(whole, tmp_path):
    config = make_config(steps=5)
    state = train(tmp_path, config)
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model" / "linear.safetensors").unlink()
    assert_equal(train(tmp_path, config, make_batches(events={5: [crash]})), state)
    assert_equal(checkpoint.load(tmp_path / "model").params["linear"], state.ema)


def test_a_run_continues_with_other_steps_and_on_another_mesh(whole, tmp_path, capsys):
    workdir, state = whole
    train(tmp_path, make_config(steps=10))
    other = make_config(mesh={"data": 2, "fsdp": 4})
    resumed = train(tmp_path, other)
    assert_close(resumed, state)
    out = capsys.readouterr().out
    assert "config changed: steps 10 -> 20" in out
    assert "config changed: mesh.fsdp 1 -> 4" in out


def wait_for(path):
    while not path.exists():
        time.sleep(0.01)


def limit_files(size):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def test_a_disk_that_is_full_leaves_the_last_checkpoint(whole, tmp_path):
    saved = tmp_path / "checkpoints" / "10"
    events = {12: [lambda: wait_for(saved), lambda: limit_files(2**16)]}
    before, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match="where the last one is of step 10: ") as e:
            train(tmp_path, batches=make_batches(events=events))
    finally:
        limit_files(before)
    assert "\n" not in str(e.value)
    assert_equal(train(tmp_path), whole[1])
    assert read_metrics(tmp_path) == read_metrics(whole[0])


def test_a_workdir_that_is_taken_away(whole, tmp_path):
    checkpoints = tmp_path / "checkpoints"

    def take_away():
        wait_for(checkpoints / "10")
        checkpoints.rename(tmp_path / "elsewhere")
        checkpoints.touch()

    threads = threading.enumerate()
    with pytest.raises(UserError, match=f"cannot save a checkpoint to {checkpoints}"):
        train(tmp_path, batches=make_batches(events={12: [take_away]}))
    # None is left that the process would have to wait for.
    assert all(t.daemon or t in threads for t in threading.enumerate())
    checkpoints.unlink()
    (tmp_path / "elsewhere").rename(checkpoints)
    assert latest(tmp_path) == 10
    assert_equal(train(tmp_path), whole[1])


def test_some_checkpoints_are_kept_for_good(whole, tmp_path):
    train(tmp_path, make_config(save_every=2, keep=1, keep_every=8))
    kept = {int(path.name) for path in (tmp_path / "checkpoints").glob("*")}
    assert kept == {8, 16, 20}
    (tmp_path / "checkpoints" / "20").rename(tmp_path / "20")
    assert_equal(train(tmp_path), whole[1])  # from 16


# How the state lies on the devices, and in what dtype


def test_the_loss_is_the_same_however_the_state_is_laid_out(whole, tmp_path):
    state = train(tmp_path, make_config(mesh={"data": 2, "fsdp": 4}))
    np.testing.assert_allclose(losses(tmp_path), losses(whole[0]), rtol=1e-5)
    adam = optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")
    for tree in (state.params, state.ema, *adam):
        shards = {shard.data.shape for shard in tree["kernel"].addressable_shards}
        assert shards == {(WIDTH // 4, WIDTH)}
        assert tree["bias"].sharding.is_fully_replicated


def test_sam_in_bfloat16(tmp_path):
    config = make_config(optim={"sam_rho": 0.05, "warmup": 0})
    state = train(tmp_path, config, stage=start_from(7, jnp.bfloat16))
    assert state.step == 20 and losses(tmp_path)[-1] < losses(tmp_path)[0]


# What stops a run


def test_a_loss_that_is_not_finite_stops_the_run_with_the_last_good_step(
    whole, tmp_path
):
    def batches(step):
        for batch in make_batches()(step):
            yield {"x": batch["x"] * (np.inf if step == 12 else 1)}
            step += 1

    config = make_config(log_every=10)
    for _ in range(2):
        with pytest.raises(UserError, match="not finite at step 13: .* from step 12"):
            train(tmp_path, config, batches)
        assert latest(tmp_path) == 12
    assert not (tmp_path / "model").exists()
    assert_equal(train(tmp_path), whole[1])


def test_another_shape_than_the_checkpoint_has(tmp_path):
    train(tmp_path, make_config(steps=5))
    wide = linear(width=128)
    config = make_config(seed=4)
    message = (
        r"checkpoints/5 does not fit .* params/bias \(256,\) instead of \(128,\).* "
        r"since it was saved, seed 3 -> 4, steps 5 -> 20 changed in the config"
    )
    with pytest.raises(UserError, match=message):
        train(tmp_path, config, stage=wide)


def test_a_workdir_in_which_a_run_is_at_work(tmp_path):
    errors = []

    def start_another():
        with pytest.raises(UserError) as error:
            train(tmp_path)
        errors.append(str(error.value))

    train(tmp_path, make_config(steps=5), make_batches(events={3: [start_another]}))
    assert len(errors) == 1 and f"another run is at work in {tmp_path}" in errors[0]


@pytest.mark.parametrize(
    "workdir", ["file", "file/below", "s3://bucket/run", Path("az://bucket/run")]
)
def test_a_workdir_that_cannot_be_written(tmp_path, monkeypatch, workdir):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(UserError, match=f"workdir .*{str(workdir)[-8:]}"):
        train(workdir)
    assert os.listdir() == ["file"]


@pytest.mark.parametrize("batch_size, accumulate", [(12, 1), (16, 3)])
def test_a_batch_that_does_not_divide(tmp_path, batch_size, accumulate):
    config = make_config(batch_size=batch_size, accumulate=accumulate)
    with pytest.raises(UserError, match=f"batch_size={batch_size} must be a multiple"):
        train(tmp_path, config)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"batch_size": 0}, "config.batch_size is 0: must be a whole number from 1"),
        ({"accumulate": 0}, "config.accumulate is 0: must be a whole number from 1"),
        ({"steps": -3}, "config.steps is -3: must be a whole number from 1 to"),
        (
            {"steps": 0},
            "config.steps is 0: must be a whole number from 1 to 2147483647",
        ),
        ({"steps": 10**12}, "config.steps is 1000000000000: must"),
        ({"save_every": -1}, "config.save_every is -1: must be a whole number from 0"),
        ({"eval_batches": -1}, "config.eval_batches is -1: must be a whole"),
        ({"seed": 10**24}, "config.seed is 10{24}: must be .* from 0 to 4294967295"),
        ({"seed": 2**32}, "config.seed is 4294967296: must be"),
        ({"keep": 0}, "config.keep is 0: must be a whole number from 1"),
        ({"keep_every": -1}, "config.keep_every is -1: must be a whole number from 0"),
        ({"profile": "9:3"}, "profile='9:3' has no steps"),
        (
            {"ema_decay": np.nan},
            "config.ema_decay is nan: must be a number from 0 to 1",
        ),
        ({"ema_decay": 2.0}, "config.ema_decay is 2.0: must be a number from 0 to 1"),
        ({"mesh": {"data": 10**9}}, "mesh.data=1000000000, .* does not fit 8 devices"),
        ({"mesh": {"fsdp": 10**9}}, "mesh.fsdp=1000000000, .* does not fit 8 devices"),
        ({"optim": {"learning_rate": np.nan}}, "optim.learning_rate is nan"),
        ({"optim": {"learning_rate": 1e-3, "b2": 1.0}}, "optim.b2 is 1.0"),
    ],
)
def test_numbers_out_of_range(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", make_config(**values))
    assert not (tmp_path / "run").exists()


def test_what_is_0_is_never_done(tmp_path):
    never = dict.fromkeys(("log_every", "eval_every", "preview_every", "save_every"), 0)
    assert train(tmp_path / "a", make_config(**never, steps=3)).step == 3
    assert read_metrics(tmp_path / "a") == [] and latest(tmp_path / "a") == 3
    config = make_config(eval_every=1, eval_batches=0, log_every=0, steps=3)
    train(tmp_path / "b", config)
    assert read_metrics(tmp_path / "b") == []


@pytest.mark.parametrize("keep_every, save_every", [(7, 5), (5, 10), (5, 0)])
def test_what_is_not_saved_is_not_kept(tmp_path, keep_every, save_every):
    config = make_config(keep_every=keep_every, save_every=save_every)
    with pytest.raises(UserError, match=f"keep_every={keep_every} must be a multiple"):
        train(tmp_path, config)


def main(workdir, changes, coordinator=None, processes=1, process=0):
    process, processes, changes = int(process), int(processes), json.loads(changes)
    if coordinator:
        jax.distributed.initialize(coordinator, processes, process)
    name, step = changes.pop("signal", ("SIGTERM", None))
    if process == 0:
        events = {step: [lambda: os.kill(os.getpid(), signal.Signals[name])]}
    else:
        events = {}
    batches = make_batches(16 // processes, process, events)
    loop.train(linear(), make_config(**changes), batches, heldout, workdir)


if __name__ == "__main__":
    main(*sys.argv[1:])
