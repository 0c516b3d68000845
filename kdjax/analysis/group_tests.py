"""Tests between groups of runs, with and without outliers.

What cannot be tested is a result too: its numbers are absent and its `statement` says
why. Nothing is rounded here.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdjax.analysis import effect_sizes, extras, runs

ALPHA = 0.05  # level at which statements speak of a difference
_FEW = 5  # runs of a group below which chi-squared is a rough approximation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A row of an analysis of variance."""

    name: str
    sum_squares: float
    df: float
    f: float
    p: float
    eta_squared: float  # share of the total sum of squares
    partial_eta_squared: effect_sizes.Estimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anova:
    """Analysis of variance; without `sources` there is none, and a statement why."""

    sources: tuple[Source, ...] = ()
    residual_squares: float | None = None
    residual_df: float | None = None
    statement: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kruskal:
    """The test of Kruskal and Wallis; without numbers there is none."""

    h: float | None = None
    df: int | None = None
    p: float | None = None
    epsilon_squared: float | None = None  # H / (n - 1)
    statement: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Two levels of the first factor, at one level of the second."""

    first: str
    second: str
    difference: float | None = None  # of means, first less second
    low: float | None = None  # its interval, simultaneous over all pairs (Tukey)
    high: float | None = None
    tukey_p: float | None = None
    dunn_p: float | None = None  # times the number of pairs, at most 1 (Bonferroni)
    hedges_g: effect_sizes.Estimate
    vargha_delaney: effect_sizes.Estimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimpleEffects:
    """Tests of one factor at one level of another, which they are within."""

    within: str  # the level; "" without another factor
    kruskal: Kruskal
    dunn_statement: str
    tukey_statement: str
    statement: str  # which levels have no run; may be ""
    pairs: tuple[Pair, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tests:
    """All tests of one set of groups."""

    groups: tuple[runs.Group, ...]
    anova: Anova
    simple_effects: tuple[SimpleEffects, ...]  # at each level of the second factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(runs.Analysis[Tests]):
    """Groups and tests of one metric."""

    absent: tuple[runs.Run, ...]  # runs without a number: failed, or not finite
    collapsed: tuple[runs.Run, ...]  # finished, but at chance or not finite


def compare(table: Sequence[runs.Run], metric: str, design: runs.Design) -> Comparison:
    """Compare the groups of a design by one metric.

    Args:
      table: all runs, failed ones too.
      metric: column.
      design: names the factors.
    """
    groups = runs.groups(table, metric, design)
    without, outliers = runs.without_outliers(groups, metric, design)
    absent = tuple(run for group in groups for run in group.absent)
    collapsed = tuple(run for run in table if run.collapsed)
    num = sum(len(group.values) for group in groups)
    words = [f"{num} of {len(table)} runs have a number"]
    if absent:
        words.append(f"{len(absent)} have none and are in no test")
    inside = [run for run in collapsed if run.value(metric) is not None]
    if inside:
        words.append(f"{len(inside)} collapsed and stay in the tests of all runs")
    words.append(
        f"{len(outliers)} lie beyond 1.5 interquartile ranges of their group"
        if outliers
        else "no outlier"
    )
    return Comparison(
        metric=metric,
        all_runs=_tests(groups, design),
        outliers=outliers,
        without_outliers=_tests(without, design) if outliers else None,
        absent=absent,
        collapsed=collapsed,
        statement="; ".join(words),
    )


def anova(groups: Sequence[runs.Group], first: str, second: str = "") -> Anova:
    """Compute an analysis of variance of type II, of two factors with interaction.

    A factor of which the runs have one level only is left out. Where two levels never
    meet, the interaction is left out, and the residual holds it.

    Args:
      groups: of runs.
      first: name of the first factor.
      second: name of the second, "" without one.

    Source: Langsrud, 2003, Stat. Comput. 13, 163-167, for the type.
    """
    filled = [group for group in groups if group.values]
    reason = _no_test(filled)
    if reason:
        return Anova(statement=reason)
    table = extras.load("pandas").DataFrame(
        [
            {"y": value, "a": group.level, "b": group.within}
            for group in filled
            for value in group.values
        ]
    )
    names = {
        f"C({column})": name
        for column, name in (("a", first), ("b", second))
        if table[column].nunique() > 1
    }
    words = ""
    formula = "y ~ " + " + ".join(names)
    if len(names) == 2:
        cells = table["a"].nunique() * table["b"].nunique()
        if len(filled) == cells:
            names["C(a):C(b)"] = f"{first} x {second}"
            formula = "y ~ C(a) * C(b)"
        else:
            words = (
                f"; {cells - len(filled)} of {cells} groups have no run: the "
                "interaction is not estimated and is part of the residual"
            )
    model = extras.load("statsmodels.formula.api").ols(formula, table)
    if np.linalg.matrix_rank(model.exog) < model.exog.shape[1]:
        return Anova(statement="the levels meet too seldom to tell the factors apart")
    fit = model.fit()
    total = float(fit.centered_tss)
    if fit.df_resid < 1 or fit.ssr <= 1e-20 * total:
        return Anova(statement="nothing is left to measure chance by: no test")
    rows = extras.load("statsmodels.stats.anova").anova_lm(fit, typ=2)
    sources = tuple(
        _source(names[key], rows.loc[key], total, float(fit.df_resid))
        for key in rows.index
        if key in names
    )
    seen = [source.name for source in sources if source.p < ALPHA]
    unseen = [source.name for source in sources if source.p >= ALPHA]
    verdicts = [
        *([f"a difference by {', '.join(seen)}"] if seen else []),
        *([f"none is seen by {', '.join(unseen)}"] if unseen else []),
    ]
    return Anova(
        sources=sources,
        residual_squares=float(fit.ssr),
        residual_df=float(fit.df_resid),
        statement=f"at the {ALPHA:.0%} level: {'; '.join(verdicts)}{words}",
    )


def simple_effects(
    groups: Sequence[runs.Group], within: str, confidence: float = 0.95
) -> SimpleEffects:
    """Compare the levels of the first factor at one level of the second.

    Tukey's honest significant differences (Tukey-Kramer where sizes differ), the test
    of Kruskal and Wallis, Dunn's with Bonferroni's correction, both with correction for
    ties, and effect sizes of all pairs. Variance and ranks are of these groups alone.

    Args:
      groups: of runs, all at this level.
      within: name of the level.
      confidence: of intervals.

    Source: Kramer, 1956, Biometrics 12(3); Kruskal and Wallis, 1952, JASA 47(260);
    Dunn, 1964, Technometrics 6(3).
    """
    filled = [group for group in groups if group.values]
    empty = [group.level for group in groups if not group.values]
    indices = list(itertools.combinations(range(len(filled)), 2))
    tukey = _tukey(filled, confidence)
    dunn = _dunn(filled)
    pairs = []
    for order, (i, j) in enumerate(indices):
        x, y = filled[i].values, filled[j].values
        pairs.append(
            Pair(
                first=filled[i].level,
                second=filled[j].level,
                difference=_difference(filled[i], filled[j]),
                **(tukey[order] if tukey else {}),
                dunn_p=float(dunn[i, j]) if dunn is not None else None,
                hedges_g=effect_sizes.hedges_g(x, y, confidence=confidence),
                vargha_delaney=effect_sizes.vargha_delaney(x, y, confidence=confidence),
            )
        )
    return SimpleEffects(
        within=within,
        kruskal=_kruskal(filled),
        dunn_statement=_verdict([p.dunn_p for p in pairs], _no_ranks(filled)),
        tukey_statement=_verdict([p.tukey_p for p in pairs], _no_test(filled)),
        statement=f"no run of {', '.join(empty)}" if empty else "",
        pairs=tuple(pairs),
    )


def _tests(groups: tuple[runs.Group, ...], design: runs.Design) -> Tests:
    levels = dict.fromkeys(group.within for group in groups)
    return Tests(
        groups=groups,
        anova=anova(groups, " / ".join(design.compare), " / ".join(design.within)),
        simple_effects=tuple(
            simple_effects(
                [group for group in groups if group.within == level],
                level,
                design.confidence,
            )
            for level in levels
        ),
    )


def _no_test(filled: Sequence[runs.Group]) -> str:
    """Return why groups cannot be compared by their variances; "" if they can."""
    if len(filled) < 2:
        return "fewer than two groups have a run: nothing to compare"
    if all(len(group.values) == 1 for group in filled):
        return "one seed in each group: no variance, no test"
    if not effect_sizes.varies(*(group.values for group in filled)):
        if not effect_sizes.varies(
            [value for group in filled for value in group.values]
        ):
            return "all values are the same: no variance, no test"
        return "no group varies, but they differ: no variance within groups, no test"
    return ""


def _no_ranks(filled: Sequence[runs.Group]) -> str:
    """Return why groups cannot be compared by their ranks; "" if they can."""
    if len(filled) < 2 or all(len(group.values) == 1 for group in filled):
        return _no_test(filled)
    if len({value for group in filled for value in group.values}) == 1:
        return "all values are the same: no ranks, no test"
    return ""


def _source(name: str, row: Any, total: float, residual_df: float) -> Source:
    squares = max(float(row["sum_sq"]), 0.0)
    f, df = max(float(row["F"]), 0.0), float(row["df"])
    return Source(
        name=name,
        sum_squares=squares,
        df=df,
        f=f,
        p=float(row["PR(>F)"]),
        eta_squared=squares / total,
        partial_eta_squared=effect_sizes.partial_eta_squared(f, df, residual_df),
    )


def _difference(first: runs.Group, second: runs.Group) -> float | None:
    if first.mean is None or second.mean is None:
        return None
    return first.mean - second.mean


def _tukey(filled: Sequence[runs.Group], confidence: float) -> list[dict[str, float]]:
    """Return interval and p of each pair in order; empty where there is no test."""
    if _no_test(filled):
        return []
    values = [value for group in filled for value in group.values]
    labels = [i for i, group in enumerate(filled) for _ in group.values]
    result = extras.load("statsmodels.stats.multicomp").pairwise_tukeyhsd(
        np.asarray(values), np.asarray(labels), alpha=1 - confidence
    )
    # Its differences are the second group's mean less the first's.
    return [
        {"low": -float(high), "high": -float(low), "tukey_p": float(p)}
        for (low, high), p in zip(result.confint, result.pvalues, strict=True)
    ]


def _kruskal(filled: Sequence[runs.Group]) -> Kruskal:
    reason = _no_ranks(filled)
    if reason:
        return Kruskal(statement=reason)
    h, p = extras.load("scipy.stats").kruskal(*(group.values for group in filled))
    num = sum(len(group.values) for group in filled)
    words = "the groups differ" if p < ALPHA else "no difference is seen"
    if min(len(group.values) for group in filled) < _FEW:
        words += f"; groups of fewer than {_FEW} runs make p rough"
    return Kruskal(
        h=float(h),
        df=len(filled) - 1,
        p=float(p),
        epsilon_squared=float(h) / (num - 1),
        statement=words,
    )


def _dunn(filled: Sequence[runs.Group]) -> np.ndarray | None:
    """Return the corrected p of each pair; None where there is no test."""
    if _no_ranks(filled):
        return None
    posthocs = extras.load("scikit_posthocs")
    values = [list(group.values) for group in filled]
    return posthocs.posthoc_dunn(values, p_adjust="bonferroni").to_numpy()


def _verdict(p_values: Sequence[float | None], reason: str) -> str:
    if reason:
        return reason
    num = sum(p is not None and p < ALPHA for p in p_values) or "none"
    return f"pairs that differ at the {ALPHA:.0%} level: {num} of {len(p_values)}"
