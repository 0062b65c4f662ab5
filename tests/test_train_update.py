"""What a step computes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle2_jax.train import mesh, optim
from dalle2_jax.train.update import TrainState, first_state, make_update
from tests.linear import WIDTH, assert_close, assert_equal, linear, make_batches

data = make_batches()


def run_updates(steps, accumulate=1, stage=None, batches=data, **options):
    """States after each of some updates with plain gradient descent, in numpy."""
    stage = stage or linear(noise=0)
    optimizer = optax.sgd(0.1)
    grid = mesh.make()
    update = jax.jit(make_update(stage.loss, optimizer, jax.random.key(0), **options))
    params = stage.init(jax.random.key(1))
    state = TrainState(jnp.int32(0), params, params, optimizer.init(params))
    states = [jax.device_get(state)]
    for step in range(steps):
        batch = mesh.put_batch(next(batches(step)), grid, accumulate)
        state, metrics = update(state, stage.frozen, batch, step)
        states.append(jax.device_get(state))
    return states, metrics


def test_accumulation_equals_the_big_batch():
    (*_, big), big_metrics = run_updates(3, ema_decay=0.5)
    (*_, small), small_metrics = run_updates(3, accumulate=2, ema_decay=0.5)
    assert_close(small, big)
    assert small_metrics["loss"] == pytest.approx(big_metrics["loss"])


def test_a_loss_that_compares_sees_all_micro_batches():
    """Its gradient is of the variance over the batch, not the mean of parts' variances.

    Which is the larger, and the same whatever the parts.
    """
    stage = linear(noise=0)

    def loss(params, frozen, batch, key):
        y = (batch["x"] @ params["kernel"]).reshape(-1, WIDTH)
        assert len(y) == 16
        return y.var(axis=0).mean(), {}

    stage = stage._replace(loss=loss)
    options = dict(stage=stage, ema_decay=0.5, compares=True)
    (*_, big), big_metrics = run_updates(3, **options)
    (*_, small), small_metrics = run_updates(3, accumulate=2, **options)
    assert_close(small, big)
    assert small_metrics["loss"] == pytest.approx(big_metrics["loss"])


def test_sam_takes_the_gradient_from_where_the_loss_is_highest():
    """On |x - a|^2 / 2 the gradient is x - a, and SAM's (x - a)(1 + rho / |x - a|)."""
    a, x = np.array([1.0, -2, 0.5]), np.array([0.25, 1, 3])
    accumulate = 2
    optimizer = optim.sam(optax.with_extra_args_support(optax.sgd(0.1)), rho=0.3)

    def loss(params, frozen, batch, key):
        return jnp.sum((params - batch.mean(axis=0)) ** 2) / 2, {}

    update = jax.jit(make_update(loss, optimizer, jax.random.key(0), ema_decay=0.5))
    state = first_state(jnp.float32(x), optimizer)
    batch = jnp.broadcast_to(jnp.float32(a), (accumulate, 4, 3))
    for step in range(2):
        state, metrics = update(state, {}, batch, step)
        distance = np.linalg.norm(x - a)
        np.testing.assert_allclose(metrics["loss"], distance**2 / 2, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], distance, rtol=1e-5)
        x = x - 0.1 * (x - a) * (1 + 0.3 / distance)
        np.testing.assert_allclose(state.params, x, rtol=1e-5)


def test_micro_batches_have_their_own_noise():
    def loss(params, frozen, batch, key):
        value = jax.random.uniform(key)
        return value + 0 * params["bias"].sum(), {"square": value**2}

    stage = linear()._replace(loss=loss)
    _, metrics = run_updates(1, accumulate=2, stage=stage, ema_decay=0.5)
    assert metrics["square"] > metrics["loss"] ** 2 + 1e-6


def test_ema():
    (first, *states), _ = run_updates(12, ema_decay=0.5)
    expected = first.params["bias"]
    for step, state in enumerate(states):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * state.params["bias"]
        np.testing.assert_allclose(state.ema["bias"], expected, rtol=1e-5, atol=1e-7)


def test_the_state_stays_at_the_last_step_that_was_finite():
    def batches(step):
        yield {"x": np.full((16, WIDTH), np.nan if step == 2 else 0.1, np.float32)}

    states, metrics = run_updates(5, batches=batches, ema_decay=0.5)
    assert [int(state.step) for state in states] == [0, 1, 2, 2, 2, 2]
    assert_equal(states[-1], states[2])
    assert np.isfinite(metrics["loss"])  # of step 5, which did not count
