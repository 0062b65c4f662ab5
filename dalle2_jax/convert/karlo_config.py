"""How diffusers describes Karlo's networks and schedulers.

A network's config goes both ways: X_net makes the arguments of ours from diffusers'
config.json, and X_config makes that config from ours. `check` compares a config that
was read with the one that ours would write, and so finds what ours can't be.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle2_jax.data import image
from dalle2_jax.errors import UserError, short
from dalle2_jax.nn.clip import CLIP
from dalle2_jax.nn.decoder import Decoder
from dalle2_jax.nn.prior import DiffusionPrior
from dalle2_jax.nn.unet import UNet

Config = dict[str, Any]

# In which library each component's class is.
CLASSES = {
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "prior": ["diffusers", "PriorTransformer"],
    "prior_scheduler": ["diffusers", "UnCLIPScheduler"],
    "text_proj": ["unclip", "UnCLIPTextProjModel"],
    "decoder": ["diffusers", "UNet2DConditionModel"],
    "decoder_scheduler": ["diffusers", "UnCLIPScheduler"],
    "super_res_first": ["diffusers", "UNet2DModel"],
    "super_res_last": ["diffusers", "UNet2DModel"],
    "super_res_scheduler": ["diffusers", "UnCLIPScheduler"],
}
# Where a component's config is not in config.json.
CONFIG_FILES = {
    "UnCLIPScheduler": "scheduler_config.json",
    "CLIPImageProcessor": "preprocessor_config.json",
}
# What is read of a config; it must have these keys.
UNET_KEYS = (
    "sample_size",
    "block_out_channels",
    "down_block_types",
    "layers_per_block",
    "in_channels",
    "out_channels",
    "resnet_time_scale_shift",
    "norm_num_groups",
)
DECODER_KEYS = (*UNET_KEYS, "attention_head_dim", "cross_attention_dim")
SCHEDULER_KEYS = (
    "num_train_timesteps",
    "prediction_type",
    "variance_type",
    "clip_sample_range",
)


def check(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """That a config that was read says nothing else than ours does.

    Raises:
      UserError: it does; names the file, the key and both values.
    """
    for key, value in wanted.items():
        value = list(value) if isinstance(value, tuple) else value
        if key in found and found[key] != value:
            raise UserError(
                f"{path}: {key} is {short(found[key])}: must be {short(value)}"
            )


def prior_net(config: Mapping[str, Any]) -> Config:
    """DiffusionPrior's arguments, from PriorTransformer's config."""
    heads = config["num_attention_heads"]
    return {
        "clip_dim": config["embedding_dim"],
        "context_length": config["num_embeddings"],
        "text_width": config["embedding_dim"],
        "width": heads * config["attention_head_dim"],
        "layers": config["num_layers"],
        "heads": heads,
    }


def prior_config(prior: DiffusionPrior) -> Config:
    """PriorTransformer's config."""
    return {
        "_class_name": "PriorTransformer",
        "num_attention_heads": prior.heads,
        "attention_head_dim": prior.width // prior.heads,
        "num_layers": prior.layers,
        "embedding_dim": prior.clip_dim,
        "num_embeddings": prior.context_length,
        "additional_embeddings": 4,
        "time_embed_act_fn": "silu",
        "norm_in_type": None,
        "embedding_proj_norm_type": None,
        "encoder_hid_proj_type": "linear",
        "added_emb_type": "prd",
        "time_embed_dim": None,
        "embedding_proj_dim": None,
        "clip_embed_dim": None,
    }


def unet_net(config: Mapping[str, Any]) -> Config:
    """UNet's arguments, from the config of UNet2DConditionModel or UNet2DModel."""
    channels = config["block_out_channels"]
    blocks = config["down_block_types"]
    attends = tuple(i for i, name in enumerate(blocks) if "CrossAttn" in name)
    return {
        "channels": channels[0],
        "multipliers": tuple(width // channels[0] for width in channels),
        "blocks": config["layers_per_block"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "attention_levels": attends,
        **({"head_channels": config["attention_head_dim"]} if attends else {}),
        "scale_shift": config["resnet_time_scale_shift"] == "scale_shift",
        "groups": config["norm_num_groups"],
    }


def _unet_config(unet: UNet, size: int) -> Config:
    """What the configs of both kinds of U-Net have in common."""
    levels = range(len(unet.multipliers))
    kinds = ["SimpleCrossAttn" if i in unet.attention_levels else "" for i in levels]
    return {
        "sample_size": size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "layers_per_block": unet.blocks,
        "block_out_channels": [unet.channels * m for m in unet.multipliers],
        "down_block_types": [
            f"{kind}DownBlock2D" if kind else "ResnetDownsampleBlock2D"
            for kind in kinds
        ],
        "up_block_types": [
            f"{kind}UpBlock2D" if kind else "ResnetUpsampleBlock2D"
            for kind in reversed(kinds)
        ],
        "norm_num_groups": unet.groups,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "time_embedding_type": "positional",
    }


def decoder_config(decoder: Decoder, size: int) -> Config:
    """UNet2DConditionModel's config, of a decoder of pictures of that side."""
    unet = UNet(**decoder.unet)
    return {
        "_class_name": "UNet2DConditionModel",
        **_unet_config(unet, size),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "resnet_time_scale_shift": "scale_shift",
        "class_embed_type": "identity",
        "attention_head_dim": unet.head_channels,
        "cross_attention_dim": decoder.context_width,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "encoder_hid_dim": None,
        "addition_embed_type": None,
    }


def projections_config(decoder: Decoder) -> Config:
    """UnCLIPTextProjModel's config."""
    return {
        "_class_name": "UnCLIPTextProjModel",
        "clip_extra_context_tokens": decoder.image_tokens,
        "clip_embeddings_dim": decoder.clip_dim,
        "time_embed_dim": 4 * decoder.unet["channels"],
        "cross_attention_dim": decoder.context_width,
    }


def upsampler_config(unet: UNet, size: int) -> Config:
    """UNet2DModel's config, of an upsampler to pictures of that side."""
    return {
        "_class_name": "UNet2DModel",
        **_unet_config(unet, size),
        "add_attention": False,
        "resnet_time_scale_shift": "default",
    }


_PREDICTS = {"x0": "sample", "eps": "epsilon"}
_VARIANCES = {"fixed_small": "fixed_small_log", "learned_range": "learned_range"}


def settings(
    path: Path, config: Mapping[str, Any], steps: int, guidance: float
) -> dict[str, Config]:
    """The sections diffusion and sampling, from UnCLIPScheduler's config.

    Args:
      path: where the config is from, for messages.
      config: of the scheduler.
      steps, guidance: what diffusers' pipelines take by default.
    """

    def ours(key: str, table: Mapping[str, str]) -> str:
        for name, theirs in table.items():
            if config[key] == theirs:
                return name
        raise UserError(f"{path}: {key} {short(config[key])} is not known")

    sections = {
        "diffusion": {
            "schedule": "cosine",
            "steps": config["num_train_timesteps"],
            "predict": ours("prediction_type", _PREDICTS),
            "variance": ours("variance_type", _VARIANCES),
        },
        "sampling": {
            "sampler": "ddpm",
            "steps": steps,
            "guidance": guidance,
            "eta": 0.0,
            "clip": config["clip_sample_range"],
            "threshold": None,
        },
    }
    check(path, config, scheduler_config(sections))
    return sections


def scheduler_config(part: Mapping[str, Any]) -> Config:
    """UnCLIPScheduler's config, from a part's sections diffusion and sampling."""
    diffusion, sampling = part["diffusion"], part["sampling"]
    return {
        "_class_name": "UnCLIPScheduler",
        "num_train_timesteps": diffusion["steps"],
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": _PREDICTS[diffusion["predict"]],
        "variance_type": _VARIANCES[diffusion["variance"]],
        "clip_sample": True,
        "clip_sample_range": sampling["clip"],
    }


def text_encoder_config(clip: CLIP) -> Config:
    """The config of CLIPTextModelWithProjection."""
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "hidden_size": clip.text_width,
        "intermediate_size": clip.text_mlp_width or 4 * clip.text_width,
        "num_hidden_layers": clip.text_layers,
        "num_attention_heads": clip.text_heads,
        "max_position_embeddings": clip.context_length,
        "vocab_size": clip.vocab_size,
        "bos_token_id": clip.eot - 1,
        "eos_token_id": clip.eot,
        "projection_dim": clip.embed_dim,
        "hidden_act": clip.activation,
        "layer_norm_eps": clip.text_eps,
    }


def image_encoder_config(clip: CLIP) -> Config:
    """The config of CLIPVisionModelWithProjection."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": clip.vision_width,
        "intermediate_size": clip.vision_mlp_width or 4 * clip.vision_width,
        "num_hidden_layers": clip.vision_layers,
        "num_attention_heads": clip.vision_heads,
        "image_size": clip.image_size,
        "patch_size": clip.patch_size,
        "projection_dim": clip.embed_dim,
        "hidden_act": clip.vision_activation or clip.activation,
        "layer_norm_eps": clip.vision_eps,
    }


def feature_extractor_config(clip: CLIP) -> Config:
    """CLIPImageProcessor's config."""
    side = clip.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.CLIP_MEAN),
        "image_std": list(image.CLIP_STD),
    }


# Which of our models have that layout


def upsamplers(parts: Mapping[str, Any]) -> list[str]:
    """The names of a model's upsamplers, without second networks."""
    return [
        name
        for name in parts
        if name.startswith("upsampler_") and not name.endswith("_last")
    ]


def check_shape(parts: Mapping[str, Any]) -> None:
    """That a model is of Karlo's shape, so that diffusers' classes can hold it.

    Args:
      parts: of its config.

    Raises:
      UserError: it is not; says what differs.
    """
    for name in ("clip", "decoder"):
        if name not in parts:
            raise UserError(f"the model has no {name}, which diffusers' pipelines need")
    if "prior" not in parts and parts["clip"]["net"].get("image_size") is None:
        raise UserError(
            "the model has neither a prior nor CLIP's image tower: diffusers' "
            "pipelines need one of them"
        )
    names = upsamplers(parts)
    if len(names) != 1:
        raise UserError(
            f"the model has {len(names)} upsamplers: diffusers' pipelines have one"
        )
    clip = CLIP(**parts["clip"]["net"])
    decoder = Decoder(**parts["decoder"]["net"])
    unet, upsampler = UNet(**decoder.unet), UNet(**parts[names[0]]["net"])
    wanted = [
        ("clip.vision_stem", tuple(clip.vision_stem), ()),
        ("decoder.text_encoder", decoder.text_encoder, None),
        ("decoder.text_width", decoder.text_width, decoder.clip_dim),
        ("decoder.unet.patch_size", unet.patch_size, 1),
        ("decoder.unet.scale_shift", unet.scale_shift, True),
        ("decoder.unet.attention_levels", bool(unet.attention_levels), True),
        ("upsampler.patch_size", upsampler.patch_size, 1),
        ("upsampler.scale_shift", upsampler.scale_shift, False),
        ("upsampler.attention_levels", tuple(upsampler.attention_levels), ()),
        ("upsampler.low_size", parts[names[0]]["low_size"], parts["decoder"]["size"]),
    ]
    if "prior" in parts:
        prior = DiffusionPrior(**parts["prior"]["net"])
        wanted += [
            ("prior.activation", prior.activation, "gelu"),
            ("prior.text_width", prior.text_width, prior.clip_dim),
            ("prior.variance", parts["prior"]["sampling"]["variance"], None),
            ("prior.last_std", parts["prior"]["sampling"]["last_std"], 0.0),
        ]
    for name in ("prior", "decoder", names[0]):
        if name in parts:
            diffusion, sampling = parts[name]["diffusion"], parts[name]["sampling"]
            wanted += [
                (f"{name}.schedule", diffusion["schedule"], "cosine"),
                (f"{name}.sampler", sampling["sampler"], "ddpm"),
                (f"whether {name} clips", sampling["clip"] is not None, True),
            ]
            for key, known in (("predict", _PREDICTS), ("variance", _VARIANCES)):
                if diffusion[key] not in known:
                    wanted.append((f"{name}.{key}", diffusion[key], [*known]))
    for what, value, allowed in wanted:
        if value != allowed:
            raise UserError(f"{what} is {value!r}: diffusers' classes need {allowed!r}")
