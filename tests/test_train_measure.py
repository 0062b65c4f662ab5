"""Operations of a step, and which steps are profiled."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dalle2_jax.errors import UserError
from dalle2_jax.nn import abstract
from dalle2_jax.nn.layers import attention
from dalle2_jax.nn.prior import DiffusionPrior
from dalle2_jax.train import measure, mesh


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
    """Products of [8, 16] and [16, 32] have 2 * 8 * 16 * 32 operations each."""
    update = jax.jit(lambda state, frozen, batch, step: (batch @ state).sum())
    arguments = jnp.zeros((16, 32)), {}, jnp.zeros((4, 8, 16))
    assert measure.least_seconds(update, *arguments) is None
    monkeypatch.setitem(measure.PEAKS, "cpu", 1e6)
    found = measure.least_seconds(update, *arguments) * 1e6 * jax.device_count()
    assert found == pytest.approx(4 * 2 * 8 * 16 * 32)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def conv(x, w, **options):
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    return jax.lax.conv_general_dilated(
        x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def loop(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]


def branch(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)


def everywhere(x, w):
    """A row of x on each device."""
    rows, whole = P("data"), P()
    specs = dict(mesh=mesh.make(), in_specs=(rows, whole), out_specs=rows)
    return jax.shard_map(jnp.matmul, **specs)(x, w)


@pytest.mark.parametrize(
    "function, shapes, flops",
    [
        (jnp.matmul, [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
        (jnp.matmul, [(4, 3, 5), (4, 5, 7)], 4 * 2 * 3 * 5 * 7),
        (loop, [(3, 5), (5, 5)], 5 * 2 * 3 * 5 * 5),
        (branch, [(3, 5), (5, 5)], 2 * 3 * 5 * 5),
        (jax.jit(jax.checkpoint(loop)), [(3, 5), (5, 5)], 5 * 2 * 3 * 5 * 5),
        (everywhere, [(8, 5), (5, 7)], 2 * 8 * 5 * 7),
        (conv, [(2, 8, 8, 3), (3, 3, 3, 4)], 2 * (2 * 8 * 8 * 4) * 3 * 3 * 3),
    ],
)
def test_flops_by_hand(function, shapes, flops):
    traced = jax.jit(function).trace(*(shape(*s) for s in shapes))
    assert measure.count_flops(traced.jaxpr) == flops


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_flops_of_a_gradient_are_those_xla_counts(stride):
    """Of the kernels as large as the stride no product is with padding."""

    def loss(w, x):
        y = conv(x, w, window_strides=(stride, stride), padding="VALID")
        return (y**2).sum()

    x, w = shape(2, 16, 16, 8), shape(stride, stride, 8, 16)
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(w, x)
    theirs = traced.lower().cost_analysis()["flops"]
    # XLA counts the squares and the sum, too.
    assert measure.count_flops(traced.jaxpr) == pytest.approx(theirs, rel=0.05)


def test_flops_of_the_prior_are_six_for_each_param_and_token():
    """Kaplan et al. 2020 (arXiv 2001.08361), section 2.1."""
    prior = DiffusionPrior(
        clip_dim=256, context_length=28, text_width=256, width=512, layers=4, heads=8
    )
    params, b = abstract(prior), 2
    arguments = jax.eval_shape(
        lambda: jax.tree.map(lambda x: jnp.repeat(x, b, 0), prior.example())
    )

    def loss(params, *arguments):
        return (prior.apply({"params": params}, *arguments) ** 2).sum()

    traced = jax.jit(jax.grad(loss)).trace(params, *arguments)
    kernels = sum(x.size for x in jax.tree.leaves(params["transformer"]) if x.ndim > 1)
    expected = 6 * kernels * b * (28 + 4)
    assert measure.count_flops(traced.jaxpr) == pytest.approx(expected, rel=0.04)


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


def test_operations_of_cudnn_attention(monkeypatch):
    """What its kernels compute: the same, and q kᵀ again in the backward pass."""
    # b, positions, heads, channels; even, as odd ones are made.
    q, k = (jax.ShapeDtypeStruct((2, n, 3, 8), jnp.bfloat16) for n in (6, 10))

    def total(q, k, v):
        return attention(q, k, v).astype(jnp.float32).sum()

    def count():
        gradient = jax.grad(total, argnums=(0, 1, 2))
        return measure.count_flops(jax.make_jaxpr(gradient)(q, k, k))

    product = 2 * 2 * 3 * 6 * 10 * 8
    assert count() == 6 * product
    cudnn = "jax._src.cudnn.fused_attention_stablehlo."
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn + "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn + "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn + "is_cuda_compute_capability_equal", lambda _: False)
    assert count() == 7 * product
