"""CLIP in the format of transformers' CLIPModel: OpenAI's weights, and OpenCLIP's.

    python -m dalle2_jax.convert.openai_clip SRC DST

writes a model of this package from a folder that holds config.json, the weights and the
tokenizer.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax import checkpoint
from dalle2_jax.convert import table, weights
from dalle2_jax.data import tokenizer
from dalle2_jax.errors import UserError
from dalle2_jax.nn.clip import CLIP
from dalle2_jax.nn.layers import ACTIVATIONS

_BLOCK = {
    "ln_1": "layer_norm1",
    "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "out": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
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
    """CLIP's table: CLIPModel, or the text's tower where ours has no other."""
    text = table.nest("text", text_table(network.text_layers))
    if network.image_size is None:
        return text
    return {
        **table.nest("vision", vision_table(network.vision_layers)),
        **text,
        "logit_scale": "logit_scale",
    }


def net(config: Mapping[str, Any]) -> dict[str, Any]:
    """CLIP's arguments, from what config.json of a CLIPModel holds.

    Raises:
      UserError: it is none, or is a CLIP that our module can't be.
    """
    if config.get("model_type") != "clip":
        raise UserError(
            f"model_type is {config.get('model_type')!r} in config.json: must be 'clip'"
        )
    # Whole configs: they fill in what a file leaves out.
    config = tokenizer.import_transformers().CLIPConfig.from_dict(dict(config))
    text = config.text_config.to_dict() | {"projection_dim": config.projection_dim}
    return towers_net(text, config.vision_config.to_dict())


def towers_net(
    text: Mapping[str, Any], vision: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """CLIP's arguments, from whole configs of the two towers, or of the text's alone.

    Raises:
      UserError: they are a CLIP that our module can't be.
    """
    arguments = {
        "embed_dim": text["projection_dim"],
        "vocab_size": text["vocab_size"],
        "context_length": text["max_position_embeddings"],
        "text_width": text["hidden_size"],
        "text_layers": text["num_hidden_layers"],
        "text_heads": text["num_attention_heads"],
        # Configs of before transformers 4.31 have 2, and mean the greatest id.
        "eot": text["vocab_size"] - 1
        if text["eos_token_id"] == 2
        else text["eos_token_id"],
        "activation": text["hidden_act"],
    }
    _check("text_config", text, "intermediate_size", 4 * text["hidden_size"])
    _check("text_config", text, "layer_norm_eps", 1e-5)
    if text["hidden_act"] not in ACTIVATIONS:
        raise UserError(
            f"hidden_act is {text['hidden_act']!r} in config.json: must be one of "
            + ", ".join(ACTIVATIONS)
        )
    if vision is None:
        return arguments
    _check("vision_config", vision, "layer_norm_eps", 1e-5)
    _check("vision_config", vision, "hidden_act", text["hidden_act"])
    return {
        **arguments,
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "vision_width": vision["hidden_size"],
        "vision_layers": vision["num_hidden_layers"],
        "vision_heads": vision["num_attention_heads"],
        "vision_mlp_width": vision["intermediate_size"],
    }


def read(folder: str | Path, place: checkpoint.Place = np.asarray) -> checkpoint.Export:
    """A CLIPModel's folder as a model of this package.

    Args:
      folder: config.json, model.safetensors (or its shards, or pytorch_model.bin), and
        the tokenizer.
      place: called with each param as it is read.

    Raises:
      UserError: a file is missing or damaged, or weights do not fit the config.
    """
    folder = Path(folder)
    arguments = net(weights.read_json(folder / "config.json"))
    network = CLIP(**arguments)
    found = weights.find(folder)
    params = table.to_ours(
        clip_table(network), network, found, place=place, ignore=BUFFERS
    )
    config = {"parts": {"clip": {"net": arguments}}}
    return checkpoint.Export(config, {"clip": params}, folder, {})


def _transformer(theirs: str, layers: int) -> dict[str, str]:
    blocks = {}
    for i in range(layers):
        blocks |= table.nest(f"transformer/block_{i}", _BLOCK, f"{theirs}.{i}.")
    return blocks


def _check(where: str, config: Mapping[str, Any], key: str, wanted: Any) -> None:
    """That a tower is such as our CLIP takes for granted."""
    if config[key] != wanted:
        raise UserError(
            f"{where}.{key} is {config[key]} in config.json: must be {wanted}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """The command: reads a CLIPModel and writes a model."""
    parser = argparse.ArgumentParser(description="CLIP to a model of this package.")
    parser.add_argument("src", help="folder of a transformers CLIPModel")
    parser.add_argument("dst", help="directory of the model to write")
    parser.add_argument("--dtype", help="of the params; that of the file by default")
    arguments = parser.parse_args(argv)
    try:
        model = read(arguments.src, weights.caster(arguments.dtype))
        checkpoint.export(
            arguments.dst,
            params=model.params,
            config=model.config,
            tokenizer=tokenizer.load(model.tokenizer_dir),
        )
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
