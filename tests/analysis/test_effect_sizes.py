"""Effect sizes and their intervals against definitions, counted and inverted."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from kdjax.analysis import effect_sizes

X = [0.62, 0.60, 0.66, 0.61, 0.65]
Y = [0.55, 0.60, 0.58, 0.61]


def test_vargha_delaney_by_counting_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        first = rng.integers(0, 6, rng.integers(1, 9)).tolist()
        second = rng.integers(0, 6, rng.integers(1, 9)).tolist()
        wins = sum((x > y) + 0.5 * (x == y) for x in first for y in second)
        found = effect_sizes.vargha_delaney(first, second)
        assert found.value == pytest.approx(wins / len(first) / len(second), abs=1e-12)
        assert 0 <= found.low <= found.value <= found.high <= 1


def test_the_bounds_of_a_solve_newcombes_equation():
    found = effect_sizes.vargha_delaney(X, Y)
    m, n = len(X), len(Y)
    z = scipy.stats.norm.ppf(0.975)
    for bound in (found.low, found.high):
        extra = (m + n) / 2 - 1
        inner = 1 + extra * ((1 - bound) / (2 - bound) + bound / (1 + bound))
        variance = bound * (1 - bound) * inner / (m * n)
        assert abs(found.value - bound) == pytest.approx(z * math.sqrt(variance))


def test_a_of_swapped_groups_is_the_rest_of_one():
    there, back = effect_sizes.vargha_delaney(X, Y), effect_sizes.vargha_delaney(Y, X)
    assert there.value == pytest.approx(1 - back.value)
    assert (there.low, there.high) == pytest.approx((1 - back.high, 1 - back.low))


def test_a_of_separate_groups_keeps_a_width():
    found = effect_sizes.vargha_delaney([4, 5, 6], [1, 2, 3])
    assert (found.value, found.high) == (1, 1)
    assert 0.4 < found.low < 0.7


def test_g_of_swapped_groups_is_the_negative():
    """SciPy's noncentral t is a NaN at t = -4.28, c = 8.04, 2 degrees of freedom."""
    assert math.isnan(scipy.stats.nct.cdf(-4.281788349862502, 2, 8.041046856725748))
    for distance in (*np.linspace(0.1, 40.0, 100), 3.02768158, 3.00579854, 3.0277):
        first, second = [0.0, 1.0], [distance, distance + 1.0]
        there, back = (
            effect_sizes.hedges_g(first, second),
            effect_sizes.hedges_g(second, first),
        )
        assert there.low is not None and there.low < there.value < there.high
        assert there.value == pytest.approx(-back.value, rel=1e-9)
        assert there.low == pytest.approx(-back.high, rel=1e-6, abs=1e-6)
        assert there.high == pytest.approx(-back.low, rel=1e-6, abs=1e-6)


def test_hedges_g_by_hand():
    # Means 2 and 4, variance 1 each: d = -2; J(4) = Gamma(2) / (sqrt(2) Gamma(1.5)).
    found = effect_sizes.hedges_g([1, 2, 3], [3, 4, 5])
    bias = 1 / (math.sqrt(2) * math.sqrt(math.pi) / 2)
    assert found.value == pytest.approx(-2 * bias, abs=1e-12)


def test_the_bounds_of_g_leave_the_tails_asked_for():
    t, _ = scipy.stats.ttest_ind(X, Y)
    df = len(X) + len(Y) - 2
    found = effect_sizes.hedges_g(X, Y, confidence=0.9)
    scale = found.value / t
    assert scipy.stats.nct.sf(t, df, found.low / scale) == pytest.approx(0.05, abs=1e-6)
    high = scipy.stats.nct.cdf(t, df, found.high / scale)
    assert high == pytest.approx(0.05, abs=1e-6)


def test_the_interval_of_g_leaves_out_zero_where_t_is_significant():
    rng = np.random.default_rng(1)
    for shift in (0, 0.5, 1, 2, 3):
        first, second = rng.normal(shift, 1, 6), rng.normal(0, 1, 5)
        p = scipy.stats.ttest_ind(first, second).pvalue
        found = effect_sizes.hedges_g(first.tolist(), second.tolist())
        assert (found.low > 0 or found.high < 0) == (p < 0.05)


def test_partial_eta_squared_and_the_tails_of_its_bounds():
    # Smithson's relation: bound = c / (c + df + residual_df + 1).
    f, df, residual = 5.0, 2.0, 27.0
    found = effect_sizes.partial_eta_squared(f, df, residual)
    assert found.value == pytest.approx(10 / 37)
    for bound, share in ((found.low, 0.95), (found.high, 0.05)):
        c = bound / (1 - bound) * (df + residual + 1)
        assert scipy.stats.ncf.cdf(f, df, residual, c) == pytest.approx(share, abs=1e-6)


def test_its_90_percent_interval_leaves_out_zero_where_f_is_significant():
    for f, residual in itertools.product((0.1, 1, 2, 4, 8), (3, 10, 60)):
        p = scipy.stats.f.sf(f, 2, residual)
        assert (effect_sizes.partial_eta_squared(f, 2, residual).low > 0) == (p < 0.05)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([], [1, 2], "a group has no run"),
        ([1], [2], "one run in each group: no variance"),
        ([1, 1], [1, 1, 1], "all values are the same: no variance"),
        ([1, 1], [2, 2], "no variance within the groups: g has no bound"),
        ([0.1 + 0.2, 0.3], [0.3, 0.3], "all values are the same: no variance"),
    ],
)
def test_g_that_cannot_be_is_said_in_words(first, second, words):
    found = effect_sizes.hedges_g(first, second)
    assert (found.value, found.low, found.high) == (None, None, None)
    assert found.statement == words


def test_what_is_too_large_for_an_interval_keeps_its_value():
    found = effect_sizes.hedges_g([1, 1 + 1e-9], [500, 500])
    assert found.value < -1e9
    assert (found.low, found.statement) == (None, "no interval: t too large")
    found = effect_sizes.partial_eta_squared(1e25, 2, 10)
    assert (found.low, found.statement) == (None, "no interval: F too large")


def test_two_runs_against_one():
    found = effect_sizes.hedges_g([1, 2], [5])
    assert found.low < found.value < found.high
    assert found.statement == "three runs in all: the bias is left in"


def test_the_same_values_twice():
    assert effect_sizes.hedges_g(X, X).value == 0
    assert effect_sizes.vargha_delaney(X, X).value == 0.5
    assert effect_sizes.partial_eta_squared(0, 2, 10).value == 0
