"""The collectives in programs, and the time of a step."""

import pytest

from dalle2_jax.planning import cost
from dalle2_jax.planning.topology import Chip

CHIP = Chip("a chip", hbm=1e9, flops=1e12, bandwidth=1e11, network=1e10)


def test_roofline():
    found = cost.roofline(CHIP, flops=3e12, hbm_bytes=4e11, network_bytes=2e10)
    assert found == pytest.approx((3 / 0.6, 4 / 0.8, 2 / 0.8))
    assert cost.roofline(CHIP, flops=6e11, hbm_bytes=0, network_bytes=0).seconds == 1
    busy = cost.roofline(CHIP, flops=0, hbm_bytes=8e10, network_bytes=1.6e10)
    assert busy.seconds == pytest.approx(2) and busy.bound == "network"


HLO = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], bf16[4,16])) -> (s32[], bf16[4,16]) {
  %x = bf16[4,16]{1,0} get-tuple-element(%state), index=1
  %gathered = bf16[4,128]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, \
replica_groups=[2,8]<=[16], dimensions={1}, use_global_device_ids=true
}

%condition (state: (s32[], bf16[4,16])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%all-reduce-scatter.1 (input: bf16[64,64]) -> bf16[64,16] {
  %all-reduce.6 = bf16[64,64]{1,0} all-reduce(%input), channel_id=7, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %sliced = bf16[64,16]{1,0} dynamic-slice(%all-reduce.6, %i, %j)
}

%async_collective_fusion.1 (y: bf16[32]) -> bf16[32] {
  %all-gather.7 = bf16[32]{0} all-gather(%y), channel_id=9, replica_groups=[8,2]<=[16]
}

%async_collective_fusion.2 (y: bf16[32]) -> bf16[32] {
  %all-gather.8 = bf16[32]{0} all-gather(%y), channel_id=9, replica_groups=[8,2]<=[16]
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %all-reduce.1 = (f32[]{:T(128)}, f32[10,3]{1,0:T(8,128)S(1)}, /*index=2*/f32[7]{0}) \
all-reduce(%p, %q, %r), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %got = f32[] get-tuple-element(%all-reduce.1), index=0
  %loop = (s32[], bf16[4,16]) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"24"},"other":1}
  %fusion.1 = bf16[64,16]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.2 = bf16[32]{0} fusion(%p), calls=%async_collective_fusion.1
  %fusion.3 = bf16[32]{0} fusion(%p), calls=%async_collective_fusion.2
  %scattered = f32[100]{0} reduce-scatter(%p), \
replica_groups=mesh['data'=4,'fsdp'=4] {'fsdp'}, dimensions={0}, to_apply=%add
  %start.2 = (f32[8]{0}, f32[128]{0}) all-gather-start(%p), dimensions={0}
  %done.2 = f32[128]{0} all-gather-done(%start.2)
  %moved = (u8[64]{0}, u8[64]{0}, u32[], u32[]) collective-permute-start(%z), \
source_target_pairs={{0,1},{1,0}}
  %split = s8[64]{0} all-to-all(%z), replica_groups=mesh['a'=16] {'a':(1)2}
}
"""


def test_bytes_of_collectives():
    assert cost.collective_bytes(HLO, 16) == {
        # 38 floats among 4, there and back.
        "all-reduce": 2 * 38 * 4 * 3 // 4,
        # 24 times [4, 128] bfloat16 among 8, once 128 floats among all 16, and once 32
        # bfloat16 among 2, of which there are two parts.
        "all-gather": 24 * (4 * 128 * 2 * 7 // 8) + 128 * 4 * 15 // 16 + 32,
        # What is reduced is 4 times the result; and what a TPU has for one.
        "reduce-scatter": 100 * 4 * 4 * 3 // 4 + 64 * 64 * 2 * 3 // 4,
        "collective-permute": 64,
        "all-to-all": 64 // 2,
    }


def test_a_program_without_collectives():
    assert cost.collective_bytes("ENTRY %main (p: f32[]) -> f32[] {\n}\n", 1) == {}
