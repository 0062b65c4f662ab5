"""Makes the reference arrays of this folder: tiny networks of peers and their answers.

    python tests/golden/make.py        (needs the parity extra)

NAME.npz holds "weights/…" under the peer's own names, "inputs/…" and "outputs/…".
Weights are numbers that float16 can hold, and are stored as such.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import nn

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
    projections = UnCLIPTextProjModel(
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


MAKERS: dict[str, Callable[[], Arrays]] = {
    "clip": clip,
    "prior": prior,
    "decoder": decoder,
    "upsampler": upsampler,
}

if __name__ == "__main__":
    for name, make in MAKERS.items():
        np.savez_compressed(Path(__file__).with_name(f"{name}.npz"), **make())
