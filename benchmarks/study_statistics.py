"""Error rates and coverage of a study's statistics, on constructed studies.

    python benchmarks/study_statistics.py [--studies=500] [--seconds=3600] [--seed=0]
        [--ordinal_only] [--coverage_only]

People rate explanations of four conditions on five constructs, one to five points. A
rating is logistic noise around condition + person + question (+ explanation), cut at
fixed thresholds with a ceiling, so that the effects of a cumulative-logit model are
known exactly and those of means by a very large study. Every person rates each
condition twice and no question twice; explanations have two raters on average.

Prints the share of studies in which a test says p < 0.05 where there is no effect
(type I error), and in which an interval covers the truth, as a Markdown table. A share
is judged by its own 95% interval of simulation. Some ten minutes on one core.
"""

import argparse
import collections
import math
import time
import warnings

import numpy as np
import scipy.stats

from kdjax.analysis import (
    effect_sizes,
    group_tests,
    mixed_models,
    ordinal_models,
    permutation,
    rating_tests,
    runs,
)

PEOPLE, QUESTIONS, CONDITIONS, ROUNDS, CONSTRUCTS = 20, 20, 4, 2, 5
SD_PERSON, SD_QUESTION, SD_EXPLANATION = 1.5, 0.4, 0.8  # logits
EFFECTS = np.array([0.0, 0.8, 0.8, 1.6])  # logits
THRESHOLDS = np.array([-3.5, -2.0, -0.8, 0.6])
ALPHA = 0.05


def study(rng, *, effects, sd_explanation=0.0, people=PEOPLE, questions=QUESTIONS):
    """Return ratings [N, constructs], conditions, people and questions."""
    per_person = CONDITIONS * ROUNDS
    what = np.tile(np.repeat(np.arange(CONDITIONS), ROUNDS), people)
    who = np.repeat(np.arange(people), per_person)
    order = np.argsort(rng.random((people, questions)), 1)
    seen = order[:, :per_person].ravel()
    shared = SD_PERSON * rng.normal(size=people)[who]
    shared = shared + SD_QUESTION * rng.normal(size=questions)[seen]
    own = rng.normal(size=(questions, CONDITIONS))[seen, what]
    eta = np.asarray(effects)[what] + shared + sd_explanation * own
    latent = eta[:, None] + rng.logistic(size=(len(who), CONSTRUCTS))
    return 1.0 + np.searchsorted(THRESHOLDS, latent), what, who, seen


def columns(what):
    """Return the columns of a model: constant and conditions."""
    return np.column_stack([np.ones(len(what)), *(what == k for k in (1, 2, 3))])


def errors(rng, *, sd_explanation, heavy):
    """Return test -> p of one study without an effect."""
    y, what, who, seen = study(rng, effects=np.zeros(4), sd_explanation=sd_explanation)
    quality = y.mean(1)
    x = columns(what)
    explanation = seen * CONDITIONS + what
    seed = int(rng.integers(2**31))
    alone = permutation.within_participants(
        quality[:, None], what, who, num=199, seed=seed
    )
    joint = permutation.within_participants(y, what, who, num=199, seed=seed)
    factors = {"person": who, "question": seen}
    with_explanation = {**factors, "explanation": explanation}
    maximal = {**with_explanation, "person x condition": who * CONDITIONS + what}
    test = np.eye(4)[1:]
    result = {
        "permutation within participants, Quality": alone.p_values[0],
        "permutation within participants, one construct": joint.p_values[0],
        "permutation within participants, all constructs": joint.joint_p,
        "linear mixed model, Quality": _linear(quality, x, factors, test),
        "linear mixed model with explanations, Quality": _linear(
            quality, x, with_explanation, test
        ),
        "linear mixed model, maximal, Quality": _linear(quality, x, maximal, test),
    }
    if not heavy:
        return result
    result["cumulative-logit mixed model, one construct"] = _ordinal(
        y[:, 0], x, factors
    )
    groups = [_group(str(k), quality[what == k]) for k in range(CONDITIONS)]
    effects = group_tests.simple_effects(groups, "")
    inside = rating_tests.inside_fences(quality)
    names = ["constant", "b", "c", "d"]

    def regression(rows):
        return rating_tests.regression(
            quality[rows], x[rows], names, who[rows], num_conditions=CONDITIONS
        ).condition_p

    result |= {
        "Kruskal-Wallis, Quality": effects.kruskal.p,
        "Kruskal-Wallis, one construct": float(
            scipy.stats.kruskal(*(y[what == k, 0] for k in range(CONDITIONS))).pvalue
        ),
        "Dunn-Bonferroni, any pair, Quality": min(
            pair.dunn_p for pair in effects.pairs
        ),
        "least squares, Quality": regression(np.ones(len(y), bool)),
        "least squares without outliers, Quality": regression(inside),
    }
    for one in rating_tests.multivariate(y, what, num=99, seed=seed):
        result[one.name] = one.p
    return result


def _linear(y, x, factors, contrasts):
    fit = mixed_models.LinearFit(y, x, factors)
    return fit.test(contrasts).p if fit.converged else math.nan


def _ordinal(y, x, factors):
    fit = ordinal_models.OrdinalFit(y, x[:, 1:], factors)
    smaller = ordinal_models.OrdinalFit(y, x[:, :0], factors)
    return fit.test(smaller).p if fit.converged and smaller.converged else math.nan


def _group(level, values):
    return runs.Group(
        level=level, within="", runs=(), values=tuple(values), absent=(),
        mean=float(values.mean()), sd=None, low=None, high=None, statement="",
    )  # fmt: skip


def truth():
    """Return the difference of mean Quality and A of conditions 3 and 0, and pairs."""
    rng = np.random.default_rng(99)
    y, what, *_ = study(rng, effects=EFFECTS, people=50_000, questions=400)
    quality = y.mean(1)
    first, second = quality[what == 3], quality[what == 0]
    wins = scipy.stats.mannwhitneyu(first, second).statistic
    return float(first.mean() - second.mean()), wins / len(first) / len(second)


def coverage(rng, difference, superiority):
    """Return interval -> whether it covers the truth, in one study with effects."""
    y, what, who, seen = study(rng, effects=EFFECTS)
    quality, x = y.mean(1), columns(what)
    contrast = np.array([0.0, 0.0, 0.0, 1.0])
    factors = {"person": who, "question": seen}
    explanation = {**factors, "explanation": seen * CONDITIONS + what}
    maximal = {**explanation, "person x condition": who * CONDITIONS + what}
    effects = [
        mixed_models.LinearFit(quality, x, each).effect("", contrast)
        for each in (factors, explanation, maximal)
    ]
    ordinal = ordinal_models.OrdinalFit(y[:, 0], x[:, 1:], factors)
    odds = ordinal.effect("", contrast[1:])
    means = np.array(
        [
            [quality[(who == person) & (what == k)].mean() for k in (3, 0)]
            for person in range(PEOPLE)
        ]
    )
    gaps = means[:, 0] - means[:, 1]
    paired = mixed_models.make_effect(
        "", gaps.mean(), gaps.std(ddof=1) / PEOPLE**0.5, PEOPLE - 1, 0.95
    )
    a = effect_sizes.vargha_delaney(
        quality[what == 3].tolist(), quality[what == 0].tolist()
    )
    return {
        "linear mixed model, difference of Quality": _covers(effects[0], difference),
        "linear mixed model with explanations": _covers(effects[1], difference),
        "linear mixed model, maximal": _covers(effects[2], difference),
        "within participants, difference of Quality": _covers(paired, difference),
        "cumulative-logit mixed model, log odds": _covers(odds, EFFECTS[3]),
        "Vargha-Delaney A, ratings as independent": _covers(a, superiority),
    }


def _covers(interval, value):
    return interval.low <= value <= interval.high


def line(name, hits, wanted):
    """Return a row: the share of hits, its interval of simulation, a verdict."""
    known = [hit for hit in hits if hit is not None]
    share, num = sum(known) / len(known), len(known)
    low, high = scipy.stats.binomtest(sum(known), num).proportion_ci(method="wilson")
    verdict = "holds"
    if not low <= wanted <= high:
        verdict = "too small" if share < wanted else "too large"
    gaps = f", {len(hits) - num} not converged" if len(hits) > num else ""
    return f"| {name} | {share:.3f} | {low:.3f} to {high:.3f} | {verdict}{gaps} |"


def significant(p):
    """Return whether p is below the level; None without a p."""
    return None if math.isnan(p) else p < ALPHA


def ordinal_error(arguments):
    """Print the type I error of the cumulative-logit model where people differ."""
    hits, start = [], time.monotonic()
    while (
        len(hits) < arguments.studies and time.monotonic() - start < arguments.seconds
    ):
        rng = np.random.default_rng([arguments.seed, len(hits)])
        y, what, who, seen = study(rng, effects=np.zeros(4))
        factors = {"person": who, "question": seen}
        hits.append(significant(_ordinal(y[:, 0], columns(what), factors)))
    print(line("cumulative-logit mixed model, one construct", hits, ALPHA))


def main():
    """Simulate studies and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ordinal_only",
        action="store_true",
        help="the likelihood ratio of the cumulative-logit mixed model alone",
    )
    parser.add_argument(
        "--coverage_only", action="store_true", help="intervals alone, a few minutes"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    if arguments.ordinal_only:
        ordinal_error(arguments)
        return
    difference, superiority = truth()
    start, num = time.monotonic(), 0
    alike, differing, covered = (collections.defaultdict(list) for _ in range(3))
    while num < arguments.studies and time.monotonic() - start < arguments.seconds:
        rng = np.random.default_rng([arguments.seed, num])
        for table, spread in ((alike, 0.0), (differing, SD_EXPLANATION)):
            if arguments.coverage_only:
                break
            ps = errors(rng, sd_explanation=spread, heavy=table is alike)
            for name, p in ps.items():
                table[name].append(significant(p))
        for name, hit in coverage(rng, difference, superiority).items():
            covered[name].append(hit)
        num += 1
    print(f"{num} studies; truth {difference:.3f} points, A {superiority:.3f}")
    for title, table, wanted in (
        ("no effect, people differ: share of p < 0.05", alike, ALPHA),
        ("no effect, explanations differ too", differing, ALPHA),
        ("effects: share of intervals that cover", covered, 0.95),
    ):
        if not table:
            continue
        print(f"\n| {title} | share | its 95% interval | verdict |\n|---|---|---|---|")
        for name, hits in table.items():
            print(line(name, hits, wanted))


if __name__ == "__main__":
    main()
