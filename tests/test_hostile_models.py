"""Damaged and hostile model folders: one line each, soon, and nothing is executed."""

import json
import shutil
import time

import pytest

from dalle2_jax import checkpoint, hub
from dalle2_jax.convert import karlo
from dalle2_jax.data import tokenizer
from dalle2_jax.errors import UserError
from tests import hostile_models
from tests.golden import peer
from tests.test_convert_openai_clip import CONFIG, stored, write
from tests.tiny import make_stage


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "pipeline"
    peer.write_pipeline(folder, "text_to_image")
    return folder


@pytest.fixture(scope="module")
def export(pipeline):
    folder = pipeline.parent / "export"
    model = karlo.read(pipeline)
    checkpoint.export(
        folder,
        params=model.params,
        config=model.config,
        tokenizer=tokenizer.load(model.tokenizer_dir),
        statistics=model.statistics,
    )
    return folder


@pytest.fixture(scope="module")
def clip(pipeline):
    folder = write(pipeline.parent / "clip", stored()[0])
    text = dict(CONFIG["text_config"])
    assert json.loads((folder / "config.json").read_text())["text_config"] == text
    shutil.copytree(pipeline / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def assert_refused(folder, message):
    """One line that says it, in a moment."""
    start = time.process_time()
    with pytest.raises(UserError, match=message) as error:
        hub.load(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1500
    assert time.process_time() - start < 30


def parameters(cases):
    """The cases; of those with many values most run only with -m slow."""
    rare = tuple(f" {value!r}" for value in hostile_models.RARE)
    return [
        pytest.param(
            *case, id=name, marks=[pytest.mark.slow] if name.endswith(rare) else []
        )
        for name, case in cases.items()
    ]


@pytest.mark.parametrize("spoil, message", parameters(hostile_models.of_an_export()))
def test_a_model_of_ours(export, tmp_path, spoil, message):
    folder = shutil.copytree(export, tmp_path / "model")
    spoil(folder)
    assert_refused(folder, message)


@pytest.mark.parametrize("spoil, message", parameters(hostile_models.of_a_clip()))
def test_a_clip(clip, tmp_path, spoil, message):
    folder = shutil.copytree(clip, tmp_path / "model")
    spoil(folder)
    assert_refused(folder, message)


@pytest.mark.parametrize("spoil, message", parameters(hostile_models.of_a_pipeline()))
def test_a_pipeline(pipeline, tmp_path, spoil, message):
    folder = shutil.copytree(pipeline, tmp_path / "model")
    spoil(folder)
    if message:
        assert_refused(folder, message)
    else:
        hub.load(folder)


@pytest.mark.parametrize("name", ["no width", "no net", "activation", "net a list"])
def test_training_upon_a_model_of_ours(export, tmp_path, name):
    spoil, message = hostile_models.of_an_export()[name]
    folder = shutil.copytree(export, tmp_path / "model")
    spoil(folder)
    for key in ("base", "init_from"):
        with pytest.raises(UserError, match=message):
            make_stage("prior", **{key: str(folder)})
