"""Networks (flax.linen): no diffusion maths and no losses."""
