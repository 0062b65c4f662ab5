"""The learning rate, and what the optimiser does to each param."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle2_jax.errors import UserError
from dalle2_jax.train import optim


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        (
            "cosine",
            [0.25, 0.5, 0.75, 1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2],
        ),
    ],
)
def test_rate(schedule, expected):
    rate = optim.rate(8, learning_rate=3.0, schedule=schedule, warmup=4)
    found = [rate(step) for step in range(8)]
    np.testing.assert_allclose(found, 3 * np.array(expected), rtol=1e-6)


def test_rate_without_warmup_and_after_the_end():
    rate = optim.rate(8, learning_rate=3.0, schedule="cosine", warmup=0)
    assert rate(0) == 3 and rate(8) == 0 and rate(100) == 0


def first_updates(params, grads, **options):
    transform = optim.make(100, learning_rate=0.1, **options)
    return transform.update(grads, transform.init(params), params)[0]


def test_only_arrays_of_two_axes_decay():
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = first_updates(params, zeros, weight_decay=0.5)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 3.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_the_gradient_is_clipped_by_its_norm():
    grads = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    # With a large eps Adam's step is proportional to the gradient, g / eps.
    updates = first_updates(grads, grads, clip_norm=5.0, eps=1e6)
    np.testing.assert_allclose(updates["a"], -0.1 * 3e-6, rtol=1e-4)
    np.testing.assert_allclose(updates["b"], -0.1 * 4e-6, rtol=1e-4)
    updates = first_updates(grads, grads, clip_norm=0.0, eps=1e6)
    np.testing.assert_allclose(updates["a"], -0.1 * 30e-6, rtol=1e-4)


def test_adam_is_given_its_constants():
    params = jnp.zeros(3)
    transform = optim.make(100, learning_rate=0.1, b1=0.8, b2=0.9, eps=1e-3)
    state = transform.init(params)
    first, second = jnp.array([1.0, -2, 0.5]), jnp.array([0.5, 1, -0.5])
    _, state = transform.update(first, state, params)
    updates, _ = transform.update(second, state, params)
    mu = (0.8 * 0.2 * first + 0.2 * second) / (1 - 0.8**2)
    nu = (0.9 * 0.1 * first**2 + 0.1 * second**2) / (1 - 0.9**2)
    np.testing.assert_allclose(updates, -0.1 * mu / (jnp.sqrt(nu) + 1e-3), rtol=1e-5)


def test_muon_makes_the_update_of_a_kernel_orthogonal():
    """In the frame of the gradient's singular vectors it is near the identity."""
    grad = np.random.default_rng(0).standard_normal((3, 3, 4, 8)).astype(np.float32)
    tree = {"conv": {"kernel": jnp.asarray(grad)}}
    update = first_updates(tree, tree, name="muon")["conv"]["kernel"]
    u, _, vt = np.linalg.svd(grad.reshape(36, 8), full_matrices=False)
    found = u.T @ np.asarray(update).reshape(36, 8) @ vt.T
    # 1/sqrt(36) would be the root mean square of an orthogonal matrix's entries.
    diagonal = -np.diag(found) / (0.1 * np.sqrt(36))
    assert diagonal.min() > 0.65 and diagonal.max() < 1.25  # Muon's polynomial
    assert np.abs(found + np.diag(diagonal) * 0.1 * 6).max() < 1e-4


def test_muon_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    grads = {
        "conv_in": {"kernel": jnp.asarray(rng.standard_normal((3, 3, 3, 8)))},
        "dense": {"bias": jnp.asarray(rng.standard_normal(8))},
        "embed": {"embedding": jnp.asarray(rng.standard_normal((5, 8)))},
    }
    updates = first_updates(grads, grads, name="muon", b1=0.9)
    # Adam's first step, with Nesterov's look-ahead, is as long for every entry.
    for grad, update in zip(*map(jax.tree.leaves, (grads, updates)), strict=True):
        length = 0.1 * (1 + 0.9 / 1.9)
        np.testing.assert_allclose(update, -length * np.sign(grad), rtol=1e-4)


def test_muon_decays_kernels_only():
    params = {"dense": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = first_updates(params, zeros, name="muon", weight_decay=0.5)["dense"]
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 3.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_adafactor_fits_a_matrix_with_little_memory():
    rng = np.random.default_rng(0)
    wanted = jnp.asarray(rng.standard_normal((128, 256)), jnp.float32)
    params = {"kernel": jnp.zeros((128, 256)), "bias": jnp.zeros(256)}
    transform = optim.make(60, name="adafactor", learning_rate=0.1)
    state = transform.init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) < 128 + 2 * 256 + 20

    @jax.jit
    def update(params, state):
        loss, grads = jax.value_and_grad(
            lambda p: jnp.mean((p["kernel"] + p["bias"] - wanted) ** 2)
        )(params)
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, updates

    losses = []
    for _ in range(60):
        params, state, loss, updates = update(params, state)
        losses.append(loss)
        rms = jnp.sqrt(jnp.mean(updates["kernel"] ** 2))
        assert rms < 0.1001  # the learning rate
    assert losses[-1] < 0.02 * losses[0]


def test_adafactor_decays_by_the_learning_rate():
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = first_updates(params, zeros, name="adafactor", weight_decay=0.5)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 3.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


@pytest.mark.parametrize("options", [{}, {"name": "muon"}, {"clip_norm": 0.1}])
def test_sam_is_the_optimiser_at_another_gradient(options):
    """As optax.contrib.sam has it, with gradient ascent of length rho."""
    params = {"kernel": jnp.array([[3.0, 1.0], [-2.0, 0.5]]), "bias": jnp.ones(2)}

    def loss(p, _=None):
        return jnp.sum(jnp.tanh(p["kernel"] @ p["bias"]) ** 2) + jnp.sum(p["bias"] ** 4)

    ours = optim.make(100, learning_rate=0.1, sam_rho=0.2, **options)
    peer = optax.contrib.sam(
        optim.make(100, learning_rate=0.1, **options),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.2)),
        opaque_mode=True,
    )
    mine, theirs = params, params
    state, peer_state = ours.init(params), peer.init(params)
    for _ in range(3):
        grads = jax.grad(loss)(mine)
        updates, state = ours.update(grads, state, mine, gradient=jax.grad(loss))
        mine = optax.apply_updates(mine, updates)
        grads = jax.grad(loss)(theirs)
        updates, peer_state = peer.update(
            grads, peer_state, theirs, grad_fn=jax.grad(loss)
        )
        theirs = optax.apply_updates(theirs, updates)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert abs(mine["bias"] - params["bias"]).max() > 0.1


@pytest.mark.parametrize("value", [1.001, -1.001, 0.3, 1e-30, 0.0, 2.0])
def test_rounding_at_random(value):
    """To one of two neighbours, and to the value on average."""
    x = jnp.full(100_000, value, jnp.float32)
    rounded = optim.round_at_random(x, jax.random.key(0))
    assert rounded.dtype == jnp.bfloat16
    rounded = np.asarray(rounded, np.float64)
    x = float(x[0])
    assert np.abs(rounded - x).max() <= abs(x) * 2**-7
    exact = x == float(jnp.bfloat16(x))
    assert len(np.unique(rounded)) == (1 if exact else 2)
    np.testing.assert_allclose(rounded.mean(), x, rtol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"schedule": "cosin"}, "'cosin': must be one of constant, cosine, linear"),
        (
            {"name": "adam"},
            "optim.name is 'adam': must be one of adamw, muon, adafactor",
        ),
        ({"learning_rate": -1.0}, "optim.learning_rate is -1.0"),
        ({"warmup": -1}, "optim.warmup is -1"),
        ({"clip_norm": -1.0}, "optim.clip_norm is -1.0"),
        ({"sam_rho": -1.0}, "optim.sam_rho is -1.0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        optim.make(10, **{"learning_rate": 0.1, **options})
