"""Tests between groups against published tables, sums by hand and the libraries."""

import itertools

import numpy as np
import pytest
import scikit_posthocs
import scipy.stats

from kdjax.analysis import group_tests, runs
from tests.analysis import cells

# Crampton, 1947: length of odontoblasts of 60 guinea pigs, by supplement and dose.
TOOTH_GROWTH = {
    ("VC", "0.5"): [4.2, 11.5, 7.3, 5.8, 6.4, 10, 11.2, 11.2, 5.2, 7],
    ("VC", "1"): [16.5, 16.5, 15.2, 17.3, 22.5, 17.3, 13.6, 14.5, 18.8, 15.5],
    ("VC", "2"): [23.6, 18.5, 33.9, 25.5, 26.4, 32.5, 26.7, 21.5, 23.3, 29.5],
    ("OJ", "0.5"): [15.2, 21.5, 17.6, 9.7, 14.5, 10, 8.2, 9.4, 16.5, 9.7],
    ("OJ", "1"): [19.7, 23.3, 23.6, 26.4, 20, 25.2, 25.8, 21.2, 14.5, 27.3],
    ("OJ", "2"): [25.5, 26.4, 22.4, 24.5, 24.8, 30.9, 26.4, 27.3, 29.4, 23],
}
UNEQUAL = {  # three methods, two sizes, unequal n, ties
    ("a", "s"): [0.52, 0.55, 0.53, 0.55],
    ("b", "s"): [0.58, 0.55, 0.60],
    ("c", "s"): [0.61, 0.63, 0.58, 0.60, 0.62],
    ("a", "t"): [0.66, 0.64],
    ("b", "t"): [0.66, 0.70, 0.68, 0.67],
    ("c", "t"): [0.65, 0.71, 0.66],
}


def _anova(table):
    return group_tests.anova(cells.groups(table), "method", "size")


def _residual(columns, y):
    coefficients, *_ = np.linalg.lstsq(columns, y)
    return float(((y - columns @ coefficients) ** 2).sum())


def _type_ii(table):
    """Sums of squares by hand: how much a factor's columns lower the residual."""
    labels = [key for key, values in table.items() for _ in values]
    y = np.array([value for values in table.values() for value in values])
    first, second = (
        np.stack([[label[i] == level for label in labels] for level in levels], 1)
        for i, levels in enumerate(sorted({key[i] for key in table}) for i in range(2))
    )
    both = np.concatenate([first, second], 1).astype(float)
    cell = np.einsum("ni,nj->nij", first, second).reshape(len(y), -1).astype(float)
    residual = _residual(cell, y)
    return {
        "method": _residual(second.astype(float), y) - _residual(both, y),
        "size": _residual(first.astype(float), y) - _residual(both, y),
        "method x size": _residual(both, y) - residual,
        "residual": residual,
        "total": float(((y - y.mean()) ** 2).sum()),
    }


def test_the_published_table_of_tooth_growth():
    found = _anova(TOOTH_GROWTH)
    rows = {source.name: source for source in found.sources}
    assert rows["method"].sum_squares == pytest.approx(205.35, abs=0.005)
    assert rows["size"].sum_squares == pytest.approx(2426.43, abs=0.005)
    assert rows["method x size"].sum_squares == pytest.approx(108.32, abs=0.005)
    assert found.residual_squares == pytest.approx(712.11, abs=0.005)
    assert [rows[name].df for name in rows] == [1, 2, 2]
    assert found.residual_df == 54
    assert rows["method"].f == pytest.approx(15.572, abs=5e-4)
    assert rows["method"].p == pytest.approx(0.0002312, abs=5e-8)
    assert rows["method x size"].f == pytest.approx(4.107, abs=5e-4)
    assert rows["method x size"].p == pytest.approx(0.02186, abs=5e-6)


@pytest.mark.parametrize("table", [TOOTH_GROWTH, UNEQUAL], ids=["equal", "unequal"])
def test_anova_against_sums_of_squares_by_hand(table):
    found, expected = _anova(table), _type_ii(table)
    df = {"method": 2, "size": 1, "method x size": 2}
    if table is TOOTH_GROWTH:
        df = {"method": 1, "size": 2, "method x size": 2}
    residual_df = sum(map(len, table.values())) - 6
    assert [source.name for source in found.sources] == list(df)
    assert found.residual_squares == pytest.approx(expected["residual"], rel=1e-6)
    for source in found.sources:
        squares = expected[source.name]
        f = squares / df[source.name] / (expected["residual"] / residual_df)
        p = scipy.stats.f.sf(f, df[source.name], residual_df)
        assert source.sum_squares == pytest.approx(squares, rel=1e-6)
        assert (source.f, source.p) == pytest.approx((f, p), rel=1e-6)
        assert source.eta_squared == pytest.approx(squares / expected["total"])
        partial = squares / (squares + expected["residual"])
        assert source.partial_eta_squared.value == pytest.approx(partial)


def test_one_factor_against_scipy():
    table = {key: values for key, values in UNEQUAL.items() if key[1] == "s"}
    found = group_tests.anova(cells.groups(table), "method")
    (source,) = found.sources
    expected = scipy.stats.f_oneway(*table.values())
    assert (source.f, source.p) == pytest.approx(tuple(expected), abs=1e-6)
    assert source.eta_squared == pytest.approx(source.partial_eta_squared.value)


def test_names_of_levels_and_factors_mean_nothing_to_the_formula():
    odd = {"a": "1 + C(y)", "b": "`b`", "c": "a:b"}
    renamed = {(odd[m], s): values for (m, s), values in UNEQUAL.items()}
    found = group_tests.anova(cells.groups(renamed), "y ~ a", "log(b)")
    expected = _anova(UNEQUAL)
    assert [s.f for s in found.sources] == [s.f for s in expected.sources]
    assert [s.name for s in found.sources] == ["y ~ a", "log(b)", "y ~ a x log(b)"]


@pytest.mark.parametrize("size", ["s", "t"])
def test_pairs_against_scipy_and_scikit_posthocs(size):
    table = {key: values for key, values in UNEQUAL.items() if key[1] == size}
    level = group_tests.simple_effects(cells.groups(table), size)
    values = list(table.values())
    tukey = scipy.stats.tukey_hsd(*values)
    bounds = tukey.confidence_interval(0.95)
    dunn = scikit_posthocs.posthoc_dunn(values, p_adjust="bonferroni").to_numpy()
    indices = list(itertools.combinations(range(3), 2))
    assert [(p.first, p.second) for p in level.pairs] == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]
    for pair, (i, j) in zip(level.pairs, indices, strict=True):
        assert pair.difference == pytest.approx(tukey.statistic[i, j], abs=1e-12)
        assert pair.tukey_p == pytest.approx(tukey.pvalue[i, j], abs=1e-6)
        assert pair.low == pytest.approx(bounds.low[i, j], abs=1e-6)
        assert pair.high == pytest.approx(bounds.high[i, j], abs=1e-6)
        assert pair.dunn_p == pytest.approx(dunn[i, j], abs=1e-12)
    h, p = scipy.stats.kruskal(*values)
    kruskal = level.kruskal
    assert (kruskal.h, kruskal.p, kruskal.df) == pytest.approx((h, p, 2), abs=1e-12)
    num = sum(map(len, values))
    assert kruskal.epsilon_squared == pytest.approx(h / (num - 1))


def test_dunn_by_hand_with_ties():
    table = {key: values for key, values in UNEQUAL.items() if key[1] == "s"}
    level = group_tests.simple_effects(cells.groups(table), "s")
    sizes = [len(values) for values in table.values()]
    flat = np.concatenate(list(table.values()))
    ranks = np.split(scipy.stats.rankdata(flat), np.cumsum(sizes)[:-1])
    num = len(flat)
    _, counts = np.unique(flat, return_counts=True)
    ties = (counts**3 - counts).sum() / (12 * (num - 1))
    spread = num * (num + 1) / 12 - ties
    pairs = itertools.combinations(range(3), 2)
    for pair, (i, j) in zip(level.pairs, pairs, strict=True):
        gap = abs(ranks[i].mean() - ranks[j].mean())
        z = gap / np.sqrt(spread * (1 / sizes[i] + 1 / sizes[j]))
        expected = min(1.0, 3 * 2 * scipy.stats.norm.sf(z))
        assert pair.dunn_p == pytest.approx(expected, abs=1e-9)


def test_a_group_of_one_run_takes_part_where_others_vary():
    table = {("a", "s"): [1, 2, 4], ("b", "s"): [2, 3, 3], ("c", "s"): [9]}
    level = group_tests.simple_effects(cells.groups(table), "s")
    assert all(pair.tukey_p is not None for pair in level.pairs)
    assert level.pairs[1].tukey_p < 0.05 < level.pairs[0].tukey_p


SAME = "all values are the same: no variance, no test"
NO_RANKS = "all values are the same: no ranks, no test"
FEW = "fewer than two groups have a run: nothing to compare"
SEED = "one seed in each group: no variance, no test"
FLAT = "no group varies, but they differ: no variance within groups, no test"


@pytest.mark.parametrize(
    ("table", "anova", "tukey", "kruskal"),
    [
        ({("a", "s"): [1], ("b", "s"): [2]}, SEED, SEED, SEED),
        ({("a", "s"): [1, 1], ("b", "s"): [1, 1, 1]}, SAME, SAME, NO_RANKS),
        ({("a", "s"): [1, 1], ("b", "s"): [2, 2]}, FLAT, FLAT, None),
        ({("a", "s"): [1, 2], ("b", "s"): []}, FEW, FEW, FEW),
        ({("a", "s"): [], ("b", "s"): []}, FEW, FEW, FEW),
        ({("a", "s"): [1, 1 + 1e-15], ("b", "s"): [1, 1]}, SAME, SAME, None),
    ],
    ids=["one seed", "all equal", "constant", "one empty", "nothing", "rounding"],
)
def test_what_cannot_be_tested_is_said_in_words(table, anova, tukey, kruskal):
    found = group_tests.compare(cells.table(table), "score", cells.DESIGN)
    (level,) = found.all_runs.simple_effects
    assert found.all_runs.anova == group_tests.Anova(statement=anova)
    assert level.tukey_statement == tukey
    assert all(pair.tukey_p is None for pair in level.pairs)
    if kruskal:
        assert level.kruskal == group_tests.Kruskal(statement=kruskal)
        assert level.dunn_statement == kruskal
    assert cells.all_finite(found)


def test_identical_groups_do_not_differ():
    table = {("a", "s"): [1, 2, 3], ("b", "s"): [1, 2, 3]}
    found = group_tests.compare(cells.table(table), "score", cells.DESIGN).all_runs
    (source,) = found.anova.sources
    (pair,) = found.simple_effects[0].pairs
    assert (source.f, source.p) == pytest.approx((0, 1), abs=1e-6)
    assert (pair.tukey_p, pair.dunn_p) == pytest.approx((1, 1), abs=1e-6)
    assert (pair.hedges_g.value, pair.vargha_delaney.value) == (0, 0.5)


def test_levels_that_never_meet():
    table = {key: v for key, v in UNEQUAL.items() if key != ("c", "t")}
    found = group_tests.compare(cells.table(table), "score", cells.DESIGN)
    anova = found.all_runs.anova
    assert [source.name for source in anova.sources] == ["method", "size"]
    assert "1 of 6 groups have no run: the interaction is not" in anova.statement
    assert found.all_runs.simple_effects[1].statement == "no run of c"
    assert cells.all_finite(found)
    apart = {("a", "s"): [1, 2], ("b", "t"): [3, 5]}
    assert _anova(apart).statement.startswith("the levels meet too seldom")


def test_with_and_without_outliers_stand_side_by_side():
    table = UNEQUAL | {("a", "s"): [0.52, 0.55, 0.53, 0.55, 0.1]}
    found = group_tests.compare(cells.table(table), "score", cells.DESIGN)
    assert [outlier.run.name for outlier in found.outliers] == ["a-s-4"]
    clean = {("a", "s"): [0.52, 0.55, 0.53, 0.55]} | table | UNEQUAL
    assert found.all_runs.anova == _anova(table)
    assert found.without_outliers.anova == _anova(clean)
    level = group_tests.simple_effects(cells.groups(UNEQUAL)[:3], "s")
    assert found.without_outliers.simple_effects[0] == level
    assert "1 lie beyond 1.5 interquartile ranges" in found.statement


def test_without_outliers_there_is_one_set_of_tests():
    found = group_tests.compare(cells.table(UNEQUAL), "score", cells.DESIGN)
    assert (found.outliers, found.without_outliers) == ((), None)
    assert found.statement.endswith("no outlier")


def test_failed_and_collapsed_runs_are_counted_and_named():
    table = runs.parse(cells.grid_rows(), cells.GRID)
    accuracy, nll = (
        group_tests.compare(table, m, cells.GRID) for m in ("accuracy", "nll")
    )
    assert accuracy.statement.startswith(
        "34 of 36 runs have a number; 2 have none and are in no test; "
        "1 collapsed and stay in the tests of all runs"
    )
    assert nll.statement.startswith("33 of 36 runs have a number; 3 have none")
    assert [run.status for run in nll.absent] == ["failed", "done", "failed"]
    assert [run.value("accuracy") for run in accuracy.collapsed] == [0.2]
    values = [v for group in accuracy.all_runs.groups for v in group.values]
    assert 0.2 in values
    assert cells.all_finite((accuracy, nll))


def test_numbers_are_finite_whatever_the_cells_hold():
    rng = np.random.default_rng(0)
    kinds = [[], [0.5], [0.5, 0.5], [0.5, 0.6], [0.6, 0.5, 0.6], [1e90, -1e90, 3.0]]
    for _ in range(12):
        table = {
            (first, second): kinds[rng.integers(len(kinds))]
            for first in "abc"
            for second in "st"
        }
        found = group_tests.compare(cells.table(table), "score", cells.DESIGN)
        assert cells.all_finite(found), table
