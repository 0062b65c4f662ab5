"""Embeddings on disk: what is written, going on, and stages that train on them."""

import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from dalle2_jax import hub
from dalle2_jax.data import embeddings, shapes
from dalle2_jax.data.examples import BadExample
from dalle2_jax.data.sources import open_all, open_source
from dalle2_jax.errors import UserError
from dalle2_jax.pipeline.embed import embed
from tests.tiny import make_stage

COUNT = 23
SETTINGS = {
    "examples": COUNT,
    "shard_size": 10,
    "image_size": 16,
    "image_format": "png",
    "z_dtype": "float32",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of two captions each, and one that is damaged."""
    path = tmp_path_factory.mktemp("pictures")
    rng, lines = np.random.default_rng(0), []
    for i in range(COUNT):
        scene = shapes.sample_scene(rng, "train", 0.5)
        Image.fromarray(shapes.render(scene, 48)).save(path / f"{i:02d}.png")
        captions = [shapes.caption(scene), f"{shapes.caption(scene)} again"]
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "caption": captions}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def clip(tiny_models):
    return hub.load_local_clip(tiny_models["clip"])


def write(clip, folder, out, settings=SETTINGS, **options):
    model, fingerprint = clip
    source = open_all("folder", str(folder))
    settings = {**settings, "clip": fingerprint}
    return embed(model, source, out, settings, batch_size=1, **options)


@pytest.fixture(scope="module")
def embedded(clip, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("embedded") / "z"
    write(clip, folder, out)
    return out


def test_what_is_written(clip, folder, embedded):
    files = sorted(path.name for path in embedded.iterdir())
    assert files == [
        "metadata.json",
        *(
            f"shard-0000{i}-of-00003.{extension}"
            for i in range(3)
            for extension in ("array_record", "json")
        ),
    ]
    source = open_all("embeddings", str(embedded))
    pictures = open_all("folder", str(folder))
    assert len(source) == COUNT
    z = []
    for i in range(COUNT):
        ours, theirs = source[i], pictures[i]
        assert ours["key"] == theirs["key"] and ours["caption"] == theirs["caption"]
        tokens = clip[0].tokenizer.encode(ours["caption"], ours["tokens"].shape[1])
        np.testing.assert_array_equal(ours["tokens"], tokens)
        assert ours["z_text"].shape == (2, *ours["z_image"].shape)
        z.append(ours["z_image"])
        small = Image.open(io.BytesIO(theirs["image"])).resize((16, 16), 3)
        np.testing.assert_array_equal(Image.open(io.BytesIO(ours["image"])), small)
    metadata = json.loads((embedded / "metadata.json").read_text())
    assert metadata["count"] == COUNT and metadata["clip"] == clip[1]
    np.testing.assert_allclose(metadata["mean"], np.mean(z, 0), atol=1e-6)
    np.testing.assert_allclose(metadata["std"], np.std(z, 0), rtol=1e-4)


def test_bad_examples_are_counted_and_work_is_shared(clip, folder, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    (bad / "03.png").write_bytes((bad / "03.png").read_bytes()[:60])
    (bad / "12.png").write_bytes(b"no picture")
    out = tmp_path / "z"
    settings = {**SETTINGS, "z_dtype": "float16", "image_size": None}
    assert write(clip, bad, out, settings, process_index=1, process_count=2) is None
    with pytest.raises(UserError, match="shard-00000-of-00003.array_record is missing"):
        open_source("embeddings", out)
    metadata = write(clip, bad, out, settings, process_index=0, process_count=2)
    assert metadata["count"] == COUNT - 2
    assert metadata["skipped"] == {"unreadable picture": 2}
    source = open_source("embeddings", out, holdout=0)
    keys = [source[i]["key"] for i in range(len(source))]
    assert keys == [f"{i:02d}.png" for i in range(COUNT) if i not in (3, 12)]
    assert source[0]["z_image"].dtype == np.float16 and source[0]["image"] is None


def test_goes_on_where_it_was_interrupted(clip, folder, embedded, tmp_path, capsys):
    out = tmp_path / "z"
    shutil.copytree(embedded, out)
    second = embeddings.shard(out, 1, 3)
    whole = second.read_bytes()
    second.rename(second.with_suffix(".unfinished"))  # as a killed process leaves it
    before = embeddings.shard(out, 0, 3).stat().st_mtime_ns
    capsys.readouterr()
    assert write(clip, folder, out)["count"] == COUNT
    assert capsys.readouterr().out == "shard 2/3: 10 pictures\n"
    assert second.read_bytes() == whole
    assert embeddings.shard(out, 0, 3).stat().st_mtime_ns == before
    assert not list(out.glob("*.unfinished"))
    with pytest.raises(UserError, match="begun with image_size=16, and not 32: give"):
        write(clip, folder, out, {**SETTINGS, "image_size": 32})


def losses(name, base, steps=3, **data):
    """Of a few steps of training, and of the last batch afterwards."""
    given = {"drop_caption": 0.2, **{f"data.{k}": v for k, v in data.items()}}
    stage = make_stage(name, base, **given)
    params = stage.init(jax.random.key(0))
    optimizer = optax.adam(1e-3)
    state = optimizer.init(params)
    value_and_grad = jax.jit(jax.value_and_grad(stage.loss, has_aux=True))
    batches, found = stage.batches("train", 0), []
    for step in range(steps):
        batch = jax.tree.map(jnp.asarray, next(batches))
        key = jax.random.fold_in(jax.random.key(1), step)
        (loss, _), grads = value_and_grad(params, stage.frozen, batch, key)
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
        found.append(float(loss))
    batch = jax.tree.map(jnp.asarray, next(stage.batches("heldout", 0)))
    metrics = jax.jit(stage.metrics)(params, stage.frozen, batch, key)
    return [*found, *np.asarray(metrics["loss"])], batch


@pytest.mark.parametrize("name", ["prior", "ar_prior", "decoder"])
def test_stages_train_alike_on_pictures_and_embeddings(
    name, folder, embedded, tiny_models
):
    base = tiny_models["clip"]
    expected, _ = losses(name, base, source="folder", path=str(folder))
    found, batch = losses(name, base, source="embeddings", path=str(embedded))
    # Without its pictures CLIP's image tower has nothing to run on.
    assert "z_image" in batch and "clip_image" not in batch
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_embeddings_that_do_not_fit(clip, folder, embedded, tiny_models, tmp_path):
    def batches(name, path=embedded, base="clip", **values):
        base = tiny_models[base]
        data = {"data.source": "embeddings", "data.path": str(path)}
        return make_stage(name, base, **data, **values).batches("train", 0)

    other = tmp_path / "other"
    shutil.copytree(embedded, other)
    metadata = json.loads((other / "metadata.json").read_text())
    changed = {**metadata, "clip": "0" * 64}
    (other / "metadata.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"are of another CLIP than .*\n?--model$"):
        batches("prior", other)
    with pytest.raises(
        UserError, match='crop must be "center", flip False and jitter 0'
    ):
        batches("prior", **{"data.flip": True})
    with pytest.raises(UserError, match="has pictures of 16 px, and 32 px are needed"):
        batches("decoder", size=32)
    metadata = {**metadata, "image_size": None}
    (other / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="no pictures, and 16 px .*--image_size=16"):
        batches("decoder", other)
    assert "z_image" in next(batches("prior", other))

    (other / "metadata.json").write_text(json.dumps({**metadata, "count": None}))
    with pytest.raises(UserError, match="it is not complete; the command"):
        open_source("embeddings", other)
    (other / "metadata.json").write_text(json.dumps({**metadata, "format": 9}))
    with pytest.raises(UserError, match="has format 9"):
        open_source("embeddings", other)
    with pytest.raises(
        UserError, match="has no metadata.json: make it with dalle2 embed"
    ):
        open_source("embeddings", folder)
    with pytest.raises(UserError, match="exists and holds no embeddings"):
        write(clip, folder, folder)


def test_a_damaged_record_is_bad(embedded, tmp_path):
    out = tmp_path / "z"
    shutil.copytree(embedded, out)
    file = embeddings.shard(out, 0, 3)
    data = bytearray(file.read_bytes())
    data[200:300] = b"\xff" * 100
    file.write_bytes(data)
    source = open_all("embeddings", str(out))
    with pytest.raises(BadExample, match="damaged record: 00.png"):
        source[0]
    assert source[12]["key"] == "12.png"
    file.write_bytes(data[:1000])
    with pytest.raises(UserError, match="cannot read .*z"):
        open_all("embeddings", str(out))
