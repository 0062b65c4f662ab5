"""The small decoder's gradient on a CPU, with nn.conv's convolutions and with flax's.

    python -m benchmarks.conv_gradient

The two take turns; the median of each is printed, and their ratio.
"""

import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs import decoder
from dalle2_jax.nn import conv, unet

ROUNDS = 20


def gradient(convolution):
    """A compiled gradient of the U-Net whose convolutions are of that kind."""
    unet.Conv = convolution
    config = decoder.get_config("small")
    net = unet.UNet(**config.net.unet)
    x = jnp.ones((config.batch_size, config.size, config.size, 3))
    t = jnp.ones(config.batch_size)
    params = net.init(jax.random.key(0), x, t)
    compiled = jax.jit(jax.grad(lambda p: jnp.square(net.apply(p, x, t) - x).mean()))
    jax.block_until_ready(compiled(params))
    return lambda: jax.block_until_ready(compiled(params))


if __name__ == "__main__":
    times = {"nn.conv": [], "flax": []}
    runs = {"nn.conv": gradient(conv.Conv), "flax": gradient(nn.Conv)}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    ours, theirs = (statistics.median(times[name]) for name in ("nn.conv", "flax"))
    print(f"nn.conv {ours:.3f} s, flax {theirs:.3f} s, ratio {ours / theirs:.2f}")
