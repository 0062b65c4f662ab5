"""All stages in order, small and short: from nothing to a model.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart
    python sample.py --model=runs/quickstart/model --prompt="a large red circle"

It trains on `shapes`; --config.data.source=… and --config.data.path=… give every stage
other pictures.

tiny   for tests.
quick  minutes of a laptop, for pictures as simple as `shapes`: 16 px, then 64.
small  for pictures of any kind, and longer: 32 px, then 128.
"""

from ml_collections import ConfigDict

from configs import clip, decoder, prior, upsampler
from configs.common import row

STAGES = {"clip": clip, "prior": prior, "decoder": decoder, "upsampler": upsampler}
# The row of each stage, and a number of steps in place of the row's.
SIZES = {
    "tiny": {name: ("tiny", 8) for name in STAGES},
    "quick": {
        "clip": ("small", 850),
        "prior": ("small", 250),
        "decoder": ("quick", None),
        "upsampler": ("quick", None),
    },
    "small": {
        "clip": ("small", 1500),
        "prior": ("small", 800),
        "decoder": ("small", 2200),
        "upsampler": ("small", 1200),
    },
}


def get_config(size: str = "quick") -> ConfigDict:
    """The config of all stages; --config.decoder.steps=… changes one of them."""
    stages = row(SIZES, size, "quickstart")
    config = ConfigDict()
    config.stages = tuple(STAGES)
    config.data = ConfigDict(dict(source="shapes", path="", keep=""))
    config.data.mixture = ConfigDict(dict(parts=()))
    for name, module in STAGES.items():
        stage_size, steps = stages[name]
        config[name] = module.get_config(stage_size)
        if steps is not None:
            config[name].steps = steps
        data = config[name].data
        data.update(
            {key: config.data.get_ref(key) for key in ("source", "path", "keep")}
        )
        data.mixture.parts = config.data.mixture.get_ref("parts")
        optim = config[name].optim
        optim.warmup = min(optim.warmup, config[name].steps // 5)
    return config
