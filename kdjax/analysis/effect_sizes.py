"""Effect sizes with analytic intervals.

Shapes: M values of one group, N of another.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from kdjax.analysis import extras

_LEAST = 1e-9
_ROUNDING = 1e-12  # of a value: smaller differences are none
_FARTHEST = 1e12  # noncentrality beyond which no bound is looked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with an interval; what cannot be had is None, and `statement` why."""

    value: float | None
    low: float | None
    high: float | None
    statement: str = ""


def hedges_g(
    first_M: Sequence[float], second_N: Sequence[float], *, confidence: float = 0.95
) -> Estimate:
    """Compute the difference of means in pooled standard deviations, bias-corrected.

    g = J (mean_M - mean_N) / s, s^2 = (SS_M + SS_N) / f, f = M + N - 2,
    J = Gamma(f / 2) / (sqrt(f / 2) Gamma((f - 1) / 2)).
    The interval is analytic: noncentralities c at which the observed t has the tail
    probabilities asked for, times J sqrt(1 / M + 1 / N).

    Args:
      first_M: values of one group.
      second_N: values of another.
      confidence: of the interval, between 0 and 1.

    Source: Hedges, 1981, J. Educ. Stat. 6(2); Cumming and Finch, 2001, Educ. Psychol.
    Meas. 61(4), for the interval.
    """
    first, second = np.asarray(first_M, float), np.asarray(second_N, float)
    if not first.size or not second.size:
        return nothing("a group has no run")
    df = first.size + second.size - 2
    if df < 1:
        return nothing("one run in each group: no variance")
    difference = float(first.mean() - second.mean())
    if not varies([*first_M, *second_N]):
        return nothing("all values are the same: no variance")
    if not varies(first_M, second_N):
        return nothing("no variance within the groups: g has no bound")
    squares = _squares(first) + _squares(second)
    per_t = math.sqrt(1 / first.size + 1 / second.size)
    t = difference / math.sqrt(squares / df) / per_t
    bias = 1.0
    if df > 1:
        log = math.lgamma(df / 2) - math.lgamma((df - 1) / 2)
        bias = math.exp(log) / math.sqrt(df / 2)

    def bound(share: float) -> float | None:
        return _crossing(lambda c: _noncentral_t(t, df, c) - share, t)

    low, high = bound((1 + confidence) / 2), bound((1 - confidence) / 2)
    scale = bias * per_t
    if low is None or high is None:
        return Estimate(
            value=scale * t, low=None, high=None, statement="no interval: t too large"
        )
    statement = "" if df > 1 else "three runs in all: the bias is left in"
    return Estimate(
        value=scale * t, low=scale * low, high=scale * high, statement=statement
    )


def vargha_delaney(
    first_M: Sequence[float], second_N: Sequence[float], *, confidence: float = 0.95
) -> Estimate:
    """Compute A = P(x > y) + P(x = y) / 2, x of the first group and y of the second.

    The interval is analytic: all a with |A - a| <= z sqrt(V(a)), where
    V(a) = a (1 - a) (1 + K (1 - a) / (2 - a) + K a / (1 + a)) / (M N) and
    K = (M + N) / 2 - 1. It keeps a width where A is 0 or 1.

    Args:
      first_M: values of one group.
      second_N: values of another.
      confidence: of the interval, between 0 and 1.

    Source: Vargha and Delaney, 2000, J. Educ. Behav. Stat. 25(2); Newcombe, 2006, Stat.
    Med. 25(4), 559-573, method 5, for the interval.
    """
    num_first, num_second = len(first_M), len(second_N)
    if not num_first or not num_second:
        return nothing("a group has no run")
    ranks = extras.load("scipy.stats").rankdata([*first_M, *second_N])
    pairs = num_first * num_second
    wins = float(ranks[:num_first].sum()) - num_first * (num_first + 1) / 2
    value = wins / pairs
    z = float(extras.load("scipy.stats").norm.ppf((1 + confidence) / 2))
    extra = (num_first + num_second) / 2 - 1

    def excess(a: float) -> float:
        inner = 1 + extra * (1 - a) / (2 - a) + extra * a / (1 + a)
        return (value - a) ** 2 - z * z * a * (1 - a) * inner / pairs

    root = extras.load("scipy.optimize").brentq
    # Just inside (0, 1) the excess is negative at A; at 0 and 1 it is not.
    inside = min(max(value, _LEAST), 1 - _LEAST)
    low = root(excess, 0.0, inside, xtol=1e-14) if value > 0 else 0.0
    high = root(excess, inside, 1.0, xtol=1e-14) if value < 1 else 1.0
    return Estimate(value=value, low=float(low), high=float(high))


def partial_eta_squared(
    f: float, df: float, residual_df: float, *, confidence: float = 0.90
) -> Estimate:
    """Compute the share of variance that an effect explains, others set aside.

    eta_p^2 = f df / (f df + residual_df) = SS / (SS + SS_residual). The interval is
    analytic: noncentralities c at which the observed F has the tail probabilities asked
    for, as c / (c + df + residual_df + 1). At 90% it leaves out 0 where p < 0.05.
    statsmodels' confint_noncentrality differs by more than 1e-4 from F = 20 on, and
    stops at c = 10,000.

    Args:
      f: F statistic.
      df: degrees of freedom of the effect.
      residual_df: degrees of freedom of the residual.
      confidence: of the interval, between 0 and 1.

    Source: Smithson, 2001, Educ. Psychol. Meas. 61(4), 605-632.
    """
    value = f * df / (f * df + residual_df)
    cdf = extras.load("scipy.special").ncfdtr

    def bound(share: float) -> float | None:
        def excess(c: float) -> float:
            return float(cdf(df, residual_df, c, f)) - share

        if excess(0.0) <= 0:
            return 0.0
        return _crossing(excess, max(f * df, 1.0), lowest=0.0)

    low, high = bound((1 + confidence) / 2), bound((1 - confidence) / 2)
    if low is None or high is None:
        return Estimate(
            value=value, low=None, high=None, statement="no interval: F too large"
        )
    total = df + residual_df + 1
    return Estimate(
        value=value,
        low=low / (low + total),
        high=high / (high + total),
        statement="" if high > 0 else "F is smaller than chance makes it",
    )


def varies(*groups: Sequence[float]) -> bool:
    """Return whether values vary within groups, by more than they are rounded."""
    largest = max(abs(value) for values in groups for value in values)
    within = sum(_squares(np.asarray(values, float)) for values in groups)
    return within > (_ROUNDING * largest) ** 2


def _squares(values: np.ndarray) -> float:
    return float(((values - values.mean()) ** 2).sum())


def nothing(statement: str) -> Estimate:
    """Return an estimate without a number, and why."""
    return Estimate(value=None, low=None, high=None, statement=statement)


def _noncentral_t(t: float, df: float, c: float) -> float:
    """Return P(T <= t) of noncentrality c.

    SciPy gives a NaN for some t and c on two sides of 0, all of them where the
    probability is within 1e-12 of 0 or 1.
    """
    probability = float(extras.load("scipy.stats").nct.cdf(t, df, c))
    if math.isnan(probability) and t * c < 0:
        return 0.0 if c > 0 else 1.0
    return probability


def _crossing(
    excess: Callable[[float], float], start: float, lowest: float = -math.inf
) -> float | None:
    """Return where a falling function is 0; None where its numbers fail."""
    reach = max(1.0, abs(start))
    low, high = start, start
    while not (above := excess(low)) >= 0:
        low, reach = max(lowest, low - reach), 2 * reach
        if math.isnan(above) or abs(low) > _FARTHEST:
            return None
    reach = max(1.0, abs(start))
    while not (below := excess(high)) <= 0:
        high, reach = high + reach, 2 * reach
        if math.isnan(below) or abs(high) > _FARTHEST:
            return None
    if low == high:
        return low
    root = extras.load("scipy.optimize").brentq
    try:
        return float(root(excess, low, high, xtol=1e-12, rtol=1e-13))
    except ValueError:  # a NaN between the two
        return None
