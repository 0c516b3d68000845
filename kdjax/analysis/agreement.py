"""Krippendorff's alpha of ordinal ratings.

Shapes: U units (what is rated), V values in rising order, B bootstrap samples.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from kdjax.analysis import effect_sizes


def krippendorff_alpha(
    units: Sequence[Hashable],
    ratings: Sequence[float] | np.ndarray,
    *,
    confidence: float = 0.95,
    num_samples: int = 1000,
    seed: int = 0,
) -> effect_sizes.Estimate:
    """Compute the agreement of raters beyond chance, with a bootstrap over units.

    alpha = 1 - D_observed / D_expected, the mean squared distances of two ratings of
    one unit and of any two ratings. The distance of two values is the number of ratings
    from one to the other, half of those at both ends left out. Units with one rating
    say nothing and are left out. The interval is of percentiles.

    Args:
      units: what each rating is of.
      ratings: values; NaN is missing.
      confidence: of the interval.
      num_samples: bootstrap samples of units.
      seed: of the bootstrap.

    Source: Krippendorff, 2011, "Computing Krippendorff's Alpha-Reliability".
    """
    values_N = np.asarray(ratings, float)
    valid_N = np.isfinite(values_N)
    if not valid_N.any():
        return effect_sizes.nothing("no rating")
    codes_N = np.unique(np.asarray(units)[valid_N], return_inverse=True)[1].ravel()
    levels_V, places_N = np.unique(values_N[valid_N], return_inverse=True)
    counts_UV = np.zeros((codes_N.max() + 1, len(levels_V)))
    np.add.at(counts_UV, (codes_N, places_N), 1)
    several_U = counts_UV.sum(1) > 1
    if not several_U.any():
        return effect_sizes.nothing(
            "not computable: every explanation was rated by one person only"
        )
    counts_UV = counts_UV[several_U]
    value = _alpha(counts_UV)
    if value is None:
        return effect_sizes.nothing("not computable: all ratings are the same")
    if len(counts_UV) < 3:
        return effect_sizes.Estimate(
            value=value, low=None, high=None, statement="too few units for an interval"
        )
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(counts_UV), size=(num_samples, len(counts_UV)))
    samples = [_alpha(counts_UV[draw]) for draw in draws]
    known = [sample for sample in samples if sample is not None]
    tail = (1 - confidence) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    alone = int((~several_U).sum())
    words = f"{len(counts_UV)} explanations with several ratings"
    return effect_sizes.Estimate(
        value=value,
        low=float(low),
        high=float(high),
        statement=f"{words}, {alone} with one are left out" if alone else words,
    )


def _alpha(counts_UV: np.ndarray) -> float | None:
    """Return alpha of units with two ratings or more; None without variance."""
    pairs_UV = counts_UV / (counts_UV.sum(1, keepdims=True) - 1)
    observed_VV = pairs_UV.T @ counts_UV - np.diag(pairs_UV.sum(0))
    total_V = observed_VV.sum(0)
    middle_V = np.cumsum(total_V) - total_V / 2
    distance_VV = (middle_V[:, None] - middle_V) ** 2
    expected = float(total_V @ distance_VV @ total_V) / (total_V.sum() - 1)
    if expected <= 0:
        return None
    return float(1 - (observed_VV * distance_VV).sum() / expected)
