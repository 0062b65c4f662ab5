"""All stages in order, small and short: from nothing to a model.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart
    python sample.py --model=runs/quickstart/model --prompt="a large red circle"

It trains on `shapes`; --config.data.source=… and --config.data.path=… give every stage
other pictures.

tiny   for tests.
quick  minutes of a laptop, for pictures as simple as `shapes`: 16 px, then 64.
small  for pictures of any kind, and longer: 32 px, then 128.
styles things in eight styles, "hamburger in the style of Noto", with both priors:
       32 px, then 128. DATA is what docs/make_styles_data.py writes. About 17 hours
       on two cores, by what a step costs; on a GPU give each stage dtype=bfloat16 and
       data.workers.

    python train.py --config=configs/quickstart.py:styles --workdir=runs/styles \
        --config.data.path=DATA/128 --config.data.keep=DATA/train.jsonl
"""

from ml_collections import ConfigDict

from configs import ar_prior, clip, decoder, prior, upsampler
from configs.common import row

STAGES = {
    "clip": clip,
    "prior": prior,
    "ar_prior": ar_prior,
    "decoder": decoder,
    "upsampler": upsampler,
}
# The row of each stage, and a number of steps in place of the row's.
SIZES = {
    "tiny": {name: ("tiny", 8) for name in STAGES if name != "ar_prior"},
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
    "styles": {name: ("styles", None) for name in STAGES},
}


def get_config(size: str = "quick") -> ConfigDict:
    """The config of all stages; --config.decoder.steps=… changes one of them."""
    stages = row(SIZES, size, "quickstart")
    config = ConfigDict()
    config.stages = tuple(stages)
    source = "webdataset" if size == "styles" else "shapes"
    config.data = ConfigDict(dict(source=source, path="", keep=""))
    config.data.mixture = ConfigDict(dict(parts=()))
    for name, (stage_size, steps) in stages.items():
        config[name] = STAGES[name].get_config(stage_size)
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
