"""What the configs of all stages share: the loop, the data, the optimiser, the mesh."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dalle2_jax.errors import UserError


def row(table: dict[str, dict], size: str, name: str) -> dict:
    """The row of a config's table; an unknown size is a UserError."""
    if size not in table:
        raise UserError(
            f"configs/{name}.py has no size {size!r}: choose {', '.join(table)}"
        )
    return table[size]


def common(stage: str) -> ConfigDict:
    """The keys every stage has, with a laptop's defaults."""
    config = ConfigDict()
    config.stage = stage
    config.base = ""  # exported model to build on; "bundled" for the one that ships
    config.init_from = ""  # exported model to fine-tune; serves as base, too
    config.trainable = ""  # regular expression in the paths of params; "" trains all
    config.seed = 0
    config.steps = 1000
    config.batch_size = 64  # over all devices
    config.accumulate = 1  # micro-batches a step
    config.dtype = "float32"  # of activations; "bfloat16" on TPUs and GPUs
    config.param_dtype = "float32"  # or "bfloat16", which halves their memory
    config.ema_decay = 0.999

    config.log_every = 50
    config.eval_every = 500
    config.eval_batches = 4
    config.preview_every = 500
    config.save_every = 500
    config.keep = 2  # checkpoints, the last
    config.keep_every = 0  # and for good those of each so many steps; 0 for none
    config.tensorboard = False
    config.wandb = ""  # project in Weights & Biases; WANDB_MODE=offline works, too
    config.profile = ""  # steps A:B, or a number of them, to WORKDIR/profile

    config.data = ConfigDict()
    config.data.source = "shapes"  # a kind of data/sources.py
    config.data.path = ""
    config.data.keep = ""  # file of the keys to read, of dalle2 filter
    config.data.crop = "center"  # how a picture is made square: center or random
    config.data.crop_fraction = 1.0  # of the side, for training on crops
    config.data.flip = False  # horizontally, at random
    config.data.jitter = 0.0  # up to how much pictures are scaled, turned and moved
    config.data.block = 1  # neighbours of the source that stay together in a batch
    config.data.threads = 4
    config.data.workers = 0  # processes that make batches, with those threads each
    # What each source takes; holdout is the fraction kept for metrics.
    config.data.shapes = ConfigDict(dict(pairs=0.5, contrast=1))
    config.data.folder = ConfigDict(dict(holdout=0.02))
    config.data.webdataset = ConfigDict(dict(holdout=0.02))
    config.data.embeddings = ConfigDict(dict(holdout=0.02))
    config.data.tfds = ConfigDict(
        dict(holdout=0.02, tfds_split="train", image="image", caption="caption")
    )
    config.data.tfds.data_dir = placeholder(str)
    # Each {"source": KIND, "path": PATH, "weight": WEIGHT}, and options as above.
    config.data.mixture = ConfigDict(dict(parts=()))

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # or muon or adafactor
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "cosine"  # constant, cosine or linear
    config.optim.warmup = 100
    config.optim.b1 = 0.9
    config.optim.b2 = 0.99
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.0
    config.optim.clip_norm = 1.0
    config.optim.sam_rho = 0.0  # of sharpness-aware minimisation; 0 for none

    config.mesh = ConfigDict()
    config.mesh.data = -1  # the devices that the others leave
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    return config


# What fine-tuning a converted Karlo has in common, whatever the stage.
FINETUNE = {
    "loop": dict(
        steps=10_000,
        batch_size=32,
        dtype="bfloat16",
        ema_decay=0.999,
        eval_every=1_000,
        preview_every=1_000,
        save_every=1_000,
    ),
    "optim": dict(learning_rate=1e-5, schedule="constant", b2=0.999, warmup=500),
}


def lean(values: dict, trainable: str) -> dict:
    """A row of `FINETUNE` that trains less of the network, in far less memory."""
    loop = dict(trainable=trainable, param_dtype="bfloat16", batch_size=16)
    return {
        **values,
        "loop": {**values["loop"], **loop},
        "optim": {**values["optim"], "name": "adafactor"},
    }


def diffusion(
    predict: str,
    variance: str,
    schedule: str = "cosine",
    min_snr_gamma: float | None = None,
    snr_power: float | None = None,
    logit_normal: tuple[float, float] | None = None,
) -> ConfigDict:
    """How a network is trained to denoise; see dalle2_jax/diffusion/generate.py."""
    section = ConfigDict()
    section.schedule = schedule
    section.steps = 1000
    section.predict = predict
    section.variance = variance
    section.min_snr_gamma = placeholder(float)
    section.min_snr_gamma = min_snr_gamma
    section.snr_power = placeholder(float)
    section.snr_power = snr_power
    section.logit_normal = placeholder(tuple)
    section.logit_normal = logit_normal
    return section


def sampling(
    steps: int | str,
    guidance: float,
    sampler: str = "ddpm",
    clip: float | None = 1.0,
) -> ConfigDict:
    """How it is sampled; see dalle2_jax/diffusion/generate.py."""
    section = ConfigDict()
    section.sampler = sampler
    section.steps = steps
    section.guidance = guidance
    section.eta = 0.0
    section.clip = placeholder(float)
    section.clip = clip
    section.threshold = placeholder(float)
    return section
