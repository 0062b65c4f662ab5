"""Make pictures: of captions, or from pictures: python sample.py --help."""

from dalle2_jax.commands import main

if __name__ == "__main__":
    main("sample")
