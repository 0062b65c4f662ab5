"""A setting is data: another value compiles no other program."""

import contextlib

import jax
import numpy as np
import pytest

import dalle2_jax
from dalle2_jax import checkpoint
from tests.tiny import make_stage

RED, BLUE = "a small red circle", "a large blue star on a black background"


@pytest.fixture(scope="module")
def model(tiny_models, tmp_path_factory):
    """A model with both priors and an upsampler."""
    stage = make_stage("ar_prior", tiny_models["upsampler"])
    path = tmp_path_factory.mktemp("both") / "model"
    checkpoint.export(path, **stage.export(stage.init(jax.random.key(0))))
    return dalle2_jax.load(path)


@contextlib.contextmanager
def compilations():
    """Yields a list that gets the name of each program that is made."""
    made = []

    def listen(event, seconds, **details):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            made.append(details.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield made
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def assert_compiles_once(first, *others):
    """After the first call the others make no program; each gives other pictures."""
    with compilations() as made:  # for other tests may have made the first's programs
        jax.jit(lambda x: x + 1)(1.0)
    assert made
    pictures = [first()]
    with compilations() as made:
        pictures += [other() for other in others]
    assert made == []
    assert len({p.tobytes() for p in pictures}) == len(pictures)


def test_text_to_image_compiles_once_for_all_settings(model):
    def draw(**settings):
        given = {"num": 8, "guidance": 2.0, "steps": 3} | settings
        return lambda: dalle2_jax.text_to_image(model, RED, **given)

    assert_compiles_once(
        draw(),
        draw(seed=1),
        draw(guidance=3.5),
        draw(guidance={"prior": 0.0, "decoder": 4.0}),
        draw(steps=5),
        draw(steps={"prior": 7, "decoder": "ddim4", "upsampler": ([0, 500, 999],)}),
        draw(negative_prompt=BLUE),
        lambda: dalle2_jax.text_to_image(
            model, [RED, BLUE], num=4, guidance=2.0, steps=3
        ),
    )
    assert_compiles_once(
        draw(guidance_interval=(100, 900)),
        draw(guidance_interval={"decoder": (0, 500)}),
        draw(guidance_interval={"prior": (300, 999)}, guidance=5.0),
    )
    assert_compiles_once(draw(sampler="ddim"), draw(sampler="ddim", steps=9))
    assert_compiles_once(
        draw(prior="autoregressive", steps=None),
        draw(prior="autoregressive", steps=None, guidance=4.0),
    )


def test_edits_compile_once_for_all_settings(model):
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
    mask = np.zeros((32, 32), bool)
    mask[8:20, 10:30] = True

    def steps(count):
        return {"steps": {"decoder": count}, "size": 16}

    assert_compiles_once(
        lambda: dalle2_jax.variations(model, one, num=8, eta=0.3, **steps(4)),
        lambda: dalle2_jax.variations(model, one, num=8, eta=0.7, **steps(4)),
        lambda: dalle2_jax.variations(model, other, num=8, eta=0.3, **steps(6)),
        lambda: dalle2_jax.interpolate(model, one, other, frames=8, **steps(4)),
        lambda: dalle2_jax.interpolate(model, one, other, frames=5, **steps(4)),
    )
    assert_compiles_once(
        lambda: dalle2_jax.img2img(model, one, RED, strength=0.5, **steps(6)),
        lambda: dalle2_jax.img2img(model, one, RED, strength=0.9, **steps(8)),
        lambda: dalle2_jax.img2img(model, other, BLUE, num=3, **steps(6)),
    )
    assert_compiles_once(
        lambda: dalle2_jax.inpaint(model, one, mask, RED, **steps(3)),
        lambda: dalle2_jax.inpaint(model, one, mask, RED, repeats=2, **steps(4)),
        lambda: dalle2_jax.inpaint(model, other, mask.T, BLUE, num=5, **steps(3)),
    )


def test_numbers_of_pictures_fall_into_buckets(model):
    """A batch has a power of two of pictures a device, of which there are 8 here."""

    def draw(num, seed=0):
        return lambda: dalle2_jax.text_to_image(
            model, RED, num=num, seed=seed, size=16, steps=2
        )

    assert_compiles_once(
        lambda: np.concatenate([draw(num)() for num in (8, 16, 32)]),
        *(draw(num, seed=num) for num in (1, 5, 7, 9, 15, 16, 20, 24)),
    )
