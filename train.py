"""Train a stage, or all of them in order: python train.py --help."""

from dalle2_jax.commands import main
from dalle2_jax.commands.train import train

__all__ = ["train"]

if __name__ == "__main__":
    main("train")
