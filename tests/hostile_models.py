"""Model folders that are damaged or meant to do harm, made of good ones.

Each case is a function that spoils a folder, and what the one line must say.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

Case = tuple[Callable[[Path], None], str]

DEEP = "[" * 100_000


def change(file: str, *path: str, value: Any = None, remove: bool = False):
    """A case's function: set a value in a JSON file, or remove it."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        if remove:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        (folder / file).write_text(json.dumps(content))

    return spoil


def text(file: str, content: str | bytes):
    """Write a file anew."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(data)


def fifo(file: str):
    """Put a named pipe in place of a file: who opens it waits for ever."""

    def spoil(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return spoil


def link(file: str, target: str):
    """Put a symbolic link in place of a file."""

    def spoil(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return spoil


def sparse(file: str, size: int):
    """Make a file of that size of which nothing is on the disk."""

    def spoil(folder: Path) -> None:
        with open(folder / file, "r+b") as opened:
            opened.truncate(size)

    return spoil


def header(file: str, tensors: dict[str, Any], data: bytes = b"", claim: int = 0):
    """Write a file of safetensors by hand."""
    start = json.dumps(tensors).encode()
    length = struct.pack("<Q", claim or len(start))
    return text(file, length + start + data)


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def arrays(file: str, spoil_arrays: Callable[[dict[str, np.ndarray]], Any]):
    """Change the tensors of a file."""

    def spoil(folder: Path) -> None:
        found = load_file(folder / file)
        spoil_arrays(found)
        save_file(found, folder / file)

    return spoil


def poison(name: str, value: float, dtype: Any = np.float32):
    """Put one bad number among the good ones of a tensor."""

    def spoil(found: dict[str, np.ndarray]) -> None:
        array = np.array(found[name], dtype)
        array.reshape(-1)[-1] = value
        found[name] = array

    return spoil


def flip(file: str, at: int = -3):
    """Flip a bit, as a bad disk or a broken copy does."""

    def spoil(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[at] ^= 4
        (folder / file).write_bytes(data)

    return spoil


def unsealed(spoil: Callable[[Path], None]):
    """Spoil a model that has no checksums, as those of version 0.1."""

    def both(folder: Path) -> None:
        change("config.json", "sha256", remove=True)(folder)
        spoil(folder)

    return both


BAD_NUMBERS = (10**12, 10**30, -1, True, "8", [8], None, {}, 1e308, 0.5)
RARE = (10**30, [8], None, {}, 1e308, 0.5, [], [0], [1, 2, 3])


def of_an_export() -> dict[str, Case]:
    """What is done to a model of this package, with parts of every kind."""
    config = "config.json"

    def net(part: str, *path: str, value: Any):
        return change(config, "parts", part, "net", *path, value=value)

    cases: dict[str, Case] = {
        f"width {value!r}": (
            net("clip", "text_width", value=value),
            "config.json: clip.net: text_width is .*: must be a whole number from 0 to",
        )
        for value in BAD_NUMBERS
        if value is not None  # there is no text tower then
    }
    for value in BAD_NUMBERS:
        cases[f"channels {value!r}"] = (
            net("decoder", "unet", "channels", value=value),
            "decoder.net.unet: channels is .*: must be a whole number from 0 to",
        )
    cases |= {
        "no width": (net("prior", "width", value=0), "prior"),
        "nan": (
            text(config, '{"format": 1, "parts": {"clip": {"net": {"width": NaN}}}}'),
            "NaN is not a finite number",
        ),
        "a million layers": (
            net("prior", "layers", value=10**6),
            r"prior.net: describes more layers than \d+ weights are for",
        ),
        "a million blocks": (
            net("upsampler_16", "blocks", value=10**6),
            "upsampler_16.net: describes more layers",
        ),
        "many levels": (
            net("upsampler_16", "multipliers", value=[1] * 10_000),
            "multipliers is .*: must be a list of at most 120 whole numbers",
        ),
        "words for levels": (
            net("upsampler_16", "multipliers", value=["1", "2"]),
            "multipliers is .*: must be a list of at most",
        ),
        "no heads": (net("prior", "heads", value=0), "prior.net: no network has these"),
        "odd heads": (net("prior", "heads", value=5), "prior"),
        "activation": (
            net("clip", "activation", value="foo"),
            "clip.net: activation is 'foo': must be one of gelu, gelu_new",
        ),
        "negative eps": (net("clip", "text_eps", value=-1.0), "a number from 0 on"),
        "unknown argument": (
            net("prior", "depth", value=3),
            "prior.net: DiffusionPrior has no argument 'depth'; its arguments are clip",
        ),
        "the argument dtype": (
            net("prior", "dtype", value="float64"),
            "prior.net: DiffusionPrior has no argument 'dtype'",
        ),
        "missing argument": (
            change(config, "parts", "prior", "net", "width", remove=True),
            "prior.net: DiffusionPrior lacks width",
        ),
        "no net": (
            change(config, "parts", "prior", "net", remove=True),
            "prior.net: must be an object, is None",
        ),
        "net a list": (
            change(config, "parts", "prior", "net", value=[1]),
            "prior.net: must be an object",
        ),
        "unet a list": (net("decoder", "unet", value=[1]), "unet is .* an object"),
        "part a number": (
            change(config, "parts", "prior", value=3),
            "the part 'prior' must be an object",
        ),
        "part in a path": (
            change(config, "parts", "../../etc/passwd", value={"net": {}}),
            "the part '../../etc/passwd' must be an object, and its name",
        ),
        "unknown part": (
            lambda folder: (
                change(config, "parts", "soul", value={"net": {}})(folder),
                save_file({}, folder / "soul.safetensors"),
            ),
            "soul is no part: must be one of clip, prior, .*upsampler",
        ),
        "parts a list": (change(config, "parts", value=[]), "parts .* must be objects"),
        "no format": (change(config, "format", remove=True), "it needs format"),
        "format of any length": (
            change(config, "format", value="1" * 10_000),
            "has format '1+….* reads format 1",
        ),
        "checksums a list": (change(config, "sha256", value=[]), "must be objects"),
        "checksum of a file outside": (
            change(config, "sha256", value={"../../etc/passwd": "0"}),
            "sha256 names '../../etc/passwd', outside the folder",
        ),
        "checksum of no file": (
            change(config, "sha256", value={"nothing.safetensors": "0"}),
            "nothing.safetensors is missing",
        ),
        "config deep": (text(config, DEEP), "config.json is not valid JSON"),
        "config large": (
            text(config, '{"a": "' + "x" * 2**21 + '"}'),
            "cannot read .*config.json: larger than",
        ),
        "config binary": (text(config, b"\xff\xfe\x00"), "is not UTF-8"),
        "config empty": (text(config, ""), "config.json is not valid JSON"),
        "config a pipe": (fifo(config), "is not a model: it has no config.json"),
        "config a loop": (link(config, config), "is not a model"),
        "config without end": (link(config, "/dev/zero"), "is not a model"),
    }
    file = "prior.safetensors"
    cases |= {
        "weights a pipe": (fifo(file), f"{file} is no regular file"),
        "weights a loop": (link(file, file), f"{file} is missing"),
        "weights without end": (link(file, "/dev/zero"), f"{file} is no regular file"),
        "weights gone": (lambda folder: (folder / file).unlink(), f"{file} is missing"),
        "weights a pointer": (
            text(file, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            f"{file} is a pointer of Git LFS .* git lfs pull",
        ),
        "weights empty": (text(file, ""), f"{file} is truncated or damaged"),
        "weights of text": (text(file, "<html>404</html>"), "is truncated or damaged"),
        "100 GB claimed": (
            header(file, {"a": tensor([25 * 10**9], 0, 10**11)}, bytes(8)),
            f"{file} is truncated or damaged",
        ),
        "a header of 100 GB": (
            header(file, {"a": tensor([2], 0, 8)}, bytes(8), claim=10**11),
            f"{file} is truncated or damaged .*header is too large",
        ),
        "overlapping": (
            header(file, {"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)),
            f"{file} is truncated or damaged",
        ),
        "a size beyond 64 bits": (
            header(file, {"a": tensor([2**40, 2**40], 0, 8)}, bytes(8)),
            f"{file} is truncated or damaged",
        ),
        "other names": (
            unsealed(arrays(file, lambda a: a.update(more=a.pop("query")))),
            f"{file} does not fit this config: missing: query; unexpected: more",
        ),
        "another shape": (
            unsealed(arrays(file, lambda a: a.update(query=a["query"][1:]))),
            "wrong shape: query",
        ),
        "whole numbers": (
            unsealed(arrays(file, lambda a: a.update(query=a["query"].astype(int)))),
            f"{file}: query is of dtype I64: must be one of F64, F32",
        ),
        "a tensor inside another": (
            unsealed(
                arrays(
                    "statistics.safetensors",
                    lambda a: a.update({"z_image_mean/a": np.ones(2, np.float32)}),
                )
            ),
            "statistics.safetensors has a name below that of a tensor",
        ),
        "a flipped bit": (flip(file), f"{file} is truncated or damaged .its SHA-256"),
        "a flipped bit of statistics": (flip("statistics.safetensors"), "its SHA-256"),
        "a flipped bit of the tokenizer": (flip("tokenizer/tokenizer.json"), "SHA-256"),
        "nan": (
            unsealed(arrays(file, poison("query", np.nan))),
            f"{file}: query holds NaN or infinity",
        ),
        "inf": (
            unsealed(arrays(file, poison("query", -np.inf, np.float16))),
            f"{file}: query holds NaN or infinity",
        ),
        "nan in bfloat16": (
            unsealed(arrays(file, poison("query", np.nan, ml_dtypes.bfloat16))),
            f"{file}: query holds NaN or infinity",
        ),
        "nan in statistics": (
            unsealed(
                arrays("statistics.safetensors", poison("z_image_std", np.nan)),
            ),
            "statistics.safetensors: z_image_std holds NaN",
        ),
        "no statistics": (
            unsealed(lambda folder: (folder / "statistics.safetensors").unlink()),
            r"needs the statistics z_image_mean of shape \(16,\), has none",
        ),
        "short statistics": (
            unsealed(
                arrays(
                    "statistics.safetensors",
                    lambda a: a.update(z_image_std=a["z_image_std"][:1]),
                )
            ),
            r"needs the statistics z_image_std of shape \(16,\), has \(1,\)",
        ),
    }

    def sampling(part: str, *path: str, value: Any = None, remove: bool = False):
        return change(config, "parts", part, *path, value=value, remove=remove)

    cases |= {
        "no sampling": (
            sampling("prior", "sampling", remove=True),
            "prior.sampling is None: must be an object",
        ),
        "no sampler": (
            sampling("prior", "sampling", "sampler", remove=True),
            "prior.sampling lacks sampler: must be one of ddpm",
        ),
        "a schedule of 8 TB": (
            sampling("decoder", "diffusion", "steps", value=10**12),
            "decoder.diffusion.steps is 1000000000000: must be a whole number from 1",
        ),
        "another schedule": (
            sampling("decoder", "diffusion", "schedule", value="foo"),
            "decoder.diffusion.schedule is 'foo': must be one of cosine, linear",
        ),
        "too many steps": (
            sampling("decoder", "sampling", "steps", value=10**9),
            "decoder.sampling.steps is 1000000000: must be a whole number from 0 to",
        ),
        "steps of words": (
            sampling("decoder", "sampling", "steps", value=["a"]),
            "decoder.sampling.steps is .*: must be a whole number",
        ),
        "guidance a word": (
            sampling("decoder", "sampling", "guidance", value="4"),
            "decoder.sampling.guidance is '4': must be a number",
        ),
        "no candidates": (
            sampling("prior", "sampling", "candidates", value=0),
            "prior.sampling.candidates is 0: must be a whole number from 1 to 1000",
        ),
        "a negative size": (
            sampling("decoder", "size", value=-8),
            "decoder.size is -8: must be a whole number from 1",
        ),
        "no low size": (
            sampling("upsampler_16", "low_size", remove=True),
            "upsampler_16 lacks low_size",
        ),
    }
    words = "tokenizer/tokenizer.json"
    cases |= {
        "another vocabulary": (
            unsealed(other_vocabulary),
            "the tokenizer has 515 ids, of which 514 ends a text; CLIP has 514 and 513",
        ),
        "no tokenizer.json": (
            unsealed(lambda folder: (folder / words).unlink()),
            "tokenizer",
        ),
        "tokenizer damaged": (unsealed(text(words, "{")), "found no tokenizer"),
        "tokenizer deep": (unsealed(text(words, DEEP)), "found no tokenizer"),
        "tokenizer of other words": (
            unsealed(text(words, '{"model": {"type": "BPE", "vocab": 3}}')),
            "tokenizer",
        ),
        "tokenizer a pipe": (
            unsealed(fifo("tokenizer/special_tokens_map.json")),
            "special_tokens_map.json is not a regular file",
        ),
        "tokenizer of 1 TB": (
            unsealed(sparse("tokenizer/tokenizer_config.json", 10**12)),
            "has 1,000,000,000,000 bytes: a tokenizer's has at most",
        ),
        "specials renamed": (
            unsealed(
                change("tokenizer/tokenizer_config.json", "eos_token", value="<end>")
            ),
            "tokenizer has .* ids",
        ),
    }
    return cases


def other_vocabulary(folder: Path) -> None:
    from dalle2_jax.data import tokenizer

    tokenizer.train(["aa"], tokenizer.SMALLEST + 1, 16).save(folder / "tokenizer")


def of_a_clip() -> dict[str, Case]:
    """What is done to a folder of transformers' CLIPModel."""
    config = "config.json"
    index = "model.safetensors.index.json"

    def indexed(names: Any):
        def spoil(folder: Path) -> None:
            (folder / "model.safetensors").unlink()
            (folder / index).write_text(json.dumps({"weight_map": names}))

        return spoil

    def number(tower: str, key: str, value: Any) -> Case:
        return change(config, f"{tower}_config", key, value=value), "config.json"

    cases = {
        f"{key} {value!r}": number(tower, key, value)
        for tower, key in (
            ("text", "hidden_size"),
            ("vision", "image_size"),
            ("vision", "patch_size"),
            ("text", "num_attention_heads"),
            ("text", "layer_norm_eps"),
        )
        for value in (-1, True, "8", [1, 2, 3], {}, 10**30)
        if (key, value) != ("layer_norm_eps", 10**30)
    }
    return cases | {
        "a million layers": (
            change(config, "text_config", "num_hidden_layers", value=10**6),
            "config.json: describes more layers than",
        ),
        "a billion layers": (
            change(config, "vision_config", "num_hidden_layers", value=10**9),
            "config.json: vision_layers is 1000000000: must be",
        ),
        "no patches": (
            change(config, "vision_config", "patch_size", value=0),
            "config.json: no network has these values",
        ),
        "a billion labels": (
            lambda folder: (
                change(config, "text_config", "num_labels", value=10**9)(folder),
                change(config, "text_config", "hidden_size", value=8)(folder),
            ),
            "wrong shape",
        ),
        "grey pictures": (
            change(config, "vision_config", "num_channels", value=1),
            "vision_config.num_channels is 1 in config.json: must be 3",
        ),
        "a tower of text": (
            change(config, "text_config", value="large"),
            "text_config is 'large' in config.json: must be an object",
        ),
        "an unknown activation": (
            change(config, "vision_config", "hidden_act", value=["gelu"]),
            r"vision_config.hidden_act is \['gelu'\] in config.json: must be one of",
        ),
        "no CLIP": (change(config, "model_type", value=3), "model_type is 3"),
        "an index that climbs": (
            indexed({"a": "../../etc/passwd"}),
            f"{index} names the file '../../etc/passwd': must be one beside it",
        ),
        "an index of its parent": (indexed({"a": ".."}), "must be one beside it"),
        "an absolute index": (indexed({"a": "/etc/passwd"}), "must be one beside it"),
        "an index of numbers": (indexed({"a": 3}), "names the file 3: must be one"),
        "an index of nothing": (indexed({}), f"{index} is damaged"),
        "an index of files that are gone": (
            indexed({"a": "gone.safetensors"}),
            "gone.safetensors is missing",
        ),
        "an index of itself": (indexed({"a": index}), "is truncated or damaged"),
        "an index, deep": (
            lambda folder: (indexed({})(folder), text(index, DEEP)(folder)),
            f"{index} is not valid JSON",
        ),
        "nan": (
            arrays("model.safetensors", poison("logit_scale", np.nan)),
            "model.safetensors: logit_scale holds NaN",
        ),
        "half of it": (sparse("model.safetensors", 1000), "is truncated or damaged"),
        "no file": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    }


def of_a_pipeline() -> dict[str, Case]:
    """What is done to a folder of diffusers."""

    def config(part: str, key: str, value: Any) -> Callable[[Path], None]:
        return change(f"{part}/config.json", key, value=value)

    cases: dict[str, Case] = {
        f"{part} {key} {value!r}": (config(part, key, value), f"{part}/config.json")
        for part, key in (
            ("prior", "num_layers"),
            ("prior", "num_attention_heads"),
            ("decoder", "block_out_channels"),
            ("decoder", "attention_head_dim"),
            ("decoder", "cross_attention_dim"),
            ("super_res_first", "layers_per_block"),
            ("super_res_last", "norm_num_groups"),
        )
        for value in (0, -1, "8", [], [0], 10**12, None)
        # What makes a network, but not that of the weights.
        if (key, value) not in (("num_layers", 0), ("layers_per_block", 0))
    }
    scheduler = "decoder_scheduler/scheduler_config.json"
    return cases | {
        "an index of paths": (
            change("model_index.json", "../../..", value=["diffusers", "UNet2DModel"]),
            "",  # which is not looked at
        ),
        "an index, deep": (text("model_index.json", DEEP), "not valid JSON"),
        "no class": (change("model_index.json", "_class_name", value=[1]), "is for"),
        "a million levels": (
            config("decoder", "block_out_channels", [8] * 10**5),
            "decoder/config.json",
        ),
        "a schedule of 8 TB": (
            change(scheduler, "num_train_timesteps", value=10**12),
            "diffusion.steps is 1000000000000: must be a whole number from 1 to",
        ),
        "a clip of words": (
            change(scheduler, "clip_sample_range", value="1"),
            "sampling.clip is '1': must be a number",
        ),
        "a prediction of lists": (
            change(scheduler, "prediction_type", value=[["x"] * 1000]),
            "prediction_type .* is not known",
        ),
        "sizes of words": (
            change("super_res_first/config.json", "sample_size", value="../16"),
            "super_res_first/config.json.sample_size is '../16': must be a whole",
        ),
        "nan": (
            arrays(
                "prior/diffusion_pytorch_model.safetensors", poison("clip_std", np.nan)
            ),
            "clip_std holds NaN",
        ),
    }
