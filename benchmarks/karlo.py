"""Karlo's networks at full size: ours beside diffusers', in speed, answers and size.

    python benchmarks/karlo.py                        (needs the parity extra)
    python benchmarks/karlo.py --networks prior decoder --repeats 5 --compile

The weights are random, and the peer's are converted by the tables of
dalle2_jax.convert. Each network has a process to itself, so that its peak memory is its
own. Whoever computes, all have the same threads, and take turns; "plain" is ours
without the options of dalle2_jax.runtime. On a CPU everything is float32, on a GPU
bfloat16. In float32 an answer that differs ends the script, as a number of parameters
does that is not Karlo's.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch is there too

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

from dalle2_jax import runtime
from dalle2_jax.convert import karlo_names as names
from dalle2_jax.convert import openai_clip, table, weights
from dalle2_jax.nn.clip import CLIP, Caption
from dalle2_jax.nn.decoder import Decoder
from dalle2_jax.nn.prior import DiffusionPrior
from dalle2_jax.nn.unet import UNet

TOLERANCE = 1e-4  # of float32 answers, beside the largest value
CHANNELS = (320, 640, 960, 1280)
LEVELS = {"channels": 320, "multipliers": (1, 2, 3, 4), "blocks": 3}

Tensors = dict[str, torch.Tensor]


class Case(NamedTuple):
    """A network of ours and of the peer's, which answer the same inputs.

    Attributes:
      theirs: the peer's modules, by the prefix of their weights' names.
      call_theirs: their answer to the inputs.
      ours, names, options: the network and the arguments of `table.to_ours`.
      call_ours: our answer to (params, inputs); pictures have their channels last.
      inputs: the peer's, by name.
      pictures: whether the answer is pictures.
      parameters: Karlo's count; of the peer's modules in turn.
    """

    theirs: dict[str, torch.nn.Module]
    call_theirs: Callable[[Tensors], torch.Tensor]
    ours: nn.Module
    names: table.Table
    options: Mapping[str, Any]
    call_ours: Callable[[Any, Mapping[str, jax.Array]], jax.Array]
    inputs: Tensors
    pictures: bool
    parameters: tuple[int, ...]


class Result(NamedTuple):
    """What is measured of a network; seconds, and bytes."""

    batch: int
    parameters: int
    error: float
    convert: float
    seconds: dict[str, float]  # medians, by who computes
    working: int  # ours, besides the params and the answer
    peak: int  # of the process, which holds both networks


# The networks. `n` is the number of pictures: guidance doubles the batch.


def prior(n: int, dtype: Any, side: int) -> Case:
    theirs = diffusers.PriorTransformer(
        num_attention_heads=32,
        attention_head_dim=64,
        num_layers=20,
        embedding_dim=768,
        num_embeddings=77,
    )
    ours = DiffusionPrior(
        clip_dim=768,
        context_length=77,
        text_width=768,
        width=2048,
        layers=20,
        heads=32,
        dtype=dtype,
    )
    inputs = {
        "hidden_states": torch.randn(2 * n, 768),
        "timestep": torch.full((2 * n,), 417),
        "proj_embedding": torch.randn(2 * n, 768),
        "encoder_hidden_states": torch.randn(2 * n, 77, 768),
        "attention_mask": text_masks(n),
    }

    def call_ours(params: Any, x: Mapping[str, jax.Array]) -> jax.Array:
        return ours.apply({"params": params}, *(x[name] for name in inputs))

    return Case(
        {"": theirs},
        lambda x: theirs(**x).predicted_image_embedding,
        ours,
        names.prior_table(20),
        {"leading": names.PRIOR_LEADING, "ignore": names.PRIOR_STATISTICS},
        call_ours,
        inputs,
        pictures=False,
        parameters=(1_022_028_544,),
    )


def decoder(n: int, dtype: Any, side: int) -> Case:
    projections = UnCLIPTextProjModel(
        clip_extra_context_tokens=4,
        clip_embeddings_dim=768,
        time_embed_dim=1280,
        cross_attention_dim=1536,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=6,
        layers_per_block=3,
        block_out_channels=CHANNELS,
        down_block_types=(
            "ResnetDownsampleBlock2D",
            *("SimpleCrossAttnDownBlock2D",) * 3,
        ),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        attention_head_dim=64,
        cross_attention_dim=1536,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    levels = LEVELS | {
        "in_channels": 3,
        "out_channels": 6,
        "attention_levels": (1, 2, 3),
    }
    ours = Decoder(
        unet=levels,
        clip_dim=768,
        context_length=77,
        text_width=768,
        context_width=1536,
        dtype=dtype,
    )
    inputs = {
        "sample": torch.randn(2 * n, 3, 64, 64),
        "timestep": torch.full((2 * n,), 417),
        "image_embeddings": torch.randn(n, 768),
        "prompt_embeds": torch.randn(2 * n, 768),
        "text_encoder_hidden_states": torch.randn(2 * n, 77, 768),
        "text_mask": text_masks(n),
    }

    def call_theirs(x: Tensors) -> torch.Tensor:
        context, vector = projections(
            image_embeddings=x["image_embeddings"],
            prompt_embeds=x["prompt_embeds"],
            text_encoder_hidden_states=x["text_encoder_hidden_states"],
            do_classifier_free_guidance=True,
        )
        mask = torch.nn.functional.pad(x["text_mask"], (4, 0), value=True)
        return unet(
            x["sample"],
            x["timestep"],
            encoder_hidden_states=context,
            class_labels=vector,
            attention_mask=mask,
        ).sample

    def call_ours(params: Any, x: Mapping[str, jax.Array]) -> jax.Array:
        mask = x["text_mask"]
        caption = Caption(
            jnp.zeros(mask.shape, jnp.int32),  # not read
            x["prompt_embeds"],
            x["text_encoder_hidden_states"],
            mask,
        )
        z_image = jnp.concatenate([x["image_embeddings"]] * 2)
        has_image = jnp.arange(2 * n) >= n  # the first half is without
        arguments = x["sample"], x["timestep"], z_image, has_image, caption
        return ours.apply({"params": params}, *arguments)

    return Case(
        {"text_proj.": projections, "decoder.": unet},
        call_theirs,
        ours,
        names.decoder_table(UNet(**levels)),
        {},
        call_ours,
        inputs,
        pictures=True,
        parameters=(7_878_400, 885_439_686),
    )


def upsampler(n: int, dtype: Any, side: int) -> Case:
    theirs = diffusers.UNet2DModel(
        sample_size=256,
        in_channels=6,
        out_channels=3,
        layers_per_block=3,
        block_out_channels=CHANNELS,
        down_block_types=("ResnetDownsampleBlock2D",) * 4,
        up_block_types=("ResnetUpsampleBlock2D",) * 4,
        add_attention=False,
        resnet_time_scale_shift="default",
    )
    ours = UNet(**LEVELS, in_channels=6, out_channels=3, scale_shift=False, dtype=dtype)
    inputs = {
        "sample": torch.randn(n, 6, side, side),
        "timestep": torch.full((n,), 417),
    }

    def call_ours(params: Any, x: Mapping[str, jax.Array]) -> jax.Array:
        return ours.apply({"params": params}, x["sample"], x["timestep"])

    return Case(
        {"": theirs},
        lambda x: theirs(**x).sample,
        ours,
        names.unet_table(ours),
        {},
        call_ours,
        inputs,
        pictures=True,
        parameters=(691_579_523,),
    )


def clip() -> tuple[transformers.CLIPModel, dict[str, Any]]:
    """CLIP ViT-L/14, and the arguments of ours."""
    text = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=768
    )
    return transformers.CLIPModel(config), openai_clip.net(config.to_dict())


def text(n: int, dtype: Any, side: int) -> Case:
    theirs, arguments = clip()
    ours = CLIP(**arguments, dtype=dtype)
    eot = arguments["eot"]
    tokens = torch.randint(0, eot - 1, (2 * n, 77))
    inputs = {"tokens": torch.where(text_masks(n), tokens, eot)}

    def call_theirs(x: Tensors) -> torch.Tensor:
        read = theirs.text_model(input_ids=x["tokens"])
        return torch.cat(
            [
                theirs.text_projection(read.pooler_output)[:, None],
                read.last_hidden_state,
            ],
            dim=1,
        )

    def call_ours(params: Any, x: Mapping[str, jax.Array]) -> jax.Array:
        z_text, states = ours.apply(
            {"params": params}, x["tokens"], method="encode_text"
        )
        return jnp.concatenate([z_text[:, None], states], axis=1)

    return Case(
        {"": theirs},
        call_theirs,
        ours,
        openai_clip.clip_table(ours),
        {"ignore": openai_clip.BUFFERS},
        call_ours,
        inputs,
        pictures=False,
        parameters=(427_616_513,),
    )


NETWORKS: dict[str, Callable[[int, Any, int], Case]] = {
    "text": text,
    "prior": prior,
    "decoder": decoder,
    "upsampler": upsampler,
}


def text_masks(n: int) -> torch.Tensor:
    """Empty captions (two tokens), then n of eleven."""
    return torch.arange(77) < torch.tensor([2] * n + [11] * n)[:, None]


# Measuring.


@torch.no_grad()
def randomise(module: torch.nn.Module) -> None:
    """Gives every parameter a value that matters; some begin as zero or one."""
    for name, parameter in module.named_parameters():
        parameter.normal_()
        if not name.endswith("weight"):
            parameter.mul_(0.3)
        elif parameter.ndim == 1:
            parameter.mul_(0.3).add_(1)  # of a norm
        else:
            parameter.div_(parameter[0].numel() ** 0.5)  # a kernel: (out, in, …)


def convert(case: Case) -> Any:
    """Our params from the peer's weights."""
    arrays = {
        prefix + name: value.cpu().numpy()
        for prefix, module in case.theirs.items()
        for name, value in module.state_dict().items()
    }
    found = weights.of(Path("the peer"), arrays)
    params = table.to_ours(
        case.names, case.ours, found, place=jax.device_put, **case.options
    )
    return jax.block_until_ready(params)


def to_jax(inputs: Tensors) -> dict[str, jax.Array]:
    """The inputs as ours are: pictures have their channels last."""
    arrays = {name: value.cpu().numpy() for name, value in inputs.items()}
    return {
        name: jnp.asarray(x.transpose(0, 2, 3, 1) if x.ndim == 4 else x)
        for name, x in arrays.items()
    }


def clock(call: Callable[[], Any], now: Callable[[], float]) -> float:
    start = now()
    call()
    return now() - start


def count(case: Case) -> tuple[int, ...]:
    """The parameters of each of the peer's modules."""
    ignored = case.options.get("ignore", ())
    return tuple(
        sum(x.numel() for name, x in module.named_parameters() if name not in ignored)
        for module in case.theirs.values()
    )


def measure(name: str, flags: argparse.Namespace) -> Result:
    """Runs one network, ours and theirs by turns; in a process of its own."""
    now = time.process_time if flags.cpu_time else time.perf_counter
    gpu = jax.default_backend() == "gpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    diffusers.utils.logging.set_verbosity_error()
    dtype = jnp.bfloat16 if gpu else jnp.float32
    with torch.device("cuda" if gpu else "cpu"):
        case = NETWORKS[name](flags.pictures, dtype, flags.side)
    for module in case.theirs.values():
        randomise(module.eval())
    start = now()
    params = convert(case)
    convert_seconds = now() - start
    parameters = sum(x.size for x in jax.tree.leaves(params))
    if count(case) != case.parameters or sum(case.parameters) != parameters:
        sys.exit(
            f"{name}: {count(case)} parameters, and {parameters} in ours: must be "
            f"{case.parameters}"
        )

    inputs = to_jax(case.inputs)
    params = jax.tree.map(lambda x: x.astype(dtype), params)

    def compile_ours(options: dict[str, str]) -> Any:
        jitted = jax.jit(case.call_ours, compiler_options=options)
        return jitted.lower(params, inputs).compile()

    program = compile_ours(runtime.compiler_options())
    calls = {"ours": lambda: jax.block_until_ready(program(params, inputs))}
    if not gpu:
        plain = compile_ours({})
        calls["plain"] = lambda: jax.block_until_ready(plain(params, inputs))

    given = place(case, gpu)

    @torch.no_grad()
    def call_theirs(call: Callable[[Tensors], torch.Tensor]) -> torch.Tensor:
        answer = call(given)
        if gpu:
            torch.cuda.synchronize()
        return answer

    calls["diffusers"] = lambda: call_theirs(case.call_theirs)
    if flags.compile:
        compiled = torch.compile(case.call_theirs)
        calls["compiled"] = lambda: call_theirs(compiled)

    expected = calls["diffusers"]().float().cpu().numpy()
    if case.pictures:
        expected = expected.transpose(0, 2, 3, 1)
    errors = []
    for who in calls.keys() & {"ours", "plain"}:
        actual = np.asarray(calls[who](), np.float32)
        errors.append(float(np.abs(actual - expected).max() / np.abs(expected).max()))
    if not gpu and not max(errors) <= TOLERANCE:
        sys.exit(f"{name}: relative error {max(errors):.1e}: at most {TOLERANCE}")
    if flags.compile:
        calls["compiled"]()  # compiles

    times = {who: [] for who in calls}
    for _ in range(flags.repeats):
        for who, call in calls.items():
            times[who].append(clock(call, now))
    return Result(
        len(expected),
        parameters,
        max(errors),
        convert_seconds,
        {who: statistics.median(values) for who, values in times.items()},
        program.memory_analysis().temp_size_in_bytes,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def place(case: Case, gpu: bool) -> Tensors:
    """Moves the peer to where it runs, in the layout that suits it; its inputs."""
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    layout = torch.channels_last if case.pictures else torch.preserve_format
    for module in case.theirs.values():
        module.to(device, dtype, memory_format=layout)
    return {
        name: x.to(
            device,
            dtype if x.is_floating_point() else x.dtype,
            memory_format=layout if x.ndim == 4 else torch.preserve_format,
        )
        for name, x in case.inputs.items()
    }


# Writing it down.


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ours beside diffusers' Karlo.")
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)
    )
    parser.add_argument(
        "--pictures", type=int, default=1, help="guidance makes the batch twice that"
    )
    parser.add_argument("--side", type=int, default=256, help="of the upsampler's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--compile", action="store_true", help="also diffusers under torch.compile"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of the CPU in place of the wall's, where others use it too",
    )
    flags = parser.parse_args(argv)

    columns = ["diffusers", "compiled", "ours", "plain"]
    print(
        row(
            [
                *("network", "batch", "parameters", "error", "conversion, s"),
                *(f"{who}, s" for who in columns),
                *("ours / diffusers", "plain / diffusers"),
                *("working memory, GiB", "peak, GiB"),
            ]
        )
    )
    print(row(["---"] * 13), flush=True)
    with concurrent.futures.ProcessPoolExecutor(
        max_workers=1,
        mp_context=multiprocessing.get_context("spawn"),
        max_tasks_per_child=1,
    ) as pool:
        for name in flags.networks:
            result = pool.submit(measure, name, flags).result()
            seconds = result.seconds
            print(
                row(
                    [
                        name,
                        str(result.batch),
                        f"{result.parameters:,}",
                        f"{result.error:.1e}",
                        f"{result.convert:.0f}",
                        *(
                            f"{seconds[who]:.3g}" if who in seconds else ""
                            for who in columns
                        ),
                        *(
                            f"{seconds[who] / seconds['diffusers']:.2f}"
                            if who in seconds
                            else ""
                            for who in ("ours", "plain")
                        ),
                        f"{result.working / 2**30:.2f}",
                        f"{result.peak / 2**30:.1f}",
                    ]
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
