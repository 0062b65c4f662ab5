"""A converted Karlo at full size, by the rows of the configs, with any weights."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs

from dalle2_jax import checkpoint, parts
from dalle2_jax.data.tokenizer import Tokenizer
from dalle2_jax.nn import abstract
from dalle2_jax.nn.clip import CLIP
from dalle2_jax.nn.decoder import Decoder
from dalle2_jax.nn.prior import DiffusionPrior
from dalle2_jax.nn.unet import UNet

# CLIP's vocabulary; texts are read by a tokenizer of any smaller one.
OPENAI = mock.Mock(spec=Tokenizer, vocab_size=49_408, eot=49_407)


def get_config(stage: str, size: str = "karlo") -> ConfigDict:
    return import_module(f"configs.{stage}").get_config(size)


def karlo(
    values: Callable[[Any, jax.ShapeDtypeStruct], np.ndarray], eot: int = OPENAI.eot
) -> checkpoint.Export:
    """The model, with CLIP's both towers.

    Args:
      values: (path of a param, its shape) -> its values.
      eot: id of the end of a text.
    """
    configs = {name: get_config(name) for name in ("prior", "decoder", "upsampler")}
    clip = parts.clip.arguments(get_config("clip", "vit_l_14"), OPENAI) | {"eot": eot}
    prior = parts.prior.arguments(configs["prior"], clip)
    decoder = parts.decoder.arguments(configs["decoder"], clip)
    upsampler = configs["upsampler"].net.to_dict()
    networks = {
        "clip": (CLIP(**clip), {"net": clip}),
        "prior": (DiffusionPrior(**prior), section(configs["prior"], prior)),
        "decoder": (Decoder(**decoder), section(configs["decoder"], decoder, "size")),
        "upsampler_256": (
            UNet(**upsampler),
            section(configs["upsampler"], upsampler, "size", "low_size"),
        ),
        "upsampler_256_last": (UNet(**upsampler), {"net": upsampler}),
    }
    return checkpoint.Export(
        config={"parts": {name: part for name, (_, part) in networks.items()}},
        params={
            name: jax.tree_util.tree_map_with_path(values, abstract(network))
            for name, (network, _) in networks.items()
        },
        tokenizer_dir=checkpoint.BUNDLED / "tokenizer",
        statistics={
            "z_image_mean": np.zeros(768, np.float32),
            "z_image_std": np.ones(768, np.float32),
        },
    )


def section(config: ConfigDict, net: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A part's section of config.json."""
    return {
        "net": net,
        "diffusion": config.diffusion.to_dict(),
        "sampling": config.sampling.to_dict(),
        **{key: config[key] for key in keys},
    }
