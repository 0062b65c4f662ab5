"""Schedules and respacing: golden numbers, identities, and diffusers' tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import schedule
from dalle2_jax.errors import UserError

SEVEN = [0, 166, 333, 500, 666, 832, 999]
# fmt: off
TWENTY_FIVE = [
    0, 42, 83, 125, 166, 208, 250, 291, 333, 375, 416, 458, 500, 541, 583, 624, 666,
    708, 749, 791, 832, 874, 916, 957, 999,
]
FAST27 = [
    0, 22, 44, 66, 88, 111, 133, 155, 177, 199, 200, 222, 244, 266, 288, 311, 333, 355,
    377, 399, 400, 500, 599, 600, 799, 800, 997,
]
# fmt: on


def test_cosine_golden_numbers():
    table = schedule.cosine(1000)
    golden = [0.99995872, 0.92760009, 0.74197475, 0.49228517, 0.24600056, 0.066220529]
    np.testing.assert_allclose(table.alpha_bar[SEVEN[:-1]], golden, rtol=1e-7)
    np.testing.assert_allclose(table.alpha_bar[-1], 2.4287669e-09, rtol=1e-7)


def test_linear_is_ddpms():
    table = schedule.linear(1000)
    np.testing.assert_allclose(table.betas, np.linspace(1e-4, 0.02, 1000), rtol=1e-9)
    finer = schedule.linear(4000)
    np.testing.assert_allclose(finer.alpha_bar[3::4], table.alpha_bar, rtol=0.1)


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("spec", [1000, 25, "fast27"])
def test_tables_are_consistent(name, spec):
    table = schedule.respace(schedule.make(name, 1000), spec)
    assert table.alpha_bar.dtype == np.float64
    assert table.timesteps.dtype == np.int32
    assert table.alpha_bar_prev[0] == 1
    assert (np.diff(table.alpha_bar) < 0).all()
    np.testing.assert_allclose(np.cumprod(1 - table.betas), table.alpha_bar)
    # The posterior of two normals: precisions add up (DDPM, eq. 7).
    precision = (1 - table.betas) / table.betas + 1 / (
        1 - table.alpha_bar_prev + 1e-300
    )
    np.testing.assert_allclose(
        table.posterior_variance[1:], 1 / precision[1:], rtol=1e-9
    )
    log_variance = table.posterior_log_variance
    np.testing.assert_allclose(log_variance[1:], np.log(table.posterior_variance[1:]))
    assert log_variance[0] == log_variance[1]


@pytest.mark.parametrize(
    "spec, expected",
    [
        (7, SEVEN),
        ("25", TWENTY_FIVE),
        ("fast27", FAST27),
        ("10,10,3,2,2", [*FAST27[:-1], 999]),
        ("ddim4", [0, 250, 500, 750]),
        ("ddim27", range(0, 1000, 38)),
        ("1,1", [0, 500]),
        (1, [999]),
        (1000, range(1000)),
        ([3, 5, 998], [3, 5, 998]),
        ((3,), [3]),
    ],
)
def test_respace_keeps_these_timesteps(spec, expected):
    full = schedule.cosine(1000)
    table = schedule.respace(full, spec)
    assert table.timesteps.tolist() == list(expected)
    np.testing.assert_array_equal(table.alpha_bar, full.alpha_bar[table.timesteps])


def test_sections_divide_unevenly():
    # 10 = 4 + 3 + 3: the first sections take what is left over.
    table = schedule.respace(schedule.cosine(10), "4,2,3")
    assert table.timesteps.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_respacing_twice_remembers_the_timesteps():
    table = schedule.respace(schedule.respace(schedule.cosine(1000), 25), 4)
    assert table.timesteps.tolist() == [0, 333, 666, 999]


@pytest.mark.parametrize(
    "spec, message",
    [
        (0, "0 steps out of 1000"),
        (-3, "-3 steps"),
        (1001, "at most 1000"),
        ("1001", "at most 1000"),
        ("300,300,400,1", "300 steps out of 250"),
        ("10,0", "0 steps out of 500"),
        ("ddim999", "no stride takes 999 steps out of 1000"),
        ("ddim0", "no stride"),
        ("ddim", "'ddim'; write a count"),
        ("many", "'many'; write a count"),
        ("10,", "write a count"),
        ("-3", "write a count"),
        ("", "write a count"),
        ([], "increase within 0 … 999"),
        ([5, 3], "increase"),
        ([5, 5], "increase"),
        ([-1, 5], "increase"),
        ([5, 1000], "increase"),
    ],
)
def test_bad_spec(spec, message):
    with pytest.raises(UserError, match=message) as error:
        schedule.respace(schedule.cosine(1000), spec)
    assert "\n" not in str(error.value)


def test_bad_schedule():
    with pytest.raises(UserError, match="schedule is 'sigmoid'; choose .* cosine"):
        schedule.make("sigmoid", 1000)
    with pytest.raises(UserError, match="0 steps; it needs at least 1"):
        schedule.make("cosine", 0)
    with pytest.raises(UserError, match="20 steps; it needs at least 21"):
        schedule.make("linear", 20)


def test_at_broadcasts_and_rounds_once():
    table = schedule.cosine(1000).alpha_bar
    x = jnp.zeros((2, 4, 4, 3))
    entries = jax.jit(lambda i: schedule.at(table, i, x))(jnp.array([0, 999]))
    assert entries.shape == (2, 1, 1, 1)
    assert entries.dtype == jnp.float32
    np.testing.assert_array_equal(entries[:, 0, 0, 0], table[[0, 999]].astype("f4"))
    assert schedule.at(table, jnp.int32(5), x).shape == (1, 1, 1, 1)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_same_tables_and_timesteps_as_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UnCLIPScheduler()
    ours = schedule.cosine(1000)
    np.testing.assert_allclose(ours.betas, theirs.betas, rtol=1e-6)
    np.testing.assert_allclose(ours.alpha_bar, theirs.alphas_cumprod, rtol=1e-4)
    for n in range(2, 1001):
        theirs.set_timesteps(n)
        kept = schedule.respace(ours, n).timesteps
        np.testing.assert_array_equal(kept[::-1], theirs.timesteps)
