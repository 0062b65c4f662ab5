"""The decoder: from a CLIP image embedding and a caption to a small picture.

    python train.py --config=configs/decoder.py:small --workdir=runs/decoder \
        --config.base=runs/prior/model

tiny        for tests: 16 px.
quick       minutes of a laptop, for simple pictures: 16 px.
small       a laptop: 32 px.
small_inpaint  the same, which is also shown a part of the picture: it can inpaint.
base        minutes on a GPU: 32 px, the bundled model.
styles      a night of a laptop: 32 px, things in eight styles, see quickstart.py.
paper       the 3.5B decoder of Table 3 of arXiv 2204.06125: 64 px.
karlo       Karlo's, to be fine-tuned: --config.init_from=MODEL, a converted Karlo.
karlo_lean  the same in far less memory: the middle and the way up.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.common import FINETUNE, common, diffusion, lean, row, sampling

_DIFFUSION = dict(
    predict="x0",
    variance="fixed_small",
    min_snr_gamma=2.5,
    snr_power=0.5,
    logit_normal=(0.8, 1.0),  # around where the shape of things is decided
)
_KARLO = {
    "size": 64,
    "unet": dict(
        channels=320,
        multipliers=(1, 2, 3, 4),
        blocks=3,
        out_channels=6,
        attention_levels=(1, 2, 3),
        head_channels=64,
        dropout=0.1,
        groups=32,
        patch_size=1,
    ),
    "text_encoder": None,
    "context_width": 1536,
    **FINETUNE,
    "diffusion": dict(predict="eps", variance="learned_range"),
    "sampling": dict(steps=25, guidance=8.0),
    "drop_caption": 0.5,
}

_SMALL = {
    "size": 32,
    "unet": dict(
        channels=48,
        multipliers=(1, 2),
        blocks=1,
        out_channels=3,
        attention_levels=(1,),
        head_channels=48,
        dropout=0.0,
        groups=8,
        patch_size=2,
    ),
    "text_encoder": None,
    "context_width": 128,
    "loop": dict(steps=7000, batch_size=32),
    "optim": dict(name="muon", warmup=200),
    "diffusion": _DIFFUSION,
    "sampling": dict(steps=50, guidance=2.0),
    "drop_caption": 0.3,
}

_BASE = {
    "size": 32,
    "unet": dict(
        channels=64,
        multipliers=(1, 2),
        blocks=2,
        out_channels=3,
        attention_levels=(1,),
        head_channels=64,
        dropout=0.0,
        groups=16,
        patch_size=2,
    ),
    "text_encoder": None,
    "context_width": 128,
    "loop": dict(steps=9000, batch_size=512, dtype="bfloat16"),
    "optim": dict(name="muon", warmup=200),
    "diffusion": _DIFFUSION,
    "sampling": dict(steps=25, guidance=2.0),
    "drop_caption": 0.3,
}

SIZES = {
    "tiny": {
        "size": 16,
        "unet": dict(
            channels=16,
            multipliers=(1, 2),
            blocks=1,
            out_channels=3,
            attention_levels=(1,),
            head_channels=16,
            dropout=0.0,
            groups=8,
            patch_size=1,
        ),
        "text_encoder": dict(width=32, layers=1, heads=2),
        "context_width": 32,
        "loop": dict(steps=20, batch_size=16, log_every=5, eval_batches=1),
        "optim": dict(name="muon", warmup=5),
        "diffusion": _DIFFUSION,
        "sampling": dict(steps=4, guidance=2.0),
        "drop_caption": 0.5,
    },
    "quick": {
        **_SMALL,
        "size": 16,
        "unet": {
            **_SMALL["unet"],
            "channels": 32,
            "head_channels": 32,
            "patch_size": 1,
        },
        "loop": dict(steps=1250, batch_size=64, eval_every=625, preview_every=1250),
        "optim": dict(name="muon", warmup=100, learning_rate=1.5e-3),
        "diffusion": {**_DIFFUSION, "logit_normal": (0.2, 1.0)},
        "sampling": dict(steps=25, guidance=2.0),
    },
    "small": _SMALL,
    "small_inpaint": {**_SMALL, "unet": {**_SMALL["unet"], "in_channels": 7}},
    "base": _BASE,
    "styles": {
        **_BASE,
        "loop": dict(steps=20_000, batch_size=64, save_every=250),
        "sampling": dict(steps=50, guidance=2.0),
    },
    "paper": {
        "mesh": dict(fsdp=16),  # what docs/plan.md finds to fit
        "size": 64,
        "unet": dict(
            channels=512,
            multipliers=(1, 2, 3, 4),
            blocks=3,
            out_channels=6,
            attention_levels=(1, 2, 3),
            head_channels=64,
            dropout=0.1,
            groups=32,
            patch_size=1,
        ),
        "text_encoder": dict(width=2048, layers=24, heads=32),
        "context_width": 2048,
        "loop": dict(
            steps=800_000,
            batch_size=2048,
            dtype="bfloat16",
            ema_decay=0.9999,
            eval_every=5_000,
            preview_every=5_000,
            save_every=5_000,
        ),
        "optim": dict(
            learning_rate=1.2e-4, schedule="constant", b2=0.999, warmup=1_000
        ),
        "diffusion": dict(predict="eps", variance="learned_range"),
        "sampling": dict(steps=250, guidance=4.0),
        "drop_caption": 0.5,
    },
    "karlo": _KARLO,
    "karlo_lean": lean(_KARLO, "net/(mid|up)_|norm_out|conv_out"),
}


def get_config(size: str = "small") -> ConfigDict:
    """The config of a row of SIZES."""
    values = row(SIZES, size, "decoder")
    config = common("decoder")
    config.base = "" if size.startswith(("karlo", "paper")) else "bundled"
    config.update(values["loop"])
    config.optim.update(values["optim"])
    config.mesh.update(values.get("mesh", {}))

    config.net = ConfigDict()
    config.net.unet = ConfigDict({"in_channels": 3, **values["unet"]})
    config.net.unet.scale_shift = True
    config.net.unet.remat = size.startswith(("karlo", "paper"))
    config.net.context_width = values["context_width"]
    config.net.image_tokens = 4
    config.net.text_encoder = placeholder(ConfigDict)  # None: CLIP's text states
    if values["text_encoder"] is not None:
        config.net.text_encoder = ConfigDict(values["text_encoder"])
        config.net.text_encoder.activation = "gelu"
        config.net.text_encoder.remat = size == "paper"
    config.size = values["size"]  # side of its pictures
    config.diffusion = diffusion(**values["diffusion"])
    config.sampling = sampling(**values["sampling"])
    config.drop_image = 0.1  # how often the image embedding is left out, and
    config.drop_caption = values["drop_caption"]  # the caption
    return config
