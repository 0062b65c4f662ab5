"""What tiles save an upsampler in memory, and what they change in its pictures.

    python benchmarks/tiles.py memory       the paper's 256 to 1024 px: only compiled
    python benchmarks/tiles.py pictures     the bundled 32 to 128 px, beside the truth

Memory is that of one picture in float32 as XLA's CPU compiler plans it, which shares it
between temporary arrays less well than a GPU's or TPU's does.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import freeze

sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs

import dalle2_jax
from configs import upsampler
from dalle2_jax.data import image, shapes
from dalle2_jax.nn import abstract
from dalle2_jax.nn.unet import UNet
from dalle2_jax.parts import part
from dalle2_jax.parts import upsampler as upsampling
from dalle2_jax.parts.component import Component, Inputs
from dalle2_jax.pipeline import generate
from dalle2_jax.planning import blueprint


def memory() -> None:
    """A line for each tile of the paper's second upsampler."""
    config = upsampler.get_config("paper_1024")
    network = UNet(**freeze(config.net.to_dict()))
    component = Component(
        params=abstract(network),
        network=network,
        diffusion=freeze(config.diffusion.to_dict()),
        size=config.size,
        low_size=config.low_size,
    )
    low = jax.ShapeDtypeStruct((1, config.low_size, config.low_size, 3), jnp.float32)
    keys = jax.eval_shape(lambda: generate.picture_keys(0, 1))
    sampler = upsampling.SAMPLER
    sampling = sampler.make_sampling(component, [config.sampling.to_dict()])
    steps = sampler.steps(component, sampling)
    sample = jax.jit(blueprint.sampling_loop(sampler, steps))
    print("| tile | overlap | temporary |\n|---|---|---|", flush=True)
    for tile, overlap in ((None, 0), (512, 128), (256, 64), (128, 32)):
        tiled = component.replace(tile=tile, overlap=overlap)
        lowered = sample.lower(tiled, sampling, Inputs(low=low, randomness=keys))
        # Compilers take long over how fast it is, which is not asked here.
        compiled = lowered.compile(
            compiler_options={"xla_backend_optimization_level": 0}
        )
        size = compiled.memory_analysis().temp_size_in_bytes / 1e9
        print(f"| {tile or 'none'} | {overlap} | {size:.2f} GB |", flush=True)


def pictures(count: int = 8) -> None:
    """A line for each tile of the bundled upsampler, of scenes whose truth is known."""
    rng = np.random.default_rng(3)
    scenes = [shapes.sample_scene(rng, "train", 0.5) for _ in range(count)]
    low, true = (
        image.to_float(np.stack([shapes.render(s, side) for s in scenes]))
        for side in (32, 128)
    )
    model = dalle2_jax.load()
    component = model.components["upsampler_128"]
    settings = [model.sampling["upsampler_128"]] * count
    keys = generate.picture_keys(0, count)

    def draw(tile: int | None, overlap: int) -> np.ndarray:
        tiled = component.replace(tile=tile, overlap=overlap)
        inputs = Inputs(low=jnp.asarray(low), randomness=keys)
        x = part.sample(upsampling.SAMPLER, tiled, settings, inputs)
        return np.asarray(x).clip(-1, 1) * 127.5

    whole = draw(None, 0)
    print("| tile | overlap | mean | 99.9% | largest | to the truth |")
    print("|---|---|---|---|---|---|", flush=True)
    for tile, overlap in ((None, 0), (96, 32), (64, 32), (64, 16), (32, 8)):
        x = whole if tile is None else draw(tile, overlap)
        change = np.abs(x - whole)
        error = ((x - 127.5 * true) ** 2).mean()
        print(
            f"| {tile or 'none'} | {overlap} | {change.mean():.2f} | "
            f"{np.percentile(change, 99.9):.1f} | {change.max():.1f} | "
            f"{10 * np.log10(255**2 / error):.1f} dB |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["memory", "pictures"])
    {"memory": memory, "pictures": pictures}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
