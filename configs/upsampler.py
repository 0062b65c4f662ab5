"""The upsamplers: a picture at four times its side. No text, no attention.

    python train.py --config=configs/upsampler.py:small --workdir=runs/upsampler \
        --config.base=runs/decoder/model

tiny        for tests: 16 to 32 px.
quick       minutes of a laptop: 16 to 64 px.
small       a laptop: 32 to 128 px.
styles      the same for longer: things in eight styles, see quickstart.py.
paper_256   the 700M 64 to 256 px model of Table 3 of arXiv 2204.06125.
paper_1024  the 300M 256 to 1024 px model.
karlo       Karlo's 64 to 256 px, to be fine-tuned: --config.init_from=MODEL, a
            converted Karlo. Its second network, for the last step, stays as it is.
karlo_lean  the same in far less memory: the middle and the way up.
"""

from ml_collections import ConfigDict

from configs.common import FINETUNE, common, diffusion, lean, row, sampling

_PAPER_LOOP = dict(
    steps=1_000_000,
    dtype="bfloat16",
    ema_decay=0.9999,
    eval_every=5_000,
    preview_every=5_000,
    save_every=5_000,
)
_PAPER_OPTIM = dict(schedule="constant", b2=0.999, warmup=1_000)
_NET_256 = dict(
    channels=320,
    multipliers=(1, 2, 3, 4),
    blocks=3,
    dropout=0.1,
    groups=32,
    patch_size=1,
)
_KARLO = {
    "low_size": 64,
    "size": 256,
    "crop_fraction": 0.25,
    "net": _NET_256,
    **FINETUNE,
    "diffusion": dict(predict="eps"),
    "sampling": dict(steps=7),
}

_SMALL = {
    "low_size": 32,
    "size": 128,
    "crop_fraction": 0.25,
    "net": dict(
        channels=32,
        multipliers=(1, 2),
        blocks=1,
        dropout=0.0,
        groups=8,
        patch_size=2,
    ),
    "loop": dict(steps=3000, batch_size=32),
    "optim": dict(name="muon", warmup=200),
    "diffusion": dict(predict="x0"),
    "sampling": dict(steps=8),
}

SIZES = {
    "tiny": {
        "low_size": 16,
        "size": 32,
        "crop_fraction": 0.5,
        "net": dict(
            channels=16,
            multipliers=(1, 2),
            blocks=1,
            dropout=0.0,
            groups=8,
            patch_size=1,
        ),
        "loop": dict(steps=20, batch_size=16, log_every=5, eval_batches=1),
        "optim": dict(warmup=5),
        "diffusion": dict(predict="x0"),
        "sampling": dict(steps=3),
    },
    "quick": {
        **_SMALL,
        "low_size": 16,
        "size": 64,
        "crop_fraction": 0.5,
        "loop": dict(steps=150, batch_size=32),
    },
    "small": _SMALL,
    "styles": {**_SMALL, "loop": dict(steps=8000, batch_size=32)},
    "paper_256": {
        "mesh": dict(fsdp=2),  # what docs/plan.md finds to fit
        "low_size": 64,
        "size": 256,
        "crop_fraction": 0.25,
        "net": _NET_256,
        "loop": {**_PAPER_LOOP, "batch_size": 1024},
        "optim": {**_PAPER_OPTIM, "learning_rate": 1.2e-4},
        "diffusion": dict(predict="eps"),
        "sampling": dict(steps="fast27", sampler="ddim"),
    },
    "paper_1024": {
        "low_size": 256,
        "size": 1024,
        "crop_fraction": 0.25,
        "net": dict(
            channels=192,
            multipliers=(1, 1, 2, 2, 4, 4),
            blocks=2,
            dropout=0.0,
            groups=32,
            patch_size=1,
        ),
        "loop": {**_PAPER_LOOP, "batch_size": 512},
        "optim": {**_PAPER_OPTIM, "learning_rate": 1.0e-4},
        "diffusion": dict(predict="eps", schedule="linear"),
        "sampling": dict(steps="ddim15", sampler="ddim"),
    },
    "karlo": _KARLO,
    "karlo_lean": lean(_KARLO, "(mid|up)_|norm_out|conv_out"),
}


def get_config(size: str = "small") -> ConfigDict:
    """The config of a row of SIZES."""
    values = row(SIZES, size, "upsampler")
    config = common("upsampler")
    config.update(values["loop"])
    config.optim.update(values["optim"])
    config.mesh.update(values.get("mesh", {}))

    config.net = ConfigDict(values["net"])
    config.net.in_channels = 6
    config.net.out_channels = 3
    config.net.attention_levels = ()
    config.net.head_channels = 64
    config.net.scale_shift = False
    config.net.remat = size.startswith(("karlo", "paper"))
    config.low_size = values["low_size"]  # side of the pictures it is given
    config.size = values["size"]  # and of those it makes
    config.data.crop_fraction = values["crop_fraction"]
    # What becomes of the low-resolution picture in training (section 2.1): "blur", or
    # "bsr", which is far more diverse.
    config.degrade = "bsr" if size == "paper_1024" else "blur"
    # How many are blurred, and how much.
    config.blur = ConfigDict(dict(chance=0.5, kernel=3, sigma=0.6))
    # The paper doesn't say how strong. These ranges are those of latent diffusion
    # (arXiv 2112.10752), which it cites; BSRGAN's, the defaults of data/degrade.py, are
    # far stronger.
    config.bsr = ConfigDict(
        dict(
            isotropic=(0.025, 0.7),
            anisotropic=(0.125, 2.0),
            noise=(1, 2),
            jpeg=(80, 95),
            jpeg_chance=0.9,
        )
    )
    config.diffusion = diffusion(variance="fixed_small", **values["diffusion"])
    config.sampling = sampling(guidance=1.0, **values["sampling"])
    # Whether the picture it is given is rounded to 8 bits: not in Karlo.
    config.sampling.round_low = not size.startswith("karlo")
    return config
