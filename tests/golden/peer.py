"""The reference arrays, and the peers' weights laid out as our networks' params.

In the tables, names on the left are ours and those on the right the peer's.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Weights = dict[str, np.ndarray]
Params = dict[str, Any]


def load(name: str) -> Weights:
    """The arrays that make.py stored under a name."""
    with np.load(Path(__file__).with_name(f"{name}.npz")) as file:
        return dict(file)


def unpack(
    arrays: Weights,
) -> tuple[Weights, dict[str, Array], dict[str, Array]]:
    """Weights, inputs and outputs, in the dtypes that JAX works in."""
    weights = below(arrays, "weights/")
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    inputs, outputs = (
        {name: jnp.asarray(value) for name, value in below(arrays, group).items()}
        for group in ("inputs/", "outputs/")
    )
    return weights, inputs, outputs


def below(weights: Weights, prefix: str) -> Weights:
    """The arrays whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def layer(weights: Weights, *names: str) -> Params:
    """A Dense, Conv or norm of ours: the peer's layers of those names, side by side."""
    weight = np.concatenate([weights[f"{name}.weight"] for name in names])
    axes = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[weight.ndim]  # torch: (out, in, …)
    params = {"scale" if weight.ndim == 1 else "kernel": weight.transpose(axes)}
    if f"{names[0]}.bias" in weights:
        params["bias"] = np.concatenate([weights[f"{name}.bias"] for name in names])
    return params


def layers(weights: Weights, prefix: str, table: dict[str, str]) -> Params:
    """The layers of a table: {our name: the peer's names below the prefix}."""
    return {
        ours: layer(weights, *(f"{prefix}{name}" for name in theirs.split()))
        for ours, theirs in table.items()
    }


CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "out": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
PRIOR_BLOCK = {
    "ln_1": "norm1",
    "qkv": "attn1.to_q attn1.to_k attn1.to_v",
    "out": "attn1.to_out.0",
    "ln_2": "norm3",
    "mlp_in": "ff.net.0.proj",
    "mlp_out": "ff.net.2",
}
RES_BLOCK = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "embedding": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
}
ATTENTION = {
    "norm": "group_norm",
    "qkv": "to_q to_k to_v",
    "context_kv": "add_k_proj add_v_proj",
    "out": "to_out.0",
}


def transformer(
    weights: Weights, prefix: str, block: dict[str, str], depth: int
) -> Params:
    """Our Transformer's params from the peer's list of blocks."""
    return {f"block_{i}": layers(weights, f"{prefix}{i}.", block) for i in range(depth)}


def clip(weights: Weights, depth: int) -> Params:
    """CLIP's params from transformers' CLIPModel."""

    def tower(name: str, table: dict[str, str]) -> Params:
        part = below(weights, f"{name}_model.")
        return {
            **layers(part, "", table),
            "projection": layer(weights, f"{name}_projection"),
            "position_embedding": part["embeddings.position_embedding.weight"],
            "transformer": transformer(part, "encoder.layers.", CLIP_BLOCK, depth),
        }

    # transformers calls the same thing vision here and visual there.
    weights = weights | {
        "vision_projection.weight": weights["visual_projection.weight"]
    }
    vision = {
        "patch_embedding": "embeddings.patch_embedding",
        "ln_pre": "pre_layrnorm",
        "ln_post": "post_layernorm",
    }
    token = weights["vision_model.embeddings.class_embedding"]
    words = weights["text_model.embeddings.token_embedding.weight"]
    return {
        "logit_scale": weights["logit_scale"],
        "vision": tower("vision", vision) | {"class_embedding": token},
        "text": tower("text", {"ln_final": "final_layer_norm"})
        | {"token_embedding": {"embedding": words}},
    }


def prior(weights: Weights, depth: int) -> Params:
    """DiffusionPrior's params from diffusers' PriorTransformer.

    Its clip_mean and clip_std are statistics of the data, and not in the network.
    """
    table = {
        "time_in": "time_embedding.linear_1",
        "time_out": "time_embedding.linear_2",
        "text_states_in": "encoder_hidden_states_proj",
        "z_text_in": "embedding_proj",
        "z_image_in": "proj_in",
        "ln_out": "norm_out",
        "z_image_out": "proj_to_clip_embeddings",
    }
    return {
        **layers(weights, "", table),
        "query": weights["prd_embedding"][0, 0],
        "position_embedding": weights["positional_embedding"][0],
        "transformer": transformer(weights, "transformer_blocks.", PRIOR_BLOCK, depth),
    }


def unet(weights: Weights, levels: int, blocks: int) -> Params:
    """UNet's params from diffusers' UNet2DModel or UNet2DConditionModel."""
    table = {
        "time_in": "time_embedding.linear_1",
        "time_out": "time_embedding.linear_2",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
    places = {
        "mid_res_0": "mid_block.resnets.0",
        "mid_attn": "mid_block.attentions.0",
        "mid_res_1": "mid_block.resnets.1",
    }
    for level in range(levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        places[f"down_{level}_downsample"] = f"{down}.downsamplers.0"
        places[f"up_{level}_upsample"] = f"{up}.upsamplers.0"
        for i in range(blocks + 1):  # one more on the way up
            places[f"down_{level}_res_{i}"] = f"{down}.resnets.{i}"
            places[f"down_{level}_attn_{i}"] = f"{down}.attentions.{i}"
            places[f"up_{level}_res_{i}"] = f"{up}.resnets.{i}"
            places[f"up_{level}_attn_{i}"] = f"{up}.attentions.{i}"

    params = layers(weights, "", table)
    for ours, theirs in places.items():
        part = below(weights, f"{theirs}.")
        if "conv1.weight" in part:
            params[ours] = layers(part, "", RES_BLOCK)
            if "conv_shortcut.weight" in part:
                params[ours]["skip"] = layer(part, "conv_shortcut")
        elif part:
            params[ours] = layers(part, "", ATTENTION)
    return params


def decoder(weights: Weights, levels: int, blocks: int) -> Params:
    """Decoder's params from UnCLIPTextProjModel and UNet2DConditionModel."""
    table = {
        "z_image_to_vector": "clip_image_embeddings_project_to_time_embeddings",
        "z_image_to_tokens": "clip_extra_context_tokens_proj",
        "text_to_vector": "embedding_proj",
        "states_to_tokens": "encoder_hidden_states_proj",
        "ln_tokens": "text_encoder_hidden_states_norm",
    }
    null = weights["text_proj.learned_classifier_free_guidance_embeddings"]
    return {
        "null_z_image": null,
        **layers(weights, "text_proj.", table),
        "net": unet(below(weights, "decoder."), levels, blocks),
    }


def size(tree: Any) -> int:
    """How many numbers a tree of arrays or of shapes holds."""
    return sum(x.size for x in jax.tree.leaves(tree))


def abstract(model: Any) -> Params:
    """The shapes and dtypes of a network's params."""
    return jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]


def assert_fits(model: Any, params: Params) -> None:
    """The params have the names, shapes and dtypes of the network's own."""
    described = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype), abstract(model))


def assert_close(actual: Array, expected: Array, tolerance: float) -> None:
    """float32, and the largest error is small beside the largest expected value."""
    assert actual.dtype == jnp.float32
    assert actual.shape == expected.shape
    error = float(jnp.abs(actual - expected).max() / jnp.abs(expected).max())
    assert error <= tolerance, f"relative error {error:.1e}"
