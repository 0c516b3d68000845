"""Effects of all factors at once: an additive model of a metric.

What cannot be estimated is None, and a statement says why. Nothing is rounded here.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from kdjax.analysis import effect_sizes, group_tests, least_squares, runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """A level of a factor, adjusted for the other factors."""

    name: str
    members: tuple[runs.Run, ...]  # those with a number
    mean: effect_sizes.Estimate  # over the levels of the other factors, each alike
    difference: effect_sizes.Estimate | None  # from the first level; None of it itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factor:
    """A factor and its levels; without `p` there is no test, and a statement why."""

    name: str
    levels: tuple[Level, ...]  # as they come in the runs; those without a number last
    df: float | None = None
    f: float | None = None
    p: float | None = None
    partial_eta_squared: effect_sizes.Estimate
    statement: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interaction:
    """Gain of adding a pair's interaction to the additive model; maybe no test."""

    name: str
    df: float | None = None
    residual_df: float | None = None  # of the model with it
    f: float | None = None
    p: float | None = None
    statement: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """An additive model of one set of runs."""

    factors: tuple[Factor, ...] = ()  # those with two levels or more
    interactions: tuple[Interaction, ...] = ()  # of each pair of them
    residual_squares: float | None = None
    residual_df: float | None = None
    statement: str
    pairs_statement: str = ""  # which interactions are seen


def levels(table: Sequence[runs.Run], design: runs.Design) -> dict[str, list[str]]:
    """Return the factors that have two levels or more, with their levels in order."""
    every = {
        factor: list(dict.fromkeys(runs.level_of(run, (factor,)) for run in table))
        for factor in design.factors
    }
    return {factor: names for factor, names in every.items() if len(names) > 1}


def compare(
    table: Sequence[runs.Run], metric: str, design: runs.Design
) -> runs.Analysis[Model]:
    """Estimate the effect of every factor of a design on one metric.

    Outliers are looked for among the runs that are alike in all factors.

    Args:
      table: all runs, failed ones too.
      metric: column.
      design: names the factors.
    """
    alike = dataclasses.replace(design, compare=design.factors, within=())
    groups = runs.groups(table, metric, alike)
    without, outliers = runs.without_outliers(groups, metric, alike)
    names = levels(table, design)

    def model(these: Sequence[runs.Group]) -> Model:
        members = [run for group in these for run in group.runs]
        return additive(members, metric, names, design.confidence)

    most = max((len(group.values) for group in groups), default=0)
    among = "among the runs that are alike in all factors"
    if outliers:
        words = f"outliers {among}: {len(outliers)}"
    elif most < 4:
        words = "fewer than four runs are alike in all factors: no outlier can be told"
    else:
        words = f"no outlier {among}"
    return runs.Analysis(
        metric=metric,
        all_runs=model(groups),
        outliers=outliers,
        without_outliers=model(without) if outliers else None,
        statement=words,
    )


def additive(
    members: Sequence[runs.Run],
    metric: str,
    levels: Mapping[str, Sequence[str]],
    confidence: float = 0.95,
) -> Model:
    """Fit metric = constant + one term a level of each factor, by least squares.

    F is of type II: the residual without the factor less the residual with it, all
    others in both. A level's mean gives the levels of each other factor the same
    weight; its interval is its own. Differences are from the first level that has a
    number; their intervals hold for all of a factor at once, by Bonferroni's
    correction: Dunnett's are a little narrower, but in an unbalanced design they are
    integrated by random numbers, and the same runs must give the same page. A pair's F
    is of adding the combinations of its levels to the model.

    Args:
      members: runs with a number.
      metric: its column.
      levels: factor -> its levels in order, those that no run has too.
      confidence: of intervals of means and differences.

    Source: Langsrud, 2003, Stat. Comput. 13, 163-167, for the type; Searle, Speed and
    Milliken, 1980, Am. Stat. 34(4), 216-221, for the means; Dunn, 1961, JASA 56(293),
    52-64, for the correction.
    """
    terms = {}
    for factor, names in levels.items():
        labels = [runs.level_of(run, (factor,)) for run in members]
        present = [name for name in names if name in labels]
        if len(present) > 1:
            columns = [[label == name for name in present] for label in labels]
            terms[factor] = np.asarray(columns, float)
    if not terms:
        return Model(statement="no factor has two levels with a number: no test")
    values_N = np.asarray([run.value(metric) for run in members], float)
    fit = least_squares.Fit(values_N, terms, confidence)
    pairs = tuple(
        _interaction(fit, first, second)
        for first, second in itertools.combinations(terms, 2)
    )
    return Model(
        factors=tuple(_factor(fit, name, members, levels[name]) for name in terms),
        interactions=pairs,
        residual_squares=fit.squares,
        residual_df=fit.df,
        statement=_statement(fit, members),
        pairs_statement=_verdict(pairs),
    )


def _factor(
    fit: least_squares.Fit, name: str, members: Sequence[runs.Run], names: Sequence[str]
) -> Factor:
    inside: dict[str, list[runs.Run]] = {level: [] for level in names}
    for run in members:
        inside[runs.level_of(run, (name,))].append(run)
    present = [level for level in names if inside[level]]
    unit = np.eye(len(present))
    contrasts = [{name: weights - unit[0]} for weights in unit[1:]]
    num = sum(fit.estimable(contrast) for contrast in contrasts)
    differences = [fit.estimate(contrast, num=num) for contrast in contrasts]
    others = {
        key: np.full(term.shape[1], 1 / term.shape[1])
        for key, term in fit.terms.items()
    }
    levels = [
        Level(
            name=level,
            members=tuple(inside[level]),
            mean=fit.estimate(others | {name: unit[place]}, constant=1.0),
            difference=differences[place - 1] if place else None,
        )
        for place, level in enumerate(present)
    ]
    none = effect_sizes.nothing("no run has a number")
    levels += [
        Level(name=level, members=(), mean=none, difference=none)
        for level in names
        if not inside[level]
    ]
    test = fit.test(fit.less(name))
    unknown = [each.statement for each in differences if each.value is None]
    if not test:
        reason = fit.reason or unknown[0]
        eta = effect_sizes.nothing(reason)
    else:
        eta = effect_sizes.partial_eta_squared(test["f"], test["df"], fit.df)
        df = f"{test['df']:.0f} of {len(contrasts)} degrees of freedom"
        reason = f"F has {df}: {unknown[0]}" if unknown else ""
    return Factor(
        name=name,
        levels=tuple(levels),
        **test,
        partial_eta_squared=eta,
        statement=reason,
    )


def _interaction(fit: least_squares.Fit, first: str, second: str) -> Interaction:
    a_NA, b_NB = fit.terms[first], fit.terms[second]
    cells_NC = np.einsum("na,nb->nab", a_NA, b_NB).reshape(len(a_NA), -1)
    both = {"additive": fit.x_NP, "cells": cells_NC}
    larger = least_squares.Fit(fit.values, both, fit.confidence)
    test = larger.test(fit)
    words = []
    missing = int((cells_NC.sum(0) == 0).sum())
    if missing:
        words.append(f"{missing} of {cells_NC.shape[1]} combinations have no run")
    most = (a_NA.shape[1] - 1) * (b_NB.shape[1] - 1)
    if fit.df == larger.df:
        words.append("not estimable: the factors alone explain as much")
    elif not test:
        words.append(larger.reason)
    elif test["df"] < most:
        words.append(f"F has {test['df']:.0f} of {most} degrees of freedom")
    return Interaction(
        name=f"{first} x {second}",
        residual_df=larger.df if test else None,
        **test,
        statement="; ".join(words),
    )


def _verdict(pairs: Sequence[Interaction]) -> str:
    p_values = {pair.name: pair.p for pair in pairs if pair.p is not None}
    if not p_values:
        return "no pair of factors can be tested for an interaction" if pairs else ""
    seen = [name for name, p in p_values.items() if p < group_tests.ALPHA]
    num = len(p_values)
    words = f"interactions seen at the {group_tests.ALPHA:.0%} level, of {num} pairs"
    if not seen:
        return f"{words}: none"
    return f"{words}: {', '.join(seen)}; there a difference is one of averages"


def _statement(fit: least_squares.Fit, members: Sequence[runs.Run]) -> str:
    """Return the remarks that the numbers of a model need, in words."""
    met: dict[str, int] = {}
    for run in members:
        key = repr([runs.level_of(run, (factor,)) for factor in fit.terms])
        met[key] = met.get(key, 0) + 1
    every = math.prod(term.shape[1] for term in fit.terms.values())
    words = [f"{len(members)} runs", f"residual of {fit.df:.0f} degrees of freedom"]
    if len(met) < every:
        words.append(f"{every - len(met)} of {every} combinations have no run")
    if fit.reason:
        words.append(fit.reason)
    elif max(met.values()) == 1:
        words.append("one run a combination: the residual is interactions and chance")
    return "; ".join(words)
