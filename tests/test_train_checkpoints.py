"""The checkpoints of a run: what goes in comes out, or a clear error."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.errors import UserError
from dalle2_jax.train import checkpoints, checksum, mesh
from tests.linear import assert_equal

STATE = {"step": jnp.int32(7), "params": {"kernel": jnp.arange(4.0)}}


def test_a_run_restores_the_latest_and_keeps_the_last(tmp_path):
    with checkpoints.Run(tmp_path / "run", keep=2) as run:
        assert run.latest_step() is None
        for step in (1, 2, 7):
            run.save(step, {**STATE, "step": jnp.int32(step)}, {"lr": step})
    with checkpoints.Run(tmp_path / "run", keep=2) as run:
        assert run.latest_step() == 7
        assert run.config() == {"lr": 7}
        assert_equal(run.restore(jax.eval_shape(lambda: STATE)), STATE)
        run.save(7, STATE, {})  # is there already
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["2", "7"]


def test_what_is_being_saved_may_be_donated(tmp_path):
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(2**20)
    with checkpoints.Run(tmp_path, keep=10) as run:
        for step in range(6):
            run.save(step, {"x": x}, {})
            for _ in range(5):
                x = add(x)
        run.wait()
        abstract = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}
        for step in (5, 4, 3, 2, 1, 0):
            found = run.restore(abstract)["x"]
            np.testing.assert_array_equal(found, np.full(2**20, 5 * step))
            run._manager.delete(step)


def test_a_checkpoint_of_another_shape(tmp_path):
    with checkpoints.Run(tmp_path) as run:
        run.save(3, STATE, {})
        other = {**STATE, "params": {"kernel": jnp.zeros(5), "bias": jnp.zeros(1)}}
        changed = checkpoints.changes({"net": {"width": 4}}, {"net": {"width": 5}})
        message = (
            r"/3 does not fit this config: missing: params/bias; "
            r"wrong shape: params/kernel \(4,\) instead of \(5,\); "
            r"since it was saved, net.width 4 -> 5 changed in the config: change it"
        )
        run.wait()
        with pytest.raises(UserError, match=message):
            run.restore(jax.eval_shape(lambda: other), changed)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A directory with the checkpoints of steps 3 and 7."""
    path = tmp_path_factory.mktemp("two")
    with checkpoints.Run(path) as run:
        for step in (3, 7):
            run.save(step, STATE, {"lr": step})
    return path


@pytest.fixture
def folder(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def restore(folder):
    """The step that is resumed from, its config, and what the user is told."""
    with checkpoints.Run(folder) as run:
        config = run.config()
        assert_equal(run.restore(jax.eval_shape(lambda: STATE)), STATE)
        return run.latest_step(), config, run.notes


@pytest.mark.parametrize(
    "name", ["a[1]", "a\\b", "c*d?", "gs:", "{0..2} %20#~ü日本", "long/" * 440]
)
def test_names_that_orbax_misreads(tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    with checkpoints.Run(folder) as run:
        run.save(7, STATE, {"lr": 7})
    assert (folder / "7" / "state" / "manifest.ocdbt").exists()
    assert restore(folder) == (7, {"lr": 7}, [])


@pytest.mark.parametrize(
    "name", ["state", "config", "config/metadata", "state/manifest.ocdbt", "."]
)
def test_an_incomplete_step_is_passed_over(folder, name):
    shutil.move(folder / "7" / name, folder.parent / "gone")
    (folder / "7").mkdir(exist_ok=True)
    step, config, (note,) = restore(folder)
    assert (step, config) == (3, {"lr": 3})
    assert "checkpoint 7 is not complete" in note and "/7.incomplete" in note
    # It stays, and the step can be saved again.
    with checkpoints.Run(folder) as run:
        run.save(7, STATE, {"lr": 8})
    assert restore(folder) == (7, {"lr": 8}, [])
    assert sorted(os.listdir(folder)) == ["3", "7", "7.incomplete"]


def test_a_run_with_no_complete_step_does_not_start_anew(folder):
    shutil.rmtree(folder / "3")
    shutil.rmtree(folder / "7" / "state")
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint in .* is complete: 7 \(st"):
            checkpoints.Run(folder)
    assert os.listdir(folder) == ["7"]


def test_what_a_killed_process_left_is_no_step(folder):
    (folder / "9.orbax-checkpoint-tmp-1").mkdir()
    (folder / "012").mkdir()
    (folder / "11").touch()
    assert restore(folder) == (7, {"lr": 7}, [])
    assert not (folder / "9.orbax-checkpoint-tmp-1").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe{", b"[" * 10**5, b"3", b"[]"])
@pytest.mark.parametrize("file", ["config/metadata", "state/_METADATA", "d"])
def test_a_damaged_checkpoint(folder, file, content):
    if file == "d":
        for path in (folder / "7" / "state").rglob("d/*"):
            path.write_bytes(content)
    else:
        (folder / "7" / file).write_bytes(content)
    with pytest.raises(UserError, match="cannot read .*/7 ") as error:
        restore(folder)
    assert str(error.value).endswith("move it elsewhere to resume from step 3")
    assert "\n" not in str(error.value)
    shutil.rmtree(folder / "3")
    with pytest.raises(UserError, match="it is the only checkpoint of this run: copy"):
        restore(folder)


def test_flipped_bits_are_refused(tmp_path):
    """Random numbers are not compressed, so that zstd has nothing to notice."""
    state = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
    with checkpoints.Run(tmp_path) as run:
        run.save(7, state, {"lr": 7})
    files = [path for path in (tmp_path / "7").rglob("*") if path.is_file()]
    (data,) = (path for path in files if path.stat().st_size > 10_000)
    good = data.read_bytes()
    for at in (len(good) // 3, len(good) // 2):
        data.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        message = "cannot read .*/7 .*other values than were saved, in kernel.*: it is"
        with checkpoints.Run(tmp_path) as run:
            with pytest.raises(UserError, match=message):
                run.restore(jax.eval_shape(lambda: state))
    data.write_bytes(good)
    config = tmp_path / "7" / "config" / "metadata"
    config.write_text(config.read_text().replace("7", "5"))
    with checkpoints.Run(tmp_path) as run:
        assert_equal(run.restore(jax.eval_shape(lambda: state)), state)
        with pytest.raises(UserError, match="its config is not the one that was saved"):
            run.config()
    shutil.rmtree(tmp_path / "7" / "checksums")  # as of version 0.1
    with checkpoints.Run(tmp_path) as run:
        assert run.config() == {"lr": 5}


def test_checksums_tell_values_and_places():
    x = jnp.arange(24, dtype=jnp.float32).reshape(4, 6)
    trees = [
        x,
        x.at[3, 5].set(np.nextafter(np.float32(23), np.float32(0))),
        x[::-1],
        x.T,
        x.at[0, 0].set(-0.0),
    ]
    found = [checksum.of_state({"x": tree})["x"] for tree in trees]
    assert len({tuple(sums) for sums in found}) == len(trees)
    split = jax.device_put(x, mesh.shardings({"x": x}, mesh.make(fsdp=2), 1)["x"])
    assert checksum.of_state({"x": split})["x"] == found[0]
    half = {"x": x.astype(jnp.bfloat16), "flag": x > 3, "step": jnp.int32(7)}
    assert checksum.of_state(half).keys() == half.keys()


def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    def fail(step, args):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nin line 3")

    with checkpoints.Run(tmp_path) as run:
        monkeypatch.setattr(run._manager, "save", fail)
        message = "save a checkpoint to .*, where the last one is of step none: .*left"
        with pytest.raises(UserError, match=message):
            run.save(3, STATE, {})


def test_changes():
    old = {"steps": 10, "optim": {"b1": 0.9}, "old": 1}
    new = {"steps": 20, "optim": {"b1": 0.9, "b2": 0.99}}
    assert checkpoints.changes(old, new) == [
        "old 1 -> unset",
        "optim.b2 unset -> 0.99",
        "steps 10 -> 20",
    ]
