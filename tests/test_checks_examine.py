"""All checks of healthy configs, and of others."""

import numpy as np
import pytest
from PIL import Image

from configs import clip, prior
from dalle2_jax import checkpoint
from dalle2_jax.checks import speed
from dalle2_jax.checks.examine import examine as examine_all
from dalle2_jax.data import tokenizer


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 0.1)


def examine(values, config=None, **options):
    config = config or prior.get_config("tiny")
    config.update_from_flattened_dict(values)
    found = list(examine_all(config, **{"examples": 64, **options}))
    checks = {finding.check: finding for finding in found}
    assert len(checks) == len(found)
    return checks


def test_a_healthy_config():
    found = examine({"optim.learning_rate": 3e-3}, overfit_steps=30)
    assert list(found) == [
        "config",
        "examples",
        "sizes",
        "blank",
        "captions",
        "words",
        "repeats",
        "embeddings",
        "memory",
        "overfit",
        "params",
        "speed",
    ]
    assert {f.level for name, f in found.items() if name != "speed"} == {"ok"}
    assert "64 captions" in found["captions"].found
    assert "0 are cut" in found["captions"].found
    assert "in 30 steps" in found["overfit"].found


def test_a_config_that_does_not_learn():
    found = examine(
        {"optim.learning_rate": 0.0},
        clip.get_config("tiny"),
        overfit_steps=10,
        skip=("data", "memory", "speed"),
    )
    assert list(found) == ["config", "overfit", "params"]
    assert found["overfit"].level == "problem"


def test_a_base_of_other_pictures(tmp_path):
    bundled = checkpoint.load(checkpoint.BUNDLED, only=("clip",))
    names = "z_image_mean", "z_image_std"
    mean, std = (np.asarray(bundled.statistics[name]) for name in names)
    checkpoint.export(
        tmp_path / "base",
        params=bundled.params,
        config={"parts": bundled.config["parts"]},
        tokenizer=tokenizer.load(bundled.tokenizer_dir),
        statistics={"z_image_mean": mean + 3 * std, "z_image_std": std},
    )
    # What is trained on is as the bundled model's.
    skip = ("memory", "overfit", "speed")
    values = {"base": str(tmp_path / "base")}
    found = examine(values, skip=skip)["embeddings"]
    assert found.level == "ok" and "takes its own" in found.found
    assert "their means are 3 deviations off" in found.found


def test_faults_of_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text("a crocodile, somewhere, " * 9)
    (tmp_path / "03.png").write_bytes(b"")
    values = {"data.source": "folder", "data.path": str(tmp_path)}
    skip = ("memory", "overfit", "speed")
    found = examine({**values, "data.folder.holdout": 0.0}, skip=skip)
    levels = {name: f.level for name, f in found.items()}
    assert levels.pop("config") == levels.pop("blank") == "ok"
    # No two are alike, but this CLIP knows nothing else of them than shapes.
    levels.pop("duplicates"), levels.pop("embeddings")
    assert levels == {
        "examples": "warning",
        "sizes": "problem",
        "captions": "warning",
        "words": "warning",
        "repeats": "warning",
    }
    assert "11 of 12" in found["examples"].found
    assert "11 are cut" in found["captions"].found
