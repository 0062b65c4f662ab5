"""DALL-E 2 (unCLIP, arXiv 2204.06125) in JAX.

model = dalle2_jax.load()
pictures = dalle2_jax.text_to_image(model, "a large red circle", num=4)
"""

import importlib

_EDITS = ("blend", "embed", "interpolate", "pca", "text_diff", "variations")
_WHERE = {
    "UserError": "dalle2_jax.errors",
    "clip_score": "dalle2_jax.pipeline.encode",
    "encode_image": "dalle2_jax.pipeline.encode",
    "encode_text": "dalle2_jax.pipeline.encode",
    "load": "dalle2_jax.hub",
    "load_clip": "dalle2_jax.hub",
    "stream": "dalle2_jax.pipeline.generate",
    "text_to_image": "dalle2_jax.pipeline.generate",
    **dict.fromkeys(_EDITS, "dalle2_jax.pipeline.edit"),
    **dict.fromkeys(("decode", "invert", "reconstruct"), "dalle2_jax.pipeline.latent"),
    **dict.fromkeys(("img2img", "inpaint", "outpaint"), "dalle2_jax.pipeline.paint"),
}

__all__ = sorted(_WHERE)
__version__ = "0.1.0"


def __getattr__(name: str):
    """Imports what is asked for only then, so that ``import dalle2_jax`` is quick."""
    if name not in _WHERE:
        raise AttributeError(f"module 'dalle2_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
