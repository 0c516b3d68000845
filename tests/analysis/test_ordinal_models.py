"""Cumulative-logit mixed models against R's examples, integrals and differences."""

import math

import numpy as np
import pytest
import scipy.special
import statsmodels.miscmodels.ordinal_model as statsmodels_ordinal

from kdjax.analysis import ordinal_models
from tests.analysis import ratings

JUDGE, BOTTLE = (codes.ravel() for codes in np.indices(ratings.WINE.shape))
WINE_X = np.column_stack([BOTTLE >= 4, BOTTLE // 2 % 2]).astype(float)


@pytest.fixture(scope="module")
def wine():
    return ordinal_models.OrdinalFit(ratings.WINE.ravel(), WINE_X, {"judge": JUDGE})


def test_wine_as_clmm(wine):
    """ordinal's clmm(rating ~ temp + contact + (1|judge), data = wine)."""
    assert wine.converged and not wine.statement
    assert wine.log_likelihood == pytest.approx(-81.57, abs=5e-3)
    assert wine.beta == pytest.approx([3.063, 1.835], abs=5e-4)
    errors = np.sqrt(np.diag(wine.covariance))
    assert errors == pytest.approx([0.5954, 0.5125], abs=2e-4)
    assert wine.thresholds == pytest.approx([-1.6237, 1.5134, 4.2285, 6.0888], abs=3e-4)
    assert wine.standard_deviations["judge"] == pytest.approx(1.131, abs=1e-3)


def test_laplace_is_close_to_the_integral(wine):
    """Integrate over each judge's effect on a grid, at the estimates."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    ends = np.concatenate([[-np.inf], wine.thresholds, [np.inf]])
    y = ratings.WINE.ravel() - 1
    eta = (WINE_X @ wine.beta)[:, None] + wine.sd_K[0] * nodes
    probability = scipy.special.expit(ends[y + 1][:, None] - eta)
    probability -= scipy.special.expit(ends[y][:, None] - eta)
    judges = np.stack([probability[judge == JUDGE].prod(0) for judge in range(9)])
    exact = np.log(judges @ weights / math.sqrt(2 * math.pi)).sum()
    assert wine.log_likelihood == pytest.approx(exact, abs=0.15)


def test_likelihood_ratio_of_contact(wine):
    """The tutorial of clmm2 has it by quadrature: 16.0; 1 degree of freedom."""
    smaller = ordinal_models.OrdinalFit(
        ratings.WINE.ravel(), WINE_X[:, :1], {"judge": JUDGE}
    )
    test = wine.test(smaller)
    assert test.df == 1
    wald = wine.effect("contact", np.array([0.0, 1.0]))
    assert test.p < 0.001 and wald.p < 0.001
    assert test.statistic == pytest.approx((wald.value / wald.standard_error) ** 2, 0.4)


@pytest.mark.parametrize("deviations", [(0.7, 0.4), (0.0, 1.2)])
def test_gradient(deviations):
    fit = ordinal_models.OrdinalFit(
        ratings.WINE.ravel(), WINE_X, {"judge": JUDGE, "bottle": BOTTLE}
    )
    point = np.concatenate([[-1.0, 0.7, 1.1, 0.4, 2.0, 1.0], deviations])
    # At a standard deviation of 0 the slope is 0 by symmetry.
    checked = np.arange(8 if all(deviations) else 6)
    numeric = [
        (fit._objective(point + step)[0] - fit._objective(point - step)[0]) / 2e-4
        for step in 1e-4 * np.eye(8)[checked]
    ]
    gradient = fit._objective(point)[1]
    assert gradient[checked] == pytest.approx(numeric, rel=1e-4, abs=1e-4)
    if not all(deviations):
        assert gradient[6] == pytest.approx(0, abs=1e-9)


def test_without_random_effects_as_statsmodels():
    y, x = ratings.WINE.ravel(), WINE_X
    fit = ordinal_models.OrdinalFit(y, x, {})
    model = statsmodels_ordinal.OrderedModel(y, x, distr="logit")
    other = model.fit(method="bfgs", disp=False)
    assert fit.log_likelihood == pytest.approx(other.llf, abs=1e-5)
    assert fit.beta == pytest.approx(other.params[:2], abs=1e-3)
    errors = np.sqrt(np.diag(fit.covariance))
    assert errors == pytest.approx(other.bse[:2], rel=1e-2)


def test_crossed_effects_against_simulation():
    """Average the likelihood over draws of both effects, on a small table."""
    rng = np.random.default_rng(0)
    who, what = (codes.ravel() for codes in np.indices((4, 4)))
    y = np.clip(np.round(2 + rng.normal(size=4)[who] + rng.normal(size=16)), 1, 3)
    fit = ordinal_models.OrdinalFit(
        y, (what % 2)[:, None].astype(float), {"who": who, "what": what}
    )
    draws = 200_000
    u, v = rng.normal(size=(2, draws, 4))
    point = np.concatenate([[-0.5, 0.5, 0.3], [0.8, 0.6]])
    cuts = np.cumsum([point[0], np.exp(point[1])])
    ends = np.concatenate([[-np.inf], cuts, [np.inf]])
    logs = np.zeros(draws)
    for row in range(16):
        eta = 0.3 * (what[row] % 2) + 0.8 * u[:, who[row]] + 0.6 * v[:, what[row]]
        code = int(y[row]) - 1
        logs += np.log(
            scipy.special.expit(ends[code + 1] - eta)
            - scipy.special.expit(ends[code] - eta)
        )
    exact = np.log(np.exp(logs).mean())
    assert -fit._objective(point)[0] == pytest.approx(exact, abs=0.1)


def test_an_effect_that_runs_away_is_noticed():
    y = np.array([1, 2, 1, 2, 1, 2, 3, 3, 3, 3, 3, 3])
    x = (np.arange(12) >= 6)[:, None].astype(float)
    fit = ordinal_models.OrdinalFit(y, x, {"people": np.arange(12) % 3})
    assert not fit.converged
    assert "not " in fit.statement


def test_one_category_is_refused():
    with pytest.raises(ValueError, match="all ratings are the same"):
        ordinal_models.OrdinalFit(np.full(6, 5), np.eye(6)[:, :1], {})
