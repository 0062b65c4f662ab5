"""Names of devices that need not be there, and what is said of those that can't be."""

import jax
import pytest

from dalle2_jax.errors import UserError
from dalle2_jax.planning import topology


@pytest.mark.parametrize(
    "name, chip, count, tpu",
    [
        ("v5e:16x16", "TPU v5e", 256, True),
        ("v5p:4x4x4", "TPU v5p", 64, True),
        ("h100:8", "H100 SXM", 8, False),
        ("gpu:16xa100", "A100 80 GB", 16, False),
    ],
)
def test_parse(name, chip, count, tpu):
    found = topology.parse(name)
    assert (found.chip.name, found.count, found.tpu) == (chip, count, tpu)


@pytest.mark.parametrize(
    "name", ["", "v9:2x2", "h100", "h100:0", "rtx:8", "v5e:x", "8xv5e"]
)
def test_a_name_that_is_none(name):
    with pytest.raises(UserError, match=f"--topology={name}: .*v5e, v5p, v6e, a100"):
        topology.parse(name)


@pytest.mark.parametrize(
    "name",
    ["h100:99999999", "gpu:99999999xh100", "v5e:9999x9999", "h100:" + "9" * 5000],
)
def test_more_devices_than_can_be_planned(name):
    with pytest.raises(UserError, match="most that can be planned|no name of a topol"):
        topology.parse(name)


def test_a_tpu_is_not_counted_as_gpus_are():
    with pytest.raises(UserError, match="as v5e:16x16"):
        topology.parse("h100:2x2")


def test_gpus_are_stood_in_for_by_the_cpu():
    assert topology.devices(topology.parse("h100:4")) == jax.devices()[:4]
    with pytest.raises(UserError, match="only 8 CPU devices.*JAX_NUM_CPU_DEVICES=9"):
        topology.devices(topology.parse("h100:9"))


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install libtpu"):
        topology.devices(topology.parse("v5e:2x2"))


def test_with_libtpu():
    pytest.importorskip("libtpu")
    for name, kind in (("v5e:2x2", "TPU v5 lite"), ("v5p:2x2x1", "TPU v5")):
        devices = topology.devices(topology.parse(name))
        assert [d.device_kind for d in devices] == [kind] * 4
    with pytest.raises(UserError, match="--topology=v5e:3x3: .*not divisible"):
        topology.devices(topology.parse("v5e:3x3"))
