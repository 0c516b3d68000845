"""Cumulative-logit mixed models with crossed random intercepts.

Shapes: N observations, P fixed effects (no constant), J categories, Q levels of all
random factors together, K random factors.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.analysis import extras, mixed_models

_STARTS = (0.4, 1.2)  # standard deviations of the random effects, in logits
_BOUNDARY = 0.02  # standard deviation below which a variance is zero
_DECREMENT = 1e-4  # expected gain of one Newton step, in log-likelihood
_AGREEMENT = 1e-3  # of the log-likelihoods of two starts
_FARTHEST = 12.0  # logits: an estimate beyond it has run away
_BOUND = 2.5 * _FARTHEST  # of the search
_NEWTON_STEPS = 60


class OrdinalFit:
    """log odds of y <= j are t_j - X b - sum_k Z_k u_k, u_k ~ N(0, s_k^2).

    The likelihood is integrated over the random effects by Laplace's approximation and
    maximised with its exact gradient from several starts. `converged` holds where the
    starts agree, the expected gain of a Newton step is small and the curvature is that
    of a maximum; `statement` says what does not. Categories that nobody used have no
    threshold.

    Args:
      y_N: ratings, any ordered values.
      x_NP: fixed effects without a constant.
      factors: name -> a label per observation, for each random intercept.

    Raises:
      ValueError: nothing can be estimated.

    Source: Christensen, 2019, "Cumulative Link Models for Ordinal Regression with the R
    Package ordinal"; Tutz and Hennevogl, 1996, Comput. Stat. Data Anal. 22(5).
    """

    def __init__(
        self, y_N: np.ndarray, x_NP: np.ndarray, factors: Mapping[str, Sequence[Any]]
    ):
        self.categories, self._y_N = np.unique(np.asarray(y_N), return_inverse=True)
        if len(self.categories) < 2:
            raise ValueError("all ratings are the same")
        full = np.column_stack([np.ones(len(x_NP)), x_NP])
        if np.linalg.matrix_rank(full) < full.shape[1]:
            raise ValueError("the fixed effects depend on each other")
        self._x_NP = np.asarray(x_NP, float)
        self.random = mixed_models.RandomIntercepts(factors)
        self._cuts = len(self.categories) - 1
        self._u_Q = np.zeros(len(self.random.factor_Q))
        best, spread = self._maximise()
        self.log_likelihood = -float(best.fun)
        self._point = best.x
        self.thresholds, self.beta, self.sd_K = self._split(best.x)
        self._check(spread)

    @property
    def standard_deviations(self) -> dict[str, float]:
        """Return the standard deviation of each random effect, in logits."""
        return dict(zip(self.random.names, self.sd_K.tolist(), strict=True))

    def effect(
        self, name: str, contrast_P: np.ndarray, confidence: float = 0.95
    ) -> mixed_models.Effect:
        """Estimate a contrast of log odds, tested by the normal distribution."""
        variance = float(contrast_P @ self.covariance @ contrast_P)
        return mixed_models.make_effect(
            name,
            float(contrast_P @ self.beta),
            math.sqrt(variance),
            math.inf,
            confidence,
        )

    def test(self, smaller: "OrdinalFit") -> mixed_models.Test:
        """Test against a model with fewer fixed effects, by the likelihood ratio."""
        statistic = max(2 * (self.log_likelihood - smaller.log_likelihood), 0.0)
        df = len(self.beta) - len(smaller.beta)
        p = float(extras.load("scipy.stats").chi2.sf(statistic, df))
        return mixed_models.Test(statistic=statistic, df=df, residual_df=math.inf, p=p)

    def _split(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return thresholds, fixed effects and standard deviations.

        The first threshold is free, the others follow at exp(.) distances.
        """
        cuts, num = self._cuts, self._x_NP.shape[1]
        steps = np.append(point[:1], np.exp(point[1:cuts]))
        return np.cumsum(steps), point[cuts : cuts + num], point[cuts + num :]

    def _bounds(
        self, thresholds: np.ndarray, eta_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the upper and lower end of each rating's interval, in logits."""
        ends = np.concatenate([[-np.inf], thresholds, [np.inf]])
        return ends[self._y_N + 1] - eta_N, ends[self._y_N] - eta_N

    def _mode(
        self, thresholds: np.ndarray, fixed_N: np.ndarray, scale_Q: np.ndarray
    ) -> np.ndarray:
        """Return the mode of the random effects, in their standard deviations."""
        linalg = extras.load("scipy.linalg")
        z = self.random.z_NQ
        u_Q = self._u_Q

        def value(u_Q: np.ndarray) -> float:
            bounds = self._bounds(thresholds, fixed_N + z @ (scale_Q * u_Q))
            return float(_log_probability(*bounds).sum() - u_Q @ u_Q / 2)

        current = value(u_Q)
        for _ in range(_NEWTON_STEPS):
            eta_N = fixed_N + z @ (scale_Q * u_Q)
            high_N, low_N = map(_logistic, self._bounds(thresholds, eta_N))
            score_Q = scale_Q * (z.T @ (high_N + low_N - 1)) - u_Q
            weights_N = high_N * (1 - high_N) + low_N * (1 - low_N)
            factor = linalg.cho_factor(self._curvature(weights_N, scale_Q), lower=True)
            step_Q = linalg.cho_solve(factor, score_Q)
            size = 1.0
            while (after := value(u_Q + size * step_Q)) < current - 1e-10:
                size /= 2
                if size < 1e-6:
                    break
            u_Q, current = u_Q + size * step_Q, after
            if float(np.abs(step_Q).max()) < 1e-9:
                break
        self._u_Q = u_Q  # where the next search starts
        return u_Q

    def _curvature(self, weights_N: np.ndarray, scale_Q: np.ndarray) -> np.ndarray:
        z = self.random.z_NQ
        inner = (z.T @ (z * weights_N[:, None])).toarray()
        return scale_Q[:, None] * inner * scale_Q + np.eye(len(scale_Q))

    def _objective(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """Return minus the approximate log-likelihood, and its gradient.

        With F(a) - F(b) = F(a) (1 - F(b)) (1 - exp(b - a)) of the logistic F, the
        derivatives of a rating's log-probability by eta are F(a) + F(b) - 1 and
        -(f(a) + f(b)). The mode moves with the parameters; `shift_N` is that part.
        """
        thresholds, beta, sd_K = self._split(point)
        fixed_N = self._x_NP @ beta
        scale_Q = sd_K[self.random.factor_Q] if self.random.names else np.zeros(0)
        num = len(scale_Q)
        if num:
            linalg = extras.load("scipy.linalg")
            z = self.random.z_NQ
            u_Q = self._mode(thresholds, fixed_N, scale_Q)
            eta_N = fixed_N + z @ (scale_Q * u_Q)
        else:
            u_Q, eta_N = np.zeros(0), fixed_N
        upper_N, lower_N = self._bounds(thresholds, eta_N)
        high_N, low_N = _logistic(upper_N), _logistic(lower_N)
        f_high, f_low = high_N * (1 - high_N), low_N * (1 - low_N)
        weights_N = f_high + f_low
        slope_N = high_N + low_N - 1
        value = float(_log_probability(upper_N, lower_N).sum() - u_Q @ u_Q / 2)
        shift_N = lever_N = np.zeros(len(eta_N))
        by_sd = np.zeros(len(sd_K))
        df_high, df_low = f_high * (1 - 2 * high_N), f_low * (1 - 2 * low_N)
        if num:
            curvature = self._curvature(weights_N, scale_Q)
            low = np.linalg.cholesky(curvature)
            value -= float(np.log(np.diag(low)).sum())
            inverse = linalg.cho_solve((low, True), np.eye(num))
            lever_N = self._leverage(inverse, scale_Q)
            implicit_N = lever_N * (df_high + df_low) / 2
            moved_Q = inverse @ (scale_Q * (z.T @ implicit_N))
            shift_N = z @ (scale_Q * moved_Q)
            total_N = slope_N + implicit_N - weights_N * shift_N
            inner = (z.T @ (z * weights_N[:, None])).toarray()
            trace_Q = ((inverse * scale_Q) * inner).sum(1)
            by_sd = self.random.sums(
                u_Q * (z.T @ total_N) + moved_Q * (z.T @ slope_N) - trace_Q
            )
        else:
            total_N = slope_N
        gap = _gap_slope(upper_N, lower_N)
        by_upper = (1 - high_N) + gap - lever_N * df_high / 2 + shift_N * f_high
        by_lower = -low_N - gap - lever_N * df_low / 2 + shift_N * f_low
        ends = np.zeros(self._cuts + 2)
        np.add.at(ends, self._y_N + 1, by_upper)
        np.add.at(ends, self._y_N, by_lower)
        after = np.cumsum(ends[1:-1][::-1])[::-1]  # of a threshold and those above
        steps = after * np.append(1.0, np.exp(point[1 : self._cuts]))
        # eta enters with a minus, so its total derivative has the sign of the slope
        gradient = np.concatenate([steps, self._x_NP.T @ total_N, by_sd])
        return -value, -gradient

    def _leverage(self, inverse: np.ndarray, scale_Q: np.ndarray) -> np.ndarray:
        """Return the variance of each linear predictor given the ratings, [N]."""
        places = [
            self.random.codes_KN[k] + self.random.starts[k]
            for k in range(len(self.random.names))
        ]
        lever_N = np.zeros(len(self._y_N))
        for first in places:
            for second in places:
                scale_N = scale_Q[first] * scale_Q[second]
                lever_N += scale_N * inverse[first, second]
        return lever_N

    def _maximise(self) -> tuple[Any, float]:
        """Return the best result and how far the starts are apart."""
        counts = np.bincount(self._y_N, minlength=self._cuts + 1)
        shares = np.cumsum(counts)[:-1] / counts.sum()
        cuts = np.log(shares / (1 - shares))
        steps = np.append(cuts[:1], np.log(np.diff(cuts)))
        num, factors = self._x_NP.shape[1], len(self.random.names)
        far = [(-_BOUND, _BOUND)] * (self._cuts + num)
        bounds = far + [(0.0, _BOUND)] * factors

        def search(point: np.ndarray) -> Any:
            self._u_Q = np.zeros(len(self.random.factor_Q))
            return extras.load("scipy.optimize").minimize(
                self._objective,
                point,
                jac=True,
                method="L-BFGS-B",
                bounds=bounds,
                options={"ftol": 1e-12, "gtol": 1e-5, "maxiter": 500},
            )

        results = []
        for start in _STARTS if factors else _STARTS[:1]:
            tail = np.full(factors, start)
            result = search(np.concatenate([steps, np.zeros(num), tail]))
            zero = result.x <= _BOUNDARY
            zero[: self._cuts + num] = False
            if zero.any():  # the slope at 0 is 0, whether it is the maximum or not
                again = search(np.where(zero, _STARTS[0], result.x))
                result = min(result, again, key=lambda one: one.fun)
            results.append(result)
        results.sort(key=lambda result: result.fun)
        return results[0], float(results[-1].fun - results[0].fun)

    def _check(self, spread: float) -> None:
        words = list(self.random.statements)
        first = self._cuts + self._x_NP.shape[1]
        free = np.append(np.ones(first, bool), self.sd_K > _BOUNDARY)

        def gradient(part: np.ndarray) -> np.ndarray:
            point = self._point.copy()
            point[free] = part
            return self._objective(point)[1][free]

        here = gradient(self._point[free])
        hessian = mixed_models.jacobian(gradient, self._point[free])
        hessian = (hessian + hessian.T) / 2
        self.converged = False
        runaway = float(np.abs(self.beta).max(initial=0.0)) > _FARTHEST
        curved = bool(np.linalg.eigvalsh(hessian).min() > 1e-8)
        if runaway:
            words.append("not estimable: an effect has run away (a category is empty)")
        elif not curved:
            words.append("not converged: the likelihood has no maximum here")
        elif here @ np.linalg.solve(hessian, here) > _DECREMENT:
            words.append("not converged: the gradient is not zero")
        elif spread > _AGREEMENT:
            words.append("two starts differ: the better one is shown")
            self.converged = True
        else:
            self.converged = True
        inverse = np.linalg.pinv(hessian)
        self.covariance = inverse[self._cuts : first, self._cuts : first]
        words += [
            f"the variance of {name} is estimated as zero"
            for name, sd in zip(self.random.names, self.sd_K, strict=True)
            if sd <= _BOUNDARY
        ]
        self.statement = "; ".join(words)


def _logistic(values: np.ndarray) -> np.ndarray:
    return extras.load("scipy.special").expit(values)


def _log_probability(upper_N: np.ndarray, lower_N: np.ndarray) -> np.ndarray:
    """Return log(F(upper) - F(lower)) without cancellation."""
    special = extras.load("scipy.special")
    gap_N = np.log(-np.expm1(lower_N - upper_N))
    return special.log_expit(upper_N) + special.log_expit(-lower_N) + gap_N


def _gap_slope(upper_N: np.ndarray, lower_N: np.ndarray) -> np.ndarray:
    """Return the derivative of log(1 - exp(lower - upper)) by upper."""
    gap_N = upper_N - lower_N
    return -np.exp(-gap_N) / np.expm1(-gap_N)
