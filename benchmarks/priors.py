"""The priors of the bundled model beside one another, and how they are sampled.

    python benchmarks/priors.py                     all
    python benchmarks/priors.py ablation variance components cache

ablation  the paper's section 5.1 in small: captions shown, by the checker of shapes,
          and how much two pictures of a caption differ, over the decoder's guidance.
variance  the diffusion prior with fixed small and with analytic variance: the Fréchet
          distance of its embeddings to those of pictures, over steps.
components  what part of the variance of pictures' embeddings the first principal
          components hold, of which the autoregressive prior writes codes.
cache     the autoregressive prior with its key/value cache and without: the same codes,
          and seconds.
"""

import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from edits import main, right

import dalle2_jax
from dalle2_jax.data import shapes
from dalle2_jax.evaluate import shapes as checker
from dalle2_jax.nn import ar_prior
from dalle2_jax.parts import prior
from dalle2_jax.pipeline.encode import encode_caption

sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs
from configs import prior as prior_config  # noqa: E402


def ablation(model) -> None:
    rng = np.random.default_rng(11)
    captions = [
        checker.make_caption(kind, rng)
        for kind in ("single", "pair")
        for _ in range(32)
    ]
    known = ["diffusion"] + ["autoregressive"] * (model.ar_prior is not None)
    print("| embedding | guidance | single, right | pair, right | diversity |")
    print("| --- | --- | --- | --- | --- |")
    for source in (*known, "none", "caption"):
        for scale in (1.0, 2.0, 4.0):
            pictures = dalle2_jax.text_to_image(
                model, captions, num=2, prior=source, guidance={"decoder": scale}
            )
            shown = [right(p, captions[k // 2]) for k, p in enumerate(pictures)]
            single, pair = np.reshape(shown, (2, -1)).mean(1)
            apart = np.abs(pictures[::2].astype(float) - pictures[1::2]).mean()
            print(
                f"| {source} | {scale:g} | {single:.0%} | {pair:.0%} | {apart:.1f} |",
                flush=True,
            )


def components(model) -> None:
    z = dalle2_jax.encode_image(model, rendered(2048)[1]).astype(np.float64)
    held = np.linalg.eigvalsh(np.cov(z, rowvar=False))[::-1].cumsum()
    own = model.ar_prior.network.components
    for count in sorted({own, 16, 24, 32, 64}):
        mark = ", as many as the model's prior writes" if count == own else ""
        print(f"components: {count} hold {held[count - 1] / held[-1]:.1%}{mark}")


def rendered(count: int) -> tuple[list[shapes.Scene], list[np.ndarray]]:
    """Held-out scenes, and pictures of them."""
    rng = np.random.default_rng(3)
    scenes = [shapes.sample_scene(rng, "heldout") for _ in range(count)]
    return scenes, [shapes.render(s, 64) for s in scenes]


def variance(model) -> None:
    config = prior_config.get_config("base")
    config.init_from, config.base = model.path, ""
    _, error = prior.measure_x0_error(config, 64)
    model = model._replace(statistics={**model.statistics, "prior_x0_error": error})
    scenes, pictures = rendered(2048)
    z = dalle2_jax.encode_image(model, pictures)
    captions = [shapes.caption(s) for s in scenes[:1024]]
    real, others = z[:1024], z[1024:]
    print(f"variance: other pictures' embeddings: {frechet(real, others):.2%}")
    samplers = {
        "fixed small": {"variance": None, "last_std": 0.0},
        "analytic": {"variance": "analytic", "last_std": 0.0},
        "fixed small and last_std": {"variance": None},
    }
    print("| variance | 8 steps | 16 | 32 | 64 |\n| --- | --- | --- | --- | --- |")
    for name, changes in samplers.items():
        changed = model.with_sampling(prior=changes)
        found = [
            frechet(
                real,
                dalle2_jax.embed(changed, captions, steps={"prior": steps}),
            )
            for steps in (8, 16, 32, 64)
        ]
        print(f"| {name} | {' | '.join(f'{x:.2%}' for x in found)} |", flush=True)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance of two sets of vectors, beside the variance of the first."""
    (m, s), (n, t) = (
        (x.mean(0), np.cov(x, rowvar=False)) for x in map(np.float64, (a, b))
    )
    root = scipy.linalg.sqrtm(s @ t).real
    return (((m - n) ** 2).sum() + np.trace(s + t - 2 * root)) / np.trace(s)


def cache(model) -> None:
    captions = ["a large red circle"] * 8
    words = model.tokenizer.encode(captions, model.clip.network.context_length)
    caption = encode_caption(model.clip, words)
    keys = jax.random.split(jax.random.key(0), len(captions))
    print("| codes | with the cache, s | without, s |\n| --- | --- | --- |")
    for components in (16, 64, 319):
        network = model.ar_prior.network.clone(components=components)
        if components == model.ar_prior.network.components:
            params = model.ar_prior.params
        else:
            params = network.init(jax.random.key(1), *network.example())["params"]
        ways = {
            "cached": jax.jit(lambda p, n=network: _cached(n, p, caption, keys)),
            "without": jax.jit(lambda p, n=network: _without(n, p, caption, keys)),
        }
        codes = {name: np.asarray(way(params)) for name, way in ways.items()}
        np.testing.assert_array_equal(codes["cached"], codes["without"])
        seconds = {name: [] for name in ways}
        for _ in range(5):
            for name, way in ways.items():
                start = time.perf_counter()
                way(params).block_until_ready()
                seconds[name].append(time.perf_counter() - start)
        with_cache, without = map(statistics.median, seconds.values())
        print(f"| {components} | {with_cache:.3f} | {without:.3f} |", flush=True)


def _cached(network, params, caption, keys):
    last = network.components - 1
    draw = ar_prior.Draw(keys, jnp.ones(len(keys)), None)

    def step(i, state):
        return ar_prior.step(network, params, caption.mask, state, i, draw)

    state = ar_prior.begin(network, params, caption, keys)
    return ar_prior.draw_code(jax.lax.fori_loop(0, last, step, state), last, draw)


def _without(network, params, caption, keys):
    """The same draws, by the whole network for each code."""

    def draw(i, function, *x):
        keys_i = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        return jax.vmap(getattr(jax.random, function))(keys_i, *x)

    half = network.dot_products // 2
    uniform = draw(network.components, "uniform")
    dot_product = half + jnp.int32(uniform * (network.dot_products - half))

    def step(i, codes):
        conditions = dot_product, caption.z_text, caption.states, caption.mask
        logits = network.apply({"params": params}, codes, *conditions)
        return codes.at[:, i].set(draw(i, "categorical", logits[:, i]))

    codes = jnp.zeros((len(keys), network.components), jnp.int32)
    return jax.lax.fori_loop(0, network.components, step, codes)


ALL = {f.__name__: f for f in (ablation, variance, components, cache)}

if __name__ == "__main__":
    main(ALL, __doc__.splitlines()[0])
