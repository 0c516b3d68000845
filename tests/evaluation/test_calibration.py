"""The expected calibration error against NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.evaluation import calibration


def _oracle_ece(confidence_N, correct_N, num_bins):
    edges = np.linspace(0, 1, num_bins + 1)
    error = 0.0
    for low, high in itertools.pairwise(edges):
        inside_N = (confidence_N > low) & (confidence_N <= high)
        if inside_N.any():
            gap = correct_N[inside_N].mean() - confidence_N[inside_N].mean()
            error += inside_N.mean() * abs(gap)
    return error


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_ece_against_numpy(num_bins):
    rng = np.random.default_rng(0)
    confidence_N = rng.uniform(0.01, 1, 500).astype(np.float32)
    correct_N = rng.uniform(size=500) < confidence_N**2
    bins = calibration.reliability_bins(confidence_N, correct_N, num_bins)
    expected = _oracle_ece(confidence_N.astype(np.float64), correct_N, num_bins)
    assert calibration.expected_calibration_error(bins) == pytest.approx(
        expected, abs=1e-5
    )


def test_ece_at_the_ends_of_the_scale():
    confidence_N = jnp.array([0.0, 1.0])
    bins = calibration.reliability_bins(confidence_N, jnp.array([False, True]), 4)
    np.testing.assert_array_equal(bins.counts_B, [1, 0, 0, 1])
    assert calibration.expected_calibration_error(bins) == 0.0
    assert (
        calibration.expected_calibration_error(jax.tree.map(jnp.zeros_like, bins))
        == 0.0
    )
