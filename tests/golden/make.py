"""Makes the reference arrays of this folder: tiny networks of peers and their answers.

    python tests/golden/make.py        (needs the parity extra)

NAME.npz holds "weights/…" under the peer's own names, "inputs/…" and "outputs/…".
Weights are numbers that float16 can hold, and are stored as such. What is made of whole
pipelines has "configs/…" too, the text of the JSON files of their folders.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers
from diffusers import (
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.deprecated import unclip
from diffusers.pipelines.deprecated.unclip import text_proj
from diffusers.schedulers import scheduling_unclip
from PIL import Image
from torch import nn

from dalle2_jax.data import tokenizer

Arrays = dict[str, np.ndarray]


def randomise(model: nn.Module, rng: np.random.Generator) -> Arrays:
    """Gives every parameter a value that matters, and returns them all by name.

    The peers' own initial values are often zero or one, which would hide a mistake.
    """
    model.eval()
    weights = {}
    for name, parameter in model.named_parameters():
        value = rng.normal(size=tuple(parameter.shape))
        if not name.endswith("weight"):
            value *= 0.3
        elif parameter.ndim == 1:
            value = 1 + 0.3 * value  # of a norm
        else:
            value /= np.sqrt(value[0].size)  # a kernel: (out, in, …)
        weights[name] = value.astype(np.float16)
        parameter.data = torch.tensor(weights[name], dtype=torch.float32)
    return weights


def pack(weights: Arrays, inputs: Arrays, outputs: dict[str, torch.Tensor]) -> Arrays:
    """Everything under one roof, as it is stored."""
    groups = {"weights": weights, "inputs": inputs, "outputs": outputs}
    return {
        f"{group}/{name}": np.asarray(value)
        for group, part in groups.items()
        for name, value in part.items()
    }


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def tensors(inputs: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in inputs.items()}


def captions(lengths: list[int], context_length: int, eot: int) -> np.ndarray:
    """Token ids; the end-of-text token is at lengths[i] - 1 and fills the rest."""
    tokens = np.full((len(lengths), context_length), eot)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = np.arange(length - 1) * 7 % (eot - 1)
    return tokens


@torch.no_grad()
def clip(activation: str = "quick_gelu") -> Arrays:
    """transformers' CLIPModel; activation as in OpenAI's weights, or "gelu"."""
    rng = np.random.default_rng(0)
    tower = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": activation,
        "attention_dropout": 0.0,
    }
    text = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 64,
        "max_position_embeddings": 10,
        "bos_token_id": 38,
        "eos_token_id": 39,
        "pad_token_id": 39,
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 96,
        "image_size": 12,
        "patch_size": 4,
    }
    config = transformers.CLIPConfig(
        text_config=text | tower, vision_config=vision | tower, projection_dim=12
    )
    model = transformers.CLIPModel(config)
    weights = randomise(model, rng)
    inputs = {"image": normal(rng, 2, 3, 12, 12), "tokens": captions([4, 10], 10, 39)}
    given = tensors(inputs)
    seen = model.vision_model(pixel_values=given["image"])
    read = model.text_model(input_ids=given["tokens"])
    outputs = {
        "image_embeds": model.visual_projection(seen.pooler_output),
        "text_embeds": model.text_projection(read.pooler_output),
        "last_hidden_state": read.last_hidden_state,
    }
    return pack(weights, inputs, outputs)


@torch.no_grad()
def prior() -> Arrays:
    """diffusers' PriorTransformer, with one caption that has padding."""
    rng = np.random.default_rng(1)
    model = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        embedding_dim=16,
        num_embeddings=7,
    )
    weights = randomise(model, rng)
    inputs = {
        "hidden_states": normal(rng, 3, 16),
        "timestep": np.array([0, 417, 999]),
        "proj_embedding": normal(rng, 3, 16),
        "encoder_hidden_states": normal(rng, 3, 7, 16),
        "attention_mask": np.arange(7) < np.array([[7], [4], [2]]),
    }
    predicted = model(**tensors(inputs)).predicted_image_embedding
    return pack(weights, inputs, {"predicted_image_embedding": predicted})


@torch.no_grad()
def decoder() -> Arrays:
    """Karlo's decoder: UnCLIPTextProjModel, then UNet2DConditionModel.

    The first half of the batch has the null image embedding.
    """
    rng = np.random.default_rng(2)
    projections = text_proj.UnCLIPTextProjModel(
        clip_embeddings_dim=10, time_embed_dim=16, cross_attention_dim=12
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=6,
        layers_per_block=1,
        block_out_channels=(4, 8, 12),
        down_block_types=(
            "ResnetDownsampleBlock2D",
            "SimpleCrossAttnDownBlock2D",
            "SimpleCrossAttnDownBlock2D",
        ),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(
            "SimpleCrossAttnUpBlock2D",
            "SimpleCrossAttnUpBlock2D",
            "ResnetUpsampleBlock2D",
        ),
        attention_head_dim=4,
        cross_attention_dim=12,
        norm_num_groups=2,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    parts = {"text_proj": projections, "decoder": unet}
    weights = randomise(nn.ModuleDict(parts), rng)
    inputs = {
        "sample": normal(rng, 2, 3, 8, 8),
        "timestep": np.array([3, 801]),
        "image_embeddings": normal(rng, 1, 10),
        "prompt_embeds": normal(rng, 2, 10),
        "text_encoder_hidden_states": normal(rng, 2, 5, 10),
        "text_mask": np.arange(5) < np.array([[2], [4]]),
    }
    given = tensors(inputs)
    context, vector = projections(
        image_embeddings=given["image_embeddings"],
        prompt_embeds=given["prompt_embeds"],
        text_encoder_hidden_states=given["text_encoder_hidden_states"],
        do_classifier_free_guidance=True,
    )
    sample = unet(
        given["sample"],
        given["timestep"],
        encoder_hidden_states=context,
        class_labels=vector,
        attention_mask=nn.functional.pad(given["text_mask"], (4, 0), value=True),
    ).sample
    outputs = {"context": context, "vector": vector, "sample": sample}
    return pack(weights, inputs, outputs)


@torch.no_grad()
def upsampler() -> Arrays:
    """Karlo's super-resolution network: UNet2DModel without attention."""
    rng = np.random.default_rng(3)
    model = UNet2DModel(
        sample_size=8,
        in_channels=6,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(4, 8, 12),
        down_block_types=("ResnetDownsampleBlock2D",) * 3,
        up_block_types=("ResnetUpsampleBlock2D",) * 3,
        norm_num_groups=2,
        add_attention=False,
        resnet_time_scale_shift="default",
    )
    weights = randomise(model, rng)
    inputs = {"sample": normal(rng, 2, 6, 8, 8), "timestep": np.array([3, 801])}
    return pack(weights, inputs, {"sample": model(**tensors(inputs)).sample})


TEXTS = ("a red circle", "ab")
STEPS = {"prior": 4, "decoder": 5, "upsampler": 4}


def networks() -> dict[str, nn.Module]:
    """The networks of both of Karlo's pipelines, as small as they can be."""
    tower = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 16,
        "intermediate_size": 64,
        "projection_dim": 16,
    }
    text = transformers.CLIPTextConfig(
        vocab_size=tokenizer.SMALLEST,
        max_position_embeddings=16,
        bos_token_id=tokenizer.SMALLEST - 2,
        eos_token_id=tokenizer.SMALLEST - 1,
        **tower,
    )
    vision = transformers.CLIPVisionConfig(image_size=12, patch_size=4, **tower)
    shared = {
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
    }
    decoder = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=12,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
        **shared,
    )

    def upsampler() -> nn.Module:
        return UNet2DModel(
            sample_size=16,
            in_channels=6,
            out_channels=3,
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
            add_attention=False,
            resnet_time_scale_shift="default",
            **shared,
        )

    return {
        "text_encoder": transformers.CLIPTextModelWithProjection(text),
        "image_encoder": transformers.CLIPVisionModelWithProjection(vision),
        "prior": PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            embedding_dim=16,
            num_embeddings=16,
        ),
        "text_proj": text_proj.UnCLIPTextProjModel(
            clip_embeddings_dim=16, time_embed_dim=32, cross_attention_dim=12
        ),
        "decoder": decoder,
        "super_res_first": upsampler(),
        "super_res_last": upsampler(),
    }


def pipelines() -> tuple[dict[str, object], Arrays]:
    """Karlo's two pipelines with the same networks, and their weights."""
    parts = networks()
    weights = randomise(nn.ModuleDict(parts), np.random.default_rng(4))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.train([""], tokenizer.SMALLEST, 16).save(folder)
        words = transformers.CLIPTokenizer.from_pretrained(folder)
    parts |= {
        "tokenizer": words,
        "feature_extractor": transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}
        ),
        "prior_scheduler": UnCLIPScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            clip_sample_range=5.0,
        ),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": UnCLIPScheduler(variance_type="fixed_small_log"),
    }

    def make(kind: type, *absent: str) -> object:
        pipeline = kind(**{k: v for k, v in parts.items() if k not in absent})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return {
        "text_to_image": make(
            unclip.UnCLIPPipeline, "image_encoder", "feature_extractor"
        ),
        "variations": make(
            unclip.UnCLIPImageVariationPipeline, "prior", "prior_scheduler"
        ),
    }, weights


@contextlib.contextmanager
def replaying(noise: Iterator[np.ndarray]) -> Iterator[None]:
    """Lets diffusers draw this noise, an entry at a time."""

    def draw(shape: tuple[int, ...], **_: object) -> torch.Tensor:
        entry = next(noise)
        entry = entry if entry.ndim == 2 else entry.transpose(0, 3, 1, 2)
        assert entry.shape == tuple(shape)
        return torch.tensor(entry)

    with contextlib.ExitStack() as stack:
        for module in (
            scheduling_unclip,
            unclip.pipeline_unclip,
            unclip.pipeline_unclip_image_variation,
        ):
            stack.enter_context(mock.patch.object(module, "randn_tensor", draw))
        yield


def run(name: str, pipeline: object, inputs: Arrays) -> np.ndarray:
    """The pictures that one of the pipelines makes of the stored noise."""
    settings = {
        "decoder_num_inference_steps": STEPS["decoder"],
        "super_res_num_inference_steps": STEPS["upsampler"],
        "output_type": "np",
    }
    noise = [*inputs["decoder"], *inputs["upsampler"]]
    if name == "variations":
        with replaying(iter(noise)):
            picture = Image.fromarray(inputs["picture"])
            settings["num_images_per_prompt"] = len(TEXTS)
            return pipeline(picture, **settings).images
    settings["prior_num_inference_steps"] = STEPS["prior"]
    with replaying(iter([*inputs["prior"], *noise])):
        return pipeline(list(TEXTS), **settings).images


def pipeline() -> Arrays:
    """Both pipelines, from the same noise."""
    made, weights = pipelines()
    rng = np.random.default_rng(5)
    n = len(TEXTS)
    inputs = {
        "prior": normal(rng, STEPS["prior"], n, 16),
        "decoder": normal(rng, STEPS["decoder"], n, 8, 8, 3),
        "upsampler": normal(rng, STEPS["upsampler"], n, 16, 16, 3),
        "picture": rng.integers(0, 256, (20, 31, 3)).astype(np.uint8),
    }
    outputs = {name: run(name, one, inputs) for name, one in made.items()}
    arrays = pack(weights, inputs, outputs)
    for name, one in made.items():
        for path, text in configs(one).items():
            arrays[f"configs/{name}/{path}"] = np.array(text)
    return arrays


def configs(pipeline: object) -> dict[str, str]:
    """The JSON files of a pipeline's folder, less the tokenizer's."""
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        return {
            str(path.relative_to(folder)): path.read_text()
            for path in sorted(Path(folder).rglob("*.json"))
            if path.parent.name != "tokenizer"
        }


MAKERS: dict[str, Callable[[], Arrays]] = {
    "clip": clip,
    "prior": prior,
    "decoder": decoder,
    "upsampler": upsampler,
    "pipeline": pipeline,
}

if __name__ == "__main__":
    for name, make in MAKERS.items():
        np.savez_compressed(Path(__file__).with_name(f"{name}.npz"), **make())
