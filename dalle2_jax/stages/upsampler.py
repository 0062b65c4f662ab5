"""The upsampler stages: a picture at several times its side (64→256, 256→1024)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dalle2_jax.data import image, tokenizer
from dalle2_jax.diffusion import generate, sample, schedule
from dalle2_jax.nn.unet import UNet
from dalle2_jax.stages.finetune import start_params
from dalle2_jax.stages.stage import (
    Batch,
    Stage,
    add_part,
    denoising_loss,
    dtype_of,
    load_models,
    make_batches,
)


def make(config: ConfigDict) -> Stage:
    """The stage that ``configs/upsampler.py`` describes.

    No text, no guidance: the low-resolution picture, resized, is concatenated to the
    noised one (section 2.1). Trained on crops, run at full size.
    """
    base, origin = load_models(config)
    net = config.net.to_dict()
    model = UNet(**net, dtype=dtype_of(config))
    diffusion = config.diffusion.to_dict()
    table = schedule.make(diffusion["schedule"], diffusion["steps"])
    size, low_size = config.size, config.low_size
    name = f"upsampler_{size}"
    blur = config.blur.to_dict()
    chance = blur.pop("chance")

    def denoise(params: Any, low: Array, x_t: Array, t: Array, **kwargs: Any) -> Array:
        x = jnp.concatenate([x_t, low], axis=-1)
        return model.apply({"params": params}, x, t, **kwargs)

    def degrade(x0: Float[Array, "b s s 3"], key: Array) -> Float[Array, "b s s 3"]:
        """The low-resolution picture as the network sees it, resized back.

        Some are blurred, and some not, as none are in sampling (CDM, arXiv 2106.15282).
        """
        side = x0.shape[1]
        low = image.resize(x0, side * low_size // size)
        blurred = jax.random.bernoulli(key, chance, (len(low), 1, 1, 1))
        low = jnp.where(blurred, image.gaussian_blur(low, **blur), low)
        return image.resize(low, side)

    def init(key: Array) -> Any:
        return model.init(key, *model.example())["params"]

    def losses(params: Any, batch: Batch, key: Array, train: bool) -> Array:
        x0 = image.to_float(batch["image"])
        key, key_blur, key_dropout = jax.random.split(key, 3)
        low = degrade(x0, key_blur)
        rngs = {"dropout": key_dropout}
        return denoising_loss(
            lambda x_t, t: denoise(params, low, x_t, t, train=train, rngs=rngs),
            table,
            x0,
            key,
            diffusion,
        )

    def loss(params: Any, frozen: Any, batch: Batch, key: Array):
        return losses(params, batch, key, True).mean(), {}

    def metrics(params: Any, frozen: Any, batch: Batch, key: Array):
        return {"loss": losses(params, batch, key, False)}

    def preview(params: Any, frozen: Any, batch: Batch, key: Array):
        shown = batch["image"][:16]
        key, key_blur = jax.random.split(key)
        low = degrade(image.to_float(shown), key_blur)
        x = generate.generate(
            lambda x_t, t, low: denoise(params, low, x_t, t),
            low,
            None,
            sample.gaussian(jax.random.split(key, len(low)), low.shape[1:]),
            diffusion,
            config.sampling.to_dict(),
        )
        return {
            "low": image.to_uint8(low),
            "sampled": image.to_uint8(x),
            "true": shown,
        }

    def export(params: Any) -> dict[str, Any]:
        part = {
            "net": net,
            "diffusion": diffusion,
            "sampling": config.sampling.to_dict(),
            "size": size,
            "low_size": low_size,
        }
        has_text = base is not None and base.tokenizer_dir is not None
        text = tokenizer.load(base.tokenizer_dir) if has_text else None
        return add_part(base, name, part, params, text)

    return Stage(
        name=name,
        frozen={},
        init=init,
        loss=loss,
        metrics=metrics,
        preview=preview,
        batches=make_batches(config, {"image": size}),
        export=export,
        start=start_params(config, origin, name, net, init),
    )
