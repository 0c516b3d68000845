"""Tables of a study's analysis: rows of numbers with words about each.

Shapes: N ratings, P columns of a model, C conditions.
"""

import dataclasses
import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kdjax.analysis import (
    agreement,
    effect_sizes,
    group_tests,
    mixed_models,
    permutation,
    plots,
    rating_tests,
)
from kdjax.analysis.study_means import QUALITY
from kdjax.survey.ratings import Ratings

ALPHA = group_tests.ALPHA
LENGTH = "length, per 10"
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
        for condition, values in groups(ratings, values_N):
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
            for condition, values in groups(ratings, ratings.values_NC[:, place])
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
    joint = permute(ratings, ratings.values_NC, complete, options)
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
        one = permute(ratings, values_N[:, None], np.isfinite(values_N), options)
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
    adjust(single)
    pairs: list[Row] = []
    for outcome, values_N in outcomes.items():
        family = []
        for first, second in itertools.combinations(ratings.levels, 2):
            inside = np.isin(ratings.conditions, [first, second])
            inside &= np.isfinite(values_N)
            one = permute(ratings, values_N[:, None], inside, options)
            test = one.get("test")
            family.append(
                {
                    "outcome": outcome,
                    "pair": f"{first} - {second}",
                    **paired(ratings, values_N, first, second, options),
                    "p": None if test is None else test.p_values[0],
                    "remark": one["remark"],
                }
            )
        pairs += adjust(family)
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


def permute(
    ratings: Ratings, values_NM: np.ndarray, rows_N: np.ndarray, options: Options
) -> dict[str, Any]:
    """Test the conditions of some rows; without a `test`, the `remark` says why."""
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


def main_outcome(ratings: Ratings) -> tuple[str, np.ndarray]:
    """Return the name and values of Quality; of the construct if there is one."""
    outcomes = ratings.outcomes
    outcome = QUALITY if QUALITY in outcomes else ratings.constructs[0]
    return outcome, outcomes[outcome]


def paired(
    ratings: Ratings, values_N: np.ndarray, first: str, second: str, options: Options
) -> Row:
    """Return the mean difference within participants, its interval and d."""
    conditions, people = np.array(ratings.conditions), np.array(ratings.participants)
    codes_N = np.unique(people, return_inverse=True)[1].ravel()
    sides = [
        means(codes_N, np.where(conditions == condition, values_N, np.nan))
        for condition in (first, second)
    ]
    differences = sides[0] - sides[1]
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


def designs(
    ratings: Ratings, values_N: np.ndarray, options: Options
) -> list[tuple[str, np.ndarray, list[str], np.ndarray]]:
    """Return models: name, columns [N, P], their names, rows without a gap.

    The last one has length as a covariate where the table has it.
    """
    levels = ordered(ratings, options)
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
                ("condition + length", with_length, [*names, LENGTH], rows_N)
            )
    return designs


def ordered(ratings: Ratings, options: Options) -> list[str]:
    """Return the conditions, the reference first."""
    others = [level for level in ratings.levels if level != options.reference]
    return [options.reference, *others]


def contrasts(
    ratings: Ratings, options: Options, num: int
) -> Iterable[tuple[str, np.ndarray]]:
    """Return the pairs of conditions and their contrasts of the model's columns."""
    places = {level: p for p, level in enumerate(ordered(ratings, options))}
    for first, second in itertools.combinations(ratings.levels, 2):
        contrast_P = np.zeros(num)
        contrast_P[places[first]] += 1
        contrast_P[places[second]] -= 1
        contrast_P[0] = 0.0  # the reference is the constant
        yield f"{first} - {second}", contrast_P


def adjust(rows: list[Row]) -> list[Row]:
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


def groups(ratings: Ratings, values_N: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return each condition and its values."""
    conditions = np.array(ratings.conditions)
    return [(level, values_N[conditions == level]) for level in ratings.levels]


def means(codes_N: np.ndarray, values_N: np.ndarray) -> np.ndarray:
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
