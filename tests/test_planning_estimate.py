"""What plans say of small programs."""

import importlib
import tempfile
from pathlib import Path

import jax
import pytest

from configs import clip as configs_clip
from dalle2_jax import parts
from dalle2_jax.errors import UserError
from dalle2_jax.planning import blueprint, estimate, topology
from dalle2_jax.planning.cost import Roofline

ROOT = Path(__file__).parent.parent
CLIP = parts.clip.arguments(configs_clip.get_config("tiny"), None)
H100 = topology.CHIPS["h100"]


def tiny(stage, **values):
    config = importlib.import_module(f"configs.{stage}").get_config("tiny")
    config.update_from_flattened_dict(values)
    return config


def test_a_plan_of_training_for_gpus():
    config = tiny("prior", batch_size=16)
    config.mesh.fsdp = 2
    found = estimate.plan(config, CLIP, topology.parse("h100:8"))
    assert found.program == "training prior" and tuple(found.mesh.values()) == (4, 2, 1)
    # Params, their average, and Adam's two moments; the CLIP; and two pictures and
    # captions a device. None of the arrays is large enough to be split.
    with tempfile.TemporaryDirectory() as folder:
        clip = jax.tree.leaves(blueprint.hollow(config, CLIP, folder).params["clip"])
    frozen = sum(x.nbytes for x in clip)
    batch = 2 * (32 * 32 * 3 + 24 * 4)
    assert found.parameters == 32_736
    assert found.arguments == pytest.approx(16 * 32_736 + frozen + batch, rel=0.01)
    assert found.needed == found.arguments + found.outputs + found.temporary
    assert found.fits and found.limit == 80e9
    # Each gradient is reduced over all 8 devices.
    assert found.sent["all-reduce"] >= 2 * 4 * 32_736 * 7 / 8
    assert found.seconds == found.roofline.seconds > 0
    assert found.days == pytest.approx(20 * found.seconds / 86_400)
    peak = found.flops / 8 / H100.flops
    assert found.utilisation == pytest.approx(peak / found.seconds)
    assert found.roofline.compute == pytest.approx(peak / 0.6)


@pytest.mark.slow
def test_a_plan_for_a_tpu():
    pytest.importorskip("libtpu")
    config = tiny("upsampler")
    config.mesh.fsdp = 2
    found = estimate.plan(config, None, topology.parse("v5e:2x2"))
    assert found.fits and found.parameters == 175_587
    assert 4 * 175_587 < found.needed < 2**30 and found.compiler_seconds > 0
    # Arithmetic does not depend on the device.
    gpus = estimate.plan(config, None, topology.parse("h100:4"))
    assert gpus.flops == found.flops
    assert found.arguments == gpus.arguments


def test_what_a_chip_has_no_room_for_is_not_compiled(monkeypatch):
    small = topology.Chip("small", 1e5, 1e12, 1e12, 1e12)
    monkeypatch.setitem(topology.CHIPS, "h100", small)
    where = topology.parse("h100:8")
    found = estimate.plan(tiny("prior", batch_size=16), CLIP, where)
    assert not found.fits and found.needed > 1e5 and found.temporary is None
    shown = estimate.table(found, small)
    assert "it does not fit" in shown and "not known" in shown


def test_a_plan_without_a_compiler():
    found = estimate.plan(
        tiny("upsampler"), None, topology.parse("h100:8"), effort="none"
    )
    assert found.fits is None and found.temporary is None and found.sent is None
    assert 16 * 175_587 <= found.needed == found.arguments < 20 * 175_587
    assert found.seconds == found.roofline.compute > 0
    assert "it may fit" in estimate.table(found, H100)


def make(fits=True, seconds=1.0, needed=2**30, **values):
    defaults = dict(
        program="training prior",
        topology="h100:8",
        mesh={"data": 4, "fsdp": 2, "tensor": 1},
        remat=True,
        parameters=1_000,
        examples=64,
        steps=86_400,
        fits=fits,
        needed=needed,
        limit=2**34,
        arguments=2**29,
        outputs=0,
        temporary=2**29,
        flops=3 * 10**15,
        touched=2**20,
        sent={"all-reduce": 2**21},
        roofline=Roofline(seconds, 0.25, 0.5),
        compiler_seconds=None,
        seconds=seconds,
        utilisation=0.6,
        compiled_in=1.0,
    )
    return estimate.Plan(**(defaults | values))


def test_the_table():
    lines = dict(
        line.split("  ", 1) if not line.startswith(" ") else line.strip().split("  ", 1)
        for line in estimate.table(make(seconds=2.0), H100).splitlines()
    )
    lines = {name: value.strip() for name, value in lines.items()}
    assert lines["memory a chip"] == "1 GiB of 16 GiB"
    assert lines["sent by a chip"] == lines["all-reduce"] == "2 MiB"
    assert lines["least time"] == "2 s, bound by compute"
    assert lines["a step"] == "2 s, 60% of the peak"
    assert lines["the run"] == "86,400 steps, 2.0 days"
    assert lines["verdict"] == "it fits"


def test_the_best_of_plans():
    slow, fast, large = make(), make(seconds=0.5, needed=1), make(seconds=0.5, needed=2)
    none = make(fits=False, seconds=0.1)
    assert estimate.best([slow, large, fast, none]) is fast
    assert estimate.best([none]) is None


def test_a_search_tries_what_may_help(monkeypatch):
    tried = []

    def fake(config, clip, topology, effort):
        tried.append((config.mesh.fsdp, config.mesh.tensor, config.net.remat))
        return make(fits=config.mesh.fsdp >= 4)

    monkeypatch.setattr(estimate, "plan", fake)
    config, where = tiny("prior", batch_size=64), topology.parse("v5e:8x8")
    found = list(estimate.search(config, None, where, "low"))
    fsdp = [(1, True), (2, True), (4, True), (4, False), (8, True), (8, False)]
    assert tried == [(n, 1, remat) for n, remat in fsdp] + [(4, 2, True)]
    assert [p.fits for p in found] == [False, False, True, True, True, True, True]
    # Fewer rows than devices.
    config.batch_size = 16
    del tried[:]
    list(estimate.search(config, None, where, "low"))
    assert tried == [(n, 4, remat) for n, remat in fsdp] + [(4, 8, True)]


def test_remat_of_networks_in_networks():
    config = tiny("decoder")
    assert estimate.remat(config.net) == [False, False]
    assert (
        estimate.remat(config.net, True) == estimate.remat(config.net) == [True, True]
    )
    assert config.net.unet.remat and config.net.text_encoder.remat


@pytest.mark.parametrize(
    "message",
    [
        "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required "
        "for HLO temporaries (132.50G) exceeds available HBM (15.75G).",
        "Ran out of memory in memory space hbm. Used 132.50G of 15.75G hbm.",
    ],
)
def test_what_a_tpus_compiler_says(message):
    error = RuntimeError(message)
    assert estimate.exceeded(error) == (132.5 * 2**30, 15.75 * 2**30)
    with pytest.raises(RuntimeError, match="another"):
        estimate.exceeded(RuntimeError("another error"))


@pytest.mark.parametrize(
    "where, values, message",
    [
        ("h100:4", {"mesh.fsdp": 8}, "mesh.fsdp=8, .* does not fit 4 devices"),
        ("h100:3", {}, "batch_size=16 must be a multiple of 3"),
    ],
)
def test_what_can_not_be_trained(where, values, message):
    with pytest.raises(UserError, match=message):
        estimate.plan(tiny("upsampler", **values), None, topology.parse(where))


def test_a_tpu_that_is_not():
    pytest.importorskip("libtpu")
    with pytest.raises(UserError, match="--topology=v5e:3x3"):
        estimate.plan(tiny("upsampler"), None, topology.parse("v5e:3x3"))
