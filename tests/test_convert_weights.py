"""Files of weights in the formats of transformers and diffusers."""

import json
import os
import pickle
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from dalle2_jax.convert import weights
from dalle2_jax.errors import UserError


def test_safetensors_come_before_pickles(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    found = weights.find(tmp_path)
    assert found.where == tmp_path / "model.safetensors"
    assert found.shapes == {"a": (2,)}
    np.testing.assert_array_equal(found.read("a"), [1, 1])


def test_a_missing_shard_is_named(tmp_path):
    index = {"weight_map": {"a": "one.safetensors"}}
    name = "diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / name).write_text(json.dumps(index))
    with pytest.raises(UserError, match="one.safetensors is missing"):
        weights.find(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="model.safetensors.index.json is damaged"):
        weights.find(tmp_path)


def test_a_pickle_needs_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pip install torch"):
        weights.find(tmp_path)


@pytest.mark.parity
def test_a_pickle_of_weights_is_read(tmp_path):
    import torch

    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).bfloat16()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    found = weights.find(tmp_path)
    assert found.shapes == {"a": (2, 3), "b": (2,)}
    np.testing.assert_array_equal(found.read("a"), tensors["a"])
    np.testing.assert_array_equal(found.read("b"), [1, 1])


class Trap:
    """What a malicious pickle does: it runs code when it is read."""

    def __reduce__(self):
        return exec, ("import os; os.environ['TRAPPED'] = 'yes'",)


@pytest.mark.parity
@pytest.mark.parametrize("content", [Trap(), {"a": Trap()}, b"\x80garbage"])
def test_nothing_but_weights_is_unpickled(tmp_path, monkeypatch, content):
    monkeypatch.setenv("TRAPPED", "no")
    data = content if isinstance(content, bytes) else pickle.dumps(content)
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(UserError, match="pytorch_model.bin is damaged, or holds more"):
        weights.find(tmp_path)
    assert os.environ["TRAPPED"] == "no"
