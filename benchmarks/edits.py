"""What edits keep and change, by the checker of shapes, on the bundled model.

    python benchmarks/edits.py                  all, some 15 minutes on two cores
    python benchmarks/edits.py text_diff inpaint

Pictures are the decoder's, of 32 px, enlarged for the checker: the upsampler is not
measured. Inputs are drawn, so that what they show is known. `variations` also draws
docs/edits/eta.png, with matplotlib (the dev extra).
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import dalle2_jax
from dalle2_jax.data import image, shapes
from dalle2_jax.evaluate import judge as checker
from dalle2_jax.runtime import use_compilation_cache

STEPS = {"decoder": 50}
PLOT = Path(__file__).parents[1] / "docs" / "edits" / "eta.png"


def enlarge(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((128, 128), Image.BICUBIC))


def right(picture: np.ndarray, caption: str) -> bool:
    return checker.judge(enlarge(picture), caption)["all"]


def scenes(count: int, pairs: float, seed: int = 7) -> list[shapes.Scene]:
    """Scenes whose caption says all, each as the checker reads it."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        scene = shapes.sample_scene(rng, "train", pairs)._replace(says_background=True)
        if right(shapes.render(scene, 32), shapes.caption(scene)):
            found.append(scene)
    return found


def inversion(model) -> None:
    """PSNR of pictures from their own (z, x_T), over steps."""
    pictures = [shapes.render(s, 64) for s in scenes(8, 0.5)]
    base = np.stack([image.square(p, 32) for p in pictures]).astype(float)
    for steps in (25, 50, 100, 250):
        back = dalle2_jax.reconstruct(model, pictures, steps={"decoder": steps})
        error = ((back - base) ** 2).mean()
        print(f"inversion: {steps} steps, {10 * np.log10(255**2 / error):.1f} dB")


def variations(model) -> None:
    """What variations keep of a picture, by attribute, and how far they are, over η."""
    given = scenes(20, 0.5) + scenes(20, 1.0, seed=8)
    captions = [shapes.caption(s) for s in given]
    squares = np.stack([shapes.render(s, 64) for s in given])
    latent = dalle2_jax.invert(model, squares, steps=STEPS)
    base = np.stack([image.square(p, 32) for p in squares]).astype(float)
    etas = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    kept, distances = {}, []
    print(f"| η | {' | '.join(checker.ATTRIBUTES)} | distance |")
    print("| --- " * (len(checker.ATTRIBUTES) + 2) + "|")
    for eta in etas:
        verdicts, distance = [], []
        for seed in range(2):
            varied = dalle2_jax.decode(model, *latent, eta=eta, seed=seed, steps=STEPS)
            verdicts += [
                checker.judge(enlarge(v), c)
                for v, c in zip(varied, captions, strict=True)
            ]
            distance.append(np.abs(varied - base).mean())
        for name in checker.ATTRIBUTES:
            of_all = [v[name] for v in verdicts if name in v]
            kept.setdefault(name, []).append(np.mean(of_all))
        distances.append(np.mean(distance))
        row = " | ".join(f"{kept[name][-1]:.0%}" for name in checker.ATTRIBUTES)
        print(f"| {eta:g} | {row} | {distances[-1]:.1f} |", flush=True)
    plot(etas, kept, distances)


def plot(etas, kept, distances) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right_) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, values in kept.items():
        width = 2.5 if name == "all" else 1.2
        left.plot(etas, np.multiply(values, 100), label=name, linewidth=width)
    left.set(xlabel="η", ylabel="variations that keep it, %", ylim=(0, 103))
    left.legend(frameon=False)
    right_.plot(etas, distances)
    right_.set(xlabel="η", ylabel="mean difference of pixels, of 255", ylim=0)
    for axes in (left, right_):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PLOT, dpi=120)


def text_diff(model) -> None:
    """Red things become blue: how many are, with all else and the place as it was."""
    given = []
    for scene in scenes(200, 0.0):
        size, _, shape = scene.things[0]
        if shape not in ("star", "triangle"):  # of which red or blue ones are unseen
            given.append(scene._replace(things=(shapes.Thing(size, "red", shape),)))
    given = given[:50]
    for direction, thetas in {"text": (0.25, 0.5), "prior": (0.5, 0.75, 1.0)}.items():
        _text_diff(model, given, direction, thetas)


def _text_diff(model, given, direction: str, thetas: tuple[float, ...]) -> None:
    colour, rest, all_right = (np.zeros((len(given), len(thetas))) for _ in range(3))
    for i, scene in enumerate(given):
        blue = scene._replace(things=(scene.things[0]._replace(colour="blue"),))
        path = dalle2_jax.text_diff(
            model,
            shapes.render(scene, 64),
            shapes.caption(scene),
            shapes.caption(blue),
            direction=direction,
            theta=thetas,
            steps=STEPS,
        )
        place = shapes.places(scene)[0]
        for j, picture in enumerate(path):
            verdict = checker.judge(enlarge(picture), shapes.caption(blue))
            found = checker.look(enlarge(picture)).found
            near = bool(found) and (
                np.hypot(found[0].x - place.x, found[0].y - place.y) < 0.06
            )
            colour[i, j] = verdict["colour"]
            rest[i, j] = near and verdict["shape"]
            all_right[i, j] = verdict["all"] and near
    for j, theta in enumerate(thetas):
        print(
            f"text_diff: {direction}, theta {theta}: colour {colour[:, j].mean():.0%}, "
            f"shape and place {rest[:, j].mean():.0%}, all "
            f"{all_right[:, j].mean():.0%} of {len(given)}",
            flush=True,
        )


def inpaint(model) -> None:
    """One thing of two is painted anew by a caption: how many show the caption."""
    given = [s for s in scenes(160, 1.0) if s.relation in ("left of", "above")][:50]
    rng, done = np.random.default_rng(5), []
    for scene in given:
        picture = shapes.render(scene, 32)
        first, second = shapes.places(scene)
        mask = np.zeros((32, 32), bool)
        if scene.relation == "left of":
            mask[:, : int(32 * (second.x - second.radius - 0.02))] = True
        else:
            mask[: int(32 * (second.y - second.radius - 0.02))] = True
        thing = shapes.sample_scene(rng, "train", 0.0).things[0]
        thing = thing._replace(size=scene.things[0].size)
        caption = shapes.caption(scene._replace(things=(thing, scene.things[1])))
        painted = dalle2_jax.inpaint(model, picture, mask, caption)[0]
        assert (painted[~mask] == picture[~mask]).all()
        done.append(right(painted, caption))
    print(f"inpaint: {np.mean(done):.0%} of {len(done)} show the caption", flush=True)


ALL = {f.__name__: f for f in (inversion, variations, text_diff, inpaint)}


def main(parts, about: str) -> None:
    """Runs the parts that the command line names, or all, on a model's decoder."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("parts", nargs="*", help=", ".join(parts))
    parser.add_argument("--model", default=None)
    flags = parser.parse_args()
    use_compilation_cache()
    model = dalle2_jax.load(*filter(None, [flags.model]))
    model = model.up_to(model.decoder.size)
    for name in flags.parts or parts:
        parts[name](model)


if __name__ == "__main__":
    main(ALL, __doc__.splitlines()[0])
