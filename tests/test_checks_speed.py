"""Which is the slower, the data or the devices."""

import itertools
import time

import jax
import jax.numpy as jnp
import pytest

from dalle2_jax.checks import speed


def test_batches_are_made_several_at_a_time():
    # Two at a time, each pair in a second.
    assert speed.rate([1.0, 1.0, 2.0, 2.0, 3.0, 3.0], ahead=2) == pytest.approx(2.0)
    assert speed.rate([0.5, 1.0], ahead=1) == pytest.approx(2.0)


def test_arrivals():
    def batches():
        while True:
            time.sleep(0.02)
            yield {}

    times = speed.arrivals(batches(), seconds=0.2, ahead=3)
    assert 4 <= len(times) <= 11 and times == sorted(times)
    assert times[0] >= 0.02 and times[-1] >= 0.2
    assert len(speed.arrivals(batches(), seconds=0.0, ahead=3)) == 4
    assert len(speed.arrivals(itertools.repeat({}), 60.0, 1)) == speed.MOST


def test_steps():
    seen = []

    @jax.jit
    def update(state, frozen, batch, step):
        return state + batch, {"loss": state}

    def slow(state, frozen, batch, step):
        time.sleep(0.02)
        seen.append(int(step))
        return update(state, frozen, batch, step)

    rate = speed.step_rate(slow, jnp.zeros(()), None, 1.0, seconds=0.2)
    assert 5 < rate < 50
    assert seen == list(range(len(seen))) and len(seen) > 2


def judge(data, steps, **values):
    options = dict(batch_size=64, wanted=7200, workers=0, threads=4, cores=8)
    return speed.judge(data, steps, **{**options, **values})


def test_the_devices_are_the_slower():
    finding = judge(10.0, 2.0)
    assert finding.level == "ok" and "need about 1:00:00" in finding.found
    assert "(640 pictures/s)" in finding.found
    assert "peak" not in finding.found
    assert "at 40% of their peak" in judge(10.0, 2.0, least=0.2).found


def test_the_data_is_the_slower():
    finding = judge(2.0, 6.0)
    assert finding.level == "warning" and "need about 1:00:00" in finding.found
    assert "data.workers=4 in place of 0" in finding.remedy
    assert "data.workers=8" in judge(2.0, 60.0, workers=2).remedy  # all cores
    assert "embeddings" in judge(2.0, 6.0, workers=8).remedy
