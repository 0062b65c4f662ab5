"""Training steps of the stages as they run, of any config, on made-up batches.

The model below a stage is hollow, its CLIP is drawn at random, and pictures come with
their embeddings, as of the source "embeddings": CLIP's image tower is not run.
"""

import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs

from dalle2_jax import parts
from dalle2_jax.nn.clip import CLIP
from dalle2_jax.parts import Stage
from dalle2_jax.planning import blueprint
from dalle2_jax.train import measure, optim, update
from dalle2_jax.train import mesh as meshes


@dataclasses.dataclass
class Step:
    """A training step, compiled, and what it works on.

    Attributes:
      program: jax's compiled update.
      parameters: that are trained.
      flops: operations of a step's products and convolutions.
      begin: -> (state, frozen, batch) on the devices.
    """

    program: Any
    parameters: int
    flops: int
    begin: Callable[[], tuple[Any, Any, Any]]
    arguments: tuple[Any, Any, Any] = ()
    done: int = 0

    def run(self, steps: int) -> None:
        """Does so many more steps, and waits for the last."""
        if not self.arguments:
            self.arguments = self.begin()
        state, frozen, batch = self.arguments
        for _ in range(steps):
            state, metrics = self.program(state, frozen, batch, np.int32(self.done))
            self.done += 1
        self.arguments = state, frozen, batch
        if not np.isfinite(jax.device_get(metrics)["loss"]):
            raise ValueError(f"the loss is not finite after {self.done} steps")


def compile_step(config: ConfigDict, clip: Mapping[str, Any]) -> Step:
    """The step of a config, upon a CLIP of these arguments."""
    stage = make_stage(config, clip)
    mesh = meshes.make(**config.mesh)
    jax.set_mesh(mesh)
    optimizer = optim.make(config.steps, **config.optim)
    step = update.make_step(stage, config, mesh, optimizer)
    batch = make_batch(config, clip)
    arguments = update.abstract_arguments(step, stage, config, mesh, batch)

    def freeze(key):
        network = CLIP(**clip)
        frozen = {
            "clip": network.init(key, *network.example())["params"],
            "mean": jnp.zeros(clip["embed_dim"]),
            "std": jnp.ones(clip["embed_dim"]),
        }
        return {name: frozen[name] for name in stage.frozen}

    shardings = jax.tree.map(lambda x: x.sharding, arguments[:2])

    @functools.partial(jax.jit, out_shardings=shardings)
    def draw(key):  # as what lies below the stage is hollow
        return update.first_state(stage.init(key), optimizer), freeze(key)

    key, call = jax.random.key(1), (*arguments, np.int32(0))
    with ThreadPoolExecutor() as pool:
        drawn, program = pool.map(
            jax.stages.Lowered.compile, [draw.lower(key), step.update.lower(*call)]
        )

    def begin():
        return *drawn(key), meshes.put_batch(batch, mesh, config.accumulate)

    return Step(
        program=program,
        parameters=sum(x.size for x in jax.tree.leaves(step.abstract.params)),
        flops=count_flops(config, clip, call),
        begin=begin,
    )


def make_stage(config: ConfigDict, clip: Mapping[str, Any]) -> Stage:
    """The stage, upon a model whose numbers are all zero."""
    config = config.copy_and_resolve_references()
    config.update(dict(base="", init_from="hollow"))
    with tempfile.TemporaryDirectory() as folder:
        export = blueprint.hollow(config, clip, folder)
        return parts.make_stage(config, lambda path: export)


def make_batch(config: ConfigDict, clip: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Embeddings, captions of 5 to 40 tokens, and for a decoder pictures; of noise."""
    generator = np.random.default_rng(config.seed)
    rows, eot = config.batch_size, clip["eot"]
    tokens = generator.integers(0, eot, (rows, clip["context_length"]), np.int32)
    ends = generator.integers(5, min(40, clip["context_length"]), (rows, 1))
    batch = {
        "tokens": np.where(np.arange(clip["context_length"]) < ends, tokens, eot),
        "z_image": generator.normal(size=(rows, clip["embed_dim"])).astype(np.float32),
    }
    if "size" in config:
        shape = rows, config.size, config.size, 3
        batch["image"] = generator.integers(0, 256, shape, np.uint8)
    return batch


def count_flops(
    config: ConfigDict, clip: Mapping[str, Any], arguments: tuple[Any, ...]
) -> int:
    """Of a step, without what it computes twice to save memory."""
    config = config.copy_and_resolve_references()
    (config.net.unet if "unet" in config.net else config.net).remat = False
    stage = make_stage(config, clip)
    optimizer = optim.make(config.steps, **config.optim)
    step = update.make_update(stage.loss, optimizer, jax.random.key(0), 0.0)
    # cuDNN's attention computes a product twice.
    with mock.patch.object(jax, "default_backend", lambda: "cpu"):
        return measure.count_flops(jax.jit(step).trace(*arguments).jaxpr)


def time_by_turns(
    runs: Mapping[str, Callable[[int], None]],
    blocks: int,
    steps: int,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds a step: medians of blocks of steps, for which all take turns."""
    seconds: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(blocks):
        for who, run in runs.items():
            start = now()
            run(steps)
            seconds[who].append((now() - start) / steps)
    return {who: statistics.median(times) for who, times in seconds.items()}


def matmul_rate(n: int = 8192, blocks: int = 7, calls: int = 20) -> float:
    """Operations a second of bfloat16 products of n × n matrices of noise, a median."""
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()

    def run(calls: int) -> None:
        jax.block_until_ready([product(a, b) for _ in range(calls)][-1])

    return 2 * n**3 / time_by_turns({"": run}, blocks, calls)[""]


def peak_memory() -> float:
    """GiB that arrays have taken at most on the device; 0 where it doesn't say."""
    numbers = jax.local_devices()[0].memory_stats() or {}
    return numbers.get("peak_bytes_in_use", 0) / 2**30
