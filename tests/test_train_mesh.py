"""Where arrays lie on 8 devices."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dalle2_jax.errors import UserError
from dalle2_jax.planning import topology
from dalle2_jax.train import mesh


@pytest.mark.parametrize(
    "options, shape",
    [
        ({}, (8, 1)),
        ({"fsdp": 4}, (2, 4)),
        ({"data": 2, "fsdp": -1}, (2, 4)),
        ({"data": -1, "fsdp": -1}, (8, 1)),
        ({"data": 1, "fsdp": 8}, (1, 8)),
    ],
)
def test_make(options, shape):
    made = mesh.make(**options)
    assert made.axis_names == ("data", "fsdp") and made.devices.shape == shape


@pytest.mark.parametrize("data, fsdp", [(4, 1), (-1, 3), (-1, 16), (-1, 0)])
def test_a_mesh_that_does_not_fit(data, fsdp):
    with pytest.raises(UserError, match=f"mesh.fsdp={fsdp} does not fit 8 devices"):
        mesh.make(data, fsdp)


@pytest.mark.parametrize(
    "shape, spec",
    [
        ((256, 512), P(None, "fsdp")),
        ((3, 3, 320, 640), P(None, None, None, "fsdp")),
        ((1001, 256), P(None, "fsdp")),  # the longest that divides evenly
        ((2**16,), P("fsdp")),
        ((256, 128), P()),  # small
        ((1001, 257), P()),  # no axis divides evenly
        ((), P()),
    ],
)
def test_large_arrays_are_split(shape, spec):
    tree = {"x": jax.ShapeDtypeStruct(shape, np.float32)}
    assert mesh.shardings(tree, mesh.make(fsdp=4))["x"].spec == spec
    assert mesh.shardings(tree, mesh.make(fsdp=1))["x"].spec == P()


def test_put():
    tree = {"large": np.random.normal(size=(256, 512)), "small": 1.0, "none": None}
    placed = mesh.put(tree, mesh.make(fsdp=4))
    np.testing.assert_allclose(placed["large"], tree["large"], rtol=1e-6)
    assert {s.data.shape for s in placed["large"].addressable_shards} == {(256, 128)}
    assert placed["small"] == 1 and placed["none"] is None


def test_a_batch_is_split_over_all_devices():
    batch = {"x": np.arange(16 * 3).reshape(16, 3), "y": np.arange(16)}
    placed = mesh.put_batch(batch, mesh.make(fsdp=4))
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    assert {s.data.shape for s in placed["x"].addressable_shards} == {(2, 3)}


def test_micro_batches_are_each_split_over_all_devices():
    batch = {"x": np.arange(16 * 3).reshape(16, 3)}
    placed = mesh.put_batch(batch, mesh.make(fsdp=4), accumulate=2)
    np.testing.assert_array_equal(placed["x"], batch["x"].reshape(2, 8, 3))
    assert {s.data.shape for s in placed["x"].addressable_shards} == {(2, 1, 3)}


@pytest.mark.parametrize("name, fsdp", [("v6e:8x8", 4), ("v5p:4x4x4", 8)])
def test_an_axis_may_be_a_part_of_a_torus_axis(name, fsdp):
    pytest.importorskip("libtpu")
    devices = topology.devices(topology.parse(name))
    made = mesh.make(fsdp=fsdp, devices=devices)
    assert made.devices.shape == (64 // fsdp, fsdp)
    assert {d.id for d in made.devices.flat} == {d.id for d in devices}
