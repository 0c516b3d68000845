"""The additive model against sums by hand, statsmodels and scipy."""

import itertools
import math

import numpy as np
import pandas
import pytest
import scipy.stats
import statsmodels.formula.api as formulas
from statsmodels.stats.anova import anova_lm

from kdjax.analysis import factor_effects, report
from tests.analysis import cells

CUBE = {  # two runs a combination; effects 2, 1 and 0
    ("1", "small", "a"): [1.0, 1.4],
    ("1", "small", "b"): [1.1, 1.3],
    ("1", "large", "a"): [2.0, 2.2],
    ("1", "large", "b"): [1.8, 2.4],
    ("2", "small", "a"): [3.2, 3.0],
    ("2", "small", "b"): [3.3, 2.9],
    ("2", "large", "a"): [4.3, 4.1],
    ("2", "large", "b"): [4.0, 4.4],
}
NAMES = ("temperature", "size", "noise")
UNEQUAL = {
    (t, s, n): [
        0.5 + 0.06 * (t == "2") + 0.01 * (t == "4") + 0.1 * (s == "large") + jitter
        for jitter in np.random.default_rng(i).normal(0, 0.02, 1 + i % 3)
    ]
    for i, (t, s, n) in enumerate(
        itertools.product(("1", "2", "4"), ("small", "large"), ("a", "b"))
    )
}
SOFT = {  # weight 0 has no temperature: it was run at one only
    (t, w): [0.4 + 0.1 * float(w) + 0.01 * float(t) + 0.003 * i**2]
    for i, (t, w) in enumerate(itertools.product("124", ("0", "0.5", "1")))
    if w != "0" or t == "1"
}
NESTED = {  # finetune has no rationales, whoever might have written them
    ("finetune", "", "base"): [0.50, 0.52],
    ("finetune", "", "large"): [0.61, 0.60],
    ("multitask", "few", "base"): [0.55, 0.57],
    ("multitask", "few", "large"): [0.66, 0.65],
    ("counterfactual", "few", "base"): [0.51, 0.53],
    ("counterfactual", "few", "large"): [0.60, 0.63],
}
SEVERAL = ("method", "generation", "student")


def _compare(table, names=NAMES):
    design, found = cells.factorial(table, names)
    return factor_effects.compare(found, "score", design)


def _model(table, names=NAMES):
    return _compare(table, names).all_runs


def _frame(table, names):
    """A row a run; names may leave out the last factors."""
    return pandas.DataFrame(
        [
            dict(zip(names, levels, strict=False)) | {"y": value}
            for levels, values in table.items()
            for value in values
        ]
    )


def _term(name):
    # The order of a factor's levels is that in which they come.
    return f"C({name}, levels=order['{name}'])"


def _fit(table, names, more=""):
    frame = _frame(table, names)
    order = {name: list(dict.fromkeys(frame[name])) for name in names}
    assert order  # read by the formula
    return formulas.ols(f"y ~ {' + '.join(map(_term, names))}{more}", frame).fit()


def test_effects_of_a_balanced_cube_by_hand():
    model = _model(CUBE)
    y = np.array(list(CUBE.values())).reshape(2, 2, 2, 2)
    total = ((y - y.mean()) ** 2).sum()
    gaps, squares = [], []
    for axis in range(3):
        one, two = np.moveaxis(y, axis, 0).reshape(2, 8).mean(1)
        gaps.append((one, two))
        squares.append(4 * (two - one) ** 2)
    residual = total - sum(squares)
    t = scipy.stats.t.ppf(0.975, 12)
    assert (model.residual_df, model.residual_squares) == pytest.approx((12, residual))
    assert model.statement == "16 runs; residual of 12 degrees of freedom"
    for factor, (one, two), of_it in zip(model.factors, gaps, squares, strict=True):
        first, second = factor.levels
        f = of_it / (residual / 12)
        assert (factor.df, factor.f) == pytest.approx((1, f), rel=1e-6)
        assert factor.p == pytest.approx(scipy.stats.f.sf(f, 1, 12), rel=1e-6)
        share = of_it / (of_it + residual)
        assert factor.partial_eta_squared.value == pytest.approx(share, abs=1e-6)
        assert [first.mean.value, second.mean.value] == pytest.approx([one, two])
        assert first.difference is None
        half = t * math.sqrt(residual / 12 / 8)
        for level in (first, second):
            mean = level.mean
            assert mean.high - mean.value == pytest.approx(half, abs=1e-9)
            assert mean.value - mean.low == pytest.approx(half, abs=1e-9)
        gap = second.difference
        assert gap.value == pytest.approx(two - one, abs=1e-9)
        assert gap.high - gap.value == pytest.approx(half * math.sqrt(2), abs=1e-9)
        assert gap.value - gap.low == pytest.approx(half * math.sqrt(2), abs=1e-9)


def test_an_unbalanced_table_against_statsmodels():
    fit = _fit(UNEQUAL, NAMES)
    model = _model(UNEQUAL)
    rows = anova_lm(fit, typ=2)
    assert model.residual_df == fit.df_resid
    assert model.residual_squares == pytest.approx(fit.ssr, rel=1e-6)
    for place, factor in enumerate(model.factors):
        row = rows.iloc[place]
        expected = (row["df"], row["F"], row["PR(>F)"])
        assert (factor.df, factor.f, factor.p) == pytest.approx(expected, rel=1e-6)
        prefix = f"C({factor.name}, "
        names = [name for name in fit.params.index if name.startswith(prefix)]
        # Bonferroni: each of the differences at its part of 5%.
        bounds = fit.conf_int(alpha=0.05 / len(names)).loc[names].to_numpy()
        for level, name, (low, high) in zip(
            factor.levels[1:], names, bounds, strict=True
        ):
            gap = level.difference
            expected = (fit.params[name], low, high)
            assert (gap.value, gap.low, gap.high) == pytest.approx(expected, abs=1e-9)


def test_means_weigh_the_levels_of_other_factors_alike():
    fit = _fit(UNEQUAL, NAMES)
    model = _model(UNEQUAL)
    num = {factor.name: len(factor.levels) for factor in model.factors}
    for factor, level in ((f, level) for f in model.factors for level in f.levels):
        weights = [
            1.0
            if name == "Intercept"
            else float(name.endswith(f"[T.{level.name}]"))
            if name.startswith(f"C({factor.name},")
            else 1 / num[name[2:].split(",")[0]]
            for name in fit.params.index
        ]
        found = fit.t_test(weights)
        ((low, high),) = found.conf_int()
        mean = level.mean
        expected = (found.effect[0], low, high)
        assert (mean.value, mean.low, mean.high) == pytest.approx(expected, abs=1e-9)


def test_interactions_against_the_larger_model():
    fit = _fit(UNEQUAL, NAMES)
    model = _model(UNEQUAL)
    pairs = list(itertools.combinations(NAMES, 2))
    assert [pair.name for pair in model.interactions] == [
        f"{a} x {b}" for a, b in pairs
    ]
    for pair, (a, b) in zip(model.interactions, pairs, strict=True):
        larger = _fit(UNEQUAL, NAMES, f" + {_term(a)}:{_term(b)}")
        row = anova_lm(fit, larger).iloc[1]
        expected = (row["df_diff"], row["F"], row["Pr(>F)"], larger.df_resid)
        found = (pair.df, pair.f, pair.p, pair.residual_df)
        assert found == pytest.approx(expected, rel=1e-6)
        assert pair.statement == ""
    seen = [pair.name for pair in model.interactions if pair.p < 0.05]
    start = "interactions seen at the 5% level, of 3 pairs: "
    assert model.pairs_statement.startswith(start + (", ".join(seen) or "none"))
    spoiled = UNEQUAL | {("2", "large", n): [0.2, 0.21] for n in "ab"}
    words = _model(spoiled).pairs_statement
    assert "temperature x size" in words
    assert words.endswith("; there a difference is one of averages")


def test_one_factor_against_scipy():
    table = {("a",): [1, 2, 4], ("b",): [2, 3, 3.5], ("c",): [4, 5]}
    (factor,) = _model(table, ("method",)).factors
    expected = scipy.stats.f_oneway(*table.values())
    assert (factor.f, factor.p) == pytest.approx(tuple(expected), abs=1e-9)
    assert [level.mean.value for level in factor.levels] == pytest.approx(
        [7 / 3, 8.5 / 3, 4.5]
    )


def test_one_seed_of_every_combination_leaves_the_interactions():
    table = {levels: values[:1] for levels, values in CUBE.items()}
    model = _model(table)
    assert model.residual_df == 4
    assert "the residual is interactions and chance" in model.statement
    assert all(factor.p is not None for factor in model.factors)
    assert all(pair.p is not None for pair in model.interactions)
    assert model.factors[0].p < 0.001 and model.factors[2].p > 0.4


def test_a_level_run_at_one_level_of_another_is_estimated_by_the_rest():
    found = _model(SOFT, ("temperature", "weight"))
    fit = _fit(SOFT, ("temperature", "weight"))
    gaps = [level.difference.value for f in found.factors for level in f.levels[1:]]
    assert gaps == pytest.approx(fit.params.iloc[1:].tolist(), abs=1e-9)
    assert "2 of 9 combinations have no run" in found.statement
    (pair,) = found.interactions
    assert "2 of 9 combinations have no run" in pair.statement
    assert pair.p is None and "nothing is left" in pair.statement
    twice = {levels: [*v, v[0] + 0.01] for levels, v in SOFT.items()}
    (pair,) = _model(twice, ("temperature", "weight")).interactions
    assert (pair.df, pair.residual_df) == (2, 7)
    assert pair.statement.endswith("F has 2 of 4 degrees of freedom")


def test_what_cannot_be_told_apart_has_no_number_but_words():
    model = _model(NESTED, SEVERAL)
    method, generation, student = model.factors
    why = "the levels of method and generation meet too seldom to tell them apart"
    assert (generation.p, generation.f, generation.statement) == (None, None, why)
    assert generation.partial_eta_squared.statement == why
    gaps = [level.difference for level in (*method.levels[1:], generation.levels[1])]
    assert {(gap.value, gap.low, gap.statement) for gap in gaps} == {(None, None, why)}
    # Of the methods two can be compared, not with the first: F says that much.
    assert method.statement == f"F has 1 of 2 degrees of freedom: {why}"
    frame = _frame(NESTED, SEVERAL)
    whole = formulas.ols("y ~ C(method) + C(student)", frame).fit()
    smaller = formulas.ols("y ~ C(generation) + C(student)", frame).fit()
    f = (smaller.ssr - whole.ssr) / (whole.ssr / whole.df_resid)
    assert (method.df, method.f) == pytest.approx((1, f), rel=1e-6)
    # The student has a difference, but no mean over methods that never met.
    gap = student.levels[1].difference
    assert gap.value == pytest.approx(whole.params.iloc[-1], abs=1e-9)
    assert gap.low > 0
    assert (student.levels[0].mean.value, student.levels[0].mean.statement) == (
        None,
        why,
    )
    assert model.interactions[0].p is None
    assert "the factors alone explain as much" in model.interactions[0].statement
    assert cells.all_finite(model)


SAME = "all values are the same: no variance, no test"
LEFT = "nothing is left to measure chance by: no test"


@pytest.mark.parametrize(
    ("table", "reason", "gap"),
    [
        ({k: [0.1, 0.1] for k in CUBE}, SAME, 0),
        ({("1", "s"): [1], ("2", "s"): [2], ("1", "t"): [4]}, LEFT, 1),
        ({("1", "s"): [1], ("2", "s"): [2], ("1", "t"): [4], ("2", "t"): [5]}, LEFT, 1),
    ],
    ids=["constant", "as many terms as runs", "nothing but the terms"],
)
def test_without_chance_there_are_values_and_a_statement(table, reason, gap):
    model = _model(table, NAMES[: len(next(iter(table)))])
    assert model.statement.endswith(reason)
    for factor in model.factors:
        assert (factor.p, factor.statement) == (None, reason)
        assert factor.levels[0].mean.value is not None
    level = model.factors[0].levels[1]
    assert level.difference.value == pytest.approx(gap, abs=1e-12)
    assert (level.difference.low, level.difference.statement) == (None, reason)
    assert all(pair.p is None and pair.statement for pair in model.interactions)
    assert cells.all_finite(model)
    text = report.sentence(model.factors[0], 0.95, 1)
    assert text.endswith(f", without an interval ({reason}).")


@pytest.mark.parametrize(
    "table",
    [{("1", "s", "a"): [1]}, {("1", "s", "a"): []}, {k: [] for k in CUBE}, {}],
    ids=["one run", "one that failed", "all failed", "no run"],
)
def test_without_two_levels_there_is_no_factor(table):
    found = _compare(table)
    assert found.all_runs == factor_effects.Model(
        statement="no factor has two levels with a number: no test"
    )
    assert found.without_outliers is None


def test_a_level_without_a_number_is_listed_last_with_its_reason():
    table = {("8", "small", "a"): [], **CUBE, ("4", "small", "a"): []}
    temperature, *_ = _model(table).factors
    assert [level.name for level in temperature.levels] == ["1", "2", "8", "4"]
    expected = [level.mean for level in _model(CUBE).factors[0].levels]
    assert [level.mean for level in temperature.levels[:2]] == expected
    for level in temperature.levels[2:]:
        assert level.members == ()
        for what in (level.mean, level.difference):
            assert (what.value, what.statement) == (None, "no run has a number")
    assert "8 against 1: not estimable" in report.sentence(temperature, 0.95, 2)


def test_outliers_are_those_of_runs_that_are_alike():
    table = {levels: [*v, *v] for levels, v in CUBE.items()}
    assert _compare(table).statement.startswith("no outlier among the runs")
    assert "no outlier can be told" in _compare(CUBE).statement
    spoiled = table | {("2", "large", "b"): [*table["2", "large", "b"], -9.0]}
    found = _compare(spoiled)
    (outlier,) = found.outliers
    assert outlier.value == -9
    assert found.without_outliers.factors[0].f == pytest.approx(
        _model(table).factors[0].f
    )
    assert found.all_runs.factors[0].f < found.without_outliers.factors[0].f / 10
    assert found.statement.endswith("alike in all factors: 1")


def test_an_offset_changes_no_difference():
    moved = {levels: [v + 4096 for v in values] for levels, values in CUBE.items()}
    for here, there in zip(_model(CUBE).factors, _model(moved).factors, strict=True):
        assert there.f == pytest.approx(here.f, rel=1e-8, abs=1e-8)
        for one, other in zip(here.levels[1:], there.levels[1:], strict=True):
            assert other.difference.low == pytest.approx(one.difference.low, abs=1e-9)
        assert there.levels[0].mean.high == pytest.approx(
            here.levels[0].mean.high + 4096, abs=1e-8
        )


def test_numbers_are_finite_whatever_the_cells_hold():
    rng = np.random.default_rng(0)
    kinds = [[], [0.5], [0.5, 0.5], [0.5, 0.6], [0.6, 0.5, 0.6], [1e90, -1e90, 3.0]]
    for _ in range(12):
        table = {
            levels: kinds[rng.integers(len(kinds))]
            for levels in itertools.product("abc", "st", "xy")
            if rng.random() < 0.6
        }
        found = _compare(table, ("a=1", "C(b)", "y ~ c"))
        assert cells.all_finite(found), table
        for factor in found.all_runs.factors:
            assert "nan" not in report.sentence(factor, 0.95, 3)


def test_a_sentence_says_what_was_seen_and_what_was_not():
    temperature, size, _ = _model(UNEQUAL).factors
    noise = _model(CUBE).factors[2]
    two, four = (level.difference for level in temperature.levels[1:])
    assert two.low > 0 and four.low < 0 < four.high

    def show(number):
        return f"{number:.3f}".replace("-", "\N{MINUS SIGN}")

    expected = (
        "temperature: "
        f"2 against 1: +{show(two.value)} "
        f"(95% interval {show(two.low)} to {show(two.high)}); "
        "4 against 1: no difference seen "
        f"({show(four.value)}, {show(four.low)} to {show(four.high)})."
    )
    assert four.value < 0
    assert report.sentence(temperature, 0.95, 3) == expected
    assert "no difference seen" in report.sentence(noise, 0.95, 3)
    assert noise.p > 0.05
    assert "no difference seen" not in report.sentence(size, 0.95, 3)


def test_a_sentence_tells_where_f_and_intervals_disagree():
    # The first level lies between two that differ: neither is far from it.
    table = {
        (method, size): [middle + step + (size == "t") for step in (-0.6, 0.0, 0.6)]
        for method, middle in {"a": 0.0, "b": 0.5, "c": -0.5}.items()
        for size in "st"
    }
    method, _ = _model(table, ("method", "size")).factors
    assert method.p < 0.05
    text = report.sentence(method, 0.95, 2)
    assert text.count("no difference seen") == 2
    assert f"; all levels together: they differ (p = {method.p:.4f})" in text
    assert "they differ" not in report.sentence(_model(CUBE).factors[0], 0.95, 2)


def test_order_of_runs_does_not_matter_but_for_the_first_level():
    design, found = cells.factorial(UNEQUAL, NAMES)
    one = factor_effects.compare(found, "score", design).all_runs
    other = factor_effects.compare(found[::-1], "score", design).all_runs
    for here, there in zip(one.factors, other.factors, strict=True):
        assert there.f == pytest.approx(here.f)
        assert [level.name for level in there.levels] == [
            level.name for level in here.levels
        ][::-1]
    gap = one.factors[1].levels[1].difference
    back = other.factors[1].levels[1].difference
    assert (back.value, back.low) == pytest.approx((-gap.value, -gap.high))
