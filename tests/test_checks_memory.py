"""What a step takes of a device."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dalle2_jax.checks import memory
from dalle2_jax.train import mesh
from dalle2_jax.train.memory import limit
from dalle2_jax.train.update import TrainState


def test_a_step_is_compiled_and_measured():
    devices = mesh.make(fsdp=2)
    split = NamedSharding(devices, PartitionSpec(None, mesh.BATCH))
    whole = NamedSharding(devices, PartitionSpec())
    kernel = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=whole)
    batch = jax.ShapeDtypeStruct((1, 16, 256), jnp.float32, sharding=split)
    state = TrainState(kernel, kernel, kernel, (kernel, kernel))

    def step(state, frozen, batch):
        return jax.tree.map(lambda x: x + (batch[0] @ frozen).sum(), state)

    traced = jax.jit(step, donate_argnums=0).trace(state, kernel, batch)
    finding, compiled = memory.check(traced, (state, kernel, batch), 2**30)
    assert finding.level == "ok" and compiled is not None
    found = memory.measure(compiled, state, kernel, batch)
    each = 256 * 256 * 4
    assert found[:5] == (each, each, 2 * each, each, 16 * 256 * 4 // 8)
    assert 0 < found.temporary < 10 * each


def test_what_does_not_fit_is_a_problem():
    taken = memory.Memory(100, 100, 200, 50, 50, 500)
    assert memory.judge(taken, 1200).level == "ok"
    assert memory.judge(taken, 1100).level == "warning"
    finding = memory.judge(taken, 999)
    assert finding.level == "problem" and "1000 B of the 999 B" in finding.found
    assert "does not fit" in finding.remedy


def test_cpus_share_the_hosts_memory():
    devices = jax.devices()
    assert limit(devices) == limit(devices[:1]) // 8
    assert limit(devices[:1]) > 2**28

    class Device:
        def __init__(self, limit):
            self.bytes = limit

        def memory_stats(self):
            return {"bytes_limit": self.bytes}

    assert limit([Device(7), Device(5)]) == 5
