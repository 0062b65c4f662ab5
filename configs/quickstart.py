"""All stages in order, small and short: from nothing to a model.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart
    python sample.py --model=runs/quickstart/model --prompt="a large red circle"

It trains on `shapes`; --config.data.source=… and --config.data.path=… give every stage
other pictures.

The rows `small` of the stages' configs, with fewer steps. `quickstart.py:tiny` is for
tests.
"""

from ml_collections import ConfigDict

from configs import clip, decoder, prior, upsampler
from configs.common import row

STAGES = {"clip": clip, "prior": prior, "decoder": decoder, "upsampler": upsampler}
STEPS = {
    "tiny": dict(clip=8, prior=8, decoder=8, upsampler=8),
    "small": dict(clip=400, prior=250, decoder=550, upsampler=250),
}


def get_config(size: str = "small") -> ConfigDict:
    """The config of all stages; --config.decoder.steps=… changes one of them."""
    steps = row(STEPS, size, "quickstart")
    config = ConfigDict()
    config.stages = tuple(STAGES)
    config.data = ConfigDict(dict(source="shapes", path="", keep=""))
    config.data.mixture = ConfigDict(dict(parts=()))
    for name, module in STAGES.items():
        config[name] = module.get_config(size)
        config[name].steps = steps[name]
        data = config[name].data
        data.update(
            {key: config.data.get_ref(key) for key in ("source", "path", "keep")}
        )
        data.mixture.parts = config.data.mixture.get_ref("parts")
        config[name].optim.warmup = min(config[name].optim.warmup, steps[name] // 5)
    return config
