"""Configs whose values can't be: one line each, before anything is loaded."""

from importlib import import_module

import numpy as np
import pytest

from dalle2_jax.checks import values
from dalle2_jax.errors import UserError


def config_of(stage, /, **changes):
    config = import_module(f"configs.{stage}").get_config("tiny")
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize(
    "stage, key, value, message",
    [
        ("clip", "stage", "foo", "must be one of clip, prior, ar_prior, decoder, ups"),
        ("clip", "seed", 10**23, "must be a whole number from 0 to 4294967295"),
        ("clip", "seed", 2**32, "must be a whole number from 0 to 4294967295"),
        ("clip", "steps", 0, "must be a whole number from 1 to 2147483647"),
        ("clip", "ema_decay", np.nan, "must be a number from 0 to 1"),
        ("clip", "optim.b1", 2.0, "must be a number from 0 to below 1"),
        ("clip", "optim.name", "adam", "must be one of adamw, muon, adafactor"),
        ("clip", "optim.schedule", "cos", "must be one of constant, cosine, linear"),
        ("clip", "dtype", "float64", "must be one of float32, bfloat16"),
        ("clip", "param_dtype", "int8", "must be one of float32, bfloat16"),
        ("clip", "net.text_heads", 5, "must divide text_width=32"),
        ("clip", "net.vision_heads", 0, "must be a whole number from 1"),
        ("clip", "net.text_width", -32, "must be a whole number from 1"),
        ("clip", "net.embed_dim", 0, "must be a whole number from 1"),
        ("clip", "net.text_layers", 10**6 + 1, "must be a whole number from 1"),
        ("clip", "net.context_length", 1, "must be a whole number from 3"),
        ("clip", "net.activation", "foo", "must be one of gelu, gelu_new, quick_gelu"),
        ("clip", "net.patch_size", 7, "must divide image_size=32"),
        ("clip", "net.vision_stem", (8,) * 4, "and be a multiple of 16"),
        ("clip", "loss_chunk", -1, "must be a whole number from 0"),
        ("clip", "tokenizer.vocab_size", 3, "must be a whole number from 514"),
        ("clip", "tokenizer.captions", 0, "must be a whole number from 1"),
        ("clip", "data.source", "imagenet", "must be one of shapes, mixture, folder"),
        ("clip", "data.shapes.pairs", 5.0, "must be a number from 0 to 1"),
        ("clip", "data.shapes.contrast", 0, "must be a whole number from 1"),
        ("clip", "data.threads", 10**9, "must be a whole number from 0 to 1024"),
        ("clip", "data.workers", -1, "must be a whole number from 0 to 1024"),
        ("clip", "data.crop", "left", "must be one of center, random"),
        ("clip", "data.crop_fraction", 0.0, "must be a number above 0 to 1"),
        ("prior", "data.crop_fraction", 2.0, "must be a number above 0 to 1"),
        ("prior", "net.heads", 3, "must divide width=32"),
        ("prior", "statistics_examples", 0, "must be a whole number from 1"),
        ("prior", "drop_caption", 2.0, "must be a number from 0 to 1"),
        ("prior", "sampling.candidates", 0, "must be a whole number from 1 to 1000"),
        ("prior", "sampling.sampler", "euler", "must be one of"),
        ("prior", "sampling.last_std", -1.0, "must be a number from 0 to 100"),
        ("prior", "diffusion.schedule", "cubic", "must be one of cosine, linear"),
        ("prior", "diffusion.steps", 0, "must be a whole number from 1"),
        ("prior", "diffusion.min_snr_gamma", np.nan, "must be a number above 0"),
        ("prior", "diffusion.logit_normal", (1.0,), "must be two of a number"),
        ("ar_prior", "net.buckets", 1, "must be a whole number from 2"),
        ("ar_prior", "sampling.temperature", np.inf, "must be a number from 0 to 1000"),
        ("decoder", "size", 17, "must be a multiple of 2, which is net.patch_size"),
        ("decoder", "drop_image", -0.1, "must be a number from 0 to 1"),
        ("decoder", "net.unet.groups", 0, "must be a whole number from 1"),
        ("decoder", "net.unet.dropout", 1.0, "must be a number from 0 to below 1"),
        ("decoder", "net.text_encoder.width", 0, "must be a whole number from 1"),
        ("decoder", "sampling.guidance", np.inf, "must be a number from -1000 to 1000"),
        ("decoder", "data.crop_fraction", 0.5, "the decoder makes whole pictures"),
        ("upsampler", "low_size", 64, "must be below size=32, and divide it"),
        ("upsampler", "low_size", 24, "must be below size=32, and divide it"),
        ("upsampler", "size", 2**17, "must be a whole number from 1 to 65536"),
        ("upsampler", "data.crop_fraction", 0.03, "must be a multiple of 2"),
        (
            "upsampler",
            "net.groups",
            7,
            "config.net: level 0 .* must divide by groups=7",
        ),
        ("upsampler", "degrade", "jpeg", "must be one of blur, bsr"),
        ("upsampler", "blur.kernel", 99, "too large for pictures of 8 px"),
        ("upsampler", "blur.sigma", 0.0, "must be a number from 0.01 to 100"),
        ("upsampler", "bsr.jpeg", (95, 30), "the smaller one first"),
    ],
)
def test_a_value_that_cannot_be(stage, key, value, message):
    with pytest.raises(UserError, match=message) as error:
        values.check(config_of(stage, **{key: value}))
    said = str(error.value)
    assert "\n" not in said and len(said) < 400
    assert key in said or key in ("net.groups", "net.vision_stem")


def test_round_low_is_true_or_false():
    config = config_of("upsampler")
    with config.ignore_type():
        config.sampling.round_low = "x"
    with pytest.raises(UserError, match="sampling.round_low is 'x': must be one of T"):
        values.check(config)


@pytest.mark.parametrize("interval", [(3,), "1,2", (1, -5), (1, np.nan)])
def test_a_guidance_interval_that_is_none(interval):
    config = config_of("decoder")
    config.sampling.guidance_interval = interval
    with pytest.raises(UserError, match="sampling.guidance_interval is .* two of a nu"):
        values.check(config)


@pytest.mark.parametrize("stages", [(), ("clip", "foo"), "clip", ("data",)])
def test_stages_that_are_none(stages):
    config = config_of("quickstart")
    with config.ignore_type():
        config.stages = stages
    with pytest.raises(UserError, match="config.stages is .*: must be names of the"):
        values.check(config)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("upsampler.low_size", 5, "config.low_size is 5: must be below size=32"),
        ("upsampler.steps", -3, "config.upsampler.steps is -3: must be a whole"),
        ("prior.net.heads", 3, "config.prior.net.heads is 3: must divide width=32"),
    ],
)
def test_the_last_stage_is_checked_before_the_first(key, value, message):
    message = message.replace("config.low_size", "config.upsampler.low_size")
    with pytest.raises(UserError, match=message):
        values.check(config_of("quickstart", **{key: value}))
