"""What a run tells: a line or a progress bar, files, TensorBoard, Weights & Biases."""

import contextlib
import datetime
import importlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from dalle2_jax import files
from dalle2_jax.data import image
from dalle2_jax.errors import UserError, first_line

LARGEST = 2**31  # bytes of metrics.jsonl: a line of 2 kB for each of a million steps


class Log:
    """The log of one run, WORKDIR/metrics.jsonl and WORKDIR/previews.

    On a terminal there is a progress bar, elsewhere a line for each call of `scalars`.
    Only the first process says and writes anything. Use it as a context manager.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        name: str,
        start: int,
        steps: int,
        batch_size: int,
        tensorboard: bool = False,
        wandb: str = "",
    ):
        """Continues the log at step `start`: what it has of later steps is dropped."""
        self.active = jax.process_index() == 0
        self.workdir, self.steps, self.batch_size = workdir, steps, batch_size
        self.least_s = None  # what a step would take at the devices' peak
        self._last = None
        self._waited = 0.0
        if not self.active:
            return
        check_writers(tensorboard, wandb)
        self._writer = _tensorboard(workdir, start) if tensorboard else None
        self._wandb = _wandb(workdir, name, wandb) if wandb else None
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        path = workdir / "metrics.jsonl"
        with self._writing():
            if bad := _drop_after(path, start):
                self.say(
                    f"{bad} lines of {path} can't be read and are left out; the file "
                    f"as it was is {_unread(path)}"
                )
            self._file = path.open("a", encoding="utf-8")
        self._progress = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task(
                name, total=steps, completed=start, status="compiling"
            )
            self._progress.start()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.active:
            return
        if self._progress:
            self._progress.stop()
        if self._writer:
            self._writer.close()
        if self._wandb:
            self._wandb.finish()
        with self._writing():
            self._file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write the log to {self.workdir}: {first_line(error)}"
            ) from error

    def say(self, message: str) -> None:
        """Prints a line."""
        if self.active:
            self._console.print(message)

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self._last is None:
            # The first step was compiled before: neither counts.
            self._last = (step, time.monotonic())
            self._waited = 0.0
        if self.active and self._progress:
            self._progress.update(self._task, completed=step)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def rates(self, step: int) -> dict[str, float]:
        """What the steps since the last call, or since the first step, had of time.

        Steps and images per second, the part of it that was spent waiting for data, and
        the part of the devices' peak that was used, where `least_s` is set.
        """
        (before, then), self._last = self._last, (step, time.monotonic())
        waited, self._waited = self._waited, 0.0
        if step == before:
            return {}
        seconds = self._last[1] - then
        rate = (step - before) / seconds
        found = {
            "steps_per_s": rate,
            "images_per_s": rate * self.batch_size,
            "data_wait": waited / seconds,
        }
        return found if self.least_s is None else found | {"mfu": rate * self.least_s}

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Adds the values to metrics.jsonl, to TensorBoard, and shows them."""
        if not self.active:
            return
        with self._writing():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(values), step=step)
        if self._progress and "loss" in values:
            self._progress.update(self._task, status=_status(values))
        else:
            left = _time_left(self.steps - step, values.get("steps_per_s"))
            self.say(f"step {step}/{self.steps}  {_line(values)}{left}")

    def previews(self, step: int, outputs: Mapping[str, Any]) -> None:
        """Writes images as previews/NAME_STEP.png, a grid; the rest are scalars."""
        if not self.active:
            return
        images = {k: np.asarray(v) for k, v in outputs.items() if np.ndim(v) == 4}
        for name, pictures in images.items():
            grid = image.grid(pictures, math.ceil(math.sqrt(len(pictures))))
            path = self.workdir / "previews" / f"{name}_{step:07d}.png"
            with self._writing():
                path.parent.mkdir(exist_ok=True)
                image.save_png(path, grid, {"step": str(step)})
            if self._writer:
                self._writer.add_image(name, np.asarray(grid), step, dataformats="HWC")
            if self._wandb:
                import wandb

                self._wandb.log({name: wandb.Image(grid)}, step=step)
        scalars = {k: float(v) for k, v in outputs.items() if k not in images}
        if scalars:
            self.scalars(step, {f"preview/{k}": v for k, v in scalars.items()})


def _drop_after(path: Path, step: int) -> int:
    """Drops the lines of later steps, and what can't be read; returns how many can't.

    A last line without an end is not counted: a killed process left it.
    """
    if not path.exists():
        return 0
    *lines, last = files.read_bytes(path, LARGEST).split(b"\n")
    new = path.with_suffix(".tmp")
    bad = 0
    with new.open("wb") as file:
        for line in [*lines, last]:
            try:
                found = files.parse_json(line, path, finite=False)["step"]
                if not isinstance(found, int):
                    raise ValueError
                if found <= step:
                    file.write(line + b"\n")
            except (ValueError, KeyError):
                bad += line is not last
    if bad:
        os.replace(path, _unread(path))
    os.replace(new, path)
    return bad


def _unread(path: Path) -> Path:
    return path.with_suffix(".unread")


def check_writers(tensorboard: bool, wandb: str) -> None:
    """A UserError where what the log is to write with is not installed."""
    for wanted, package, name, extra in (
        (tensorboard, "tensorboardX", "tensorboard=True", "tensorboard"),
        (wandb, "wandb", f"wandb={wandb!r}", "wandb"),
    ):
        try:
            _ = wanted and importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"{name} needs {package}: pip install 'dalle2_jax[{extra}]'"
            ) from error


def _tensorboard(workdir: Path, start: int) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)


def _wandb(workdir: Path, name: str, project: str) -> Any:
    """A run of Weights & Biases, the same one when this run goes on."""
    import wandb

    path = workdir / "wandb_id.txt"
    identity = path.read_bytes().decode(errors="ignore") if path.is_file() else ""
    if not re.fullmatch(r"[\w-]{1,128}", identity):
        identity = secrets.token_hex(4)
        path.write_text(identity)
    try:
        return wandb.init(
            project=project, name=name, id=identity, resume="allow", dir=str(workdir)
        )
    except wandb.Error as error:
        raise UserError(
            f"wandb={project!r}: {first_line(error)}; with WANDB_MODE=offline it needs "
            "no account and no network"
        ) from error


def _line(values: Mapping[str, float | int]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _status(values: Mapping[str, float | int]) -> str:
    units = {"steps_per_s": "steps/s", "images_per_s": "images/s"}
    rates = [
        f"{values[name]:.3g} {unit}" for name, unit in units.items() if name in values
    ]
    return "  ".join([f"loss {values['loss']:.4g}", *rates])


def _time_left(steps: int, steps_per_s: float | None) -> str:
    if not steps_per_s:
        return ""
    return f"  left {datetime.timedelta(seconds=round(steps / steps_per_s))}"
