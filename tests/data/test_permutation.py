import numpy as np
import pytest

from kdjax.data.permutation import permute


@pytest.mark.parametrize(
    "num", [*range(1, 70), 127, 128, 129, 1000, 4097, 65_536, 10**5]
)
def test_it_is_a_permutation(num):
    permuted = permute(np.arange(num), num, (num, 1))
    np.testing.assert_array_equal(np.sort(permuted), np.arange(num))
    some = np.arange(num)[:: max(1, num // 7)]
    np.testing.assert_array_equal(permute(some, num, (num, 1)), permuted[some])


def test_a_few_of_very_many():
    permuted = permute(np.arange(10**5), 10**12, (3,))
    assert len(np.unique(permuted)) == 10**5 and permuted.max() < 10**12
    assert abs(permuted.mean() / 10**12 - 0.5) < 0.005


def test_every_place_is_as_likely_as_any_other():
    num, draws = 7, 2_100
    counts = np.zeros((num, num))
    pairs = np.zeros((num, num))
    for seed in range(draws):
        permuted = permute(np.arange(num), num, (0, seed))
        counts[np.arange(num), permuted] += 1
        pairs[permuted[0], permuted[1]] += 1
    # Chi-squared of 6 degrees of freedom: above 22.5 once in a thousand.
    chi_squared = ((counts - draws / num) ** 2 / (draws / num)).sum(1)
    assert chi_squared.max() < 25
    others = pairs[~np.eye(num, dtype=bool)]
    expected = draws / len(others)
    # 41 degrees of freedom: above 74.7 once in a thousand.
    assert ((others - expected) ** 2 / expected).sum() < 80
    assert not pairs.diagonal().any()


def test_neighbours_and_keys_say_nothing():
    permuted = permute(np.arange(10**5), 10**5, (1, 2))
    other = permute(np.arange(10**5), 10**5, (1, 3))
    for pair in (
        (permuted[:-1], permuted[1:]),
        (np.arange(10**5), permuted),
        (permuted, other),
    ):
        assert abs(np.corrcoef(*pair)[0, 1]) < 0.01
    # As many fixed points and equal places as of random permutations: 1 on average.
    assert (permuted == np.arange(10**5)).sum() < 8
    assert (permuted == other).sum() < 8
