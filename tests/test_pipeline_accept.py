"""Whether the parts of a model fit one another."""

import numpy as np
import pytest

from dalle2_jax import hub
from dalle2_jax.convert import karlo
from dalle2_jax.errors import UserError
from dalle2_jax.nn.ar_prior import ARPrior
from dalle2_jax.parts import ar_prior
from dalle2_jax.pipeline import accept
from tests.golden import peer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("karlo")
    peer.write_pipeline(folder, "text_to_image")
    return hub.load(folder)


def altered(model, name, **values):
    """The model with another network of a part."""
    old = model.components[name]
    return model.replace(**{name: old.replace(network=old.network.clone(**values))})


def with_statistics(model, **changes):
    changed = {**model.statistics, **changes}
    kept = {name: value for name, value in changed.items() if value is not None}
    return model._replace(statistics=kept)


def test_parts_of_one_clip_fit(model):
    accept.whole(model)
    accept.whole(model.replace(clip=None))


@pytest.mark.parametrize(
    "part, values, message",
    [
        ("prior", {"clip_dim": 12}, "prior has clip_dim=12 and CLIP 16: load parts"),
        ("decoder", {"text_width": 8}, "decoder has text_width=8 and CLIP 16"),
        ("prior", {"context_length": 9}, "prior has context_length=9 and CLIP 16"),
        ("clip", {"text_width": None}, "needs CLIP's text tower"),
        ("clip", {"vocab_size": 513}, "tokenizer has 514 ids.*CLIP has 513 and 513"),
        ("clip", {"eot": 512}, "of which 513 ends a text; CLIP has 514 and 512"),
    ],
)
def test_parts_of_another_clip_are_refused(model, part, values, message):
    with pytest.raises(UserError, match=message):
        accept.whole(altered(model, part, **values))


def test_a_vocabulary_padded_beyond_the_tokenizers_is_fine(model):
    accept.whole(altered(model, "clip", vocab_size=576))


def test_statistics_have_the_shapes_that_the_priors_need(model):
    with pytest.raises(
        UserError, match=r"statistics z_image_std of shape \(16,\), has n"
    ):
        accept.whole(with_statistics(model, z_image_std=None))
    accept.whole(with_statistics(model, prior_x0_error=np.ones(1000, np.float32)))
    with pytest.raises(
        UserError, match=r"prior_x0_error of shape \(1000,\), has \(9,\)"
    ):
        accept.whole(with_statistics(model, prior_x0_error=np.ones(9, np.float32)))


def test_codes_have_the_shapes_of_their_network(model):
    network = ARPrior(16, 16, 16, 8, 1, 2, components=3, buckets=4, dot_products=2)
    whole = model.replace(ar_prior=model.prior.replace(network=network, params={}))
    whole = whole.with_sampling(ar_prior={})
    stored = ar_prior.zero_statistics(network)["ar_prior"]
    accept.whole(with_statistics(whole, ar_prior=stored))
    short = {**stored, "axes": np.ones((16, 1))}
    with pytest.raises(
        UserError, match=r"ar_prior/axes of shape \(16, 3\), has \(16, 1\)"
    ):
        accept.whole(with_statistics(whole, ar_prior=short))


def test_numbers_beyond_half_precision_are_named(tmp_path):
    peer.write_pipeline(tmp_path / "karlo", "text_to_image")
    read = karlo.read(tmp_path / "karlo")
    query = read.params["prior"]["query"]
    read.params["prior"]["query"] = np.full(query.shape, 1e6, np.float32)
    karlo.write(read, tmp_path / "large")
    assert hub.load(tmp_path / "large", dtype="bfloat16").prior is not None
    with pytest.raises(UserError, match="query holds numbers beyond float16: take"):
        hub.load(tmp_path / "large", dtype="float16")
