"""Tests of ratings that take them as independent, as published studies do.

Shapes: N ratings, M outcomes (constructs).
"""

import dataclasses
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from kdjax.analysis import extras


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultivariateTest:
    """One statistic of all outcomes together."""

    name: str
    value: float
    f: float | None  # the approximate F; None where the law is another
    df: float | None
    residual_df: float | None
    p: float


def multivariate(
    outcomes_NM: np.ndarray,
    groups: Sequence[Hashable],
    *,
    num: int = 9999,
    seed: int = 0,
) -> list[MultivariateTest]:
    """Test all outcomes together, without normality, between independent groups.

    "Non-parametric MANOVA" names several tests, so all are given: the statistics of a
    MANOVA of the ranks of each outcome; the multivariate Kruskal-Wallis test,
    (N - 1) times Pillai's trace of the ranks, chi-squared with M (groups - 1) degrees
    of freedom; the ANOVA-type statistic of the ranks with unequal covariances; and
    PERMANOVA, the pseudo-F of Euclidean distances with free permutations of the groups.

    Args:
      outcomes_NM: ratings, none missing.
      groups: of each rating.
      num: permutations drawn.
      seed: of the draws.

    Raises:
      ValueError: fewer than two groups, or an outcome that depends on the others.

    Source: Puri and Sen, 1971, "Nonparametric Methods in Multivariate Analysis",
    section 5.4; Bathke, Harrar and Madden, 2008, Comput. Stat. Data Anal. 52(11);
    Anderson, 2001, Austral Ecology 26(1).
    """
    codes_N = np.unique(np.asarray(groups), return_inverse=True)[1].ravel()
    num_groups, size = int(codes_N.max(initial=-1)) + 1, outcomes_NM.shape[1]
    if num_groups < 2:
        raise ValueError("fewer than two groups have a complete rating")
    ranks_NM = extras.load("scipy.stats").rankdata(outcomes_NM, axis=0)
    centred_NM = ranks_NM - ranks_NM.mean(0)
    if np.linalg.matrix_rank(centred_NM) < size or len(ranks_NM) <= num_groups + size:
        raise ValueError("the outcomes depend on each other, or ratings are too few")
    counts = np.bincount(codes_N)
    sums = (codes_N == np.arange(num_groups)[:, None]) @ centred_NM
    between = sums.T @ (sums / counts[:, None])
    inside = centred_NM.T @ centred_NM - between
    tests = _rank_manova(between, inside, num_groups - 1, len(ranks_NM) - num_groups)
    trace = tests[1].value
    tests.append(_kruskal(trace, len(ranks_NM), size * (num_groups - 1)))
    tests += _anova_type(ranks_NM, codes_N)
    tests.append(_permanova("of ratings", outcomes_NM, codes_N, num, seed))
    tests.append(_permanova("of ranks", ranks_NM, codes_N, num, seed))
    return tests


def _rank_manova(
    between: np.ndarray, inside: np.ndarray, df: int, residual_df: int
) -> list[MultivariateTest]:
    """Return Wilks' lambda and the traces, with their approximate F.

    Source: Rencher and Christensen, 2012, "Methods of Multivariate Analysis", 3rd
    edition, section 6.1 (Rao's F of lambda, Pillai's F); Lawley and Hotelling's F with
    degrees of freedom s (2 m + s + 1) and 2 (s n + 1).
    """
    size = len(between)
    roots = np.maximum(np.linalg.eigvals(np.linalg.solve(inside, between)).real, 0.0)
    s = min(size, df)
    m, n = (abs(size - df) - 1) / 2, (residual_df - size - 1) / 2
    wilks = float((1 / (1 + roots)).prod())
    pillai, trace = float((roots / (1 + roots)).sum()), float(roots.sum())
    squares = size**2 + df**2 - 5
    root = ((size**2 * df**2 - 4) / squares) ** 0.5 if squares > 0 else 1.0
    lambda_df = root * (residual_df + df - (size + df + 1) / 2) - (size * df - 2) / 2
    power = wilks ** (1 / root)
    rows = [
        ("Wilks' lambda", wilks, (1 - power) / power, size * df, lambda_df),
        (
            "Pillai's trace",
            pillai,
            pillai / (s - pillai),
            s * (2 * m + s + 1),
            s * (2 * n + s + 1),
        ),
        (
            "Hotelling-Lawley trace",
            trace,
            trace / s,
            s * (2 * m + s + 1),
            2 * (s * n + 1),
        ),
    ]
    law = extras.load("scipy.stats").f
    return [
        MultivariateTest(
            name=f"rank MANOVA, {name}",
            value=value,
            f=ratio * second / first,
            df=first,
            residual_df=second,
            p=float(law.sf(ratio * second / first, first, second)),
        )
        for name, value, ratio, first, second in rows
    ]


def _kruskal(trace: float, size: int, df: int) -> MultivariateTest:
    value = (size - 1) * trace
    return MultivariateTest(
        name="multivariate Kruskal-Wallis, chi-squared",
        value=value,
        f=None,
        df=df,
        residual_df=None,
        p=float(extras.load("scipy.stats").chi2.sf(value, df)),
    )


def _anova_type(ranks_NM: np.ndarray, codes_N: np.ndarray) -> list[MultivariateTest]:
    """Return the ANOVA-type statistic; none where a group has one rating.

    F = tr(H) / tr(G), H the covariance of the groups' mean ranks, G the mean of their
    sampling covariances; degrees of freedom by Box's approximation.
    """
    counts = np.bincount(codes_N)
    if counts.min() < 2:
        return []
    num = len(counts)
    members = [ranks_NM[codes_N == code] for code in range(num)]
    means = np.stack([group.mean(0) for group in members])
    between = np.atleast_2d(np.cov(means.T))
    scaled = [np.atleast_2d(np.cov(group.T)) / len(group) for group in members]
    inside = np.mean(scaled, axis=0)
    trace = float(np.trace(inside))
    first = (num - 1) * trace**2 / float((inside**2).sum())
    second = num**2 / ((num - 1) * float((1 / (counts - 1)).sum())) * first
    f = float(np.trace(between)) / trace
    p = float(extras.load("scipy.stats").f.sf(f, first, second))
    name = "ANOVA-type statistic of ranks"
    return [
        MultivariateTest(name=name, value=f, f=f, df=first, residual_df=second, p=p)
    ]


def _permanova(
    name: str, outcomes_NM: np.ndarray, codes_N: np.ndarray, num: int, seed: int
) -> MultivariateTest:
    centred_NM = outcomes_NM - outcomes_NM.mean(0)
    total = float((centred_NM**2).sum())
    counts = np.bincount(codes_N)
    groups, size = len(counts), len(codes_N)

    def between(codes_N: np.ndarray) -> float:
        sums = (np.arange(groups)[:, None] == codes_N) @ centred_NM
        return float((sums**2 / counts[:, None]).sum())

    observed = between(codes_N)
    rng = np.random.default_rng(seed)
    larger = sum(
        between(rng.permutation(codes_N)) >= observed - 1e-9 * total for _ in range(num)
    )
    f = observed / (groups - 1) / ((total - observed) / (size - groups))
    return MultivariateTest(
        name=f"PERMANOVA {name}, pseudo-F",
        value=f,
        f=None,
        df=groups - 1,
        residual_df=size - groups,
        p=(1 + larger) / (1 + num),
    )


def inside_fences(values: np.ndarray) -> np.ndarray:
    """Return which values lie within 1.5 interquartile ranges of the quartiles.

    A missing value is inside.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return np.ones(len(values), bool)
    low, high = np.quantile(known, [0.25, 0.75])
    reach = 1.5 * (high - low)
    outside = (values < low - reach) | (values > high + reach)
    return ~outside


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coefficient:
    """A coefficient of a linear regression."""

    name: str
    value: float
    standard_error: float
    t: float
    p: float
    low: float
    high: float
    cluster_p: float | None  # by errors that are robust to clusters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression:
    """Ordinary least squares; `condition_p` tests all conditions together."""

    coefficients: tuple[Coefficient, ...]
    pairs: tuple[Coefficient, ...]  # differences of conditions
    ratings: int
    r_squared: float
    condition_f: float
    condition_p: float


def regression(
    y_N: np.ndarray,
    x_NP: np.ndarray,
    names: Sequence[str],
    clusters: Sequence[Hashable],
    *,
    num_conditions: int,
    contrasts: Iterable[tuple[str, np.ndarray]] = (),
    confidence: float = 0.95,
) -> Regression:
    """Fit ordinary least squares.

    Args:
      y_N: outcome.
      x_NP: constant, then an indicator for each condition but the first, then
        covariates; of full rank.
      names: of the columns.
      clusters: of each rating (participants), for robust standard errors.
      num_conditions: with the first.
      contrasts: name and weights of the columns, of further estimates.
      confidence: of intervals.

    Raises:
      ValueError: columns depend on each other, or the outcome does not vary.

    Source: Liang and Zeger, 1986, Biometrika 73(1), for errors robust to clusters.
    """
    if np.linalg.matrix_rank(x_NP) < x_NP.shape[1] or len(y_N) <= x_NP.shape[1]:
        raise ValueError("the columns of the regression depend on each other")
    if np.ptp(y_N) == 0:
        raise ValueError("all ratings are the same")
    fit = extras.load("statsmodels.api").OLS(y_N, x_NP).fit()
    codes_N = np.unique(np.asarray(clusters), return_inverse=True)[1].ravel()
    robust = None
    if codes_N.max() > x_NP.shape[1]:
        robust = fit.get_robustcov_results("cluster", groups=codes_N)

    def estimate(name: str, contrast_P: np.ndarray) -> Coefficient:
        test = fit.t_test(contrast_P)
        low, high = np.ravel(test.conf_int(1 - confidence))
        cluster_p = None
        if robust is not None:
            cluster_p = float(np.squeeze(robust.t_test(contrast_P).pvalue))
        return Coefficient(
            name=name,
            value=float(np.squeeze(test.effect)),
            standard_error=float(np.squeeze(test.sd)),
            t=float(np.squeeze(test.tvalue)),
            p=float(np.squeeze(test.pvalue)),
            low=float(low),
            high=float(high),
            cluster_p=cluster_p,
        )

    identity = np.eye(len(names))
    joint = fit.f_test(identity[1:num_conditions])
    return Regression(
        coefficients=tuple(map(estimate, names, identity)),
        pairs=tuple(estimate(name, row) for name, row in contrasts),
        ratings=len(y_N),
        r_squared=float(fit.rsquared),
        condition_f=float(np.squeeze(joint.fvalue)),
        condition_p=float(np.squeeze(joint.pvalue)),
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values adjusted by Holm's method; None stays and does not count.

    Source: Holm, 1979, Scand. J. Stat. 6(2).
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for order, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - order) * p))
        adjusted[place] = highest
    return adjusted
