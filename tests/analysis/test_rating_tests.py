"""Tests of independent ratings against linear algebra and libraries."""

import numpy as np
import pytest
import scipy.stats
import statsmodels.multivariate.manova as manova
import statsmodels.stats.multitest

from kdjax.analysis import rating_tests


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], [20, 25, 15])
    return rng.normal(size=(60, 3)) + 0.4 * codes[:, None], codes


def test_statistics_of_ranks_are_those_of_eigenvalues(table):
    y, codes = table
    tests = {t.name: t for t in rating_tests.multivariate(y, codes, num=99)}
    ranks = scipy.stats.rankdata(y, axis=0)
    means = np.stack([ranks[codes == code].mean(0) for code in range(3)])
    rest = ranks - means[codes]
    inside = rest.T @ rest
    gaps = (means - ranks.mean(0))[codes]
    roots = np.linalg.eigvals(np.linalg.solve(inside, gaps.T @ gaps)).real
    pillai = (roots / (1 + roots)).sum()
    value = {name: test.value for name, test in tests.items()}
    assert value["rank MANOVA, Wilks' lambda"] == pytest.approx(
        (1 / (1 + roots)).prod()
    )
    assert value["rank MANOVA, Pillai's trace"] == pytest.approx(pillai)
    assert value["rank MANOVA, Hotelling-Lawley trace"] == pytest.approx(roots.sum())
    model = manova.MANOVA(ranks - ranks.mean(0), np.eye(3)[codes])
    fit = model.mv_test([("groups", np.array([[1, -1, 0], [1, 0, -1]]))])
    library = fit.results["groups"]["stat"]
    for name in ("Wilks' lambda", "Pillai's trace"):
        row, test = library.loc[name], tests[f"rank MANOVA, {name}"]
        assert test.f == pytest.approx(row["F Value"])
        assert test.p == pytest.approx(row["Pr > F"])
    chi = tests["multivariate Kruskal-Wallis, chi-squared"]
    assert chi.value == pytest.approx(59 * pillai)
    assert chi.df == 6


def test_one_outcome_is_kruskal_wallis(table):
    """Of one outcome Pillai's trace of ranks is H / (N - 1), with or without ties."""
    y, codes = np.round(table[0][:, :1]), table[1]
    tests = {t.name: t for t in rating_tests.multivariate(y, codes, num=999)}
    h, p = scipy.stats.kruskal(*(y[codes == code, 0] for code in range(3)))
    chi = tests["multivariate Kruskal-Wallis, chi-squared"]
    assert (chi.value, chi.p) == pytest.approx((h, p))
    assert tests["PERMANOVA of ranks, pseudo-F"].p == pytest.approx(p, abs=0.05)
    f = tests["ANOVA-type statistic of ranks"]
    assert f.p == pytest.approx(p, abs=0.05)  # it lets variances differ


def test_permanova_is_the_f_of_distances(table):
    """Anderson's pseudo-F, from the distances of all pairs."""
    y, codes = table
    squares = ((y[:, None] - y[None]) ** 2).sum(-1)
    total = squares.sum() / 2 / 60
    inside = sum(
        squares[np.ix_(codes == k, codes == k)].sum() / 2 / (codes == k).sum()
        for k in range(3)
    )
    tests = {t.name: t for t in rating_tests.multivariate(y, codes, num=99)}
    pseudo = (total - inside) / 2 / (inside / 57)
    assert tests["PERMANOVA of ratings, pseudo-F"].value == pytest.approx(pseudo)


def test_regression_by_normal_equations(table):
    y, codes = table[0][:, 0], table[1]
    length = np.random.default_rng(1).normal(size=60)
    x = np.column_stack([np.ones(60), codes == 1, codes == 2, length]).astype(float)
    fit = rating_tests.regression(
        y,
        x,
        ["constant", "b", "c", "length"],
        np.arange(60) % 20,
        num_conditions=3,
        contrasts=[("b - c", np.array([0.0, 1.0, -1.0, 0.0]))],
    )
    beta = np.linalg.solve(x.T @ x, x.T @ y)
    assert [one.value for one in fit.coefficients] == pytest.approx(beta)
    rest = y - x @ beta
    variance = rest @ rest / 56 * np.linalg.inv(x.T @ x)
    assert fit.coefficients[3].standard_error == pytest.approx(variance[3, 3] ** 0.5)
    assert fit.pairs[0].value == pytest.approx(beta[1] - beta[2])
    smaller = x[:, [0, 3]]
    less = y - smaller @ np.linalg.lstsq(smaller, y)[0]
    f = (less @ less - rest @ rest) / 2 / (rest @ rest / 56)
    assert fit.condition_f == pytest.approx(f)
    assert all(one.cluster_p is not None for one in fit.coefficients)


def test_fences():
    values = np.array([1.0, 2, 2, 3, 3, 3, 4, 4, 5, 20, np.nan])
    assert rating_tests.inside_fences(values).tolist() == [*[True] * 9, False, True]


def test_holm_as_statsmodels():
    p = [0.01, 0.04, 0.03, 0.005, 0.9]
    expected = statsmodels.stats.multitest.multipletests(p, method="holm")[1]
    assert rating_tests.holm(p) == pytest.approx(expected)
    assert rating_tests.holm([0.02, None]) == [0.02, None]


def test_too_few_are_refused():
    with pytest.raises(ValueError, match="fewer than two"):
        rating_tests.multivariate(np.eye(4), [0] * 4)
    with pytest.raises(ValueError, match="depend on each other"):
        rating_tests.multivariate(np.ones((8, 2)), [0, 1] * 4)
