"""The table of names, on a network small enough to check every number by hand."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.convert import table, weights
from dalle2_jax.errors import UserError

TABLE = {
    "token": "emb",
    "conv": "stem.conv",
    "qkv": "attn.q attn.k attn.v",
    "ln": "norm",
}
WHERE = Path("peer.safetensors")
RNG = np.random.default_rng(0)
SHAPES = {  # as PyTorch has them: [out, in], [out, in, h, w]
    "emb": (1, 3),
    "stem.conv.weight": (3, 2, 5, 4),
    "stem.conv.bias": (3,),
    **{f"attn.{name}.weight": (2, 3) for name in "qkv"},
    **{f"attn.{name}.bias": (2,) for name in "qkv"},
    "norm.weight": (6,),
    "norm.bias": (6,),
}
THEIRS = {
    name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()
}


class Net(nn.Module):
    """A convolution, one layer for three of theirs, a norm, a lone parameter."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (5, 4), padding="VALID", name="conv")(x)[:, 0, 0]
        x = x + self.param("token", nn.initializers.zeros, (3,))
        return nn.LayerNorm(epsilon=1e-5, name="ln")(nn.Dense(6, name="qkv")(x))

    def example(self):
        return (jnp.zeros((1, 5, 4, 2)),)


def read(arrays, **options):
    found = weights.of(WHERE, arrays)
    return table.to_ours(TABLE, Net(), found, leading={"emb": 1}, **options)


def test_it_computes_what_theirs_would():
    x = RNG.normal(size=(4, 5, 4, 2)).astype(np.float32)
    token = np.einsum("bhwi,oihw->bo", x, THEIRS["stem.conv.weight"])
    token += THEIRS["stem.conv.bias"] + THEIRS["emb"][0]
    parts = [
        token @ THEIRS[f"attn.{name}.weight"].T + THEIRS[f"attn.{name}.bias"]
        for name in "qkv"
    ]
    row = np.concatenate(parts, axis=1)
    row = (row - row.mean(1, keepdims=True)) / np.sqrt(row.var(1) + 1e-5)[:, None]
    expected = row * THEIRS["norm.weight"] + THEIRS["norm.bias"]
    ours = Net().apply({"params": read(THEIRS)}, x)
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_there_and_back_is_exact():
    back = table.to_theirs(TABLE, Net(), read(THEIRS), leading={"emb": 1})
    assert {name: array.shape for name, array in back.items()} == SHAPES
    for name, array in back.items():
        np.testing.assert_array_equal(array, THEIRS[name])


def test_each_weight_is_read_once_and_placed_at_once():
    read_names, placed = [], []
    found = weights.of(WHERE, THEIRS)
    found = found._replace(read=lambda n: read_names.append(n) or THEIRS[n])

    def place(array):
        placed.append(len(read_names))
        return jax.device_put(array)

    table.to_ours(TABLE, Net(), found, leading={"emb": 1}, place=place)
    assert sorted(read_names) == sorted(SHAPES)
    assert placed == sorted(placed) and placed[0] == 1 and placed[-1] == len(SHAPES)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.pop("norm.bias"), "missing: norm.bias"),
        (lambda x: x.update(extra=np.zeros(1)), "unexpected: extra"),
        (
            lambda x: x.update({"attn.k.bias": np.zeros(3)}),
            r"wrong shape: attn.k.bias \(3,\) instead of \(2,\)",
        ),
    ],
)
def test_every_name_and_shape_is_accounted_for_before_anything_is_read(change, message):
    arrays = dict(THEIRS)
    change(arrays)
    found = weights.of(WHERE, arrays)._replace(read=pytest.fail)
    with pytest.raises(UserError, match=f"{WHERE}.*{message}"):
        table.to_ours(TABLE, Net(), found, leading={"emb": 1})


def test_what_is_no_weight_of_the_network_can_be_ignored():
    arrays = THEIRS | {"position_ids": np.arange(3)}
    np.testing.assert_array_equal(
        read(arrays, ignore=["position_ids"])["token"], THEIRS["emb"][0]
    )


def test_a_table_is_nested_on_both_sides():
    assert table.nest("a/b", {"qkv": "q k", "ln": "n"}, "x.0.") == {
        "a/b/qkv": "x.0.q x.0.k",
        "a/b/ln": "x.0.n",
    }
