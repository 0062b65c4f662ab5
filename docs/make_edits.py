"""Makes docs/edits/*.png, the README's strips: python docs/make_edits.py."""

from pathlib import Path

import numpy as np

import dalle2_jax
from dalle2_jax.data import image
from dalle2_jax.runtime import use_compilation_cache

FOLDER = Path(__file__).with_name("edits")
RED = "a large red circle on a white background"
STAR = "a small yellow star left of a large blue square on a black background"
GREEN = "a large green circle on a white background"
STEPS = {"decoder": 50}


def strip(name: str, *pictures: np.ndarray) -> None:
    """Writes pictures side by side."""
    pictures = np.concatenate(pictures).astype(np.uint8)
    image.save_png(FOLDER / f"{name}.png", image.grid(pictures, len(pictures)))
    print(name, flush=True)


if __name__ == "__main__":
    use_compilation_cache()
    FOLDER.mkdir(exist_ok=True)
    model = dalle2_jax.load()
    red, star = dalle2_jax.text_to_image(model, [RED, STAR], seed=3)
    for name, picture in {"circle": red, "star": star}.items():
        image.save_png(FOLDER / f"{name}.png", picture)

    strip("reconstruct", star[None], dalle2_jax.reconstruct(model, star, steps=STEPS))
    varied = [
        dalle2_jax.variations(model, star, eta=eta, seed=1, steps=STEPS)
        for eta in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    strip("variations", star[None], *varied)
    strip(
        "interpolate", dalle2_jax.interpolate(model, red, star, frames=7, steps=STEPS)
    )
    strip(
        "text_diff",
        dalle2_jax.text_diff(model, red, RED, GREEN, frames=7, steps=STEPS),
    )
    strip("pca", star[None], dalle2_jax.pca(model, star, steps=STEPS))
    mask = np.zeros(star.shape[:2], bool)
    mask[:, : mask.shape[1] // 2] = True
    painted = dalle2_jax.inpaint(
        model, star, mask, STAR.replace("yellow star", "pink circle"), num=4
    )
    strip("inpaint", star[None], np.where(mask[..., None], 255, star)[None], painted)
    around = STAR.replace("large blue", "small blue")
    strip("outpaint", dalle2_jax.outpaint(model, star, around, extend=0.6, num=5))
    anew = [
        dalle2_jax.img2img(model, red, GREEN, strength=s) for s in (0.5, 0.7, 0.8, 0.9)
    ]
    strip("img2img", red[None], *anew)
