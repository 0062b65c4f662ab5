"""The networks: linen modules that know neither diffusion nor losses."""

from dalle2_jax.nn.shapes import abstract

__all__ = ["abstract"]
