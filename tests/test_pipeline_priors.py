"""Where the decoder's image embedding is from, and the best of several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dalle2_jax
from dalle2_jax import checkpoint
from dalle2_jax.errors import UserError
from dalle2_jax.nn import codes
from dalle2_jax.nn.clip import cosine
from dalle2_jax.parts import decoder, part_of
from dalle2_jax.parts.component import Inputs
from dalle2_jax.parts.part import sample
from dalle2_jax.pipeline import generate
from dalle2_jax.pipeline.encode import encode_caption
from tests.tiny import make_stage

RED, BLUE = "a small red circle", "a large blue star on a black background"


@pytest.fixture(scope="module")
def model(tiny_models, tmp_path_factory):
    """A model with both priors and no upsampler; the codes' is far from its start."""
    stage = make_stage("ar_prior", tiny_models["decoder"])
    params = jax.tree.map(lambda x: 3 * x, stage.init(jax.random.key(0)))
    path = tmp_path_factory.mktemp("priors") / "model"
    checkpoint.export(path, **stage.export(params))
    return dalle2_jax.load(path)


def draw(model, **settings):
    return dalle2_jax.text_to_image(model, RED, **settings)


def assert_same_pictures(a, b):
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_each_prior_gives_other_pictures(model):
    calls = []
    names = ("diffusion", "autoregressive", "none", "caption")
    pictures = {
        name: draw(model, prior=name, progress=lambda *call: calls.append(call))
        for name in names
    }
    assert len({p.tobytes() for p in pictures.values()}) == 4
    np.testing.assert_array_equal(draw(model), pictures["diffusion"])
    # Where there is no prior, it has nothing to report.
    assert [c[0] for c in calls] == ["prior", "decoder"] * 2 + ["decoder"] * 2
    alone = model.replace(prior=None)
    np.testing.assert_array_equal(draw(alone), pictures["autoregressive"])


def test_none_is_the_text_embedding_as_an_images(model):
    tokens = model.tokenizer.encode([RED, ""], model.clip.network.context_length)
    caption, null = (
        encode_caption(model.clip, jnp.repeat(t[None], 8, 0)) for t in tokens
    )
    keys = generate.picture_keys(0, 8)
    inputs = Inputs(caption, null, keys)

    def decode(inputs):
        settings = [model.sampling["decoder"]] * 8
        x = sample(decoder.SAMPLER, model.decoder, settings, inputs)
        return generate.image.to_uint8(x)[:1]

    expected = decode(inputs.replace(z_image=caption.z_text))
    assert_same_pictures(draw(model, prior="none"), np.asarray(expected))
    # The caption alone: whatever embedding there is, the decoder isn't shown it.
    expected = decode(inputs)
    assert_same_pictures(draw(model, prior="caption"), np.asarray(expected))


def test_an_autoregressive_picture_does_not_depend_on_its_batch(model, monkeypatch):
    settings = dict(seed=3, prior="autoregressive")
    many = draw(model, num=12, **settings)
    assert len({p.tobytes() for p in many}) == 12
    assert_same_pictures(draw(model, num=2, **settings), many[:2])
    monkeypatch.setattr(generate, "BATCH", 1)  # 8 at once on 8 devices
    assert_same_pictures(draw(model, num=12, **settings), many)


def test_an_autoregressive_picture_does_not_depend_on_the_devices(model):
    one = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    alone = model._replace(devices=one)
    for part in ("clip", "ar_prior", "decoder"):
        moved = jax.device_put(getattr(model, part), jax.devices()[0])
        alone = alone.replace(**{part: moved})
    settings = dict(num=3, prior="autoregressive")
    assert_same_pictures(draw(alone, **settings), draw(model, **settings))


def test_guidance_and_temperature(model):
    first = draw(model, prior="autoregressive")
    same = draw(model, prior="autoregressive", guidance={"prior": 2.0})
    np.testing.assert_array_equal(same, first)  # the config's own
    other = draw(model, prior="autoregressive", guidance={"prior": 5.0})
    assert other.tobytes() != first.tobytes()
    cool, _ = embeddings(model, "ar_prior", temperature=0)
    hot, _ = embeddings(model, "ar_prior", temperature=9.0)
    assert spread(cool) < spread(hot)


def spread(z):
    return np.linalg.norm(z - z.mean(0), axis=-1).mean()


def embeddings(model, name, count=8, **sampling):
    """z_image of one caption by a prior, and its cosine with z_text."""
    tokens = model.tokenizer.encode([RED, ""], model.clip.network.context_length)
    caption, null = (
        encode_caption(model.clip, jnp.repeat(t[None], count, 0)) for t in tokens
    )
    keys = generate.picture_keys(0, count)
    settings = {**model.sampling[name], **sampling}
    statistics = part_of(name).read_statistics(model.statistics, settings)
    inputs = Inputs(caption, null, keys, **statistics)
    component = model.components[name]
    z = sample(part_of(name).sampler, component, [settings] * count, inputs)
    return np.asarray(z), np.asarray(cosine(z, caption.z_text))


@pytest.mark.parametrize("name", ["prior", "ar_prior"])
def test_the_best_of_several_is_kept(model, name):
    """More candidates are the same ones and others: a fit can only become better."""
    one, fit_one = embeddings(model, name, candidates=1)
    two, fit_two = embeddings(model, name, candidates=2)
    four, fit_four = embeddings(model, name, candidates=4)
    assert (fit_two >= fit_one - 1e-5).all() and (fit_four >= fit_two - 1e-5).all()
    assert fit_four.mean() > fit_one.mean()
    kept = np.abs(one - two).max(-1) < 1e-3
    assert 0 < kept.sum() < 8  # the first was the better one of two, but not always
    assert (np.abs(four - one).max(-1) > 1e-3).any()


def test_codes_are_decoded_by_the_models_own_tables(model):
    z, _ = embeddings(model, "ar_prior")
    again = codes.decode(model.codes, codes.encode(model.codes, z, 16), 16)
    np.testing.assert_allclose(again, z, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"prior": "gan"}, "prior='gan': .* has diffusion, autoregressive; choose"),
        ({"ar_prior": None}, {"prior": "autoregressive"}, "has diffusion; choose one"),
        ({"prior": None}, {"prior": "diffusion"}, "has autoregressive; choose one"),
        ({"prior": None, "ar_prior": None}, {}, "has no prior"),
        (
            {"prior": None, "ar_prior": None},
            {"prior": "diffusion"},
            "has none; choose one of none, caption",
        ),
        (
            {},
            {"prior": "autoregressive", "steps": {"prior": 3}},
            "steps for 'prior': give it for decoder, upsampler",
        ),
        ({}, {"prior": "none", "guidance": {"prior": 3.0}}, "guidance for 'prior'"),
        ({}, {"prior": "caption", "noise": {"prior": 3}}, "noise for 'prior'"),
    ],
)
def test_what_the_model_or_the_prior_lacks(model, changes, settings, message):
    with pytest.raises(UserError, match=message):
        draw(model.replace(**changes), **settings)


def test_given_noise_is_for_one_candidate(model):
    two = model.with_sampling(prior={"candidates": 2})
    with pytest.raises(UserError, match="candidates=2: it must have 1"):
        draw(two, noise={"prior": np.zeros((4, 1, 32))})


def test_a_model_without_its_tables_is_refused(model, tmp_path):
    export = checkpoint.load(model.path)
    checkpoint.export(tmp_path / "m", params=export.params, config=export.config)
    with pytest.raises(UserError, match="needs the statistics z_image_mean of shape"):
        dalle2_jax.load(tmp_path / "m")


def test_captions_are_blended_by_either_prior(model):
    alone = model.replace(prior=None)
    both = [dalle2_jax.blend(one, prompts=[RED, BLUE]) for one in (model, alone)]
    assert (both[0] != both[1]).any()
    given = {"guidance": {"prior": 1.0}}
    assert (dalle2_jax.blend(alone, prompts=[RED, BLUE], **given) != both[1]).any()
