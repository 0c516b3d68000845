"""Least squares on factors whose columns may depend on each other.

Shapes: N runs, P columns of the model (ones, then one a level of each factor).
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kdjax.analysis import effect_sizes, extras

_FAR = 1e-8  # from a span: what is closer is in it
_ROUNDING = 1e-12  # of the largest value: smaller residuals are none
_EXACT = 1e-20  # of the total sum of squares: likewise

Parts = Mapping[str, np.ndarray]  # factor -> one weight a level; others have 0


class Fit:
    """value = constant + one term a level of each factor.

    Such terms are never unique. A contrast of them is estimable if it is the same in
    all solutions: if it is a sum of rows of the runs.

    Args:
      values_N: what is explained.
      terms: factor -> a column a level, 1 where the run has it and 0 elsewhere.
      confidence: of intervals.

    Source: Searle, Linear Models, 1971, chapter 5.
    """

    def __init__(
        self, values_N: np.ndarray, terms: Mapping[str, np.ndarray], confidence: float
    ):
        self.values, self.terms, self.confidence = values_N, terms, confidence
        ones = np.ones((len(values_N), 1))
        self.x_NP = np.concatenate([ones, *terms.values()], 1)
        # Of all solutions, that in which columns that others make up have no part.
        self._kept = _independent(self.x_NP)
        ols = extras.load("statsmodels.regression.linear_model").OLS
        # Less their first value, numbers that lie close together lose no digits.
        self._result: Any = ols(values_N - values_N[0], self.x_NP[:, self._kept]).fit()
        self.squares = float(self._result.ssr)  # of the residual
        self.df = float(self._result.df_resid)

    @functools.cached_property
    def reason(self) -> str:
        """Why there is no test, in words; "" if there is one."""
        if not effect_sizes.varies(self.values.tolist()):
            return "all values are the same: no variance, no test"
        total = float(((self.values - self.values.mean()) ** 2).sum())
        rounding = (_ROUNDING * float(np.abs(self.values).max())) ** 2
        if self.df < 1 or self.squares <= max(_EXACT * total, rounding):
            return "nothing is left to measure chance by: no test"
        return ""

    def less(self, name: str) -> "Fit":
        """The fit without a factor."""
        kept = {key: term for key, term in self.terms.items() if key != name}
        return Fit(self.values, kept, self.confidence)

    def test(self, smaller: "Fit") -> dict[str, float]:
        """df, f and p of what this explains more than a smaller fit; {} without one."""
        df = smaller.df - self.df
        if self.reason or df < 1:
            return {}
        gain = max(smaller.squares - self.squares, 0.0)
        f = gain / df / (self.squares / self.df)
        return {"df": df, "f": f, "p": float(_scipy().f.sf(f, df, self.df))}

    def estimable(self, parts: Parts, *, constant: float = 0.0) -> bool:
        """Whether all solutions agree on a contrast."""
        contrast_P = self._contrast(parts, constant)
        span_P = contrast_P @ self._span_PP
        return bool(np.abs(span_P - contrast_P).max() < _FAR)

    def estimate(
        self, parts: Parts, *, constant: float = 0.0, num: int = 1
    ) -> effect_sizes.Estimate:
        """A contrast with its interval, by t of the residual.

        Args:
          parts: its weights.
          constant: weight of the constant: 1 for a mean, 0 for a difference.
          num: intervals that hold at once, by Bonferroni's correction.
        """
        if not self.estimable(parts, constant=constant):
            return effect_sizes.nothing(self._blame(parts, constant))
        kept = self._contrast(parts, constant)[self._kept]
        value = float(kept @ self._result.params + constant * self.values[0])
        if self.reason:
            return effect_sizes.Estimate(
                value=value, low=None, high=None, statement=self.reason
            )
        spread = float(kept @ self._result.normalized_cov_params @ kept)
        t = float(_scipy().t.isf((1 - self.confidence) / 2 / num, self.df))
        half = t * math.sqrt(max(spread, 0.0) * self.squares / self.df)
        return effect_sizes.Estimate(value=value, low=value - half, high=value + half)

    @functools.cached_property
    def _span_PP(self) -> np.ndarray:
        return np.linalg.pinv(self.x_NP) @ self.x_NP

    def _contrast(self, parts: Parts, constant: float) -> np.ndarray:
        weights = [
            parts.get(name, np.zeros(term.shape[1]))
            for name, term in self.terms.items()
        ]
        return np.concatenate([[constant], *weights])

    def _blame(self, parts: Parts, constant: float) -> str:
        """Without which factors a contrast would be estimable, in words."""
        names = [
            name
            for name in self.terms
            if self.less(name).estimable(parts, constant=constant)
        ]
        who = " and ".join(names) if len(names) > 1 else "the factors"
        return f"the levels of {who} meet too seldom to tell them apart"


def _independent(x_NP: np.ndarray) -> list[int]:
    """Columns that those before them do not make up."""
    found: list[int] = []
    basis_ND = x_NP[:, :0]
    for place, column_N in enumerate(x_NP.T):
        rest_N = column_N - basis_ND @ (basis_ND.T @ column_N)
        rest_N = rest_N - basis_ND @ (basis_ND.T @ rest_N)  # twice is exact enough
        length = float(np.linalg.norm(rest_N))
        if length > _FAR:
            found.append(place)
            basis_ND = np.column_stack([basis_ND, rest_N / length])
    return found


def _scipy() -> Any:
    return extras.load("scipy.stats")
