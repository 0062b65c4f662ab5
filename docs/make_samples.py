"""Makes docs/samples.png, the README's grid: python docs/make_samples.py."""

from pathlib import Path

import dalle2_jax
from dalle2_jax.data import image

PROMPTS = (
    "a large red circle",
    "a small green star on a black background",
    "a large pink square above a small blue cross",
    "a small yellow triangle left of a large purple circle on a gray background",
    "a large cyan star on a white background",
    "a small orange square below a large green triangle",
)

if __name__ == "__main__":
    pictures = dalle2_jax.text_to_image(dalle2_jax.load(), PROMPTS, num=4, seed=0)
    order = [4 * k + i for i in range(4) for k in range(len(PROMPTS))]
    grid = image.grid(pictures[order], columns=len(PROMPTS))
    image.save_png(Path(__file__).with_name("samples.png"), grid)
    print(*PROMPTS, sep="\n")
