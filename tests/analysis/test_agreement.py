"""Krippendorff's alpha against its published example, and sums over pairs."""

import itertools

import numpy as np
import pytest

from kdjax.analysis import agreement

# Krippendorff, 2011, section C: four observers, twelve units; 0 is missing.
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
        [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
    ]
)


def _alpha(table, **settings):
    units = np.tile(np.arange(table.shape[1]), len(table))
    values = np.where(table == 0, np.nan, table.astype(float)).ravel()
    return agreement.krippendorff_alpha(units, values, **settings)


def test_published_example():
    alpha = _alpha(PUBLISHED)
    assert alpha.value == pytest.approx(0.815, abs=5e-4)
    assert alpha.low < alpha.value < alpha.high <= 1


def test_pairs_by_hand():
    table = np.random.default_rng(0).integers(1, 6, size=(3, 20))
    flat = table.ravel()
    counts = {value: int((flat == value).sum()) for value in set(flat.tolist())}

    def distance(a, b):
        low, high = min(a, b), max(a, b)
        between = sum(n for value, n in counts.items() if low <= value <= high)
        return (between - (counts[a] + counts[b]) / 2) ** 2

    observed = np.mean(
        [
            distance(*pair)
            for unit in table.T
            for pair in itertools.combinations(unit, 2)
        ]
    )
    expected = np.mean([distance(*p) for p in itertools.combinations(flat, 2)])
    assert _alpha(table).value == pytest.approx(1 - observed / expected)


def test_one_rater_an_explanation_is_not_computable():
    alpha = _alpha(PUBLISHED[:1])
    assert alpha.value is None
    assert "one person only" in alpha.statement


def test_perfect_and_constant():
    assert _alpha(np.array([[1, 2, 3], [1, 2, 3]])).value == pytest.approx(1.0)
    assert _alpha(np.full((2, 3), 4)).value is None
