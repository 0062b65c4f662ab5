"""The diffusion prior: from a caption to a CLIP image embedding.

    python train.py --config=configs/prior.py:small --workdir=runs/prior \
        --config.base=runs/clip/model

tiny        for tests.
small       a laptop.
base        minutes on a GPU: the bundled model.
styles      a laptop: things in eight styles, see quickstart.py.
paper       the 1B diffusion prior of Table 3 of arXiv 2204.06125.
karlo       Karlo's, to be fine-tuned: --config.init_from=MODEL, a converted Karlo.
karlo_lean  the same in far less memory: the upper half of the blocks.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.common import FINETUNE, common, diffusion, lean, row, sampling

_KARLO = {
    "net": dict(width=2048, layers=20, heads=32),
    "loop": {**FINETUNE["loop"], "batch_size": 128},
    "optim": {**FINETUNE["optim"], "b2": 0.96, "eps": 1e-6, "weight_decay": 6e-2},
    "statistics_examples": 65_536,
    # As diffusers clips; Karlo's own code does at 10.
    "sampling": dict(steps=25, guidance=4.0, clip=5.0),
}

SIZES = {
    "tiny": {
        "net": dict(width=32, layers=2, heads=2),
        "loop": dict(steps=20, batch_size=32, log_every=5, eval_batches=1),
        "optim": dict(warmup=5),
        "statistics_examples": 64,
        "sampling": dict(steps=4, guidance=2.0),
    },
    "small": {
        "net": dict(width=128, layers=4, heads=4),
        "loop": dict(steps=1200, batch_size=64),
        "optim": dict(name="muon", warmup=200),
        "statistics_examples": 8192,
        "sampling": dict(steps=25, guidance=1.0),
    },
    "base": {
        "net": dict(width=192, layers=6, heads=6),
        "loop": dict(steps=6000, batch_size=256),
        "optim": dict(warmup=200),
        "statistics_examples": 8192,
        "sampling": dict(steps=25, guidance=1.0),
    },
    "styles": {
        "net": dict(width=192, layers=4, heads=6),
        "loop": dict(steps=8000, batch_size=128),
        "optim": dict(name="muon", warmup=200),
        "statistics_examples": 8192,
        "sampling": dict(steps=25, guidance=1.0),
    },
    "paper": {
        "mesh": dict(fsdp=8),  # what docs/plan.md finds to fit
        "net": dict(width=2048, layers=24, heads=32),
        "loop": dict(
            steps=600_000,
            batch_size=4096,
            dtype="bfloat16",
            ema_decay=0.9999,
            eval_every=5_000,
            preview_every=5_000,
            save_every=5_000,
        ),
        "optim": dict(
            learning_rate=1.1e-4,
            schedule="constant",
            b2=0.96,
            eps=1e-6,
            weight_decay=6e-2,
            warmup=1_000,
        ),
        "statistics_examples": 65_536,
        "sampling": dict(steps=64, guidance=4.0),
    },
    "karlo": _KARLO,
    "karlo_lean": lean(_KARLO, r"block_1\d/|ln_out|z_image_out"),
}


def get_config(size: str = "small") -> ConfigDict:
    """The config of a row of SIZES."""
    values = row(SIZES, size, "prior")
    config = common("prior")
    config.base = "" if size.startswith(("karlo", "paper")) else "bundled"
    config.update(values["loop"])
    config.optim.update(values["optim"])
    config.mesh.update(values.get("mesh", {}))

    config.net = ConfigDict(values["net"])
    config.net.activation = "gelu"
    config.net.remat = size.startswith(("karlo", "paper"))
    config.diffusion = diffusion(predict="x0", variance="fixed_small")
    config.sampling = sampling(**{"clip": 10.0, **values["sampling"]})
    # Embeddings for each picture, of which the one that fits its caption best is kept.
    config.sampling.candidates = 2 if size == "paper" else 1
    # This one leaves out what is finest in an embedding, and its decoder looks for it.
    config.sampling.last_std = 0.1 if size == "base" else 0.0
    # dalle2 analytic makes it "analytic", as the paper's, once trained.
    config.sampling.variance = placeholder(str)
    config.drop_caption = 0.1
    # Pictures whose embeddings give the mean and deviation that the prior works with.
    config.statistics_examples = values["statistics_examples"]
    return config
