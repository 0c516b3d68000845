"""Tables of a study's analysis: rows of numbers with words about each.

Shapes: N ratings, P columns of a model, C conditions.
"""

import dataclasses
import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from kdjax.analysis import (
    agreement,
    effect_sizes,
    extras,
    group_tests,
    mixed_models,
    ordinal_models,
    permutation,
    plots,
    rating_tests,
    runs,
)
from kdjax.analysis.study_means import MEANS, QUALITY
from kdjax.survey.ratings import Ratings

ALPHA = group_tests.ALPHA
_LENGTH = "length, per 10"
_SEVERAL = 1.5  # mean ratings per explanation from which it is a random effect
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the page and of the csv."""

    name: str  # in the csv and in links
    title: str
    words: str  # what it says and how to read it
    rows: Sequence[Row]  # `low` and `high` are an interval, `remark` is in words
    figure: str = ""  # SVG
    notes: Sequence[str] = ()  # what was not estimable, what was left out

    @property
    def columns(self) -> list[str]:
        """Return the keys that some row has a value of; an interval is one column."""
        keys = dict.fromkeys(
            key
            for row in self.rows
            for key, value in row.items()
            if value not in ("", None)
        )
        last = ["remark"] if keys.pop("remark", "") is None else []
        return [key for key in keys if key != "high"] + last

    @property
    def numeric(self) -> set[str]:
        """Return the columns of numbers."""
        return {
            key
            for row in self.rows
            for key, value in row.items()
            if isinstance(value, int | float)
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the analysis."""

    reference: str  # condition that others are compared with
    points: int  # of the scale
    confidence: float = 0.95
    permutations: int = 9999
    bootstraps: int = 1000
    seed: int = 0


def overview(ratings: Ratings) -> Table:
    """Count participants, items, explanations and ratings."""
    people = Counter(ratings.participants)
    rated = Counter(ratings.explanations)
    cells = Counter(zip(ratings.participants, ratings.conditions, strict=True))
    twice = Counter(zip(ratings.participants, ratings.items, strict=True))
    repeated = sum(count > 1 for count in twice.values())
    levels = ratings.levels
    full = sum(
        len({cells[person, level] for level in levels}) == 1 for person in people
    )
    rows: list[Row] = [
        {"count of": "ratings", "number": len(ratings)},
        {"count of": "participants", "number": len(people)},
        {"count of": "items", "number": len(set(ratings.items))},
        {"count of": "conditions", "number": len(levels)},
        {"count of": "explanations (item and condition)", "number": len(rated)},
        {
            "count of": "explanations rated by several people",
            "number": sum(count > 1 for count in rated.values()),
        },
        {
            "count of": "participants who saw each condition equally often",
            "number": full,
        },
        {"count of": "participant and item pairs that occur twice", "number": repeated},
    ]
    few, most = min(people.values()), max(people.values())
    words = (
        f"A participant gave {few} to {most} ratings, "
        f"{statistics.mean(people.values()):.1f} on average; an explanation has "
        f"{min(rated.values())} to {max(rated.values())} ratings, "
        f"{statistics.mean(rated.values()):.2f} on average."
    )
    return Table(
        name="overview",
        title="What was rated",
        words=words,
        rows=rows,
        notes=ratings.statements,
    )


def excluded(ratings: Ratings, reasons: dict[str, np.ndarray]) -> Table:
    """Count what each reason excludes."""
    people = np.array(ratings.participants)
    rows = [
        {
            "reason": reason,
            "participants": len(set(people[mask].tolist())),
            "ratings": int(mask.sum()),
        }
        for reason, mask in reasons.items()
    ]
    gone = np.zeros(len(ratings), bool)
    for mask in reasons.values():
        gone |= mask
    rows.append(
        {
            "reason": "any of them",
            "participants": len(set(people[gone].tolist())),
            "ratings": int(gone.sum()),
        }
    )
    if reasons:
        words = (
            "Excluded before any test, as preregistered: all ratings of a participant "
            "for whom one of these holds. One may fall under several."
        )
    else:
        words = "The table says nothing of attention, time or completion: all stay."
    return Table(name="exclusions", title="Exclusions", words=words, rows=rows)


def descriptives(ratings: Ratings, options: Options) -> Table:
    """Describe each outcome by condition, with stacked bars."""
    rows: list[Row] = []
    top = (options.points - 1, options.points)
    for outcome, values_N in ratings.outcomes.items():
        for condition, values in _groups(ratings, values_N):
            known = values[np.isfinite(values)]
            row: Row = {"outcome": outcome, "condition": condition, "n": len(known)}
            if len(known):
                row |= {
                    "mean": float(known.mean()),
                    "sd": float(known.std(ddof=1)) if len(known) > 1 else None,
                    "median": float(np.median(known)),
                }
                if outcome != QUALITY:
                    row |= {
                        f"share of {value}": float((known == value).mean())
                        for value in top
                    }
            row["share missing"] = float(1 - len(known) / len(values))
            rows.append(row)
    scale = [float(value) for value in range(1, options.points + 1)]
    counts = {
        outcome: {
            condition: [int((values == value).sum()) for value in scale]
            for condition, values in _groups(ratings, ratings.values_NC[:, place])
        }
        for place, outcome in enumerate(ratings.constructs)
    }
    return Table(
        name="descriptives",
        title="Ratings by condition",
        words=(
            "Means hide a ceiling: where a large share gave the highest points, "
            "conditions cannot differ upwards. Quality is the mean of the constructs "
            "of a rating in which none is missing."
        ),
        rows=rows,
        figure=plots.likert(counts, [f"{value:g}" for value in scale], name="likert"),
    )


def reliability(ratings: Ratings, options: Options) -> Table:
    """Compute the agreement of raters on each construct."""
    rows = []
    for outcome, values_N in ratings.outcomes.items():
        alpha = agreement.krippendorff_alpha(
            [f"{item}\0{condition}" for item, condition in ratings.explanations],
            values_N,
            confidence=options.confidence,
            num_samples=options.bootstraps,
            seed=options.seed,
        )
        rows.append({"outcome": outcome, **_estimate(alpha)})
    alone = all(row["value"] is None for row in rows)
    words = (
        "Krippendorff's alpha of ordinal ratings: 1 is perfect agreement on an "
        "explanation, 0 what chance gives. Intervals by bootstrap over explanations."
    )
    if alone:
        words += (
            " No explanation has two raters here, so how far people agree cannot be "
            "known, and an explanation's own effect cannot be told from noise."
        )
    return Table(name="agreement", title="Agreement", words=words, rows=rows)


def within_participants(ratings: Ratings, options: Options) -> list[Table]:
    """Test by permutation within participants: jointly, each outcome, each pair."""
    outcomes = ratings.outcomes
    rows: list[Row] = []
    complete = np.isfinite(ratings.values_NC).all(1)
    joint = _permute(ratings, ratings.values_NC, complete, options)
    test = joint.get("test")
    rows.append(
        {
            "outcome": "all constructs together",
            "share of variance": None
            if test is None
            else sum(test.shares) / len(test.shares),
            "participants": None if test is None else test.participants,
            "ratings": None if test is None else test.ratings,
            "p": None if test is None else test.joint_p,
            "remark": joint["remark"],
        }
    )
    for outcome, values_N in outcomes.items():
        one = _permute(ratings, values_N[:, None], np.isfinite(values_N), options)
        test = one.get("test")
        rows.append(
            {
                "outcome": outcome,
                "share of variance": None if test is None else test.shares[0],
                "participants": None if test is None else test.participants,
                "ratings": None if test is None else test.ratings,
                "p": None if test is None else test.p_values[0],
                "remark": one["remark"],
            }
        )
    single = [row for row in rows if row["outcome"] in ratings.constructs]
    _adjust(single)
    pairs: list[Row] = []
    for outcome, values_N in outcomes.items():
        family = []
        for first, second in itertools.combinations(ratings.levels, 2):
            inside = np.isin(ratings.conditions, [first, second])
            inside &= np.isfinite(values_N)
            one = _permute(ratings, values_N[:, None], inside, options)
            test = one.get("test")
            family.append(
                {
                    "outcome": outcome,
                    "pair": f"{first} - {second}",
                    **_paired(ratings, values_N, first, second, options),
                    "p": None if test is None else test.p_values[0],
                    "remark": one["remark"],
                }
            )
        pairs += _adjust(family)
    return [
        Table(
            name="permutation",
            title="Within-participant permutation tests (headline)",
            words=(
                "Each participant's ratings keep their values and exchange their "
                "conditions: differences between people drop out, and neither "
                "normality nor independence of a person's ratings is assumed. The "
                "share of the variance within participants that conditions explain is "
                f"the statistic; {options.permutations:,} exchanges. Holm's correction "
                "is over the constructs. It says of these explanations that they were "
                "rated differently; of conditions only as far as explanations of one "
                "condition are alike. The mixed models speak of further items."
            ),
            rows=rows,
        ),
        Table(
            name="permutation_pairs",
            title="Pairs of conditions within participants",
            words=(
                "Difference: mean over participants who rated both of their mean "
                "rating of the first less that of the second, with its interval by t "
                "of these differences; d is the difference in their standard "
                "deviations. p by permutation as above, of the two conditions alone; "
                "corrections are over the pairs of an outcome."
            ),
            rows=pairs,
        ),
    ]


def linear_models(
    ratings: Ratings, options: Options, advance: Callable[[], None]
) -> list[Table]:
    """Fit linear mixed models, with and without length."""
    tests: list[Row] = []
    pairs: list[Row] = []
    means: list[Row] = []
    variances: list[Row] = []
    for outcome, values_N in ratings.outcomes.items():
        for model, x_NP, names, rows in _designs(ratings, values_N, options):
            advance()
            head = {"outcome": outcome, "model": model, "n": int(rows.sum())}
            try:
                fit = mixed_models.LinearFit(
                    values_N[rows], x_NP[rows], _factors(ratings, rows)
                )
            except ValueError as error:
                tests.append({**head, "remark": f"not estimable: {error}"})
                continue
            num, identity = len(ratings.levels), np.eye(len(names))
            if num > 1:
                test = fit.test(identity[1:num])
                tests.append(
                    {
                        **head,
                        "effect": "condition",
                        "F": test.statistic,
                        "df": test.df,
                        "residual df": test.residual_df,
                        "p": test.p,
                        "remark": fit.statement,
                    }
                )
            for place in range(num, len(names)):
                effect = fit.effect(names[place], identity[place], options.confidence)
                tests.append(
                    {
                        **head,
                        "effect": names[place],
                        "F": (effect.value / effect.standard_error) ** 2,
                        "df": 1.0,
                        "residual df": effect.df,
                        "p": effect.p,
                        "value": effect.value,
                        "low": effect.low,
                        "high": effect.high,
                        "remark": "",
                    }
                )
            total = sum(sd**2 for sd in fit.standard_deviations.values())
            variances.append(
                {
                    **head,
                    **{f"sd of {k}": v for k, v in fit.standard_deviations.items()},
                    **{
                        f"share of {name}": fit.standard_deviations[name] ** 2 / total
                        for name in fit.random.names
                    },
                    "converged": "yes" if fit.converged else "NO",
                    "remark": fit.statement,
                }
            )
            for place, level in enumerate(_ordered(ratings, options)):
                contrast_P = identity[0] + (identity[place] if place else 0)
                effect = fit.effect(level, contrast_P, options.confidence)
                means.append(
                    {
                        "outcome": outcome,
                        "model": model,
                        "condition": level,
                        "mean": effect.value,
                        "low": effect.low,
                        "high": effect.high,
                    }
                )
            family = []
            for pair, contrast_P in _contrasts(ratings, options, len(names)):
                effect = fit.effect(pair, contrast_P, options.confidence)
                family.append(
                    {
                        "outcome": outcome,
                        "model": model,
                        "pair": pair,
                        "difference": effect.value,
                        "low": effect.low,
                        "high": effect.high,
                        "d": effect.value / total**0.5,
                        "df": effect.df,
                        "p": effect.p,
                    }
                )
            pairs += _adjust(family)
    return [
        Table(
            name="linear_mixed",
            title="Linear mixed models",
            words=(
                "Rating = condition (and length, per 10 units) + an effect of the "
                "participant + an effect of the item (+ one of the explanation, where "
                "explanations have several raters), random and crossed; REML, F with "
                "Satterthwaite's degrees of freedom. With length, conditions are "
                "compared at equal length; without, as they are."
            ),
            rows=tests,
            notes=_explanation_note(ratings),
        ),
        Table(
            name=MEANS,
            title="Means of conditions in the linear mixed models",
            words=(
                "What an average participant would give an average item, at average "
                "length where that is in the model; intervals are for further "
                "participants and items."
            ),
            rows=means,
        ),
        Table(
            name="linear_mixed_pairs",
            title="Pairs of conditions in the linear mixed models",
            words=(
                "Differences in points of the scale with intervals by t; d is the "
                "difference in standard deviations of a rating (all variances summed). "
                "Corrections are over the pairs of an outcome and model."
            ),
            rows=pairs,
        ),
        Table(
            name="variances",
            title="Where ratings vary",
            words=(
                "Standard deviations of the random effects and of the residual, and "
                "shares of the variance (intraclass correlations). Where people differ "
                "much, tests that take ratings as independent miss differences that "
                "are there. A model that did not converge is marked."
            ),
            rows=variances,
        ),
    ]


def cumulative_models(
    ratings: Ratings, options: Options, advance: Callable[[], None]
) -> list[Table]:
    """Fit cumulative-logit mixed models, with length where it is known."""
    tests: list[Row] = []
    pairs: list[Row] = []
    for outcome in ratings.constructs:
        advance()
        values_N = ratings.outcomes[outcome]
        model, x_NP, names, rows = _designs(ratings, values_N, options)[-1]
        head = {"outcome": outcome, "model": model, "n": int(rows.sum())}
        num = len(ratings.levels)
        x_NP, names = x_NP[rows, 1:], names[1:]
        factors = _factors(ratings, rows)
        try:
            fit = ordinal_models.OrdinalFit(values_N[rows], x_NP, factors)
            smaller = ordinal_models.OrdinalFit(
                values_N[rows], x_NP[:, num - 1 :], factors
            )
        except (ValueError, np.linalg.LinAlgError) as error:
            tests.append({**head, "remark": f"not estimable: {error}"})
            continue
        test = fit.test(smaller)
        words = fit.statement
        if not smaller.converged:
            words = "; ".join(
                filter(None, (words, f"without condition: {smaller.statement}"))
            )
        usable = fit.converged and smaller.converged
        sds = {f"sd of {k}": v for k, v in fit.standard_deviations.items()}
        tests.append(
            {
                **head,
                "effect": "condition",
                "chi-squared": test.statistic if usable else None,
                "df": test.df,
                "p": test.p if usable else None,
                **sds,
                "converged": "yes" if usable else "NO",
                "remark": words,
            }
        )
        if not fit.converged:
            continue
        identity = np.eye(len(names))
        for place in range(num - 1, len(names)):
            effect = fit.effect(names[place], identity[place], options.confidence)
            tests.append(
                {
                    **head,
                    "effect": names[place],
                    "chi-squared": (effect.value / effect.standard_error) ** 2,
                    "df": 1,
                    "p": effect.p,
                    "value": effect.value,
                    "low": effect.low,
                    "high": effect.high,
                }
            )
        family = []
        for pair, contrast_P in _contrasts(ratings, options, len(names) + 1):
            effect = fit.effect(pair, contrast_P[1:], options.confidence)
            family.append(
                {
                    "outcome": outcome,
                    "model": model,
                    "pair": pair,
                    "odds ratio": float(np.exp(effect.value)),
                    "low": float(np.exp(effect.low)),
                    "high": float(np.exp(effect.high)),
                    "log odds": effect.value,
                    "p": effect.p,
                }
            )
        pairs += _adjust(family)
    return [
        Table(
            name="ordinal_mixed",
            title="Cumulative-logit mixed models",
            words=(
                "As the linear mixed model, for ordered points: the log odds of a "
                "rating above each threshold. Laplace's approximation; condition by "
                "the likelihood ratio, length by Wald. Intervals and standard "
                "deviations are in logits. A fit whose gradient is not zero or whose "
                "curvature is not that of a maximum has no p."
            ),
            rows=tests,
            notes=_explanation_note(ratings),
        ),
        Table(
            name="ordinal_mixed_pairs",
            title="Pairs of conditions in the cumulative-logit mixed models",
            words=(
                "Odds ratio: how the odds of a higher rating change from the second "
                "condition to the first, for one participant and item. Wald intervals; "
                "corrections are over the pairs of an outcome."
            ),
            rows=pairs,
        ),
    ]


def independent_tests(ratings: Ratings, options: Options) -> list[Table]:
    """Test as if ratings were independent: MANOVA of ranks, Kruskal-Wallis, Dunn."""
    complete = np.isfinite(ratings.values_NC).all(1)
    try:
        tests = rating_tests.multivariate(
            ratings.values_NC[complete],
            np.array(ratings.conditions)[complete],
            num=options.permutations,
            seed=options.seed,
        )
        rows: list[Row] = [
            {
                "test": test.name,
                "value": test.value,
                "F": test.f,
                "df": test.df,
                "residual df": test.residual_df,
                "p": test.p,
            }
            for test in tests
        ]
    except (ValueError, np.linalg.LinAlgError) as error:
        rows = [{"test": "multivariate", "remark": f"not estimable: {error}"}]
    kruskal: list[Row] = []
    pairs: list[Row] = []
    for outcome, values_N in ratings.outcomes.items():
        groups = [
            _group(condition, values[np.isfinite(values)])
            for condition, values in _groups(ratings, values_N)
        ]
        effects = group_tests.simple_effects(groups, "", options.confidence)
        test = effects.kruskal
        known = test.h is not None
        kruskal.append(
            {
                "outcome": outcome,
                "n": sum(len(group.values) for group in groups),
                "H": test.h,
                "df": test.df,
                "p": test.p,
                "epsilon squared": test.epsilon_squared,
                "remark": "" if known else "not estimable: no ranks to compare",
            }
        )
        for pair in effects.pairs:
            a = pair.vargha_delaney
            pairs.append(
                {
                    "outcome": outcome,
                    "pair": f"{pair.first} - {pair.second}",
                    "p, Dunn-Bonferroni": pair.dunn_p,
                    "A": a.value,
                    "low": a.low,
                    "high": a.high,
                    "Hedges' g": pair.hedges_g.value,
                    "p, Tukey": pair.tukey_p,
                }
            )
    single = [row for row in kruskal if row["outcome"] in ratings.constructs]
    _adjust(single)
    note = (
        "These tests take all ratings as independent. A participant's are not: where "
        "people differ, p is too large if each sees all conditions, and too small if "
        "each sees one."
    )
    return [
        Table(
            name="multivariate",
            title="All constructs together, as published studies test them",
            words=(
                "What is called a non-parametric MANOVA: the statistics of a MANOVA of "
                "ranks, the multivariate Kruskal-Wallis test, the ANOVA-type statistic "
                f"and PERMANOVA ({options.permutations:,} permutations); of "
                f"{int(complete.sum())} ratings without a missing construct. {note}"
            ),
            rows=rows,
        ),
        Table(
            name="kruskal_wallis",
            title="Kruskal-Wallis per construct",
            words=f"With correction for ties. {note}",
            rows=kruskal,
        ),
        Table(
            name="dunn",
            title="Pairs by Dunn's test, and Vargha-Delaney's A",
            words=(
                "Dunn's test with Bonferroni's correction over the pairs of an "
                "outcome. A is the chance that a rating of the first condition is "
                "higher, ties counting half, with Newcombe's interval; Tukey's test "
                "beside it."
            ),
            rows=pairs,
        ),
    ]


def regressions(ratings: Ratings, options: Options) -> Table:
    """Fit least squares of Quality, with and without outliers."""
    outcomes = ratings.outcomes
    outcome = QUALITY if QUALITY in outcomes else ratings.constructs[0]
    values_N = outcomes[outcome]
    _, x_NP, names, rows_N = _designs(ratings, values_N, options)[-1]
    people = np.array(ratings.participants)
    rows: list[Row] = []
    for data, mask in _versions(ratings, values_N, rows_N):
        head: Row = {"data": data, "n": int(mask.sum())}
        try:
            fit = rating_tests.regression(
                values_N[mask],
                x_NP[mask],
                names,
                people[mask],
                num_conditions=len(ratings.levels),
                contrasts=_contrasts(ratings, options, len(names)),
                confidence=options.confidence,
            )
        except ValueError as error:
            rows.append({**head, "remark": f"not estimable: {error}"})
            continue
        rows.append(
            {
                **head,
                "term": "all conditions",
                "t or F": fit.condition_f,
                "p": fit.condition_p,
                "R squared": fit.r_squared,
            }
        )
        rows += [
            {
                **head,
                "term": one.name,
                "value": one.value,
                "low": one.low,
                "high": one.high,
                "t or F": one.t,
                "p": one.p,
                "p, robust to participants": one.cluster_p,
            }
            for one in (*fit.coefficients, *fit.pairs)
        ]
    words = (
        f"Least squares of {outcome} on condition (against {options.reference})"
        f"{' and length' if names[-1] == _LENGTH else ''}, and all pairs; "
        "ratings taken as independent, with p of errors that are robust to clusters "
        "of participants beside it. Outliers lie beyond 1.5 interquartile ranges of "
        "the quartiles; rules differ in the column and group that they look at, so "
        "each that finds one is shown."
    )
    return Table(name="regression", title="Linear regression", words=words, rows=rows)


def measures(ratings: Ratings, options: Options) -> Table | None:
    """Correlate ratings with automatic measures, per explanation."""
    names = [
        name
        for name in ratings.numbers
        if name not in ("order", "seconds", "attention_failed")
    ]
    if not names:
        return None
    codes = np.unique(
        [f"{item}\0{condition}" for item, condition in ratings.explanations],
        return_inverse=True,
    )[1].ravel()
    rank = extras.load("scipy.stats").spearmanr
    rng = np.random.default_rng(options.seed)
    rows: list[Row] = []
    for measure in names:
        measure_E = _means(codes, ratings.numbers[measure])
        for outcome, values_N in ratings.outcomes.items():
            rating_E = _means(codes, values_N)
            both = np.isfinite(measure_E) & np.isfinite(rating_E)
            x_E, y_E = measure_E[both], rating_E[both]
            row: Row = {"measure": measure, "outcome": outcome, "n": len(x_E)}
            if len(x_E) < 5 or np.ptp(x_E) == 0 or np.ptp(y_E) == 0:
                rows.append({**row, "remark": "not estimable: it does not vary"})
                continue
            result = rank(x_E, y_E)
            draws = rng.integers(len(x_E), size=(options.bootstraps, len(x_E)))
            ranks = extras.load("scipy.stats").rankdata
            first, second = ranks(x_E[draws], axis=1), ranks(y_E[draws], axis=1)
            first -= first.mean(1, keepdims=True)
            second -= second.mean(1, keepdims=True)
            scale = np.sqrt((first**2).sum(1) * (second**2).sum(1))
            samples = (first * second).sum(1)[scale > 0] / scale[scale > 0]
            tail = (1 - options.confidence) / 2
            low, high = np.quantile(samples, [tail, 1 - tail])
            rows.append(
                {
                    **row,
                    "rho": float(result.statistic),
                    "low": float(low),
                    "high": float(high),
                    "p": float(result.pvalue),
                }
            )
    return Table(
        name="measures",
        title="Ratings and automatic measures",
        words=(
            "Spearman's correlation of an explanation's mean rating with what kdjax "
            "measures of it, over explanations; intervals by bootstrap of them. "
            "A measure that does not follow ratings does not replace them."
        ),
        rows=rows,
    )


def _permute(
    ratings: Ratings, values_NM: np.ndarray, rows_N: np.ndarray, options: Options
) -> dict[str, Any]:
    try:
        test = permutation.within_participants(
            values_NM[rows_N],
            np.array(ratings.conditions)[rows_N],
            np.array(ratings.participants)[rows_N],
            num=options.permutations,
            seed=options.seed,
        )
    except ValueError as error:
        return {"remark": f"not estimable: {error}"}
    return {"test": test, "remark": ""}


def _paired(
    ratings: Ratings, values_N: np.ndarray, first: str, second: str, options: Options
) -> Row:
    """Return the mean difference within participants, its interval and d."""
    conditions, people = np.array(ratings.conditions), np.array(ratings.participants)
    codes_N = np.unique(people, return_inverse=True)[1].ravel()
    means = [
        _means(codes_N, np.where(conditions == condition, values_N, np.nan))
        for condition in (first, second)
    ]
    differences = means[0] - means[1]
    differences = differences[np.isfinite(differences)]
    row: Row = {"participants": len(differences), "difference": None, "low": None}
    row |= {"high": None, "d": None}
    if len(differences):
        row["difference"] = float(differences.mean())
    if len(differences) > 1 and differences.std() > 0:
        sd = float(differences.std(ddof=1))
        error = sd / len(differences) ** 0.5
        effect = mixed_models.make_effect(
            "", row["difference"], error, len(differences) - 1.0, options.confidence
        )
        row |= {"low": effect.low, "high": effect.high, "d": effect.value / sd}
    return row


def _designs(
    ratings: Ratings, values_N: np.ndarray, options: Options
) -> list[tuple[str, np.ndarray, list[str], np.ndarray]]:
    """Return models: name, columns [N, P], their names, rows without a gap.

    The last one has length as a covariate where the table has it.
    """
    levels = _ordered(ratings, options)
    conditions = np.array(ratings.conditions)
    x_NP = np.stack(
        [np.ones(len(ratings)), *(conditions == level for level in levels[1:])], 1
    ).astype(float)
    names = ["constant", *levels[1:]]
    rows_N = np.isfinite(values_N)
    designs = [("condition", x_NP, names, rows_N)]
    length_N = ratings.numbers.get("length")
    if length_N is not None:
        rows_N = rows_N & np.isfinite(length_N)
        if rows_N.any() and np.ptp(length_N[rows_N]) > 0:
            centred_N = (length_N - length_N[rows_N].mean()) / 10
            with_length = np.column_stack([x_NP, centred_N])
            designs.append(
                ("condition + length", with_length, [*names, _LENGTH], rows_N)
            )
    return designs


def _ordered(ratings: Ratings, options: Options) -> list[str]:
    """Return the conditions, the reference first."""
    others = [level for level in ratings.levels if level != options.reference]
    return [options.reference, *others]


def _contrasts(
    ratings: Ratings, options: Options, num: int
) -> Iterable[tuple[str, np.ndarray]]:
    """Return the pairs of conditions and their contrasts of the model's columns."""
    places = {level: p for p, level in enumerate(_ordered(ratings, options))}
    for first, second in itertools.combinations(ratings.levels, 2):
        contrast_P = np.zeros(num)
        contrast_P[places[first]] += 1
        contrast_P[places[second]] -= 1
        contrast_P[0] = 0.0  # the reference is the constant
        yield f"{first} - {second}", contrast_P


def _factors(ratings: Ratings, rows_N: np.ndarray) -> dict[str, list[str]]:
    """Return the random effects of some rows."""
    places = np.flatnonzero(rows_N).tolist()
    factors = {
        "participant": [ratings.participants[place] for place in places],
        "item": [ratings.items[place] for place in places],
    }
    if _is_replicated(ratings):
        pairs = ratings.explanations
        factors["explanation"] = ["\0".join(pairs[place]) for place in places]
    return factors


def _is_replicated(ratings: Ratings) -> bool:
    return len(ratings) >= _SEVERAL * len(set(ratings.explanations))


def _explanation_note(ratings: Ratings) -> list[str]:
    if _is_replicated(ratings):
        return []
    return [
        "explanation is not a random effect: most have one rating, so that its "
        "variance is part of the residual"
    ]


def _versions(
    ratings: Ratings, values_N: np.ndarray, rows_N: np.ndarray
) -> list[tuple[str, np.ndarray]]:
    """Return the ratings of a regression with and without outliers, by each rule."""
    everywhere = rating_tests.inside_fences(np.where(rows_N, values_N, np.nan))
    by_condition = np.ones(len(ratings), bool)
    for condition in ratings.levels:
        inside = np.array(ratings.conditions) == condition
        by_condition[inside] = rating_tests.inside_fences(values_N[inside])
    rules = [
        ("without outliers of the outcome", everywhere),
        ("without outliers of the outcome in its condition", by_condition),
    ]
    if "length" in ratings.numbers:
        length = rating_tests.inside_fences(ratings.numbers["length"])
        rules += [
            ("without outliers of length", length),
            ("without outliers of the outcome or length", everywhere & length),
        ]
    versions = [("all ratings", rows_N)]
    for name, mask in rules:
        rows = rows_N & mask
        if not any(np.array_equal(rows, other) for _, other in versions):
            versions.append((name, rows))
    return versions


def _adjust(rows: list[Row]) -> list[Row]:
    """Add p-values corrected for all of the rows; return these."""
    known = [row.get("p") for row in rows]
    num = sum(p is not None for p in known)
    for row, p, holm in zip(rows, known, rating_tests.holm(known), strict=True):
        remark = row.pop("remark", None)
        row["p, Bonferroni"] = None if p is None else min(1.0, p * num)
        row["p, Holm"] = holm
        if remark is not None:
            row["remark"] = remark
    return rows


def _groups(ratings: Ratings, values_N: np.ndarray) -> list[tuple[str, np.ndarray]]:
    conditions = np.array(ratings.conditions)
    return [(level, values_N[conditions == level]) for level in ratings.levels]


def _group(level: str, values: np.ndarray) -> runs.Group:
    """Return values as a group of the comparison's tests."""
    return runs.Group(
        level=level,
        within="",
        runs=(),
        values=tuple(values.tolist()),
        absent=(),
        mean=float(values.mean()) if len(values) else None,
        sd=None,
        low=None,
        high=None,
        statement="",
    )


def _means(codes_N: np.ndarray, values_N: np.ndarray) -> np.ndarray:
    """Return the mean of each code's values that are there; NaN without one."""
    known = np.isfinite(values_N)
    size = int(codes_N.max()) + 1
    counts = np.bincount(codes_N[known], minlength=size)
    sums = np.bincount(codes_N[known], values_N[known], minlength=size)
    return np.divide(sums, counts, out=np.full(size, np.nan), where=counts > 0)


def _estimate(estimate: effect_sizes.Estimate) -> Row:
    return {
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "remark": estimate.statement,
    }
