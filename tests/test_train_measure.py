"""Operations of a step, and which steps are profiled."""

import jax
import jax.numpy as jnp
import pytest

from dalle2_jax.errors import UserError
from dalle2_jax.train import measure


@pytest.mark.parametrize(
    "kind, speed",
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_peak(kind, speed):
    assert measure.peak(kind) == speed


def test_least_seconds(monkeypatch):
    """A product of [8, 16] and [16, 32] has 2 * 8 * 16 * 32 operations."""
    update = jax.jit(lambda state, frozen, batch, step: (batch @ state).sum())
    arguments = jnp.zeros((16, 32)), {}, jnp.zeros((4, 8, 16))
    assert measure.least_seconds(update, *arguments) is None
    monkeypatch.setitem(measure.PEAKS, "cpu", 1e6)
    found = measure.least_seconds(update, *arguments) * 1e6 * jax.device_count()
    assert found == pytest.approx(4 * 2 * 8 * 16 * 32, rel=0.1)


@pytest.mark.parametrize(
    "steps, expected",
    [("", range(0)), ("7", range(13, 20)), ("12:15", range(12, 15))],
)
def test_span(steps, expected):
    assert measure.span(steps, 10) == expected


@pytest.mark.parametrize("steps", ["a", "5:", "3:3", "0", "1:2:3", "-4"])
def test_a_span_that_cannot_be(steps):
    with pytest.raises(UserError, match=f"profile='{steps}'"):
        measure.span(steps, 10)


@pytest.mark.parametrize("last", [3, 9])
def test_a_profile_is_written(tmp_path, last, monkeypatch):
    """Of steps 2 and 3, and also where the run ends within them."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(path))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(step))
    with measure.profiling(tmp_path, "2:4", 0) as profile:
        for step in range(1, last + 1):
            profile(step, [])
    assert calls == [tmp_path / "profile", min(last, 4)]
