"""CLIP in the format of transformers: OpenAI's weights, and OpenCLIP's.

A folder holds config.json, the weights and the tokenizer. As a command it is
`dalle2 convert`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax import checkpoint
from dalle2_jax.convert import table, weights
from dalle2_jax.errors import UserError, short
from dalle2_jax.nn import build
from dalle2_jax.nn.clip import CLIP

_BLOCK = {
    "ln_1": "layer_norm1",
    "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "out": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
# What a config.json may leave out.
TEXT_DEFAULTS = {
    "vocab_size": 49_408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49_407,
}
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# Ours by the names of transformers, some of which are one function.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Buffers that older versions of transformers stored.
BUFFERS = (
    "vision_model.embeddings.position_ids",
    "text_model.embeddings.position_ids",
)


def vision_table(layers: int) -> dict[str, str]:
    """VisionTower's table: CLIPVisionModelWithProjection."""
    return {
        "class_embedding": "vision_model.embeddings.class_embedding",
        "patch_embedding": "vision_model.embeddings.patch_embedding",
        "position_embedding": "vision_model.embeddings.position_embedding.weight",
        "ln_pre": "vision_model.pre_layrnorm",
        **_transformer("vision_model.encoder.layers", layers),
        "ln_post": "vision_model.post_layernorm",
        "projection": "visual_projection",
    }


def text_table(layers: int) -> dict[str, str]:
    """TextTower's table: CLIPTextModelWithProjection."""
    return {
        "token_embedding": "text_model.embeddings.token_embedding",
        "position_embedding": "text_model.embeddings.position_embedding.weight",
        **_transformer("text_model.encoder.layers", layers),
        "ln_final": "text_model.final_layer_norm",
        "projection": "text_projection",
    }


def clip_table(network: CLIP) -> dict[str, str]:
    """CLIP's table: CLIPModel, or the one tower that ours has."""
    towers = {}
    if network.image_size is not None:
        towers |= table.nest("vision", vision_table(network.vision_layers))
    if network.text_width is not None:
        towers |= table.nest("text", text_table(network.text_layers))
    both = network.image_size is not None and network.text_width is not None
    return towers | ({"logit_scale": "logit_scale"} if both else {})


def net(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return CLIP's arguments, from what config.json of transformers holds.

    Args:
      config: of a CLIPModel, or of a CLIPTextModelWithProjection or
        CLIPVisionModelWithProjection, which are one tower alone.

    Raises:
      UserError: it is none, or is a CLIP that our module can't be.
    """
    kind = config.get("model_type")
    if kind == "clip_text_model":
        return towers_net(text=config)
    if kind == "clip_vision_model":
        return towers_net(vision=config)
    if kind != "clip":
        raise UserError(
            f"model_type is {short(kind)} in config.json: must be 'clip', "
            "'clip_text_model' or 'clip_vision_model'"
        )
    shared = {"projection_dim": config.get("projection_dim", 512)}
    towers = []
    for name in ("text_config", "vision_config"):
        # Older files hold the tower's config twice, and what they mean is in the first.
        found = config.get(f"{name}_dict")
        found = config.get(name) if found is None else found
        if not isinstance(found, Mapping | None):
            raise UserError(
                f"{name} is {short(found)} in config.json: must be an object"
            )
        towers.append({**(found or {}), **shared})
    return towers_net(*towers)


def towers_net(
    text: Mapping[str, Any] | None = None, vision: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return CLIP's arguments, from the configs of both towers or of one alone.

    Values are checked when the network is built, but for those that ours has no name
    for. Arguments at their defaults are left out, so that older models have the same.

    Raises:
      UserError: they are a CLIP that our module can't be.
    """
    arguments: dict[str, Any] = {}
    if text is not None:
        text = {**TEXT_DEFAULTS, **text}
        eot = text["eos_token_id"]
        arguments |= {
            "embed_dim": text["projection_dim"],
            "vocab_size": text["vocab_size"],
            "context_length": text["max_position_embeddings"],
            "text_width": text["hidden_size"],
            "text_layers": text["num_hidden_layers"],
            "text_heads": text["num_attention_heads"],
            # Configs of before transformers 4.31 have 2, and mean the greatest id.
            "eot": text["vocab_size"] - 1 if eot == 2 else eot,
            "activation": _activation("text", text),
        }
        if text["intermediate_size"] != 4 * text["hidden_size"]:
            arguments["text_mlp_width"] = text["intermediate_size"]
        if text["layer_norm_eps"] != 1e-5:
            arguments["text_eps"] = text["layer_norm_eps"]
    if vision is None:
        return arguments
    vision = {**VISION_DEFAULTS, **vision}
    if vision["num_channels"] != 3:
        raise UserError(
            f"vision_config.num_channels is {short(vision['num_channels'])} in "
            "config.json: must be 3"
        )
    arguments |= {
        "embed_dim": vision["projection_dim"]
        if text is None
        else text["projection_dim"],
        "image_size": _side(vision["image_size"]),
        "patch_size": _side(vision["patch_size"]),
        "vision_width": vision["hidden_size"],
        "vision_layers": vision["num_hidden_layers"],
        "vision_heads": vision["num_attention_heads"],
        "vision_mlp_width": vision["intermediate_size"],
    }
    activation = _activation("vision", vision)
    if text is None:
        arguments["activation"] = activation
    elif activation != arguments["activation"]:
        arguments["vision_activation"] = activation
    if vision["layer_norm_eps"] != 1e-5:
        arguments["vision_eps"] = vision["layer_norm_eps"]
    return arguments


def read(
    folder: str | Path,
    place: checkpoint.Place = np.asarray,
    variant: str | None = None,
) -> checkpoint.Export:
    """Read a folder of transformers as a model of this package.

    Args:
      folder: of a CLIPModel, or of one tower with its projection: config.json, the
        weights, and the tokenizer if there is a text tower.
      place: called with each param as it is read.
      variant: of the weights, as "fp16", where a folder holds several.

    Raises:
      UserError: a file is missing or damaged, or weights do not fit the config.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = weights.read_config(folder)
    with build.describing(path):
        arguments = net(config)
    found = weights.find(folder, variant)
    network = build.build(CLIP, arguments, found.shapes, str(path))
    params = table.to_ours(
        clip_table(network), network, found, place=place, ignore=BUFFERS
    )
    config = {"parts": {"clip": {"net": arguments}}}
    tokenizer_dir = folder if network.text_width is not None else None
    return checkpoint.Export(config, {"clip": params}, tokenizer_dir, {})


def _transformer(theirs: str, layers: int) -> dict[str, str]:
    blocks = {}
    for i in range(layers):
        blocks |= table.nest(f"transformer/block_{i}", _BLOCK, f"{theirs}.{i}.")
    return blocks


def _activation(tower: str, config: Mapping[str, Any]) -> str:
    """Our name of a tower's activation."""
    name = config["hidden_act"]
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UserError(
            f"{tower}_config.hidden_act is {short(name)} in config.json: must be one "
            f"of {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _side(value: Any) -> Any:
    """The side of a square, which transformers also takes as [side, side]."""
    square = isinstance(value, list | tuple) and len(value) == 2 and len({*value}) == 1
    return value[0] if square else value


if __name__ == "__main__":
    from dalle2_jax.commands import main

    main("convert")
