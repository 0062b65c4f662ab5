"""The one training loop: what happens to a stage, in the order in which it happens."""

import contextlib
import functools
import itertools
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle2_jax import checkpoint, runtime
from dalle2_jax.errors import UserError
from dalle2_jax.nn.build import describing
from dalle2_jax.train import checkpoints, cluster, measure, memory, optim, settings
from dalle2_jax.train import mesh as meshes
from dalle2_jax.train.log import Log
from dalle2_jax.train.update import (
    TrainState,
    ema_distance,
    make_step,
    split_seed,
)
from dalle2_jax.train.workdir import SECONDS, Workdir

# Makes the batches from a given step on, each a dict of this process's rows.
Batches = Callable[[int], Iterator[dict[str, np.ndarray]]]


def train(
    stage: Any,
    config: Any,
    batches: Batches,
    heldout: Batches,
    workdir: str | os.PathLike,
) -> TrainState:
    """Trains a stage for `config.steps` steps, from where WORKDIR/checkpoints ends.

    The batch and the noise of a step follow from (seed, step) alone. So a run that was
    interrupted anywhere and is started again gives, on the same devices, bit for bit
    the params of a run that was not.

    Args:
        stage: a Stage.
        config: its ConfigDict. The loop reads seed, steps, batch_size, accumulate,
            ema_decay, log_every, eval_every, eval_batches, preview_every, save_every
            (each also at the last step; 0 for never, but the last step is saved), keep,
            keep_every, tensorboard, wandb, profile, and the sections optim and mesh.
            With eval_batches=0 nothing is evaluated.
        batches: step -> iterator of batches of `batch_size / processes` rows.
        heldout: the same, of examples that are not trained on; always read from 0.
        workdir: for checkpoints, metrics.jsonl, previews and the exported model; a
            directory, or a gs:// URL.

    Returns:
        The state after the last step, with the EMA exported to WORKDIR/model. After
        SIGTERM or SIGINT, the state that was saved, with `step` below `config.steps`.

    Raises:
        UserError: a config that can't be trained, a state that doesn't fit the devices,
            a checkpoint of another model, a
            workdir that can't be written, or a loss that is not finite. What fails in
            between, as the data, is raised when the step before it is saved.
    """
    settings.check(config)
    optimizer = optim.make(config.steps, **config.optim)
    mesh = meshes.make(**config.mesh)
    check_batch_size(config, mesh)
    workdir = Workdir(workdir)
    saved_config = json.loads(json.dumps(config.to_dict()))
    cluster.meet()  # before checkpoints let the processes wait for each other
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir.alone())
        stack.enter_context(jax.set_mesh(mesh))
        run = stack.enter_context(
            checkpoints.Run(workdir.join("checkpoints"), config.keep, config.keep_every)
        )
        interrupted = stack.enter_context(_interruption(run))

        # What can't be is told before minutes of compiling.
        program = make_step(stage, config, mesh, optimizer)
        memory.check(program.abstract, stage.frozen, mesh)

        # The state: a new one, or the latest that is complete on disk.
        start = run.latest_step()
        if start is None:
            start, changes = 0, []
            state = program.begin()
        else:
            changes = checkpoints.changes(run.config(), saved_config)
            state = run.restore(program.abstract, changes)
        frozen = meshes.put(stage.frozen, mesh)

        log = stack.enter_context(
            Log(
                workdir.files,
                name=stage.name,
                start=start,
                steps=config.steps,
                batch_size=config.batch_size,
                tensorboard=config.tensorboard,
                wandb=config.wandb,
            )
        )
        profile = stack.enter_context(
            measure.profiling(workdir.files, config.profile, start)
        )
        log.say(
            f"{stage.name}: {_count(state.params):,} parameters, batch "
            f"{config.batch_size}, {mesh.size} devices {dict(mesh.shape)}"
        )
        for note in run.notes:
            log.say(note)
        if start:
            log.say(f"resuming from step {start}")
        for change in changes:
            log.say(f"config changed: {change}")

        # What runs on the devices. `frozen` is an argument of each: what a compiled
        # function captures would be copied into its program.
        update = program.update
        *_, eval_key = split_seed(config.seed)
        everywhere = NamedSharding(mesh, PartitionSpec())
        jit = functools.partial(
            jax.jit,
            out_shardings=everywhere,
            compiler_options=runtime.compiler_options(),
        )
        take = cluster.compiled_by_all(update)
        distance = cluster.compiled_by_all(jit(ema_distance))
        metrics = cluster.compiled_by_all(jit(stage.metrics))
        preview = cluster.compiled_by_all(jit(stage.preview))

        data = batches(start)
        if hasattr(data, "close"):
            stack.callback(data.close)
        recent = []  # what the steps since the last log line gave, still on the devices
        for step in range(start + 1, config.steps + 1):
            # Whatever fails here leaves the state of the step before as it is.
            with _saved_if_failing(run, state, saved_config, log):
                profile(step, recent[-1:])
                with log.waiting():
                    batch = next(data)
                batch = meshes.put_batch(batch, mesh, config.accumulate)
                if step == start + 1:
                    with describing("the training step of this config"):
                        update.trace(state, frozen, batch, np.int32(0))
                    log.least_s = measure.least_seconds(update, state, frozen, batch)
            state, values = take(state, frozen, batch, np.int32(step - 1))
            if not config.log_every:
                recent = recent[-1:]
            recent.append(values)
            # Two steps in flight keep the devices busy; the batches of more would only
            # fill the memory.
            jax.block_until_ready(recent[-2:-1])
            log.advance(step)
            stop = interrupted(step)

            with _saved_if_failing(run, state, saved_config, log):
                if _due(config.log_every, step, config.steps):
                    _check_finite(state, step, run, saved_config)
                    values = _means(recent) | {"ema_distance": float(distance(state))}
                    log.scalars(step, values | _skipped(data) | log.rates(step))
                    recent = []
                if config.eval_batches and _due(config.eval_every, step, config.steps):
                    values = [
                        metrics(state.ema, frozen, meshes.put_batch(batch, mesh), key)
                        for batch, key in zip(
                            itertools.islice(heldout(0), config.eval_batches),
                            jax.random.split(eval_key, config.eval_batches),
                            strict=True,
                        )
                    ]
                    means = _means(values)
                    log.scalars(
                        step, {f"heldout/{name}": means[name] for name in means}
                    )
                if _due(config.preview_every, step, config.steps):
                    batch = meshes.put_batch(next(heldout(0)), mesh)
                    log.previews(step, preview(state.ema, frozen, batch, eval_key))
                workdir.push(wait=SECONDS)
            if (
                _due(config.save_every, step, config.steps)
                or stop
                or step == config.steps
            ):
                _check_finite(state, step, run, saved_config)
                workdir.push()  # the log of a step is there before its checkpoint
                run.save(step, state, saved_config)
            if stop and step < config.steps:
                run.wait()
                log.say(
                    f"{stop}: stopped at step {step}, which is saved; "
                    "the same command resumes from it"
                )
                return state

        run.wait()
        ema = multihost_utils.process_allgather(state.ema, tiled=True)
        model = stage.export(ema)
        if jax.process_index() == 0:
            checkpoint.export(workdir.join("model"), **model)
        # The others may read it from here on, as the next stage does.
        multihost_utils.sync_global_devices("export")
        workdir.push()
        log.say(f"step {state.step} is done; the model is in {workdir.join('model')}")
        return state


@contextlib.contextmanager
def _interruption(run: checkpoints.Run) -> Iterator[Callable[[int], str | None]]:
    """Yields step -> what asks the run to stop there, or None.

    With several processes, JAX's distributed service catches SIGTERM and agrees with
    all of them on the step.
    """
    if jax.process_count() > 1:
        yield lambda step: "preemption" if run.reached_preemption(step) else None
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: None  # only the main thread may handle signals
        return

    received = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]

    def restore():
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

    def note(number, frame):
        received.append(signal.Signals(number).name)
        restore()  # a second signal stops at once

    for number in numbers:
        signal.signal(number, note)
    try:
        yield lambda step: received[0] if received else None
    finally:
        restore()


def _due(every: int, step: int, steps: int) -> bool:
    return bool(every) and (step % every == 0 or step == steps)


@contextlib.contextmanager
def _saved_if_failing(
    run: checkpoints.Run, state: TrainState, config: Mapping[str, Any], log: Log
) -> Iterator[None]:
    """Saves the state if something fails: data, the log, memory for a preview.

    Several processes can't agree on a step when one of them fails.
    """
    try:
        yield
    except Exception:
        if jax.process_count() == 1:
            # What failed is what the user is to read, also where this fails, too.
            with contextlib.suppress(Exception):
                step = int(state.step)
                if step > (run.latest_step() or 0):
                    run.save(step, state, config)
                    run.wait()
                    log.say(f"step {step} is saved; the same command resumes from it")
        raise


def _check_finite(
    state: TrainState, step: int, run: checkpoints.Run, config: Mapping[str, Any]
) -> None:
    """Stops a run whose state did not come along to this step, with the state saved."""
    good = int(state.step)
    if good == step:
        return
    if good > (run.latest_step() or 0):
        run.save(good, state, config)
        run.wait()
    if good == 0:
        raise UserError(
            "the loss or its gradient is not finite at step 1, before anything was "
            "learnt: look for values that are not finite, or far too large, in the "
            "data, the config and the base model"
        )
    raise UserError(
        f"the loss or its gradient is not finite at step {good + 1}: lower "
        "optim.learning_rate or raise optim.warmup, and run again to go on from step "
        f"{good}"
    )


def _skipped(data: Iterator) -> dict[str, int]:
    """How many examples could not be used, of iterators that tell."""
    count = data.report()["skipped"] if hasattr(data, "report") else 0
    return {"skipped": count} if count else {}


def _means(values: Sequence[Mapping[str, jax.Array]]) -> dict[str, float]:
    """Averages scalars, or arrays of one size, name by name."""
    values = jax.device_get(values)
    names = sorted(values[0], key=lambda name: name != "loss")
    return {name: float(np.mean([v[name] for v in values])) for name in names}


def _count(params: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def check_batch_size(config: Any, mesh: Mesh) -> None:
    """A UserError where a micro-batch can't be split evenly over the mesh."""
    devices = mesh.size // mesh.shape["tensor"]
    unit = config.accumulate * devices
    if config.batch_size % unit:
        raise UserError(
            f"batch_size={config.batch_size} must be a multiple of {unit}, "
            f"accumulate={config.accumulate} times {devices}, the devices that each "
            "have rows of their own (mesh.data times mesh.fsdp)"
        )
