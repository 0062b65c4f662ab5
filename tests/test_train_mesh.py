"""Where arrays lie on 8 devices."""

import dataclasses
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import clip as configs_clip
from dalle2_jax import parts
from dalle2_jax.errors import UserError
from dalle2_jax.nn import layers, unet
from dalle2_jax.planning import blueprint, topology
from dalle2_jax.train import checkpoints, mesh


@pytest.mark.parametrize(
    "options, shape",
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1)),
        ({"data": -1, "fsdp": -1}, (8, 1, 1)),
        ({"data": 1, "fsdp": 8}, (1, 8, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 2, "tensor": -1}, (2, 1, 4)),
    ],
)
def test_make(options, shape):
    made = mesh.make(**options)
    assert made.axis_names == ("data", "fsdp", "tensor") and made.devices.shape == shape


@pytest.mark.parametrize(
    "shape", [(4, 1, 1), (-1, 3, 1), (-1, 16, 1), (-1, 0, 1), (-1, 1, 3), (4, 2, 2)]
)
def test_a_mesh_that_does_not_fit(shape):
    given = "mesh.data={}, mesh.fsdp={}, mesh.tensor={}".format(*shape)
    with pytest.raises(UserError, match=f"{given} does not fit 8 devices"):
        mesh.make(*shape)


@dataclasses.dataclass(frozen=True)
class Device:
    """Of one of several processes."""

    id: int
    process_index: int


def test_neighbours_along_tensor_are_of_one_process():
    devices = [Device(i, i % 2) for i in range(8)]
    made = mesh.make(fsdp=2, tensor=2, devices=devices)
    for row in made.devices.reshape(-1, 2):
        assert len({device.process_index for device in row}) == 1
    with pytest.raises(UserError, match="mesh.tensor=8 must divide 4, the devices of"):
        mesh.make(tensor=8, devices=devices)


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


def spec_of(path, *shape, tensor=2):
    """How an array lies that is in such dicts."""
    tree = jax.ShapeDtypeStruct(shape, np.float32)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    made = mesh.make(fsdp=2, tensor=tensor)
    (found,) = jax.tree.leaves(mesh.shardings(tree, made))
    return found.spec


def test_kernels_are_split_over_tensor():
    assert spec_of("block_0/qkv/kernel", 256, 768) == P("fsdp", "tensor")
    assert spec_of("nu/block_0/mlp_in/kernel", 256, 1024) == P("fsdp", "tensor")
    assert spec_of("block_0/mlp_out/kernel", 1024, 256) == P("tensor", "fsdp")
    conv_1 = P(None, None, "fsdp", "tensor")
    assert spec_of("res/conv_1/kernel", 3, 3, 96, 192) == conv_1
    conv_2 = P(None, None, "tensor", "fsdp")
    assert spec_of("res/conv_2/kernel", 3, 3, 192, 192) == conv_2


def test_all_else_is_not():
    assert spec_of("qkv/kernel", 256, 768, tensor=1) == P(None, "fsdp")
    assert spec_of("qkv/kernel", 257, 769) == P()
    assert spec_of("qkv/kernel", 16, 48) == P()
    assert spec_of("qkv/bias", 2**16) == P("fsdp")
    assert spec_of("skip/kernel", 256, 512) == P(None, "fsdp")
    # Adafactor's means of the squared gradient of a convolution.
    assert spec_of("v_row/conv_1/kernel", 3, 3, 2**14) == P(None, None, "fsdp")


# Large kernels of the paper's networks that are as without tensor: what is at their
# ends, and what isn't in pairs.
WHOLE = {
    "clip": {"patch_embedding", "projection"},
    "prior": {"text_states_in", "time_in", "time_out", "z_image_in", "z_image_out"}
    | {"z_text_in"},
    "ar_prior": {"text_states_in", "z_text_in", "logits_out"},
    "decoder": {"embedding", "skip", "time_in", "time_out", "text_to_vector"}
    | {"states_to_tokens", "z_image_to_vector", "z_image_to_tokens"},
    "upsampler": {"embedding", "skip", "time_in", "time_out"},
}


@pytest.mark.parametrize("stage", WHOLE)
def test_every_large_kernel_of_the_paper(stage, tmp_path):
    size = "paper_256" if stage == "upsampler" else "paper"
    config = importlib.import_module(f"configs.{stage}").get_config(size)
    clip = parts.clip.arguments(configs_clip.get_config("paper"), None)
    model = blueprint.hollow(config, clip, str(tmp_path))
    (params,) = (model.params[name] for name in model.params if stage in name)
    made = mesh.make(fsdp=2, tensor=2)
    whole, names = set(), set()
    for path, sharding in jax.tree.leaves_with_path(mesh.shardings(params, made)):
        layer, name = ([None] + [key.key for key in path])[-2:]
        if "tensor" in sharding.spec:
            names.add(layer)
            assert "fsdp" in sharding.spec
        elif name == "kernel" and sharding.spec:
            whole.add(layer)
    assert whole <= WHOLE[stage] and names <= set(mesh.TENSOR_AXIS)
    kernels = {"qkv", "out", "mlp_in", "mlp_out"}
    convs = {"conv_1", "conv_2"}
    everything = kernels | convs | {"context_kv"}
    assert names == {"decoder": everything, "upsampler": convs}.get(stage, kernels)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "module, inputs",
    [
        (layers.Block(heads=4), [(32, 16, 64)]),
        (unet.ResBlock(64, groups=8), [(32, 4, 4, 64), (32, 64)]),
        (unet.AttentionBlock(16, groups=8), [(32, 4, 4, 64), (32, 8, 48)]),
    ],
)
def test_the_products_of_a_block_are_split(module, inputs):
    """Half of the arithmetic for the same rows, the same gradient."""
    rng = np.random.default_rng(0)
    inputs = {str(i): np.float32(rng.normal(size=n)) for i, n in enumerate(inputs)}
    more = (False,) if isinstance(module, unet.ResBlock) else ()
    params = module.init(jax.random.key(0), *map(jnp.asarray, inputs.values()), *more)[
        "params"
    ]
    # The last kernel of U-Nets begins at zero.
    params = jax.tree.map(lambda x: x + 0.01 * (x.ndim > 1), params)

    def loss(params, inputs):
        y = module.apply({"params": params}, *inputs.values(), *more)
        return (y**2).mean()

    def run(made):
        placed = mesh.shardings(params, made, min_size=64 * 32)
        arguments = jax.device_put(params, placed), mesh.put_batch(inputs, made)
        step = jax.jit(jax.grad(loss), out_shardings=placed).lower(*arguments).compile()
        return step(*arguments), step.cost_analysis()["flops"], step.as_text()

    alone, flops, _ = run(mesh.make(data=4, devices=jax.devices()[:4]))
    split, half, program = run(mesh.make(data=4, tensor=2))
    jax.tree.map(close, split, alone)
    assert half < 0.6 * flops
    # No kernel is gathered, but for those that hold several matrices side by side.
    gathered = re.findall(
        r'= f32\[([\d,]+)\]\S* all-gather\(.*op_name="(.*?)"', program
    )
    for shape, name in gathered:
        assert "qkv" in name or "context_kv" in name or shape.count(",") == 0, name


def test_what_was_saved_on_one_mesh_is_restored_on_another(tmp_path):
    state = {"mlp_in": {"kernel": np.random.normal(size=(256, 512))}}
    with checkpoints.Run(tmp_path, 1, 0) as run:
        run.save(1, mesh.put(state, mesh.make(fsdp=2, tensor=2)), {})
        run.wait()
        made = mesh.make(fsdp=4, tensor=2)
        abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state))
        found = run.restore(
            mesh.with_shardings(abstract, mesh.shardings(abstract, made)), []
        )
    kernel = found["mlp_in"]["kernel"]
    np.testing.assert_allclose(kernel, state["mlp_in"]["kernel"], rtol=1e-6)
    assert {s.data.shape for s in kernel.addressable_shards} == {(64, 256)}


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


def test_a_batch_is_replicated_over_tensor():
    batch = {"x": np.arange(16 * 3).reshape(16, 3)}
    placed = mesh.put_batch(batch, mesh.make(fsdp=2, tensor=2))
    np.testing.assert_array_equal(placed["x"], batch["x"])
    assert {s.data.shape for s in placed["x"].addressable_shards} == {(4, 3)}


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
    assert made.devices.shape == (64 // fsdp, fsdp, 1)
    assert {d.id for d in made.devices.flat} == {d.id for d in devices}


def test_bytes_are_those_of_one_device():
    place = NamedSharding(mesh.make(fsdp=4), P("fsdp"))
    x = jax.device_put(np.zeros((8, 3), np.float32), place)
    assert mesh.local_bytes({"x": x}) == 8 * 3 * 4 // 4
