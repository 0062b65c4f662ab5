"""A state that does not fit the devices is refused, with what would hold it."""

import jax
import jax.numpy as jnp
import pytest

from dalle2_jax.errors import UserError
from dalle2_jax.train import loop, memory, mesh
from dalle2_jax.train.update import TrainState
from tests.linear import linear, make_batches
from tests.test_train_loop import make_config

GIB = 2**30
PARAMS = {"kernel": jax.ShapeDtypeStruct((2**14, 2**14), jnp.float32)}  # 1 GiB
STEP = jax.ShapeDtypeStruct((), jnp.int32)
STATE = TrainState(STEP, PARAMS, PARAMS, (PARAMS, PARAMS))


@pytest.mark.parametrize(
    "there, fsdp", [(4 * GIB, None), (3 * GIB, 2), (2 * GIB, 4), (GIB, 8)]
)
def test_the_least_fsdp_that_holds_the_state_and_its_gradient(there, fsdp):
    if fsdp is None:
        memory.check(STATE, {}, mesh.make(), there)
        return
    message = (
        f"with mesh.fsdp=1 the state takes 4 GiB of a device's {there // GIB} GiB "
        r"\(params 1 GiB, EMA 1 GiB, optimiser 2 GiB, frozen 0 GiB\): "
        f"--config.mesh.fsdp={fsdp} holds it and the gradient, in {5 / fsdp:.3g} GiB"
    )
    with pytest.raises(UserError, match=message):
        memory.check(STATE, {}, mesh.make(), there)


def test_a_state_that_no_mesh_holds():
    with pytest.raises(UserError, match="no mesh.fsdp of 8 devices holds it: give mor"):
        memory.check(STATE, PARAMS, mesh.make(fsdp=2), GIB // 2)


def test_the_loop_looks_before_it_compiles(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "limit", lambda devices: 1000)
    with pytest.raises(UserError, match="no mesh.fsdp of 8 devices holds it"):
        loop.train(linear(), make_config(), make_batches(), make_batches(), tmp_path)
    assert not any((tmp_path / "checkpoints").iterdir())
