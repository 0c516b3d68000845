"""Linear mixed models with crossed random intercepts, by restricted likelihood.

Shapes: N observations, P fixed effects, Q levels of all random factors together, K
random factors.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.analysis import extras

_STARTS = (0.2, 1.0, 3.0)  # ratios of standard deviations
_BOUNDARY = 1e-3  # ratio of standard deviations below which a variance is zero
_DECREMENT = 1e-4  # expected gain of one Newton step, in deviance
_AGREEMENT = 1e-3  # of the deviances of two optimisers


class RandomIntercepts:
    """Indicator columns of one or several factors, which may be crossed.

    A factor is left out, and `statements` says why, where it has one level, a level
    for each observation, or the same levels as an earlier factor.

    Args:
      factors: name -> a label per observation.
    """

    def __init__(self, factors: Mapping[str, Sequence[Any]]):
        sparse = extras.load("scipy.sparse")
        self.names: list[str] = []
        self.statements: list[str] = []
        self.codes_KN: list[np.ndarray] = []
        blocks: list[Any] = []
        for name, labels in factors.items():
            codes_N = np.unique(np.asarray(labels), return_inverse=True)[1].ravel()
            num, levels = len(codes_N), int(codes_N.max()) + 1
            if reason := self._reason(codes_N, levels):
                self.statements.append(f"{name} is not a random effect: {reason}")
                continue
            ones_N = np.ones(num)
            shape = (num, levels)
            blocks.append(sparse.csr_array((ones_N, (np.arange(num), codes_N)), shape))
            self.names.append(name)
            self.codes_KN.append(codes_N)
        sizes = [block.shape[1] for block in blocks]
        self.factor_Q = np.repeat(np.arange(len(sizes)), sizes)
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        empty = sparse.csr_array((0, 0))  # no random effect: it is not used
        self.z_NQ: Any = sparse.csr_array(sparse.hstack(blocks)) if blocks else empty

    def _reason(self, codes_N: np.ndarray, levels: int) -> str:
        if levels < 2:
            return "it has one level"
        if levels == len(codes_N):
            return "each of its levels has one observation"
        for name, other_N in zip(self.names, self.codes_KN, strict=True):
            pairs = len(set(zip(codes_N.tolist(), other_N.tolist(), strict=True)))
            if pairs == levels == other_N.max() + 1:
                return f"its levels are those of {name}"
        return ""

    def sums(self, values_Q: np.ndarray) -> np.ndarray:
        """Return the sums of each factor's levels, [K]."""
        return np.add.reduceat(values_Q, self.starts[:-1]) if self.names else values_Q


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """A contrast of fixed effects with its test."""

    name: str
    value: float
    standard_error: float
    df: float  # infinite: the normal distribution
    low: float
    high: float
    p: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Test:
    """A joint test of several contrasts."""

    statistic: float
    df: float
    residual_df: float  # infinite: chi-squared
    p: float


class LinearFit:
    """y = X b + sum_k Z_k u_k + e, u_k ~ N(0, s_k^2), e ~ N(0, s^2), by REML.

    The deviance is profiled over b and s and minimised over the ratios s_k / s, from
    several starts with its gradient and once without. `converged` holds where the
    optimisers agree, the expected gain of a Newton step is small and the curvature is
    positive; `statement` says what does not, and which variances are zero.

    Args:
      y_N: outcome.
      x_NP: fixed effects, of full rank.
      factors: name -> a label per observation, for each random intercept.

    Raises:
      ValueError: nothing can be estimated.

    Source: Bates, Maechler, Bolker and Walker, 2015, J. Stat. Softw. 67(1), section
    3.4; Satterthwaite's degrees of freedom: Kuznetsova, Brockhoff and Christensen,
    2017, J. Stat. Softw. 82(13), section 2.
    """

    def __init__(
        self, y_N: np.ndarray, x_NP: np.ndarray, factors: Mapping[str, Sequence[Any]]
    ):
        self.num, self.rank = x_NP.shape
        if np.linalg.matrix_rank(x_NP) < self.rank or self.num <= self.rank:
            raise ValueError(
                "the fixed effects depend on each other, or there are too few ratings"
            )
        self.random = RandomIntercepts(factors)
        y_N = np.asarray(y_N, float)
        least, *_ = np.linalg.lstsq(x_NP, y_N)
        rest_N = y_N - x_NP @ least
        if rest_N @ rest_N <= 1e-20 * max(float(y_N @ y_N), 1e-300):
            raise ValueError("nothing varies beyond the fixed effects")
        both = np.column_stack([x_NP, y_N])
        z = self.random.z_NQ if self.random.names else np.zeros((self.num, 0))
        self._cross = both.T @ both
        self._zxy = np.asarray(z.T @ both)
        zz = z.T @ z
        self._zz = np.asarray(zz.toarray() if hasattr(zz, "toarray") else zz)
        self.theta, spread = self._minimise()
        state = self._state(self.theta)
        self.beta = state["beta"]
        self.sigma = math.sqrt(state["rss"] / (self.num - self.rank))
        self.deviance = self._profiled(self.theta)[0]
        self.covariance = self.sigma**2 * state["inverse"]
        self._varying = np.flatnonzero(self.theta > _BOUNDARY)
        self._parameters = np.append(self.theta[self._varying], self.sigma)
        self._check(spread)

    @property
    def standard_deviations(self) -> dict[str, float]:
        """Return the standard deviation of each random effect and of the residual."""
        ratios = dict(zip(self.random.names, self.theta, strict=True))
        return {
            **{name: float(t) * self.sigma for name, t in ratios.items()},
            "residual": self.sigma,
        }

    def effect(
        self, name: str, contrast_P: np.ndarray, confidence: float = 0.95
    ) -> Effect:
        """Estimate a contrast, tested by t with Satterthwaite's degrees of freedom."""
        value = float(contrast_P @ self.beta)
        variance = float(contrast_P @ self.covariance @ contrast_P)
        df = self._df(contrast_P)
        return make_effect(name, value, math.sqrt(variance), df, confidence)

    def test(self, contrasts_MP: np.ndarray) -> Test:
        """Test that all of several contrasts are zero, by F.

        Source: Fai and Cornelius, 1996, J. Stat. Comput. Simul. 54(4).
        """
        values, vectors = np.linalg.eigh(
            contrasts_MP @ self.covariance @ contrasts_MP.T
        )
        rotated = vectors.T @ contrasts_MP
        f = float(np.mean((rotated @ self.beta) ** 2 / values))
        dfs = [self._df(row) for row in rotated]
        excess = sum(df / (df - 2) for df in dfs if df > 2)
        num = len(dfs)
        df = 2 * excess / (excess - num) if excess > num else 0.0
        if num == 1:
            df = dfs[0]
        if not df > 0 or any(one <= 2 for one in dfs):
            df = min(dfs)
        return Test(
            statistic=f,
            df=num,
            residual_df=df,
            p=float(extras.load("scipy.stats").f.sf(f, num, df)),
        )

    def _state(self, theta_K: np.ndarray) -> dict[str, Any]:
        """Return the solution at given ratios of standard deviations."""
        linalg = extras.load("scipy.linalg")
        scale_Q = theta_K[self.random.factor_Q]
        scaled = scale_Q[:, None] * self._zxy
        matrix = scale_Q[:, None] * self._zz * scale_Q + np.eye(len(scale_Q))
        factor = linalg.cho_factor(matrix, lower=True) if len(scale_Q) else None
        solved = linalg.cho_solve(factor, scaled) if factor else scaled
        inner = self._cross - scaled.T @ solved  # [X y]' V^-1 [X y]
        inverse = np.linalg.inv(inner[:-1, :-1])
        beta = inverse @ inner[:-1, -1]
        logs = 2 * np.log(np.diag(factor[0])).sum() if factor else 0.0
        return {
            "scale": scale_Q,
            "factor": factor,
            "solved": solved,
            "inverse": inverse,
            "beta": beta,
            "rss": float(inner[-1, -1] - beta @ inner[:-1, -1]),
            "logs": float(logs + np.linalg.slogdet(inner[:-1, :-1])[1]),
        }

    def _gradients(
        self, theta_K: np.ndarray, state: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradients of `logs` and `rss` by the ratios, [K] each."""
        scale_Q, solved, beta = state["scale"], state["solved"], state["beta"]
        linalg = extras.load("scipy.linalg")
        low = linalg.solve_triangular(
            state["factor"][0], scale_Q[:, None] * self._zz, lower=True
        )
        trace_Q = np.diag(self._zz) - (low**2).sum(0)  # diagonal of Z' V^-1 Z
        # Z' V^-1 of X, and of what the fixed effects leave
        inner = self._zxy - self._zz @ (scale_Q[:, None] * solved)
        rest_Q = inner[:, -1] - inner[:, :-1] @ beta
        fixed_Q = np.einsum(
            "qi,ij,qj->q", inner[:, :-1], state["inverse"], inner[:, :-1]
        )
        sums = self.random.sums
        logs_K = 2 * theta_K * (sums(trace_Q) - sums(fixed_Q))
        return logs_K, -2 * theta_K * sums(rest_Q**2)

    def _profiled(self, theta_K: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the restricted deviance at given ratios, and its gradient."""
        state = self._state(theta_K)
        free = self.num - self.rank
        value = state["logs"] + free * (1 + math.log(2 * math.pi * state["rss"] / free))
        if not self.random.names:
            return value, np.zeros(0)
        logs_K, rss_K = self._gradients(theta_K, state)
        return value, logs_K + free / state["rss"] * rss_K

    def _minimise(self) -> tuple[np.ndarray, float]:
        """Return the best ratios and how far two optimisers are apart."""
        num = len(self.random.names)
        if not num:
            return np.zeros(0), 0.0
        minimise = extras.load("scipy.optimize").minimize
        bounds = [(0.0, None)] * num
        results = [
            minimise(
                self._profiled,
                np.full(num, start),
                jac=True,
                method="L-BFGS-B",
                bounds=bounds,
                options={"ftol": 1e-13, "gtol": 1e-7},
            )
            for start in _STARTS
        ]
        best = min(results, key=lambda result: result.fun)
        other = minimise(
            lambda theta_K: self._profiled(np.abs(theta_K))[0],  # no bound to stick to
            np.full(num, 0.7),
            method="Nelder-Mead",
            options={"xatol": 1e-5, "fatol": 1e-8},
        )
        least = min(best, other, key=lambda result: result.fun)
        return np.abs(least.x), abs(best.fun - other.fun)

    def _full_gradient(self, parameters: np.ndarray) -> np.ndarray:
        """Return the gradient of the deviance by the varying ratios and sigma."""
        theta_K, sigma = self._ratios(parameters), parameters[-1]
        state = self._state(theta_K)
        free = self.num - self.rank
        last = 2 * free / sigma - 2 * state["rss"] / sigma**3
        if not len(self._varying):
            return np.array([last])
        logs_K, rss_K = self._gradients(theta_K, state)
        return np.append((logs_K + rss_K / sigma**2)[self._varying], last)

    def _ratios(self, parameters: np.ndarray) -> np.ndarray:
        theta_K = np.zeros(len(self.random.names))
        theta_K[self._varying] = parameters[:-1]
        return theta_K

    def _check(self, spread: float) -> None:
        words = list(self.random.statements)
        gradient = self._full_gradient(self._parameters)
        hessian = jacobian(self._full_gradient, self._parameters)
        curved = bool(np.linalg.eigvalsh(hessian).min() > 0)
        self.converged = False
        self._spread = np.linalg.pinv(hessian) * 2  # of the variance parameters
        if not curved:
            words.append("not converged: the deviance has no minimum here")
        elif gradient @ np.linalg.solve(hessian, gradient) > _DECREMENT:
            words.append("not converged: the gradient is not zero")
        elif spread > _AGREEMENT:
            words.append("two optimisers differ: the better one is shown")
        else:
            self.converged = True
        words += [
            f"the variance of {name} is estimated as zero"
            for place, name in enumerate(self.random.names)
            if place not in self._varying
        ]
        self.statement = "; ".join(words)

    def _df(self, contrast_P: np.ndarray) -> float:
        """Return Satterthwaite's degrees of freedom of a contrast."""

        def variance(parameters: np.ndarray) -> np.ndarray:
            inverse = self._state(self._ratios(parameters))["inverse"]
            return np.atleast_1d(
                parameters[-1] ** 2 * (contrast_P @ inverse @ contrast_P)
            )

        gradient = jacobian(variance, self._parameters)[0]
        value = float(variance(self._parameters)[0])
        return float(2 * value**2 / (gradient @ self._spread @ gradient))


def make_effect(
    name: str, value: float, standard_error: float, df: float, confidence: float
) -> Effect:
    """Return an estimate with its interval and p-value, by t or the normal."""
    stats = extras.load("scipy.stats")
    law = stats.t(df) if math.isfinite(df) else stats.norm
    half = float(law.isf((1 - confidence) / 2)) * standard_error
    return Effect(
        name=name,
        value=value,
        standard_error=standard_error,
        df=df,
        low=value - half,
        high=value + half,
        p=float(2 * law.sf(abs(value) / standard_error)),
    )


def jacobian(
    function: Callable[[np.ndarray], np.ndarray], point: np.ndarray
) -> np.ndarray:
    """Return the derivatives of a vector function by central differences."""
    columns = []
    for place in range(len(point)):
        step = np.zeros(len(point))
        step[place] = 1e-4 * max(abs(point[place]), 0.1)
        high, low = function(point + step), function(point - step)
        columns.append((high - low) / (2 * step[place]))
    return np.stack(columns, -1)
