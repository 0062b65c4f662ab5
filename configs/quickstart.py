"""All stages in order, small and short: from nothing to a model.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart
    python sample.py --model=runs/quickstart/model --prompt="a large red circle"

It trains on `shapes`; --config.data.source=… and --config.data.path=… give every stage
other pictures.

The rows `small` of the stages' configs, with fewer steps and smaller pictures.
`quickstart.py:tiny` is for tests.
"""

from ml_collections import ConfigDict

from configs import clip, decoder, prior, upsampler
from configs.common import row

STAGES = {"clip": clip, "prior": prior, "decoder": decoder, "upsampler": upsampler}
# What each stage has of its own, instead of what its config's row of that name has.
CHANGES = {
    "tiny": {stage: {"steps": 8} for stage in STAGES},
    "small": {
        "clip": {"steps": 550},
        "prior": {"steps": 300},
        # A quarter of the pixels, and narrower, to see several times as many pictures
        # in the time there is. At half the side it takes less noise to hide the shape
        # of things, so the noise levels lie lower.
        "decoder": {
            "steps": 2400,
            "batch_size": 64,
            "size": 16,
            "net.unet.channels": 32,
            "net.unet.head_channels": 32,
            "diffusion.logit_normal": (0.0, 1.0),
        },
        "upsampler": {
            "steps": 200,
            "low_size": 16,
            "size": 64,
            "data.crop_fraction": 0.5,
        },
    },
}


def get_config(size: str = "small") -> ConfigDict:
    """The config of all stages; --config.decoder.steps=… changes one of them."""
    changes = row(CHANGES, size, "quickstart")
    config = ConfigDict()
    config.stages = tuple(STAGES)
    config.data = ConfigDict(dict(source="shapes", path="", keep=""))
    config.data.mixture = ConfigDict(dict(parts=()))
    for name, module in STAGES.items():
        config[name] = module.get_config(size)
        config[name].update_from_flattened_dict(changes[name])
        data = config[name].data
        data.update(
            {key: config.data.get_ref(key) for key in ("source", "path", "keep")}
        )
        data.mixture.parts = config.data.mixture.get_ref("parts")
        config[name].optim.warmup = min(
            config[name].optim.warmup, config[name].steps // 5
        )
    return config
