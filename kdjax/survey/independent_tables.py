"""Tables of tests that take ratings as independent, and of automatic measures.

Shapes: N ratings, P columns of a model.
"""

import numpy as np

from kdjax.analysis import (
    extras,
    group_tests,
    rating_tests,
    runs,
)
from kdjax.survey import tables
from kdjax.survey.ratings import Ratings
from kdjax.survey.tables import Options, Row, Table


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
            for condition, values in tables.groups(ratings, values_N)
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
    tables.adjust(single)
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
    outcome, values_N = tables.main_outcome(ratings)
    _, x_NP, names, rows_N = tables.designs(ratings, values_N, options)[-1]
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
                contrasts=tables.contrasts(ratings, options, len(names)),
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
        f"{' and length' if names[-1] == tables.LENGTH else ''}, and all pairs; "
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
        if name not in ("order", "seconds", "attention_failed", "predicted")
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
        measure_E = tables.means(codes, ratings.numbers[measure])
        for outcome, values_N in ratings.outcomes.items():
            rating_E = tables.means(codes, values_N)
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
