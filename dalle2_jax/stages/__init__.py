"""What is trained: one stage for each part of the model."""

from dalle2_jax.stages import clip, decoder, prior, upsampler

MAKE = {
    "clip": clip.make,
    "prior": prior.make,
    "decoder": decoder.make,
    "upsampler": upsampler.make,
}
