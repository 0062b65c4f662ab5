"""The autoregressive prior: from a caption to the codes of a CLIP image embedding.

    python train.py --config=configs/ar_prior.py:small --workdir=runs/ar_prior \
        --config.base=runs/clip/model

tiny        for tests.
small       a laptop: the bundled model's.
styles      a laptop: things in eight styles, see quickstart.py.
paper       the 1B autoregressive prior of Table 3 of arXiv 2204.06125: its latent
            decoder, which reads CLIP's text states. There is no text encoder beside it.

python sample.py --prior=autoregressive samples with it.
"""

from ml_collections import ConfigDict

from configs.common import common, row

SIZES = {
    "tiny": {
        "net": dict(
            width=32, layers=2, heads=2, components=8, buckets=16, dot_products=8
        ),
        "loop": dict(steps=20, batch_size=32, log_every=5, eval_batches=1),
        "optim": dict(warmup=5),
        "statistics_examples": 64,
        "sampling": dict(guidance=2.0),
    },
    "small": {
        # 16 components hold 93.6% of the variance of the bundled CLIP's embeddings.
        "net": dict(
            width=128, layers=4, heads=4, components=16, buckets=64, dot_products=16
        ),
        "loop": dict(steps=4000, batch_size=64),
        "optim": dict(name="muon", warmup=200),
        "statistics_examples": 8192,
        "sampling": dict(guidance=1.0),
    },
    "styles": {
        "net": dict(
            width=128, layers=4, heads=4, components=32, buckets=64, dot_products=16
        ),
        "loop": dict(steps=6000, batch_size=128),
        "optim": dict(name="muon", warmup=200),
        "statistics_examples": 8192,
        "sampling": dict(guidance=1.0),
    },
    "paper": {
        "mesh": dict(fsdp=8),  # what docs/plan.md finds to fit
        "net": dict(
            width=1664,
            layers=24,
            heads=26,
            components=319,
            buckets=1024,
            dot_products=64,
        ),
        "loop": dict(
            steps=1_000_000,
            batch_size=4096,
            dtype="bfloat16",
            ema_decay=0.999,
            eval_every=5_000,
            preview_every=5_000,
            save_every=5_000,
        ),
        "optim": dict(
            learning_rate=1.6e-4,
            schedule="constant",
            b2=0.91,
            eps=1e-10,
            weight_decay=4e-2,
            warmup=1_000,
        ),
        "statistics_examples": 65_536,
        "sampling": dict(guidance=4.0),
    },
}


def get_config(size: str = "small") -> ConfigDict:
    """The config of a row of SIZES."""
    values = row(SIZES, size, "ar_prior")
    config = common("ar_prior")
    config.base = "" if size == "paper" else "bundled"
    config.update(values["loop"])
    config.optim.update(values["optim"])
    config.mesh.update(values.get("mesh", {}))

    config.net = ConfigDict(values["net"])
    config.net.activation = "gelu"
    config.net.remat = size == "paper"
    config.sampling = ConfigDict(values["sampling"])
    config.sampling.temperature = 1.0  # 0 takes the likeliest codes
    config.sampling.candidates = 1  # embeddings of which the one that fits best is kept
    config.drop_caption = 0.1
    # Pictures whose embeddings give the components and the dot products' quantiles.
    config.statistics_examples = values["statistics_examples"]
    return config
