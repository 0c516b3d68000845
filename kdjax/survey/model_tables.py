"""Tables of mixed models of ratings: linear, and cumulative-logit.

Shapes: N ratings, P columns of a model, C conditions.
"""

from collections.abc import Callable

import numpy as np

from kdjax.analysis import (
    mixed_models,
    ordinal_models,
)
from kdjax.analysis.study_means import MEANS
from kdjax.survey import tables
from kdjax.survey.ratings import Ratings
from kdjax.survey.tables import Options, Row, Table

_MAXIMAL = ", maximal"  # ending of a model's name
_SEVERAL = 1.5  # mean ratings per level from which a factor is a random effect
_MOST_LEVELS = 2_000  # of participant x condition: the model's time grows with the cube


def linear_models(
    ratings: Ratings, options: Options, advance: Callable[[], None]
) -> list[Table]:
    """Fit linear mixed models, with and without length."""
    tests: list[Row] = []
    pairs: list[Row] = []
    means: list[Row] = []
    variances: list[Row] = []
    for outcome, values_N in ratings.outcomes.items():
        designs = tables.designs(ratings, values_N, options)
        models = [(*design, _factors(ratings, design[-1])) for design in designs]
        if repeats_conditions(ratings):
            model, x_NP, names, rows = designs[0]
            factors = _factors(ratings, rows) | _interaction(ratings, rows)
            models.append((model + _MAXIMAL, x_NP, names, rows, factors))
        for model, x_NP, names, rows, factors in models:
            advance()
            head = {"outcome": outcome, "model": model, "n": int(rows.sum())}
            try:
                fit = mixed_models.LinearFit(values_N[rows], x_NP[rows], factors)
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
            for place, level in enumerate(tables.ordered(ratings, options)):
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
            for pair, contrast_P in tables.contrasts(ratings, options, len(names)):
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
            pairs += tables.adjust(family)
    return [
        Table(
            name="linear_mixed",
            title="Linear mixed models",
            words=(
                "Rating = condition (and length, per 10 units) + an effect of the "
                "participant + an effect of the item (+ one of the explanation, where "
                "explanations have several raters), random and crossed; REML, F with "
                "Satterthwaite's degrees of freedom. With length, conditions are "
                "compared at equal length; without, as they are. The maximal model has "
                "an effect of participant x condition besides: conditions differ more "
                "for some people than for others, by taste or because some already "
                "give the highest points. Its intervals are the widest."
            ),
            rows=tests,
            notes=[*_explanation_note(ratings), *_interaction_note(ratings)],
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
        model, x_NP, names, rows = tables.designs(ratings, values_N, options)[-1]
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
        for pair, contrast_P in tables.contrasts(ratings, options, len(names) + 1):
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
        pairs += tables.adjust(family)
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


def _interaction(ratings: Ratings, rows_N: np.ndarray) -> dict[str, list[str]]:
    """Return the random effect of participant x condition of some rows."""
    pairs = ["\0".join(pair) for pair in _cells(ratings)]
    return {"participant x condition": [pairs[n] for n in np.flatnonzero(rows_N)]}


def _cells(ratings: Ratings) -> list[tuple[str, str]]:
    return list(zip(ratings.participants, ratings.conditions, strict=True))


def repeats_conditions(ratings: Ratings) -> bool:
    """Return whether participants rate a condition several times."""
    levels = len(set(_cells(ratings)))
    return levels <= _MOST_LEVELS and len(ratings) >= _SEVERAL * levels


def _interaction_note(ratings: Ratings) -> list[str]:
    levels = len(set(_cells(ratings)))
    if repeats_conditions(ratings):
        return []
    if levels > _MOST_LEVELS:
        why = f"participants x conditions are {levels:,}, the limit is {_MOST_LEVELS:,}"
    else:
        why = "most participants rate a condition once"
    return [f"the maximal model is not fitted: {why}"]


def _is_replicated(ratings: Ratings) -> bool:
    return len(ratings) >= _SEVERAL * len(set(ratings.explanations))


def _explanation_note(ratings: Ratings) -> list[str]:
    if _is_replicated(ratings):
        return []
    return [
        "explanation is not a random effect: most have one rating, so that its "
        "variance is part of the residual"
    ]
