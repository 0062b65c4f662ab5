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


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"weight_map": 3}', "is damaged: weight_map must be an object"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=f"model.safetensors.index.json {message}"):
        weights.find(tmp_path)


VARIANTS = {
    # What lies in a folder, the variant that is asked for, and what is read.
    "half alone": (["model.fp16.safetensors"], None, "model.fp16.safetensors"),
    "whole before half": (
        ["model.fp16.safetensors", "model.safetensors"],
        None,
        "model.safetensors",
    ),
    "half on demand": (
        ["model.fp16.safetensors", "model.safetensors"],
        "fp16",
        "model.fp16.safetensors",
    ),
    "whole where there is no half": (
        ["model.safetensors"],
        "fp16",
        "model.safetensors",
    ),
    "bfloat16 before float16": (
        ["model.fp16.safetensors", "model.bf16.safetensors"],
        None,
        "model.bf16.safetensors",
    ),
    "half before another average": (
        ["model.non_ema.safetensors", "model.fp16.safetensors"],
        None,
        "model.fp16.safetensors",
    ),
    "a whole pickle before half safetensors": (
        ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"],
        None,
        "diffusion_pytorch_model.bin",
    ),
    "safetensors of a variant before its pickle": (
        ["model.fp16.safetensors", "pytorch_model.fp16.bin"],
        "fp16",
        "model.fp16.safetensors",
    ),
    "shards of pickles": (
        [
            "pytorch_model-00001-of-00002.bin",
            "pytorch_model-00002-of-00002.bin",
            "pytorch_model.bin.index.json",
        ],
        None,
        "pytorch_model.bin.index.json",
    ),
    "shards of a variant": (
        [
            "model.fp16-00001-of-00001.safetensors",
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.fp16.json",
            "model.safetensors.index.json",
        ],
        "fp16",
        "model.safetensors.index.fp16.json",
    ),
    "a shard without index": (["model-00001-of-00002.safetensors"], None, None),
    "something else": (["clip.safetensors", "tf_model.h5", "model.json"], None, None),
}


@pytest.mark.parametrize("names, variant, chosen", VARIANTS.values(), ids=VARIANTS)
def test_which_files_are_read(names, variant, chosen):
    assert weights.choose(names, variant)[:1] == ([chosen] if chosen else [])
    assert weights.choose(reversed(names), variant) == weights.choose(names, variant)


def test_an_index_comes_with_its_own_shards():
    names, variant, chosen = VARIANTS["shards of a variant"]
    assert weights.choose(names, variant) == [chosen, names[0]]
    names, variant, chosen = VARIANTS["shards of pickles"]
    assert weights.choose(names, variant) == [chosen, *names[:2]]


def test_a_variant_is_read(tmp_path):
    for variant, value in (("", 1), (".fp16", 2)):
        array = np.full(2, value, np.float16)
        save_file({"a": array}, tmp_path / f"model{variant}.safetensors")
    assert weights.find(tmp_path).read("a")[0] == 1
    assert weights.find(tmp_path, "fp16").read("a")[0] == 2
    (tmp_path / "model.safetensors").unlink()
    assert weights.find(tmp_path).read("a")[0] == 2


def test_a_pickle_needs_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pip install torch.*as safetensors$"):
        weights.find(tmp_path)
    save_file({"a": np.ones(2, np.float16)}, tmp_path / "model.fp16.safetensors")
    with pytest.raises(UserError, match="as safetensors, or give variant='fp16'$"):
        weights.find(tmp_path)
    assert weights.find(tmp_path, "fp16").shapes == {"a": (2,)}


@pytest.mark.parity
def test_a_pickle_of_weights_is_read(tmp_path):
    import torch

    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).bfloat16()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    found = weights.find(tmp_path)
    assert found.shapes == {"a": (2, 3), "b": (2,)}
    np.testing.assert_array_equal(found.read("a"), tensors["a"])
    np.testing.assert_array_equal(found.read("b"), [1, 1])


@pytest.mark.parity
def test_pickles_in_shards_and_of_before_archives_are_read(tmp_path):
    import torch

    for i, name in enumerate("ab", 1):
        torch.save(
            {name: torch.full((2,), float(i))},
            tmp_path / f"pytorch_model-0000{i}-of-00002.bin",
            _use_new_zipfile_serialization=i == 1,
        )
    files = {
        name: f"pytorch_model-0000{i}-of-00002.bin" for i, name in ((1, "a"), (2, "b"))
    }
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    found = weights.find(tmp_path)
    assert found.shapes == {"a": (2,), "b": (2,)}
    assert [found.read(name)[0] for name in "ab"] == [1, 2]


@pytest.mark.parity
@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda t: {"a": t.ones(1).expand(10**6, 10**6)},
            "'a' is larger than the file",
        ),
        (lambda t: {"a": {"b": t.ones(2)}}, "holds more than weights"),
        (lambda t: [t.ones(2)], "holds more than weights"),
        (lambda t: {3: t.ones(2)}, "3 is no weight"),
        (lambda t: {"a": t.eye(2).to_sparse()}, "'a' is no weight"),
        (lambda t: {"a": t.tensor([1, 2])}, "'a' is of dtype torch.int64"),
        (lambda t: {"a": t.tensor([1.0, float("nan")])}, "a holds NaN"),
        (lambda t: {"a": t.tensor([1.0, float("inf")]).bfloat16()}, "a holds NaN"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, make, message):
    import torch

    torch.save(make(torch), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=message) as error:
        weights.find(tmp_path).read("a")
    assert "\n" not in str(error.value)


@pytest.mark.parity
def test_an_archive_that_unpacks_to_more_than_it_is_refused(tmp_path):
    import zipfile

    import torch

    torch.save({"a": torch.zeros(10**6)}, tmp_path / "whole.bin")
    with (
        zipfile.ZipFile(tmp_path / "whole.bin") as whole,
        zipfile.ZipFile(
            tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED
        ) as new,
    ):
        for member in whole.infolist():
            new.writestr(member.filename, whole.read(member))
    with pytest.raises(UserError, match="damaged, or holds more.*compressed"):
        weights.find(tmp_path)


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
