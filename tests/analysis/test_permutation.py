"""Permutation within participants against all exchanges, and its blindness."""

import itertools

import numpy as np
import pytest
import scipy.stats

from kdjax.analysis import permutation
from tests.analysis import ratings


def test_all_exchanges_of_a_small_study():
    """Three people, two conditions, one rating each: eight exchanges."""
    y = np.array([3.0, 1.0, 4.0, 2.5, 5.0, 3.0])
    differences = y[0::2] - y[1::2]
    sums = [
        abs(np.dot(signs, differences))
        for signs in itertools.product((1, -1), repeat=3)
    ]
    exact = np.mean([total >= sums[0] - 1e-9 for total in sums])
    test = permutation.within_participants(
        y[:, None], [0, 1] * 3, np.repeat([0, 1, 2], 2), num=20_000
    )
    assert test.p_values[0] == pytest.approx(exact, abs=0.01)
    assert test.joint_p == test.p_values[0]


def test_share_is_that_of_two_regressions():
    y, what, who, _ = ratings.study(0, effects=(0, 0.5, 0, 1))
    order = np.random.default_rng(0).permutation(len(y))[:200]  # unbalanced
    y, what, who = y[order], what[order], who[order]
    people = np.eye(24)[who]
    both = np.column_stack([people, np.eye(4)[what]])

    def residual(x):
        return y - x @ np.linalg.lstsq(x, y)[0]

    first, second = residual(people), residual(both)
    share = 1 - (second @ second) / (first @ first)
    test = permutation.within_participants(y[:, None], what, who, num=99)
    assert test.shares[0] == pytest.approx(share)


def test_what_people_have_in_common_does_not_matter():
    y, what, who, _ = ratings.study(0, effects=(0, 0.5, 0, 0.5))
    shifted = y + 100 * who
    tests = [
        permutation.within_participants(values[:, None], what, who, num=499)
        for values in (y, shifted)
    ]
    assert tests[0].p_values == tests[1].p_values
    assert tests[0].p_values[0] < 0.05


def test_people_with_one_condition_say_nothing():
    y, what, who, _ = ratings.study(0)
    extra = np.full(10, 99)
    test = permutation.within_participants(
        np.append(y, np.full(10, 5.0))[:, None],
        np.append(what, np.zeros(10, int)),
        np.append(who, extra),
        num=99,
    )
    assert test.participants == 24
    assert test.ratings == len(y)
    with pytest.raises(ValueError, match="no participant"):
        permutation.within_participants(y[:10, None], what[:10], np.arange(10))
    with pytest.raises(ValueError, match="does not vary"):
        permutation.within_participants(0 * y[:, None], what, who)


def test_sign_flips_are_the_sign_test_and_its_draws():
    ones = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 5)
    exact = scipy.stats.binomtest(9, 11).pvalue
    assert permutation.sign_flip(ones) == pytest.approx(exact)
    assert permutation.sign_flip(ones, num=1000) == pytest.approx(exact, abs=0.02)
    assert permutation.sign_flip(np.zeros(4)) == 1.0
    assert permutation.sign_flip(np.array([2.0, 1.0, 1.0])) == 2 / 8
