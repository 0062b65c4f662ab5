"""Karlo, and models of its shape, in the layout of diffusers' unCLIP pipelines.

As a command it is `dalle2 convert`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dalle2_jax import checkpoint, rules, tensors
from dalle2_jax.convert import karlo_config as configs
from dalle2_jax.convert import karlo_names as names
from dalle2_jax.convert import openai_clip, table, weights
from dalle2_jax.data import tokenizer
from dalle2_jax.diffusion import settings
from dalle2_jax.errors import UserError, short
from dalle2_jax.nn import build
from dalle2_jax.nn.clip import CLIP
from dalle2_jax.nn.decoder import Decoder
from dalle2_jax.nn.prior import DiffusionPrior
from dalle2_jax.nn.unet import UNet

TEXT_TO_IMAGE, VARIATION = "UnCLIPPipeline", "UnCLIPImageVariationPipeline"

Find = Callable[[Path], tensors.Weights]
Made = tuple[dict[str, Any], Any]  # a part's section of config.json, and its params
# A component of diffusers: its folder's name, its config, and its weights, if any.
Component = tuple[str, dict[str, Any], dict[str, np.ndarray] | None]


# From diffusers


def read(
    folder: str | Path,
    place: checkpoint.Place = np.asarray,
    only: Sequence[str] | None = None,
    variant: str | None = None,
) -> checkpoint.Export:
    """Read a pipeline's folder as a model of this package.

    Args:
      folder: what diffusers' UnCLIPPipeline or UnCLIPImageVariationPipeline saves.
      place: called with each param as it is read.
      only: the parts to read, as "clip"; None for all.
      variant: of the weights, as "fp16", where a part has several (see weights.choose).

    Raises:
      UserError: a network or file is missing or damaged, or weights do not fit.
    """
    folder = Path(folder)
    name = "model_index.json"
    index = _config(folder, name=name)
    if index.get("_class_name") not in (TEXT_TO_IMAGE, VARIATION):
        raise UserError(
            f"{folder / name} is for {short(index.get('_class_name'))}: must be "
            f"{TEXT_TO_IMAGE!r} or {VARIATION!r}"
        )
    # Of what such a folder holds: no other name in the file is taken for a path.
    listed = [name for name in configs.CLASSES if name in index]
    for name in listed:
        if not (folder / name).is_dir():
            raise UserError(f"{folder} has no {name}, which its model_index.json lists")
    find = partial(weights.find, variant=variant)
    size = _size(folder / "super_res_first")
    parts: dict[str, Callable[[], Made]] = {
        "clip": partial(_read_clip, folder, "image_encoder" in listed, place, find),
        "decoder": partial(_read_decoder, folder, place, find),
        f"upsampler_{size}": partial(_read_upsampler, folder, "first", place, find),
        f"upsampler_{size}_last": partial(_read_upsampler, folder, "last", place, find),
    }
    if "prior" in listed:
        parts["prior"] = partial(_read_prior, folder, place, find)
    made = {k: make() for k, make in parts.items() if only is None or k in only}
    return checkpoint.Export(
        config={"parts": {name: section for name, (section, _) in made.items()}},
        params={name: params for name, (_, params) in made.items()},
        tokenizer_dir=folder / "tokenizer",
        statistics=_read_statistics(folder, find) if "prior" in made else {},
    )


def read_any(
    folder: str | Path,
    place: checkpoint.Place = np.asarray,
    only: Sequence[str] | None = None,
    variant: str | None = None,
    accept: checkpoint.Accept | None = None,
) -> checkpoint.Export:
    """Read a model in any format: of a pipeline, of a CLIP, or of this package.

    Args:
      folder, place, only, variant: see `read`.
      accept: see `checkpoint.load`, for a model of this package.

    Raises:
      UserError: see `read`; or no weights are of that variant.
    """
    folder = Path(folder)
    if variant is not None:
        folders = [folder, *(folder / name for name in configs.CLASSES)]
        names = [p.name for f in folders if f.is_dir() for p in f.iterdir()]
        weights.check_variant(folder, names, variant)
    if (folder / "model_index.json").is_file():
        return read(folder, place, only, variant)
    config = folder / "config.json"
    if config.is_file() and "model_type" in weights.read_config(folder):
        return openai_clip.read(folder, place, variant)
    return checkpoint.load(folder, place, only, accept)


_config = weights.read_config


def _read_clip(
    folder: Path, has_images: bool, place: checkpoint.Place, find: Find
) -> Made:
    path = folder / "text_encoder"
    text, vision = _config(path), None
    found = [("", find(path))]
    if has_images:
        vision = _config(folder / "image_encoder")
        given = {"logit_scale": np.asarray(checkpoint.LOGIT_SCALE)}
        found.append(("", find(folder / "image_encoder")))
        found.append(("", weights.of(folder, given)))
    with build.describing(path / "config.json"):
        net = openai_clip.towers_net(text, vision)
    joined = weights.join(path, found)
    network = build.build(CLIP, net, joined.shapes, str(path / "config.json"))
    params = table.to_ours(
        openai_clip.clip_table(network),
        network,
        joined,
        place=place,
        ignore=openai_clip.BUFFERS,
    )
    return {"net": net}, params


def _read_prior(folder: Path, place: checkpoint.Place, find: Find) -> Made:
    path, found = folder / "prior/config.json", find(folder / "prior")
    config = _config(
        folder / "prior",
        "num_attention_heads",
        "attention_head_dim",
        "num_layers",
        "embedding_dim",
        "num_embeddings",
    )
    with build.describing(path):
        net = configs.prior_net(config)
    network = build.build(DiffusionPrior, net, found.shapes, str(path))
    configs.check(path, config, configs.prior_config(network))
    params = table.to_ours(
        names.prior_table(network.layers),
        network,
        found,
        place=place,
        leading=names.PRIOR_LEADING,
        ignore=names.PRIOR_STATISTICS,
    )
    # Steps and guidance are the defaults of the pipelines, here and below.
    sections = _settings(folder / "prior_scheduler", 25, 4.0)
    sections["sampling"] |= {"candidates": 1, "variance": None, "last_std": 0.0}
    return {"net": net, **sections}, params


def _read_statistics(folder: Path, find: Find) -> dict[str, np.ndarray]:
    """Mean and deviation of the embeddings, which lie among the prior's weights."""
    found, statistics = find(folder / "prior"), {}
    for theirs, ours in names.PRIOR_STATISTICS.items():
        if theirs not in found.shapes:
            raise UserError(f"{found.where} lacks {theirs}")
        statistics[ours] = found.read(theirs).astype(np.float32).reshape(-1)
    return statistics


def _read_decoder(folder: Path, place: checkpoint.Place, find: Find) -> Made:
    config = _config(folder / "decoder", *configs.DECODER_KEYS)
    projections = _config(
        folder / "text_proj", "clip_embeddings_dim", "clip_extra_context_tokens"
    )
    text = _config(folder / "text_encoder", "max_position_embeddings")
    path = folder / "decoder/config.json"
    found = weights.join(
        folder, [(f"{name}.", find(folder / name)) for name in names.DECODER]
    )
    with build.describing(path):
        unet = configs.unet_net(config)
    net = {
        "unet": unet,
        "clip_dim": projections["clip_embeddings_dim"],
        "context_length": text["max_position_embeddings"],
        "text_width": projections["clip_embeddings_dim"],
        "context_width": config["cross_attention_dim"],
        "image_tokens": projections["clip_extra_context_tokens"],
    }
    network = build.build(Decoder, net, found.shapes, str(path))
    size = _size(folder / "decoder")
    for name, theirs, wanted in (
        ("decoder", config, configs.decoder_config(network, size)),
        ("text_proj", projections, configs.projections_config(network)),
    ):
        configs.check(folder / name / "config.json", theirs, wanted)
    params = table.to_ours(
        names.decoder_table(UNet(**network.unet)), network, found, place=place
    )
    sections = _settings(folder / "decoder_scheduler", 25, 8.0)
    return {"net": net, **sections, "size": size}, params


def _read_upsampler(
    folder: Path, which: str, place: checkpoint.Place, find: Find
) -> Made:
    component = folder / f"super_res_{which}"
    path, found = component / "config.json", find(component)
    config = _config(component, *configs.UNET_KEYS)
    with build.describing(path):
        net = configs.unet_net(config)
    size = _size(component)
    network = build.build(UNet, net, found.shapes, str(path))
    configs.check(path, config, configs.upsampler_config(network, size))
    params = table.to_ours(names.unet_table(network), network, found, place=place)
    if which == "last":
        return {"net": net}, params
    sections = _settings(folder / "super_res_scheduler", 7, 1.0)
    # diffusers hands over the decoder's picture as it is.
    sections["sampling"]["round_low"] = False
    return {
        "net": net,
        **sections,
        "size": size,
        "low_size": _size(folder / "decoder"),
    }, params


def _size(component: Path) -> int:
    """The side of the pictures that a component makes."""
    config = _config(component)
    known = {"sample_size": rules.SIDE}
    rules.check(config, known, str(component / "config.json"))
    return config["sample_size"]


def _settings(folder: Path, steps: int, guidance: float) -> dict[str, dict[str, Any]]:
    name = "scheduler_config.json"
    needed = configs.SCHEDULER_KEYS
    config = _config(folder, *needed, name=name)
    sections = configs.settings(folder / name, config, steps, guidance)
    settings.check_part(sections, str(folder / name))
    return sections


# To diffusers


def write(model: checkpoint.Export, folder: str | Path) -> None:
    """Writes a model for diffusers' pipelines: the inverse of `read`.

    With a prior it is a folder of UnCLIPPipeline, without one a folder of
    UnCLIPImageVariationPipeline, which needs CLIP's image tower. Where the upsampler
    has no second network for the last step, its only one is written for both.

    Args:
      model: of Karlo's shape and of any size, with one upsampler.
      folder: where to; must be new or empty.

    Raises:
      UserError: the model lacks a part or is of another shape, or the folder is in use.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: give a new folder")
    configs.check_shape(model.config["parts"])
    if model.tokenizer_dir is None:
        raise UserError("the model has no tokenizer, which diffusers' pipelines need")
    index: dict[str, Any] = {
        "_class_name": TEXT_TO_IMAGE if "prior" in model.params else VARIATION,
        "_diffusers_version": "0.9.0",  # the first with these pipelines
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    for name, config, arrays in _components(model):
        index[name] = configs.CLASSES[name]
        (folder / name).mkdir(parents=True)
        file = configs.CONFIG_FILES.get(index[name][1], "config.json")
        _write_json(folder / name / file, config)
        if arrays is not None:
            library = index[name][0]
            stem = "model" if library == "transformers" else "diffusion_pytorch_model"
            path = folder / name / f"{stem}.safetensors"
            save_file(arrays, path, metadata={"format": "pt"})
            path.chmod(0o644)  # safetensors leaves it to its owner alone
    tokenizer.load(model.tokenizer_dir).save(folder / "tokenizer")
    _write_json(folder / "model_index.json", index)


def _components(model: checkpoint.Export) -> Iterator[Component]:
    """One after the other, so that only one lies in memory twice."""
    parts, params = model.config["parts"], model.params
    clip, decoder = CLIP(**parts["clip"]["net"]), Decoder(**parts["decoder"]["net"])
    found = table.to_theirs(openai_clip.clip_table(clip), clip, params["clip"])
    yield (
        "text_encoder",
        configs.text_encoder_config(clip),
        {k: v for k, v in found.items() if k.startswith("text_")},
    )
    if clip.image_size is not None:
        yield (
            "image_encoder",
            configs.image_encoder_config(clip),
            {k: v for k, v in found.items() if k.startswith("vis")},
        )
        yield "feature_extractor", configs.feature_extractor_config(clip), None
    if "prior" in parts:
        prior = DiffusionPrior(**parts["prior"]["net"])
        found = table.to_theirs(
            names.prior_table(prior.layers),
            prior,
            params["prior"],
            names.PRIOR_LEADING,
        )
        for theirs, ours in names.PRIOR_STATISTICS.items():
            found[theirs] = np.asarray(model.statistics[ours])[None]
        yield "prior", configs.prior_config(prior), found
        yield "prior_scheduler", configs.scheduler_config(parts["prior"]), None
    section = parts["decoder"]
    found = table.to_theirs(
        names.decoder_table(UNet(**decoder.unet)), decoder, params["decoder"]
    )
    for name, config in (
        ("text_proj", configs.projections_config(decoder)),
        ("decoder", configs.decoder_config(decoder, section["size"])),
    ):
        start = f"{name}."
        of_it = {k: v for k, v in found.items() if k.startswith(start)}
        yield name, config, {k.removeprefix(start): v for k, v in of_it.items()}
    yield "decoder_scheduler", configs.scheduler_config(section), None
    (name,) = configs.upsamplers(parts)
    section, first = parts[name], params[name]
    unet = UNet(**section["net"])
    config = configs.upsampler_config(unet, section["size"])
    for which, tree in (("first", first), ("last", params.get(f"{name}_last", first))):
        found = table.to_theirs(names.unet_table(unet), unet, tree)
        yield f"super_res_{which}", config, found
    yield "super_res_scheduler", configs.scheduler_config(section), None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    from dalle2_jax.commands import main

    main("convert")
