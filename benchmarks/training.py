"""Training steps: ours beside DALLE2-pytorch's, and how busy ours keep the device.

    python benchmarks/training.py                    (needs torch and dalle2-pytorch)
    python benchmarks/training.py prior decoder --compile
    python benchmarks/training.py decoder:karlo:64 prior:karlo:256
    python benchmarks/training.py decoder:karlo:32,net.unet.remat=False \
        --profile /tmp/profile

A step is all of it: forward, loss, backward, clipping, AdamW and the moving average.
The peer's are those of its own trainers, with the average taken at every step, as ours
is. Both train on embeddings, ours below a CLIP whose text tower has no layers, so that
captions cost neither anything. They take turns, in one process a network. On a CPU
everything is float32, on a GPU bfloat16 (the peer's by its trainers' autocast).

Operations are those of the products and convolutions, forward and backward: ours as
dalle2_jax.train.measure counts them, without what is computed twice to save memory, the
peer's as torch counts them. A row, STAGE:SIZE:BATCH of configs/ and KEY=VALUE of them
after commas, is ours alone; its operations are set beside the rate of a product of two
large bfloat16 matrices.
"""

import argparse
import ast
import concurrent.futures
import importlib.util
import multiprocessing
import os
import sys
import time
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch is there too

import jax
import kernels
import steps
from full_size import get_config
from ml_collections import ConfigDict

from dalle2_jax import parts
from dalle2_jax.train import measure


class Pair(NamedTuple):
    """A network of ours and one of the peer's that are about as large.

    Attributes:
      stage: "prior" or "decoder".
      batch_size: examples a step.
      clip_dim: of the embeddings and the text states.
      ours: of our config.
      theirs: arguments of the peer's network.
      size: side of the pictures.
    """

    stage: str
    batch_size: int
    clip_dim: int
    ours: dict[str, Any]
    theirs: dict[str, Any]
    size: int = 64


# The peer's feed-forward layers are gated: three kernels, where ours have two. Its keys
# and values have one head.
PAIRS = {
    "prior": Pair(
        "prior",
        256,
        768,
        dict(width=768, layers=12, heads=12),
        dict(dim=768, depth=12, heads=12, ff_mult=3.25),
    ),
    "prior_large": Pair(
        "prior",
        128,
        1024,
        dict(width=1024, layers=24, heads=16),
        dict(dim=1024, depth=24, heads=16, ff_mult=3.25),
    ),
    # Its levels attend once, but each of their blocks reads the context.
    "decoder": Pair(
        "decoder",
        32,
        768,
        dict(channels=192, multipliers=(1, 2, 3, 4), blocks=3),
        dict(
            dim=256,
            dim_mults=(1, 2, 3, 4),
            num_resnet_blocks=2,
            cond_dim=512,
            self_attn=(False, True, True, True),
            attn_heads=8,
            attn_dim_head=64,
        ),
    ),
    "prior_small": Pair(
        "prior",
        16,
        256,
        dict(width=256, layers=6, heads=4),
        dict(dim=256, depth=6, heads=4, ff_mult=3.25),
    ),
    "decoder_small": Pair(
        "decoder",
        8,
        256,
        dict(channels=64, multipliers=(1, 2, 3), blocks=2),
        dict(
            dim=64,
            dim_mults=(1, 2, 3),
            num_resnet_blocks=2,
            cond_dim=128,
            self_attn=(False, True, True),
            attn_heads=4,
            attn_dim_head=64,
        ),
        size=32,
    ),
}
WORDS = 77


class Measured(NamedTuple):
    """What is measured of one's steps; GiB are 0 where they aren't known."""

    who: str
    parameters: int
    flops: int
    seconds: float
    memory: float


# Ours.


def our_config(pair: Pair, gpu: bool) -> tuple[ConfigDict, dict[str, Any]]:
    """The config of ours, and the arguments of the CLIP below it."""
    config = get_config(pair.stage, "karlo")
    net = config.net.unet if pair.stage == "decoder" else config.net
    net.update(pair.ours, remat=False)  # as the peer's
    if pair.stage == "decoder":
        net.update(
            out_channels=6,
            attention_levels=(1, 2, 3)[: len(net.multipliers) - 1],
            head_channels=64,
            dropout=0.0,
            groups=32,
            patch_size=1,
        )
        config.net.context_width = pair.theirs["cond_dim"]
        config.size = pair.size
    config.batch_size = pair.batch_size
    config.dtype = "bfloat16" if gpu else "float32"
    config.ema_decay = 0.9999
    config.optim.update(name="adamw", learning_rate=1e-4, weight_decay=1e-2)
    clip = dict(
        embed_dim=pair.clip_dim,
        context_length=WORDS,
        vocab_size=49_408,
        eot=49_407,
        text_width=pair.clip_dim,
        text_layers=0,
        text_heads=1,
        image_size=32,  # it has an image tower, which is not run
        patch_size=32,
        vision_width=32,
        vision_layers=0,
        vision_heads=1,
    )
    return config, clip


# The peer's.


class Theirs:
    """The peer's trainer of a network, and a batch of noise.

    Attributes:
      parameters: that are trained.
      flops: of a step; counted in the first one.
    """

    def __init__(self, pair: Pair, gpu: bool):
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        import_peer()
        from accelerate import Accelerator
        from dalle2_pytorch import dalle2_pytorch as peer
        from dalle2_pytorch import trainer

        torch.manual_seed(0)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.backends.cudnn.benchmark = True
        self.torch, self.gpu = torch, gpu
        device = "cuda" if gpu else "cpu"
        options = dict(
            accelerator=Accelerator(
                mixed_precision="bf16" if gpu else "no", cpu=not gpu
            ),
            lr=1e-4,
            wd=1e-2,
            max_grad_norm=1.0,
            ema_beta=0.9999,
            ema_update_every=1,
            ema_update_after_step=0,
            ema_use_foreach=True,
        )
        n, d = pair.batch_size, pair.clip_dim
        z_image, z_text = torch.randn(2, n, d, device=device)
        states = torch.randn(n, WORDS, d, device=device)
        if pair.stage == "prior":
            network = peer.DiffusionPriorNetwork(
                **pair.theirs, dim_head=64, max_text_len=WORDS
            )
            whole = peer.DiffusionPrior(
                network, image_embed_dim=d, timesteps=1000, cond_drop_prob=0.1
            )
            self.trainer = trainer.DiffusionPriorTrainer(whole, **options)
            self.network = network
            self.given = lambda: {
                "image_embed": z_image.clone(),  # it is scaled in place
                "text_embed": z_text,
                "text_encodings": states,
            }
        else:
            network = peer.Unet(
                **pair.theirs,
                image_embed_dim=d,
                text_embed_dim=d,
                cond_on_text_encodings=True,
                max_text_len=WORDS,
            )
            whole = peer.Decoder(network, image_size=pair.size, timesteps=1000)
            whole.to(device)
            self.trainer = trainer.DecoderTrainer(whole, **options)
            self.network = whole.unets[0]
            pictures = torch.rand(n, 3, pair.size, pair.size, device=device)
            self.given = lambda: {
                "image": pictures,
                "image_embed": z_image,
                "text_encodings": states,
            }
        self.trainer.train()
        self.parameters = sum(x.numel() for x in self.network.parameters())
        with FlopCounterMode(display=False) as counter:
            self.run(1)
        self.flops = counter.get_total_flops()

    def run(self, steps: int) -> None:
        """Does so many more steps, and waits for the last."""
        for _ in range(steps):
            self.trainer(**self.given())
            self.trainer.update()
        if self.gpu:
            self.torch.cuda.synchronize()

    def peak_memory(self) -> float:
        if not self.gpu:
            return 0.0
        return self.torch.cuda.max_memory_allocated() / 2**30


def import_peer() -> None:
    """Lets the peer be imported where torchvision isn't there: nothing here uses it."""
    if importlib.util.find_spec("torchvision") is None:
        module = types.ModuleType("torchvision")
        module.transforms = types.ModuleType("torchvision.transforms")
        sys.modules[module.__name__] = module
        sys.modules[module.transforms.__name__] = module.transforms


# Measuring, each in a process of its own.


class Turn:
    """Programs may be compiled side by side; then one measures at a time."""

    def __init__(self, barrier: Any = None, lock: Any = None):
        self.barrier, self.lock = barrier, lock

    def __enter__(self) -> None:
        if self.barrier:
            self.barrier.wait()
            self.lock.acquire()

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.barrier:
            self.lock.release()


_turn = Turn()


def _take_turns(*arguments: Any) -> None:
    global _turn
    _turn = Turn(*arguments)


def compiled(config: ConfigDict, clip: dict[str, Any]) -> steps.Step:
    """Ours; what fails to compile has had its turn."""
    try:
        return steps.compile_step(config, clip)
    except Exception:
        with _turn:
            raise


def compare(name: str, flags: argparse.Namespace) -> list[str]:
    """Rows of a pair: ours and theirs by turns, then ours and theirs compiled."""
    gpu = jax.default_backend() == "gpu"
    now = time.process_time if flags.cpu_time else time.perf_counter
    pair = PAIRS[name]
    if flags.batch:
        pair = pair._replace(batch_size=flags.batch)
    if flags.size:
        pair = pair._replace(size=flags.size)
    ours = compiled(*our_config(pair, gpu))
    with _turn:
        ours.run(flags.warmup)
        theirs = Theirs(pair, gpu)
        theirs.run(flags.warmup)
        runs = {"ours": ours.run, "dalle2-pytorch": theirs.run}
        seconds = steps.time_by_turns(runs, flags.blocks, flags.steps, now)
        rows = pair_rows(name, pair.batch_size, ours, theirs, seconds)
        if flags.compile:
            theirs.network.compile()
            theirs.run(flags.warmup)
            runs = {"ours": ours.run, "the same, compiled": theirs.run}
            seconds = steps.time_by_turns(runs, flags.blocks, flags.steps, now)
            rows += pair_rows(name, pair.batch_size, ours, theirs, seconds)
    return rows


def pair_rows(
    name: str, batch: int, ours: steps.Step, theirs: Theirs, seconds: dict[str, float]
) -> list[str]:
    (us, a), (them, b) = seconds.items()
    memory = steps.peak_memory(), theirs.peak_memory()
    rows = []
    for who, side, each, gib in (us, ours, a, memory[0]), (them, theirs, b, memory[1]):
        mine = side is ours
        cells = [
            f"{name}, {batch}",
            who,
            f"{side.parameters / 1e6:.1f}",
            f"{side.flops / 1e12:.3g}",
            f"{1e3 * each:.4g}",
            f"{1 / each:.3g}",
            f"{side.flops / each / 1e12:.3g}",
            f"{gib:.1f}" if gib else "",
            "" if mine else f"{b / a:.2f}",
            "" if mine else f"{ours.flops / a / (theirs.flops / b):.2f}",
        ]
        rows.append(row(cells))
    return rows


def utilise(name: str, flags: argparse.Namespace) -> list[str]:
    """A row of ours alone: its share of what the device can multiply."""
    if flags.profile:  # kernels of a graph don't tell what they are of
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
        )
    config, clip = parse(name)
    config.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    step = compiled(config, clip)
    with _turn:
        best = steps.matmul_rate(flags.matmul)
        step.run(flags.warmup)
        times = steps.time_by_turns({"ours": step.run}, flags.blocks, flags.steps)
        seconds = times["ours"]
        rate = step.flops / seconds
        published = measure.peak(jax.devices()[0].device_kind)
        cells = [
            f"`{name}`",
            f"{step.parameters / 1e6:,.0f}",
            f"{config.batch_size}",
            f"{1e3 * seconds:.4g}",
            f"{config.batch_size / seconds:.4g}",
            f"{rate / 1e12:.3g}",
            f"{best / 1e12:.3g}",
            f"{100 * rate / best:.1f}",
            f"{100 * rate / published:.1f}" if published else "",
            f"{steps.peak_memory():.1f}",
        ]
        rows = [row(cells)]
        if flags.profile:
            folder = Path(flags.profile) / name.replace(":", "_").replace(",", "_")
            with jax.profiler.trace(str(folder)):
                step.run(3)
            rows.append("\n" + kernels.report(folder, step.program.as_text(), 3) + "\n")
    return rows


def parse(name: str) -> tuple[ConfigDict, dict[str, Any]]:
    """The config of STAGE:SIZE:BATCH,KEY=VALUE… and the arguments of CLIP."""
    spec, *changes = name.split(",")
    stage, size, batch = spec.split(":")
    config = get_config(stage, size)
    config.batch_size = int(batch)
    for change in changes:
        key, value = change.split("=")
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # a string
        config.update_from_flattened_dict({key: value})
    clip = get_config("clip", "tiny" if size == "tiny" else "vit_l_14")
    return config, parts.clip.arguments(clip, None)


# Writing it down.


COLUMNS = {
    compare: (
        *("network, batch", "whose", "parameters, M", "TFLOP a step", "ms a step"),
        *("steps/s", "TFLOP/s", "peak memory, GiB"),
        *("ours / theirs, steps/s", "ours / theirs, FLOP/s"),
    ),
    utilise: (
        *("row", "parameters, M", "batch", "ms a step", "examples/s", "TFLOP/s"),
        *("matmul, TFLOP/s", "% of the matmul", "% of the published"),
        "peak memory, GiB",
    ),
}


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def attempt(work: Callable[..., list[str]], name: str, flags: Any) -> list[str]:
    try:
        return work(name, flags)
    except Exception:  # the others' numbers are not lost
        traceback.print_exc()
        return [row([name, "failed: " + traceback.format_exc().splitlines()[-1][:200]])]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "names", nargs="*", help=f"of {', '.join(PAIRS)}; or STAGE:SIZE:BATCH,…"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also the peer's under torch.compile"
    )
    parser.add_argument("--batch", type=int, help="other than a pair's")
    parser.add_argument("--size", type=int, help="of the pictures, other than a pair's")
    parser.add_argument("--warmup", type=int, default=3, help="steps")
    parser.add_argument("--blocks", type=int, default=5, help="that take turns")
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of the CPU in place of the wall's, where others use it too",
    )
    parser.add_argument("--matmul", type=int, default=8192, help="side of the matrices")
    parser.add_argument("--profile", help="folder for JAX's profiles of rows")
    parser.add_argument(
        "--together", action="store_true", help="compile all at once, then take turns"
    )
    flags = parser.parse_args(argv)

    names = flags.names or list(PAIRS)
    works = [utilise if ":" in name else compare for name in names]
    context = multiprocessing.get_context("spawn")
    turns: tuple[Any, ...] = ()
    if flags.together:
        turns = context.Barrier(len(names)), context.Lock()
    with concurrent.futures.ProcessPoolExecutor(
        max_workers=len(names) if flags.together else 1,
        mp_context=context,
        max_tasks_per_child=1,
        initializer=_take_turns,
        initargs=turns,
    ) as pool:
        futures = {
            pool.submit(attempt, work, name, flags): COLUMNS[work]
            for work, name in zip(works, names, strict=True)
        }
        columns: Sequence[str] = ()
        for future in concurrent.futures.as_completed(futures):
            if columns is not futures[future]:
                columns = futures[future]
                print("\n" + row(columns))
                print(row(["---"] * len(columns)))
            print("\n".join(future.result()), flush=True)


if __name__ == "__main__":
    main()
