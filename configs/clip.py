"""CLIP: a vision transformer and a causal text transformer, trained by contrast.

    python train.py --config=configs/clip.py:small --workdir=runs/clip

tiny      for tests.
small     a laptop: pictures of 64 px.
base      the same for longer, in larger batches, on a GPU: the bundled model.
styles    hours of a laptop: things in eight styles, see quickstart.py.
paper     ViT-H/16 at 256 px, as in the appendix of arXiv 2204.06125.
vit_l_14  OpenAI's ViT-L/14 at 224 px, which Karlo builds on, to be fine-tuned:
          --config.init_from=MODEL, a converted one.
"""

from ml_collections import ConfigDict

from configs.common import FINETUNE, common, row

_SMALL_NET = dict(
    embed_dim=128,
    image_size=64,
    patch_size=16,
    vision_width=128,
    vision_layers=3,
    vision_heads=4,
    # Learns shapes from far fewer pictures than patches of raw pixels do.
    vision_stem=(16, 32, 64, 128),
    context_length=24,
    text_width=128,
    text_layers=2,
    text_heads=4,
)

SIZES = {
    "tiny": {
        "net": dict(
            embed_dim=32,
            image_size=32,
            patch_size=8,
            vision_width=32,
            vision_layers=2,
            vision_heads=2,
            vision_stem=(),
            context_length=24,
            text_width=32,
            text_layers=2,
            text_heads=2,
        ),
        "loop": dict(steps=20, batch_size=32, log_every=5, eval_batches=1),
        "optim": dict(warmup=5),
        "tokenizer": dict(captions=200),
        "shapes": dict(contrast=8),
    },
    "small": {
        "net": _SMALL_NET,
        "loop": dict(steps=6000, batch_size=64),
        "optim": dict(name="muon", warmup=200),
        "tokenizer": dict(captions=10_000),
        "shapes": dict(contrast=4),  # as many as there are relations
    },
    "base": {
        "net": _SMALL_NET,
        "loop": dict(steps=3000, batch_size=1024),
        "optim": dict(warmup=200),
        "tokenizer": dict(captions=10_000),
        "shapes": dict(contrast=8),
    },
    "styles": {
        "net": _SMALL_NET,
        "loop": dict(steps=3000, batch_size=256, eval_every=250, save_every=250),
        "optim": dict(name="muon", warmup=200, weight_decay=0.3),
        "tokenizer": dict(captions=20_000, vocab_size=2048),
        "data": dict(jitter=0.15, block=4),
    },
    "paper": {
        "mesh": dict(fsdp=8),  # what docs/plan.md finds to fit
        "net": dict(
            embed_dim=1024,
            image_size=256,
            patch_size=16,
            vision_width=1280,
            vision_layers=32,
            vision_heads=16,
            vision_stem=(),
            context_length=256,
            text_width=1024,
            text_layers=24,
            text_heads=16,
        ),
        "loop": dict(
            steps=400_000,
            batch_size=32_768,
            dtype="bfloat16",
            eval_every=5_000,
            preview_every=5_000,
            save_every=5_000,
        ),
        "optim": dict(
            learning_rate=5e-4, b2=0.98, weight_decay=0.2, warmup=2_000, sam_rho=0.1
        ),
        "tokenizer": dict(captions=1_000_000, vocab_size=49_408),
    },
    "vit_l_14": {
        "net": dict(
            embed_dim=768,
            image_size=224,
            patch_size=14,
            vision_width=1024,
            vision_layers=24,
            vision_heads=16,
            vision_stem=(),
            context_length=77,
            text_width=768,
            text_layers=12,
            text_heads=12,
            activation="quick_gelu",
        ),
        "loop": {**FINETUNE["loop"], "batch_size": 256},
        "optim": {**FINETUNE["optim"], "b2": 0.98, "weight_decay": 0.1},
        "tokenizer": dict(captions=1_000_000, vocab_size=49_408),
    },
}


def get_config(size: str = "small") -> ConfigDict:
    """The config of a row of SIZES."""
    values = row(SIZES, size, "clip")
    config = common("clip")
    config.update(values["loop"])
    config.optim.update(values["optim"])
    config.mesh.update(values.get("mesh", {}))
    config.data.shapes.update(values.get("shapes", {}))
    config.data.update(values.get("data", {}))

    config.net = ConfigDict({"activation": "gelu", **values["net"]})
    config.net.remat = size in ("paper", "vit_l_14")

    # Rows of a device whose logits are in memory at a time, in place of all; 0 for all.
    config.loss_chunk = 0

    config.tokenizer = ConfigDict()
    config.tokenizer.path = ""  # folder or hub id; "" trains one on the captions
    config.tokenizer.vocab_size = 1024
    config.tokenizer.captions = 10_000  # how many to train it on
    config.tokenizer.update(values["tokenizer"])
    return config
