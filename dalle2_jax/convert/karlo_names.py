"""What diffusers calls the weights of Karlo's networks."""

from dalle2_jax.convert import table
from dalle2_jax.nn.unet import UNet

_PRIOR_BLOCK = {
    "ln_1": "norm1",
    "qkv": "attn1.to_q attn1.to_k attn1.to_v",
    "out": "attn1.to_out.0",
    "ln_2": "norm3",
    "mlp_in": "ff.net.0.proj",
    "mlp_out": "ff.net.2",
}
_RES_BLOCK = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "embedding": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "skip": "conv_shortcut",
}
_ATTENTION = {
    "norm": "group_norm",
    "qkv": "to_q to_k to_v",
    "context_kv": "add_k_proj add_v_proj",
    "out": "to_out.0",
}
_TIME = {
    "time_in": "time_embedding.linear_1",
    "time_out": "time_embedding.linear_2",
}

# Of the prior: axes of length one that diffusers puts first, and what PriorTransformer
# holds beside the network, the mean and deviation of the data's embeddings. Of the
# decoder: the components whose weights it has.
PRIOR_LEADING = {"prd_embedding": 2, "positional_embedding": 1}
PRIOR_STATISTICS = {"clip_mean": "z_image_mean", "clip_std": "z_image_std"}
DECODER = ("text_proj", "decoder")


def prior_table(layers: int) -> dict[str, str]:
    """DiffusionPrior's table: PriorTransformer."""
    blocks = {}
    for i in range(layers):
        blocks |= table.nest(
            f"transformer/block_{i}", _PRIOR_BLOCK, f"transformer_blocks.{i}."
        )
    return {
        **_TIME,
        "text_states_in": "encoder_hidden_states_proj",
        "z_text_in": "embedding_proj",
        "z_image_in": "proj_in",
        "query": "prd_embedding",
        "position_embedding": "positional_embedding",
        **blocks,
        "ln_out": "norm_out",
        "z_image_out": "proj_to_clip_embeddings",
    }


def unet_table(network: UNet) -> dict[str, str]:
    """UNet's table: UNet2DConditionModel or UNet2DModel, which have the same names."""
    levels = len(network.multipliers)
    found = {
        **_TIME,
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
        **table.nest("mid_res_0", _RES_BLOCK, "mid_block.resnets.0."),
        **table.nest("mid_attn", _ATTENTION, "mid_block.attentions.0."),
        **table.nest("mid_res_1", _RES_BLOCK, "mid_block.resnets.1."),
    }
    for level in range(levels):
        # The way up is counted from the bottom there.
        for way, theirs in (
            ("down", f"down_blocks.{level}"),
            ("up", f"up_blocks.{levels - 1 - level}"),
        ):
            name = f"{way}_{level}"
            for i in range(network.blocks + (way == "up")):
                resnet, attention = (
                    f"{theirs}.resnets.{i}.",
                    f"{theirs}.attentions.{i}.",
                )
                found |= table.nest(f"{name}_res_{i}", _RES_BLOCK, resnet)
                found |= table.nest(f"{name}_attn_{i}", _ATTENTION, attention)
            sampler = f"{theirs}.{way}samplers.0."
            found |= table.nest(f"{name}_{way}sample", _RES_BLOCK, sampler)
    return found


def decoder_table(unet: UNet) -> dict[str, str]:
    """Decoder's table: UnCLIPTextProjModel as text_proj, and its U-Net as decoder."""
    projections = {
        "null_z_image": "learned_classifier_free_guidance_embeddings",
        "z_image_to_vector": "clip_image_embeddings_project_to_time_embeddings",
        "z_image_to_tokens": "clip_extra_context_tokens_proj",
        "text_to_vector": "embedding_proj",
        "states_to_tokens": "encoder_hidden_states_proj",
        "ln_tokens": "text_encoder_hidden_states_norm",
    }
    return {
        **{ours: f"text_proj.{theirs}" for ours, theirs in projections.items()},
        **table.nest("net", unet_table(unet), "decoder."),
    }
