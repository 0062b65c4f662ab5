"""The checkpoints of a training run: the whole TrainState, read only to resume it."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from dalle2_jax import checkpoint, storage
from dalle2_jax.errors import UserError, first_line
from dalle2_jax.train import checksum

# Without one of these a step can't be read: a copy was cut short, or a file deleted.
FILES = ("config/metadata", "state/_METADATA", "state/manifest.ocdbt")
_STEP = re.compile("0|[1-9][0-9]*")


class Run:
    """The checkpoints of a training run, DIRECTORY/STEP.

    Saving is asynchronous, and a step counts only once it is complete: a process killed
    while saving leaves the step before as the latest. With several processes, all of
    them call every method.

    Attributes:
        notes: what the user is to be told of what was found, a line each.
    """

    def __init__(
        self, directory: str | os.PathLike, keep: int = 2, keep_every: int = 0
    ):
        """Open a directory, which is made if it is not there.

        A step without some of its files is renamed to STEP.incomplete, so that the run
        resumes from the one before.

        Args:
            directory: absolute path, or URL of a Google Cloud Storage bucket.
            keep: how many of the last steps stay.
            keep_every: steps that it divides stay, too; 0 for none.

        Raises:
            UserError: the directory can't be written, or has incomplete steps only.
        """
        self.directory = storage.url(directory) or str(Path(directory).absolute())
        self.notes: list[str] = []
        self._stack = contextlib.ExitStack()
        self._path = self._stack.enter_context(_as_orbax_reads(self.directory))
        with contextlib.ExitStack() as failing:
            failing.callback(self._stack.close)
            with self._writing():
                self._tidy()
                self._manager = self._open(keep, keep_every)
            failing.pop_all()

    def _open(self, keep: int, keep_every: int) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._path,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every or None,
                # So that a directory that can't be made is told at once: the threads
                # that write would wait for it for minutes, and the process for them.
                async_options=ocp.options.AsyncOptions(
                    create_directories_asynchronously=False
                ),
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
                "checksums": ocp.JsonCheckpointHandler(),
            },
        )

    def _tidy(self) -> None:
        """Sets aside the steps that can't be read, and deletes unfinished ones."""
        paths = list(self._path.iterdir()) if self._path.exists() else []
        steps = [p for p in paths if _STEP.fullmatch(p.name) and p.is_dir()]
        # What a killed process left: a name of its own, or, where nothing can be
        # renamed, a directory that the last file is missing from.
        if storage.url(self.directory):
            unfinished = [p for p in steps if not (p / "commit_success.txt").exists()]
            steps = [p for p in steps if p not in unfinished]
        else:
            unfinished = [p for p in paths if ".orbax-checkpoint-tmp" in p.name]
        missing = {
            p: [name for name in FILES if not (p / name).exists()] for p in steps
        }
        incomplete = {path: names for path, names in missing.items() if names}
        if incomplete and len(incomplete) == len(steps):
            told = ", ".join(
                f"{p.name} ({n[0]} is missing)" for p, n in incomplete.items()
            )
            raise UserError(
                f"no checkpoint in {self.directory} is complete: {told}; copy it there "
                "again, or train in another workdir to start anew"
            )
        # All have looked before anything changes.
        multihost_utils.sync_global_devices("checkpoints listed")
        if jax.process_index() == 0:
            for path, names in incomplete.items():
                aside = f"{path.name}.incomplete"
                while (path.parent / aside).exists():
                    aside += "_"
                path.rename(path.parent / aside)
                self.notes.append(
                    f"checkpoint {path.name} is not complete, {names[0]} is missing: "
                    f"it is passed over, and is now {self.directory}/{aside}"
                )
            # Orbax would do it in the background, and fail at the next save if two
            # processes did it at the same time.
            for path in unfinished:
                path.rmtree(missing_ok=True)
        multihost_utils.sync_global_devices("checkpoints tidied")

    def latest_step(self) -> int | None:
        """The last complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, config: Mapping[str, Any]) -> None:
        """Starts to save the state; the caller may donate its buffers right away.

        Raises:
            UserError: the step before could not be written.
        """
        if step == self.latest_step():
            return
        config = dict(config)
        sums = {
            "state": checksum.of_state(state),
            "config": checksum.of_json(config),
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            config=ocp.args.JsonSave(config),
            checksums=ocp.args.JsonSave(sums),
        )
        with self._writing():
            self._manager.save(step, args=args)

    def wait(self) -> None:
        """Returns when all that was saved is complete on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def config(self) -> dict[str, Any]:
        """The config that the latest step was saved with."""
        with self._reading() as step:
            found = self._json(step, "config")
            sums = self._checksums(step)
            if sums is not None and sums["config"] != checksum.of_json(found):
                raise ValueError("its config is not the one that was saved")
            return found

    def shapes(self) -> Any:
        """What the latest step holds: a tree of things with a shape and a dtype."""
        with self._reading() as step:
            return self._manager.item_metadata(step)["state"]

    def restore(self, abstract: Any, changed: Sequence[str] = ()) -> Any:
        """Reads the latest step.

        Args:
            abstract: tree of `jax.ShapeDtypeStruct` with the shardings to restore to.
            changed: what `changes` found in the config, for the message.

        Raises:
            UserError: names or shapes differ, a file can't be read, or what it holds
                is not what was saved, by its checksum.
        """
        found = self.shapes()
        try:
            # Compared here because orbax would tell the difference in pages.
            where = storage.join(self.directory, str(self.latest_step()))
            checkpoint.check(found, abstract, where)
        except UserError as error:
            raise UserError(
                f"{error}; since it was saved, "
                f"{checkpoint.shorten(changed) or 'nothing'} changed "
                "in the config: change it back, or train in another workdir"
            ) from None
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        with self._reading() as step:
            state = self._manager.restore(step, args=args).state
            sums = self._checksums(step)
            if sums is not None:
                found = checksum.of_state(state)
                changed = [k for k, v in found.items() if sums["state"].get(k) != v]
                if changed:
                    raise ValueError(
                        "other values than were saved, in "
                        f"{checkpoint.shorten(changed, 3)}"
                    )
            return state

    def _json(self, step: int, item: str) -> dict[str, Any]:
        args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
        found = self._manager.restore(step, args=args)[item]
        if not isinstance(found, dict):
            raise ValueError(f"its {item} is not a JSON object")
        return found

    def _checksums(self, step: int) -> dict[str, Any] | None:
        """What `save` wrote; None of a checkpoint of version 0.1."""
        if not (self._path / str(step) / "checksums").exists():
            return None
        return self._json(step, "checksums")

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes of a cluster are to save at this step and stop."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Waits, and stops the threads that write."""
        with self._stack, self._writing():
            self._manager.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[int]:
        step = self.latest_step()
        try:
            yield step
        except (UserError, jax.errors.JaxRuntimeError):  # the latter as of memory
            raise
        # What orbax raises of what it finds in a file is of any kind.
        except Exception as error:
            before = max(
                (s for s in self._manager.all_steps() if s < step), default=None
            )
            if before is None:
                what = (
                    "it is the only checkpoint of this run: copy it there again, or "
                    "train in another workdir to start anew"
                )
            else:
                what = f"move it elsewhere to resume from step {before}"
            raise UserError(
                f"cannot read {self.directory}/{step} ({self._told(error)}): {what}"
            ) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        # Of object storage, each package has errors of its own.
        except Exception as error:
            known = isinstance(error, ValueError | OSError)
            if not known and not storage.url(self.directory):
                raise
            raise UserError(
                f"cannot save a checkpoint to {self.directory}, where the last one is "
                f"of step {self._last_on_disk()}: {self._told(error)}"
            ) from error

    def _last_on_disk(self) -> int | str:
        """Orbax counts the step that it could not save."""
        try:
            names = [path.name for path in self._path.iterdir()]
        except Exception:  # the reason is told already
            names = []
        steps = [int(name) for name in names if _STEP.fullmatch(name)]
        return max(steps, default="none")

    def _told(self, error: Exception) -> str:
        return first_line(error).replace(str(self._path), self.directory)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two configs, as "net.width 64 -> 128"."""
    old, new = flatten_dict(old, sep="."), flatten_dict(new, sep=".")
    return [
        f"{key} {old.get(key, 'unset')} -> {new.get(key, 'unset')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


# What orbax and TensorStore misread in a path: as a pattern, a backslash, or a bucket.
_ODD = re.compile(r"[][*?\\]|gs:|^/(gs|s3|az|hf)/")


@contextlib.contextmanager
def _as_orbax_reads(directory: str) -> Iterator[epath.Path]:
    """Yields a path for orbax: a link where it would misread the directory's own.

    It saves below "[" without a word what can't be read back, and below "*" it may take
    another run's files.
    """
    long = len(os.fsencode(directory)) > 2000  # Linux allows 4,096 with all file names
    if storage.url(directory) or not (long or _ODD.search(directory)):
        yield epath.Path(directory)
        return
    with tempfile.TemporaryDirectory(prefix="dalle2_jax-") as folder:
        if _ODD.search(folder):
            raise UserError(
                f"checkpoints can't be written below {directory!r}: rename it, or set "
                f"TMPDIR to a directory with a plainer name than {folder!r}"
            )
        Path(directory).mkdir(parents=True, exist_ok=True)
        link = Path(folder) / "checkpoints"
        link.symlink_to(directory)
        yield epath.Path(link)
