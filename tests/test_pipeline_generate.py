"""Text to image: determinism, settings, and every refusal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dalle2_jax
from dalle2_jax import parts
from dalle2_jax.errors import UserError
from dalle2_jax.parts.component import Inputs
from dalle2_jax.parts.part import sample
from dalle2_jax.pipeline import generate

RED, BLUE = "a small red circle", "a large blue star on a black background"


@pytest.fixture(scope="module")
def model(tiny_models):
    return dalle2_jax.load(tiny_models["upsampler"])


def upsample(model, component, low, keys):
    settings = [model.sampling["upsampler_32"]] * len(low)
    inputs = Inputs(low=low, randomness=keys)
    return sample(parts.upsampler.SAMPLER, component, settings, inputs)


def assert_same_pictures(a, b):
    """Equal up to the last bit of rounding, which the batch's size may change."""
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_pictures_of_each_prompt_stand_together(model):
    calls = []
    pictures = dalle2_jax.text_to_image(
        model, [RED, BLUE], num=3, progress=lambda *call: calls.append(call)
    )
    assert pictures.shape == (6, 32, 32, 3) and pictures.dtype == np.uint8
    assert calls == [("prior", 6, 6), ("decoder", 6, 6), ("upsampler 32", 6, 6)]
    assert len({p.tobytes() for p in pictures}) == 6


def test_pictures_are_handed_over_as_they_are_made(model, monkeypatch):
    monkeypatch.setattr(generate, "BATCH", 1)  # 8 at once on 8 devices
    handed = []

    def progress(stage, done, total):
        assert len(handed) == (0 if done == 8 else 1)

    progress.finished = handed.append
    quick = {"size": 16, "steps": {"prior": 1, "decoder": 1}, "progress": progress}
    pictures = dalle2_jax.text_to_image(model, RED, num=12, **quick)
    assert [len(batch) for batch in handed] == [8, 4]
    np.testing.assert_array_equal(np.concatenate(handed), pictures)

    handed.clear()
    quick["progress"] = Handed(handed)
    best = dalle2_jax.text_to_image(model, [RED, BLUE], num=2, best_of=5, **quick)
    assert [len(batch) for batch in handed] == [2, 2]
    np.testing.assert_array_equal(np.concatenate(handed), best)


class Handed:
    def __init__(self, handed):
        self.finished = handed.append

    def __call__(self, *_):
        pass


def test_a_picture_does_not_depend_on_its_batch(model, monkeypatch):
    many = dalle2_jax.text_to_image(model, RED, num=20, seed=3)
    few = dalle2_jax.text_to_image(model, RED, num=2, seed=3)
    assert_same_pictures(many[:2], few)
    monkeypatch.setattr(generate, "BATCH", 1)  # 8 at once on 8 devices
    assert_same_pictures(dalle2_jax.text_to_image(model, RED, num=20, seed=3), many)


def test_a_picture_does_not_depend_on_the_devices(model):
    one = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    alone = model._replace(devices=one)
    for part in ("clip", "prior", "decoder"):
        moved = jax.device_put(getattr(model, part), jax.devices()[0])
        alone = alone.replace(**{part: moved})
    alone, model = alone.up_to(16), model.up_to(16)
    assert_same_pictures(
        dalle2_jax.text_to_image(alone, RED, num=3),
        dalle2_jax.text_to_image(model, RED, num=3),
    )


def test_seed_prompt_steps_and_guidance_matter(model):
    def picture(prompt=RED, **settings):
        return dalle2_jax.text_to_image(model, prompt, **settings)

    first = picture()
    assert picture().tobytes() == first.tobytes()
    assert picture(seed=1).tobytes() != first.tobytes()
    assert picture(steps={"decoder": 3}).tobytes() != first.tobytes()
    assert picture(guidance={"decoder": 9.0}).tobytes() != first.tobytes()
    assert picture(steps={"upsampler": (2,)}).tobytes() != first.tobytes()
    same = picture(steps={"prior": 4, "decoder": "4", "upsampler": 3})
    assert same.tobytes() == first.tobytes()


def test_smaller_sizes_leave_upsamplers_out(model):
    assert model.sizes == (16, 32)
    assert dalle2_jax.text_to_image(model, RED, size=16).shape == (1, 16, 16, 3)


def test_the_upsampler_sees_the_small_picture(model):
    """Its low-resolution input, downsized again, is what it was given."""
    low = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)))
    keys = generate.picture_keys(0, 2)
    first = upsample(model, model.upsamplers[0], jnp.float32(low), keys)
    other = upsample(model, model.upsamplers[0], -jnp.float32(low), keys)
    assert np.abs(first - other).max() > 0.1


def test_few_pictures_are_split_over_the_devices(model):
    """Into strips, of which XLA exchanges the borders: the pictures are the same."""
    part = model.upsamplers[0]
    low = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3))
    arguments = jnp.float32(low), generate.picture_keys(0, 2)
    split = generate.in_strips(part, model.devices, 2)
    assert split.strips is not None
    whole = upsample(model, part, *arguments)
    strips = upsample(model, split, *arguments)
    assert strips.sharding.shard_shape(strips.shape) == (2, 4, 32, 3)
    np.testing.assert_allclose(strips, whole, atol=1e-4)
    for other, count in (
        (part, 8),
        (part.replace(tile=16), 2),
        (part.replace(size=24), 2),
    ):
        assert generate.in_strips(other, model.devices, count).strips is None


def test_a_model_loaded_with_tiles(model, tiny_models):
    """The larger they are, the nearer to the whole picture, whose noise they have."""
    path = tiny_models["upsampler"]
    assert dalle2_jax.load(path, tile=16).upsamplers[0].overlap == 4

    def make(model, **settings):
        return dalle2_jax.text_to_image(model, RED, **settings).astype(int)

    def distance(a, b):
        return np.abs(a - b).mean()

    whole, other = make(model), make(model, seed=1)
    half, most, all_of_it = (
        make(dalle2_jax.load(path, tile=tile, overlap=8)) for tile in (16, 24, 32)
    )
    np.testing.assert_array_equal(all_of_it, whole)
    assert 0 < distance(most, whole) < 0.5 * distance(half, whole)
    assert distance(half, whole) < distance(other, whole)
    for settings, message in (
        ({"tile": 15}, "tile=15: must be a multiple of 2"),
        ({"tile": 16, "overlap": 15}, "overlap=15 of tiles of 16 px: .* from 0 to 14"),
        ({"overlap": 8}, "overlap=8: give tile, too"),
    ):
        with pytest.raises(UserError, match=message):
            dalle2_jax.load(path, **settings)
    with pytest.raises(UserError, match="tile=16: the model .* has no upsampler"):
        dalle2_jax.load(tiny_models["decoder"], tile=16)


def test_a_long_prompt_is_cut_with_a_warning(model):
    with pytest.warns(UserWarning, match="cut to the 22"):
        dalle2_jax.text_to_image(model, "a red circle " * 20, size=16)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "no prompt"),
        (["a", " "], {}, "the prompt ' ' is empty"),
        ("a", {"num": 0}, "num=0"),
        ("a", {"seed": -1}, "seed=-1"),
        ("a", {"size": 64}, "size=64: this model makes pictures of side 16, 32"),
        ("a", {"steps": {"clip": 3}}, "steps for 'clip'"),
        ("a", {"steps": {"prior": 0}}, "0"),
        ("a", {"steps": {"upsampler": (2, 2)}}, "steps for 2 upsamplers"),
        ("a", {"guidance": {"upsampler": 2.0}}, "guidance for 'upsampler'"),
        ("a", {"guidance": {"decoder": -1.0}}, "guidance=-1.0: must be from 0 to 1000"),
    ],
)
def test_what_cannot_be_done_is_refused(model, prompts, settings, message):
    with pytest.raises(UserError, match=message):
        dalle2_jax.text_to_image(model, prompts, **settings)


def test_a_model_without_a_part_is_refused(tiny_models):
    model = dalle2_jax.load(tiny_models["prior"])
    with pytest.raises(UserError, match="has no decoder"):
        dalle2_jax.text_to_image(model, RED)


def test_variations_of_a_picture(model):
    picture = dalle2_jax.text_to_image(model, RED)[0]
    varied = dalle2_jax.variations(model, picture, num=3, size=16)
    assert varied.shape == (3, 16, 16, 3) and varied.dtype == np.uint8
    assert len({p.tobytes() for p in varied}) == 3
    again = dalle2_jax.variations(model, picture, num=2, size=16)
    assert_same_pictures(again, varied[:2])
    other = dalle2_jax.variations(model, 255 - picture, num=3, size=16)
    assert np.abs(other.astype(int) - varied).max() > 1


def test_given_noise_takes_the_place_of_the_seed(model):
    rng = np.random.default_rng(0)
    shapes = {"prior": (4, 2, 32), "decoder": (4, 2, 16, 16, 3)}
    noise = {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}
    pictures = [
        dalle2_jax.text_to_image(model, RED, num=2, seed=s, size=16, noise=noise)
        for s in (0, 1)
    ]
    np.testing.assert_array_equal(*pictures)
    assert pictures[0][0].tobytes() != pictures[0][1].tobytes()
    # One network's noise alone: the other's still follows from the seed.
    noise.pop("prior")
    pictures = [
        dalle2_jax.text_to_image(model, RED, num=2, seed=s, size=16, noise=noise)
        for s in (0, 1)
    ]
    assert pictures[0].tobytes() != pictures[1].tobytes()


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"clip": 0}, "noise for 'clip': give it for prior, decoder, upsampler"),
        ({"prior": np.zeros((3, 1, 32))}, r"\[3, 1, 32\]: must be \[4, 1, 32\]"),
        ({"upsampler": ()}, "noise for 0 upsamplers: there are 1"),
    ],
)
def test_noise_that_does_not_fit_is_refused(model, noise, message):
    with pytest.raises(UserError, match=message):
        dalle2_jax.text_to_image(model, RED, noise=noise)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num": 0}, "num=0"),
        ({"steps": {"prior": 3}}, "steps for 'prior': give it for decoder, upsampler"),
        ({"guidance": {"upsampler": 3.0}}, "guidance for 'upsampler': .* decoder"),
        ({"noise": {"prior": 0}}, "noise for 'prior'"),
    ],
)
def test_what_cannot_be_varied_is_refused(model, settings, message):
    with pytest.raises(UserError, match=message):
        dalle2_jax.variations(model, np.zeros((8, 8, 3), np.uint8), **settings)
    with pytest.raises(UserError, match="2 pictures: give one"):
        dalle2_jax.variations(model, np.zeros((2, 8, 8, 3), np.uint8))


def test_the_stream_ends_in_the_pictures(model):
    given = list(dalle2_jax.stream(model, [RED, BLUE], num=2, seed=1))
    assert [(stage, p.shape) for stage, p in given] == [
        ("decoder", (4, 16, 16, 3)),
        ("upsampler 32", (4, 32, 32, 3)),
    ]
    pictures = dalle2_jax.text_to_image(model, [RED, BLUE], num=2, seed=1)
    np.testing.assert_array_equal(given[-1][1], pictures)


def test_the_best_of_several_are_those_that_clip_likes(model):
    made = dalle2_jax.text_to_image(model, [RED, BLUE], num=4)
    best = dalle2_jax.text_to_image(model, [RED, BLUE], num=2, best_of=4)
    for k, prompt in enumerate((RED, BLUE)):
        scores = dalle2_jax.clip_score(model, made[4 * k : 4 * k + 4], [prompt] * 4)
        order = np.argsort(-scores)[:2]
        assert_same_pictures(best[2 * k : 2 * k + 2], made[4 * k : 4 * k + 4][order])
    with pytest.raises(UserError, match="best_of=1: must be from 2 to"):
        dalle2_jax.text_to_image(model, RED, num=2, best_of=1)


def test_a_negative_prompt_takes_the_place_of_the_empty_one(model):
    def draw(**settings):
        return dalle2_jax.text_to_image(model, RED, **settings)

    assert (draw(negative_prompt=BLUE) != draw()).any()
    alone = {"guidance": {"prior": 1.0, "decoder": 1.0}}  # then nothing leads away
    np.testing.assert_array_equal(draw(negative_prompt=BLUE, **alone), draw(**alone))


def test_pictures_are_shown_while_they_are_made(model):
    """And end as they do when nobody looks."""
    seen = list(dalle2_jax.stream(model, RED, steps=4, every=2, num=2))
    stages = [stage for stage, _ in seen]
    assert stages == ["decoder"] * 2 + ["upsampler 32"] * 2
    assert [x.shape for _, x in seen] == [(2, 16, 16, 3)] * 2 + [(2, 32, 32, 3)] * 2
    whole = dalle2_jax.text_to_image(model, RED, steps=4, num=2)
    assert_same_pictures(seen[-1][1], whole)
    assert (seen[2][1] != whole).any()
