"""Karlo's whole pipeline at full size: loading and sampling, ours beside diffusers'.

    python benchmarks/karlo_pipeline.py --make karlo-random    (once; 7 GB)
    python benchmarks/karlo_pipeline.py karlo-random           (needs the parity extra)

The weights are random, in float16, in the layout of diffusers. Ours and theirs run one
after the other, each in a process of its own: seconds to load, the peak of the host's
memory, and seconds for a picture, of the second of two calls. On a CPU both compute in
float32, on a GPU in bfloat16.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "a portrait of an old monk, highly detailed"


def make(folder: Path) -> None:
    """Writes a folder of Karlo's size with random weights."""
    from full_size import karlo

    from dalle2_jax.convert import karlo as diffusers_layout
    from dalle2_jax.data import tokenizer

    noise = np.random.default_rng(0).normal(size=2**24 + 1).astype(np.float16)

    def random(path: Any, x: Any) -> np.ndarray:
        """As a network's first values are, about; from a block of noise, repeated."""
        values = np.resize(noise, x.size).reshape(x.shape)
        name = path[-1].key
        if name == "kernel":
            return values * np.float16(np.prod(x.shape[:-1]) ** -0.5)
        return values * np.float16(0.02) + np.float16(name == "scale")

    words = folder.with_name(f"{folder.name}-tokenizer")
    text = tokenizer.train([""], tokenizer.SMALLEST, 77)
    text.save(words)
    model = karlo(random, eot=text.eot)
    diffusers_layout.write(model._replace(tokenizer_dir=words), folder)


def ours(folder: Path, steps: tuple[int, int, int]) -> dict[str, float]:
    """Seconds and bytes of dalle2_jax."""
    import jax

    import dalle2_jax

    gpu = jax.default_backend() == "gpu"
    start = time.perf_counter()
    model = dalle2_jax.load(folder, dtype="bfloat16" if gpu else "float32")
    jax.block_until_ready((model.prior, model.decoder, model.upsamplers))
    loaded, peak = time.perf_counter() - start, _peak()
    ends: dict[str, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        ends[stage.partition(" ")[0]] = time.perf_counter()

    for _ in range(2):
        start = time.perf_counter()
        dalle2_jax.text_to_image(
            model,
            PROMPT,
            steps={"prior": steps[0], "decoder": steps[1], "upsampler": steps[2]},
            progress=progress,
        )
        ends["all"] = time.perf_counter()
    return _report(loaded, peak, start, ends)


def theirs(folder: Path, steps: tuple[int, int, int]) -> dict[str, float]:
    """The same of diffusers."""
    import diffusers.pipelines
    import torch
    from diffusers.pipelines.deprecated import unclip

    diffusers.pipelines.unclip = unclip  # where it looks for the class of text_proj
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    gpu = torch.cuda.is_available()
    start = time.perf_counter()
    pipeline = unclip.UnCLIPPipeline.from_pretrained(
        folder, torch_dtype=torch.bfloat16 if gpu else torch.float32
    ).to("cuda" if gpu else "cpu")
    for name in ("decoder", "super_res_first", "super_res_last"):
        getattr(pipeline, name).to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    loaded, peak = time.perf_counter() - start, _peak()
    ends: dict[str, float] = {}

    def ending(name: str, module: torch.nn.Module) -> None:
        def hook(*_: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            ends[name] = time.perf_counter()

        module.register_forward_hook(hook)

    ending("prior", pipeline.prior)
    ending("decoder", pipeline.decoder)
    ending("upsampler", pipeline.super_res_last)
    for _ in range(2):
        start = time.perf_counter()
        pipeline(
            PROMPT,
            prior_num_inference_steps=steps[0],
            decoder_num_inference_steps=steps[1],
            super_res_num_inference_steps=steps[2],
        )
        ends["all"] = time.perf_counter()
    return _report(loaded, peak, start, ends)


def _report(
    loaded: float, peak: float, start: float, ends: dict[str, float]
) -> dict[str, float]:
    """Seconds and bytes by what they are of; the stages end one after the other."""
    return {
        "load, s": loaded,
        "peak after loading, GB": peak,
        "peak, GB": _peak(),
        "prior, s": ends["prior"] - start,
        "decoder, s": ends["decoder"] - ends["prior"],
        "upsampler, s": ends["upsampler"] - ends["decoder"],
        "a picture, s": ends["all"] - start,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", action="store_true", help="write it")
    parser.add_argument(
        "--steps", type=int, nargs=3, default=(25, 25, 7), help="of each network"
    )
    flags = parser.parse_args()
    if flags.make:
        make(flags.folder)
        return
    context = multiprocessing.get_context("spawn")
    results = []
    for run in (ours, theirs):
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            results.append(pool.submit(run, flags.folder, tuple(flags.steps)).result())
    print(f"steps {flags.steps}\n| | ours | diffusers | ratio |\n|---|---|---|---|")
    for name, value in results[0].items():
        other = results[1][name]
        print(f"| {name} | {value:.1f} | {other:.1f} | {value / other:.2f} |")


if __name__ == "__main__":
    main()
