"""CLIP alone: its embeddings are those of transformers, of captions and pictures."""

import io

import numpy as np
import pytest
from PIL import Image

import dalle2_jax
from dalle2_jax.data import tokenizer
from dalle2_jax.errors import UserError
from tests.golden import peer


@pytest.fixture(scope="module")
def karlo(tmp_path_factory):
    """An image-variation folder, whose CLIP has both towers."""
    folder = tmp_path_factory.mktemp("karlo")
    peer.write_pipeline(folder, "variations")
    return folder


@pytest.fixture(scope="module")
def clip(karlo):
    return dalle2_jax.load_clip(karlo)


PICTURE = np.random.default_rng(0).integers(0, 256, (20, 31, 3)).astype(np.uint8)


def test_only_clip_is_loaded(clip):
    assert clip.decoder is None and clip.upsamplers == ()


def test_a_row_for_each(clip):
    texts = ["a red circle", "ab", "x"]
    z = dalle2_jax.encode_text(clip, texts)
    assert z.shape == (3, 16) and z.dtype == np.float32
    np.testing.assert_allclose(dalle2_jax.encode_text(clip, "ab"), z[1:2], atol=1e-6)
    z = dalle2_jax.encode_image(clip, [PICTURE, PICTURE[:, ::-1]])
    assert z.shape == (2, 16) and z.dtype == np.float32
    one = dalle2_jax.encode_image(clip, PICTURE)
    np.testing.assert_allclose(one, z[:1], atol=1e-6)
    assert np.abs(z[0] - z[1]).max() > 0.01


def test_pictures_of_any_kind(clip, tmp_path):
    """An array, a PIL image, its file, and a batch as one array are the same."""
    z = dalle2_jax.encode_image(clip, PICTURE)
    picture = Image.fromarray(PICTURE)
    picture.save(tmp_path / "picture.png")
    data = io.BytesIO()
    picture.save(data, "PNG")
    for same in (picture, str(tmp_path / "picture.png"), PICTURE[None], [picture]):
        np.testing.assert_array_equal(dalle2_jax.encode_image(clip, same), z)


@pytest.mark.parametrize(
    "pictures, message",
    [
        ([], "no pictures"),
        (np.zeros((4, 4, 3)), r"shape \(4, 4, 3\) and dtype float64: give uint8"),
        (np.zeros((4, 4, 2), np.uint8), "give uint8"),
        ("nowhere.png", "there is no file nowhere.png"),
    ],
)
def test_what_is_no_picture_is_refused(clip, pictures, message):
    with pytest.raises(UserError, match=message):
        dalle2_jax.encode_image(clip, pictures)


def test_what_has_no_image_tower_is_refused(tmp_path):
    peer.write_pipeline(tmp_path, "text_to_image")
    clip = dalle2_jax.load_clip(tmp_path)
    assert dalle2_jax.encode_text(clip, "ab").shape == (1, 16)
    with pytest.raises(UserError, match="no image tower: load it together with"):
        dalle2_jax.encode_image(clip, PICTURE)
    with pytest.raises(UserError, match="no text: give at least one"):
        dalle2_jax.encode_text(clip, [])


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_embeddings_are_those_of_transformers(tmp_path):
    """A whole CLIPModel with its processor, on pictures of several shapes."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tower = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 128,
    }
    last = tokenizer.SMALLEST - 1
    text = {
        "vocab_size": last + 1,
        "max_position_embeddings": 16,
        "bos_token_id": last - 1,
        "eos_token_id": last,
    }
    config = transformers.CLIPConfig(
        text_config=tower | text,
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.train([""], tokenizer.SMALLEST, 16).save(tmp_path)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    words = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = ["a red circle", "ab", "Ein Bild"]
    rng = np.random.default_rng(1)
    shapes = [(50, 91), (91, 50), (32, 32), (17, 12)]
    pictures = [rng.integers(0, 256, (*s, 3)).astype(np.uint8) for s in shapes]
    with torch.no_grad():
        given = words(texts, padding="max_length", max_length=16, return_tensors="pt")
        states = model.text_model(given.input_ids).pooler_output
        z_text = model.text_projection(states)
        seen = processor(
            [Image.fromarray(p) for p in pictures], return_tensors="pt"
        ).pixel_values
        z_image = model.visual_projection(model.vision_model(seen).pooler_output)
    clip = dalle2_jax.load_clip(tmp_path)
    for ours, theirs in (
        (dalle2_jax.encode_text(clip, texts), z_text.numpy()),
        (dalle2_jax.encode_image(clip, pictures), z_image.numpy()),
    ):
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
