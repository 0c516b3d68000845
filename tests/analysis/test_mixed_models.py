"""Linear mixed models against R's examples, exact theory, a dense likelihood."""

import numpy as np
import pytest
import scipy.optimize
import statsmodels.api as sm

from kdjax.analysis import mixed_models
from tests.analysis import ratings


def _design(what):
    return np.column_stack([np.ones(len(what)), *(what == k for k in (1, 2, 3))])


def test_penicillin_as_lme4():
    """lme4's lmer(diameter ~ 1 + (1|plate) + (1|sample)): crossed."""
    y = ratings.PENICILLIN
    plate, sample = np.indices(y.shape)
    fit = mixed_models.LinearFit(
        y.ravel(),
        np.ones((144, 1)),
        {"plate": plate.ravel(), "sample": sample.ravel()},
    )
    assert fit.converged and not fit.statement
    assert fit.deviance == pytest.approx(330.8606, abs=1e-4)
    assert fit.beta == pytest.approx([22.9722], abs=1e-4)
    assert fit.covariance[0, 0] ** 0.5 == pytest.approx(0.8086, abs=1e-4)
    deviations = fit.standard_deviations
    assert deviations["plate"] == pytest.approx(0.8467, abs=1e-4)
    assert deviations["sample"] == pytest.approx(1.9316, abs=1e-4)
    assert deviations["residual"] == pytest.approx(0.5499, abs=1e-4)


def test_sleepstudy_as_lme4():
    """lme4's lmer(Reaction ~ Days + (1|Subject)); lmerTest: 161 degrees of freedom."""
    subject, day = np.indices(ratings.SLEEPSTUDY.shape)
    x = np.column_stack([np.ones(180), day.ravel()])
    fit = mixed_models.LinearFit(
        ratings.SLEEPSTUDY.ravel(), x, {"subject": subject.ravel()}
    )
    assert fit.converged
    assert fit.deviance == pytest.approx(1786.465, abs=1e-3)
    assert fit.beta == pytest.approx([251.4051, 10.4673], abs=1e-4)
    errors = np.sqrt(np.diag(fit.covariance))
    assert errors == pytest.approx([9.7467, 0.8042], abs=1e-4)
    assert fit.standard_deviations["subject"] == pytest.approx(37.124, abs=1e-3)
    assert fit.standard_deviations["residual"] == pytest.approx(30.991, abs=1e-3)
    days = fit.effect("days", np.array([0.0, 1.0]))
    assert days.df == pytest.approx(161.0, rel=1e-3)
    test = fit.test(np.array([[0.0, 1.0]]))
    assert test.statistic == pytest.approx((10.4673 / 0.8042) ** 2, rel=1e-3)
    assert test.p == pytest.approx(days.p, rel=1e-6)


def test_satterthwaite_is_exact_in_a_balanced_design():
    """Blocks with each condition once: F and its degrees of freedom are the ANOVA's."""
    y, what, who, _ = ratings.study(3, rounds=1)
    fit = mixed_models.LinearFit(y, _design(what), {"people": who})
    test = fit.test(np.eye(4)[1:])
    table = y.reshape(24, 4)
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    between = 24 * ((table.mean(0) - table.mean()) ** 2).sum() / 3
    assert test.statistic == pytest.approx(between / ((rest**2).sum() / 69), rel=1e-4)
    assert test.residual_df == pytest.approx(69, rel=1e-3)


def test_one_factor_as_statsmodels():
    y, what, who, _ = ratings.study(4)
    x = _design(what)
    fit = mixed_models.LinearFit(y, x, {"people": who})
    other = sm.MixedLM(y, x, groups=who).fit(reml=True)
    assert fit.beta == pytest.approx(other.fe_params, abs=1e-4)
    errors = np.sqrt(np.diag(fit.covariance))
    assert errors == pytest.approx(other.bse_fe, rel=1e-3)
    assert fit.deviance == pytest.approx(-2 * other.llf, abs=1e-4)


def test_crossed_effects_by_the_dense_likelihood():
    y, what, who, seen = ratings.study(5, people=12, items=20)
    x = _design(what)
    fit = mixed_models.LinearFit(y, x, {"people": who, "items": seen})
    z = [np.eye(12)[who], np.eye(20)[seen]]

    def deviance(variances):
        residual, *others = np.exp(variances)
        v = residual * np.eye(len(y)) + sum(
            s * block @ block.T for s, block in zip(others, z, strict=True)
        )
        inverse = np.linalg.inv(v)
        inner = x.T @ inverse @ x
        beta = np.linalg.solve(inner, x.T @ inverse @ y)
        rest = y - x @ beta
        return (
            np.linalg.slogdet(v)[1]
            + np.linalg.slogdet(inner)[1]
            + rest @ inverse @ rest
            + (len(y) - 4) * np.log(2 * np.pi)
        )

    here = np.log(np.square([fit.sigma, *(fit.sigma * fit.theta)]))
    assert deviance(here) == pytest.approx(fit.deviance, abs=1e-8)
    other = scipy.optimize.minimize(deviance, here + 0.3, method="BFGS")
    assert other.fun == pytest.approx(fit.deviance, abs=1e-6)


@pytest.mark.parametrize("ratios", [(0.5, 2.0), (1.5, 0.1)])
def test_gradient(ratios):
    y, what, who, seen = ratings.study(1, people=8)
    fit = mixed_models.LinearFit(y, _design(what), {"people": who, "items": seen})
    theta = np.array(ratios)
    numeric = mixed_models.jacobian(
        lambda point: np.atleast_1d(fit._profiled(point)[0]), theta
    )[0]
    assert fit._profiled(theta)[1] == pytest.approx(numeric, rel=1e-5, abs=1e-5)


def test_no_variance_is_said():
    y, what, who, seen = ratings.study(2, sd_items=0.0)
    rest = y - np.array([y[seen == item].mean() for item in range(24)])[seen]
    fit = mixed_models.LinearFit(rest, _design(what), {"people": who, "items": seen})
    assert fit.converged
    assert fit.standard_deviations["items"] < 1e-3
    assert "the variance of items is estimated as zero" in fit.statement


def test_factors_that_say_nothing_are_left_out():
    y, what, who, _ = ratings.study(2)
    alone = np.arange(len(y))
    factors = {"people": who, "again": who + 7, "rows": alone, "one": who * 0}
    fit = mixed_models.LinearFit(y, _design(what), factors)
    assert fit.random.names == ["people"]
    for words in ("those of people", "one observation", "one level"):
        assert words in fit.statement


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ValueError, match="nothing varies"):
        mixed_models.LinearFit(np.full(8, 3.0), np.ones((8, 1)), {"a": [0, 1] * 4})
    with pytest.raises(ValueError, match="depend on each other"):
        mixed_models.LinearFit(np.arange(8.0), np.ones((8, 2)), {"a": [0, 1] * 4})


def test_a_wrong_optimum_is_noticed(monkeypatch):
    """Optimisers that stop too early do not pass in silence."""
    stopped = scipy.optimize.OptimizeResult(x=np.array([0.1, 0.1]), fun=0.0)
    monkeypatch.setattr(scipy.optimize, "minimize", lambda *_, **__: stopped)
    y, what, who, seen = ratings.study(1)
    fit = mixed_models.LinearFit(y, _design(what), {"people": who, "items": seen})
    assert not fit.converged
    assert "not converged" in fit.statement
