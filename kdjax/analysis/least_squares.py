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
        self._inverse_PN = np.linalg.pinv(self.x_NP)
        # Less their first value, numbers that lie close together lose no digits.
        shifted_N = values_N - values_N[0]
        self._params_P = self._inverse_PN @ shifted_N  # the shortest of all solutions
        self.squares = _squares(shifted_N - self.x_NP @ self._params_P)
        self.df = float(len(values_N) - np.linalg.matrix_rank(self.x_NP))

    @functools.cached_property
    def reason(self) -> str:
        """Return why there is no test, in words; "" if there is one."""
        if not effect_sizes.varies(self.values.tolist()):
            return "all values are the same: no variance, no test"
        total = float(((self.values - self.values.mean()) ** 2).sum())
        rounding = (_ROUNDING * float(np.abs(self.values).max())) ** 2
        if self.df < 1 or self.squares <= max(_EXACT * total, rounding):
            return "nothing is left to measure chance by: no test"
        return ""

    def less(self, name: str) -> "Fit":
        """Return the fit without a factor."""
        others = {key: term for key, term in self.terms.items() if key != name}
        return Fit(self.values, others, self.confidence)

    def test(self, smaller: "Fit") -> dict[str, float]:
        """Return df, f and p of the gain over a smaller fit; {} without a test."""
        df = smaller.df - self.df
        if self.reason or df < 1:
            return {}
        gain = max(smaller.squares - self.squares, 0.0)
        f = gain / df / (self.squares / self.df)
        return {"df": df, "f": f, "p": float(_scipy().f.sf(f, df, self.df))}

    def estimable(self, parts: Parts, *, constant: float = 0.0) -> bool:
        """Return whether all solutions agree on a contrast."""
        contrast_P = self._contrast(parts, constant)
        span_P = contrast_P @ self._inverse_PN @ self.x_NP
        return bool(np.abs(span_P - contrast_P).max() < _FAR)

    def estimate(
        self, parts: Parts, *, constant: float = 0.0, num: int = 1
    ) -> effect_sizes.Estimate:
        """Estimate a contrast with its interval, by t of the residual.

        Args:
          parts: its weights.
          constant: weight of the constant: 1 for a mean, 0 for a difference.
          num: intervals that hold at once, by Bonferroni's correction.
        """
        if not self.estimable(parts, constant=constant):
            return effect_sizes.nothing(self._blame(parts, constant))
        contrast_P = self._contrast(parts, constant)
        value = float(contrast_P @ self._params_P + constant * self.values[0])
        if self.reason:
            return effect_sizes.Estimate(
                value=value, low=None, high=None, statement=self.reason
            )
        spread = _squares(contrast_P @ self._inverse_PN)
        t = float(_scipy().t.isf((1 - self.confidence) / 2 / num, self.df))
        half = t * math.sqrt(spread * self.squares / self.df)
        return effect_sizes.Estimate(value=value, low=value - half, high=value + half)

    def _contrast(self, parts: Parts, constant: float) -> np.ndarray:
        weights = [
            parts.get(name, np.zeros(term.shape[1]))
            for name, term in self.terms.items()
        ]
        return np.concatenate([[constant], *weights])

    def _blame(self, parts: Parts, constant: float) -> str:
        """Name the factors without which a contrast would be estimable."""
        names = [
            name
            for name in self.terms
            if self.less(name).estimable(parts, constant=constant)
        ]
        who = " and ".join(names) if len(names) > 1 else "the factors"
        return f"the levels of {who} meet too seldom to tell them apart"


def _squares(values: np.ndarray) -> float:
    return float(values @ values)


def _scipy() -> Any:
    return extras.load("scipy.stats")
