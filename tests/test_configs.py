"""Every config at every size: what it builds, and that all of it is read."""

import re
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dalle2_jax import parts
from dalle2_jax.diffusion import schedule
from dalle2_jax.errors import UserError
from dalle2_jax.nn import abstract
from tests.golden import peer

ROOT = Path(__file__).parents[1]
VOCABULARY = {"vocab_size": 49_408, "eot": 49_407}  # OpenAI CLIP's

# With the vocabulary of OpenAI's CLIP.
PARAMETERS = {
    ("clip", "tiny"): 1_641_601,
    ("clip", "small"): 7_468_801,
    ("clip", "base"): 7_468_801,
    ("clip", "styles"): 7_468_801,
    ("clip", "paper"): 986_523_137,
    ("clip", "vit_l_14"): 427_616_513,
    ("prior", "tiny"): 32_736,
    ("prior", "small"): 896_128,
    ("prior", "base"): 2_848_256,
    ("prior", "styles"): 1_958_528,
    ("prior", "paper"): 1_225_925_632,
    ("prior", "karlo"): 1_022_028_544,
    ("prior", "karlo_lean"): 1_022_028_544,
    ("ar_prior", "tiny"): 29_936,
    ("ar_prior", "small"): 850_112,
    ("ar_prior", "styles"): 852_160,
    ("ar_prior", "paper"): 805_849_600,
    ("decoder", "tiny"): 1_822_355,
    ("decoder", "quick"): 1_009_507,
    ("decoder", "small"): 2_094_972,
    ("decoder", "small_inpaint"): 2_101_884,
    ("decoder", "base"): 4_946_316,
    ("decoder", "styles"): 4_946_316,
    ("decoder", "paper"): 3_567_897_094,
    ("decoder", "karlo"): 885_439_686 + 7_878_400,
    ("decoder", "karlo_lean"): 885_439_686 + 7_878_400,
    ("upsampler", "tiny"): 175_587,
    ("upsampler", "quick"): 703_020,
    ("upsampler", "small"): 703_020,
    ("upsampler", "styles"): 703_020,
    ("upsampler", "paper_256"): 691_579_523,
    ("upsampler", "paper_1024"): 267_146_691,
    ("upsampler", "karlo"): 691_579_523,
    ("upsampler", "karlo_lean"): 691_579_523,
}
STAGES = ["clip", "prior", "ar_prior", "decoder", "upsampler"]
QUICKSTART = ["clip", "prior", "decoder", "upsampler"]


def module(stage):
    return import_module(f"configs.{stage}")


def clip_net(size):
    """The arguments of the CLIP that goes with a row of any stage."""
    rows = {"karlo": "vit_l_14", "karlo_lean": "vit_l_14"}
    rows |= {"quick": "small", "small_inpaint": "small"}
    size = rows.get(size, size)
    return parts.clip.arguments(module("clip").get_config(size), VOCABULARY)


@cache
def params(stage, size):
    """The abstract params of what a config of that size trains."""
    config = module(stage).get_config(size)
    own = parts.PARTS[config.stage]
    clip = None if stage == "upsampler" else clip_net(size)
    return abstract(own.module(**own.arguments(config, clip)))


def test_the_table_has_every_size():
    assert list(PARAMETERS) == [(s, size) for s in STAGES for size in module(s).SIZES]


@pytest.mark.parametrize("stage, size", PARAMETERS)
def test_parameter_count(stage, size):
    assert peer.size(params(stage, size)) == PARAMETERS[stage, size]


@pytest.mark.parametrize(
    "stage, size, published, percent",
    [
        # The published sizes have one or two digits. 24 blocks of width 2048 alone
        # are 1.21B, which the paper calls 1B.
        ("prior", "paper", 1e9, 23),
        # Less the text encoder, which alone would make 1.2B more.
        ("ar_prior", "paper", 1e9, -19),
        ("decoder", "paper", 3.5e9, 2),
        ("upsampler", "paper_256", 700e6, -1),
        ("upsampler", "paper_1024", 300e6, -11),
    ],
)
def test_how_far_off_the_papers_sizes(stage, size, published, percent):
    """Table 3 of arXiv 2204.06125."""
    assert round(100 * (PARAMETERS[stage, size] / published - 1)) == percent


def test_the_papers_clip():
    """ViT-H/16 has 632M parameters (table 1 of arXiv 2010.11929, at 14 px patches)."""
    assert peer.size(params("clip", "paper")["vision"]) == pytest.approx(
        632e6, rel=0.01
    )


def test_the_papers_decoder_is_glides():
    """2.3B for the picture and 1.2B for the text (section 4 of arXiv 2112.10741)."""
    decoder = params("decoder", "paper")
    assert peer.size(decoder["net"]) == pytest.approx(2.3e9, rel=0.03)
    assert peer.size(decoder["text"]["transformer"]) == pytest.approx(1.2e9, rel=0.01)


def row(batch_size, iterations, learning_rate, sampling_steps, **others):
    """What the decoder and the upsamplers share, and what they do not."""
    return {
        "schedule": "cosine",
        "diffusion_steps": 1000,
        "sampling_steps": sampling_steps,
        "crop_fraction": 1.0,
        "batch_size": batch_size,
        "iterations": iterations,
        "learning_rate": learning_rate,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "ema_decay": 0.9999,
    } | others


PRIOR_OPTIM = {"b2": 0.96, "eps": 1e-6, "weight_decay": 6e-2}
TABLE_3 = {
    ("prior", "paper"): row(4096, 600_000, 1.1e-4, 64, **PRIOR_OPTIM),
    ("decoder", "paper"): row(2048, 800_000, 1.2e-4, 250),
    ("upsampler", "paper_256"): row(1024, 1_000_000, 1.2e-4, 27, crop_fraction=0.25),
    ("upsampler", "paper_1024"): row(
        512, 1_000_000, 1.0e-4, 15, crop_fraction=0.25, schedule="linear"
    ),
}


@pytest.mark.parametrize("stage, size", TABLE_3)
def test_table_3_of_the_paper(stage, size):
    config = module(stage).get_config(size)
    table = schedule.make(config.diffusion.schedule, config.diffusion.steps)
    assert TABLE_3[stage, size] == {
        "schedule": config.diffusion.schedule,
        "diffusion_steps": table.steps,
        "sampling_steps": schedule.respace(table, config.sampling.steps).steps,
        "crop_fraction": config.data.crop_fraction,
        "batch_size": config.batch_size,
        "iterations": config.steps,
        "learning_rate": config.optim.learning_rate,
        "b2": config.optim.b2,
        "eps": config.optim.eps,
        "weight_decay": config.optim.weight_decay,
        "ema_decay": config.ema_decay,
    }


def test_the_papers_autoregressive_prior():
    """Its column of Table 3, and section 2 of arXiv 2204.06125."""
    config = module("ar_prior").get_config("paper")
    assert (config.net.width, config.net.layers, config.net.heads) == (1664, 24, 26)
    assert (config.net.components, config.net.buckets) == (319, 1024)
    assert (config.batch_size, config.steps) == (4096, 1_000_000)
    optim = config.optim
    assert (optim.learning_rate, optim.b2, optim.eps) == (1.6e-4, 0.91, 1e-10)
    assert (optim.weight_decay, config.ema_decay) == (4e-2, 0.999)
    assert config.drop_caption == 0.1


def test_the_networks_of_table_3():
    """Its rows from "Channels" to "Dropout", and how each is sampled."""

    def unet(net):
        return (net.channels, net.blocks, net.multipliers, net.dropout)

    decoder = module("decoder").get_config("paper")
    net, text = decoder.net.unet, decoder.net.text_encoder
    assert unet(net) == (512, 3, (1, 2, 3, 4), 0.1)
    sides = [decoder.size >> level for level in net.attention_levels]
    assert (sides, net.head_channels) == ([32, 16, 8], 64)
    assert (text.width, text.layers, text.heads) == (2048, 24, 32)
    assert decoder.diffusion.variance == "learned_range"
    assert decoder.sampling.sampler == "ddpm"

    sizes = {"paper_256": (64, 256), "paper_1024": (256, 1024)}
    nets = {
        "paper_256": (320, 3, (1, 2, 3, 4), 0.1),
        "paper_1024": (192, 2, (1, 1, 2, 2, 4, 4), 0.0),
    }
    for size in nets:
        config = module("upsampler").get_config(size)
        assert (config.low_size, config.size) == sizes[size]
        assert unet(config.net) == nets[size] and config.net.attention_levels == ()
        assert (config.sampling.sampler, config.sampling.eta) == ("ddim", 0.0)
        assert config.sampling.guidance == 1.0

    prior = module("prior").get_config("paper")
    assert (prior.net.width, prior.net.layers, prior.net.heads) == (2048, 24, 32)
    assert (prior.drop_caption, prior.sampling.candidates) == (0.1, 2)
    assert prior.diffusion.predict == "x0"


def test_the_papers_clip_is_vit_h_16():
    """Appendix C of the paper."""
    net = module("clip").get_config("paper").net
    assert (net.vision_width, net.vision_layers, net.patch_size) == (1280, 32, 16)
    assert (net.text_width, net.text_layers) == (1024, 24)
    assert (net.image_size, net.embed_dim, net.context_length) == (256, 1024, 256)


@pytest.mark.parametrize("stage", ["prior", "ar_prior", "decoder"])
def test_the_papers_stages_build_on_no_small_clip(stage):
    assert module(stage).get_config("paper").base == ""


def leaves(config):
    """The keys that hold values, of a config and its sections."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value)
        else:
            yield name


def test_every_key_is_read():
    """By name, somewhere: an attribute, a parameter, a field or a string."""
    files = [*ROOT.glob("*.py"), *(ROOT / "dalle2_jax").rglob("*.py")]
    words = set(re.findall(r"\w+", "\n".join(path.read_text() for path in files)))
    for stage, size in PARAMETERS:
        assert set(leaves(module(stage).get_config(size))) <= words


@pytest.mark.parametrize(
    "size, rows",
    [
        ("tiny", dict.fromkeys(QUICKSTART, "tiny")),
        (
            "quick",
            dict(clip="small", prior="small", decoder="quick", upsampler="quick"),
        ),
        ("small", dict.fromkeys(QUICKSTART, "small")),
        ("styles", dict.fromkeys(STAGES, "styles")),
    ],
)
def test_the_quick_start_trains_every_stage_at_its_size(size, rows):
    config = module("quickstart").get_config(size)
    assert list(config.stages) == list(rows)
    for stage, row in rows.items():
        expected = module(stage).get_config(row)
        expected.data.source = config.data.source
        expected.steps = config[stage].steps
        expected.optim.warmup = config[stage].optim.warmup
        assert config[stage].to_dict() == expected.to_dict()
        assert expected.optim.warmup < expected.steps


@pytest.mark.parametrize(
    "stage, sizes",
    [
        ("clip", "tiny, small, base, styles, paper, vit_l_14"),
        ("prior", "tiny, small, base, styles, paper, karlo, karlo_lean"),
        ("ar_prior", "tiny, small, styles, paper"),
        (
            "decoder",
            "tiny, quick, small, small_inpaint, base, styles, paper, karlo, karlo_lean",
        ),
        (
            "upsampler",
            "tiny, quick, small, styles, paper_256, paper_1024, karlo, karlo_lean",
        ),
        ("quickstart", "tiny, quick, small, styles"),
    ],
)
def test_an_unknown_size_names_the_sizes(stage, sizes):
    with pytest.raises(UserError) as error:
        module(stage).get_config("huge")
    assert str(error.value) == f"configs/{stage}.py has no size 'huge': choose {sizes}"
