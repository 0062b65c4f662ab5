"""Files of weights: what is finite, what fits a dtype, which bytes were written."""

import hashlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dalle2_jax import tensors
from dalle2_jax.errors import UserError

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bad_number_is_found_wherever_it_is(dtype):
    good = np.linspace(-3, 3, 200_000).astype(dtype).reshape(2, -1)
    assert tensors.is_finite(good)
    largest = ml_dtypes.finfo(dtype).max
    assert tensors.is_finite(np.array([largest, -largest, 0.0, -0.0], dtype))
    assert tensors.is_finite(np.zeros((0, 3), dtype))
    assert tensors.is_finite(np.array(1, dtype))
    for bad in (np.nan, np.inf, -np.inf):
        for at in (0, 65_536, 99_999):
            array = good.copy()
            array[1, at] = bad
            assert not tensors.is_finite(array), (bad, at)
            assert not tensors.is_finite(array.T)


def test_what_is_beyond_a_dtype_is_told():
    array = np.array([1.0, 1e5], np.float32)
    assert tensors.cast(array, np.float32) is array
    np.testing.assert_allclose(
        tensors.cast(array, ml_dtypes.bfloat16), array, rtol=0.01
    )
    with pytest.raises(OverflowError, match="^float16$"):
        tensors.cast(array, np.float16)
    message = "model: a/b holds numbers beyond float16: take bfloat16 or float32"
    with pytest.raises(UserError, match=message):
        tensors.place(lambda x: tensors.cast(x, np.float16), array, "a/b", "model")


def test_a_file_is_opened_without_reading_its_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.float16([1, 2]),
    }
    save_file(arrays, path)
    found = tensors.open_safetensors(path)
    assert found.shapes == {"a": (2, 3), "b": (2,)} and found.where == path
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.read(name), array)
        assert found.read(name).dtype == array.dtype


def test_a_tensor_larger_than_the_memory_is_not_read(tmp_path, monkeypatch):
    save_file({"a": np.zeros(1000, np.float32)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(tensors, "memory", lambda: 3999)
    with pytest.raises(UserError, match="a takes 0 GB, this machine has 0 GB"):
        tensors.open_safetensors(tmp_path / "a.safetensors").read("a")


def test_checksums(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").write_bytes(b"some bytes")
    digest = tensors.sha256(tmp_path / "a/b")
    assert digest == hashlib.sha256(b"some bytes").hexdigest()
    tensors.verify(tmp_path, {})
    tensors.verify(tmp_path, {"a/b": digest})
    for checksums, message in (
        ({"a/b": digest[::-1]}, "a/b is truncated or damaged .its SHA-256"),
        ({"a/b": 3}, "a/b is truncated or damaged"),
        ({"a": digest}, "a is no regular file"),
        ({"c": digest}, "c is missing"),
        ({"../b": digest}, "'../b', outside the folder"),
        ({str(tmp_path / "a/b"): digest}, "outside the folder"),
    ):
        with pytest.raises(UserError, match=message):
            tensors.verify(tmp_path, checksums)
