"""Sums and counts: what is divided once does not depend on how a batch was cut."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.evaluation import calibration


def test_uneven_microbatches_give_the_mean_of_the_whole():
    values_N = np.arange(10.0, dtype=np.float32)
    parts = [
        {"loss": calibration.pair(values_N[:2])},
        {"loss": calibration.pair(values_N[2:])},
    ]
    assert calibration.finalize(calibration.merge(*parts)) == {
        "loss": pytest.approx(4.5)
    }
    assert calibration.finalize(calibration.add(*parts)) == {"loss": pytest.approx(4.5)}


def test_scan_outputs_merge_over_the_leading_axis():
    def body(carry, values_N):
        return carry, {"kl": calibration.pair(values_N, where=values_N > 0)}

    values_MN = jnp.array([[1.0, 2.0], [-1.0, 6.0]])
    _, stacked = jax.jit(lambda x: jax.lax.scan(body, 0, x))(values_MN)
    merged = calibration.merge_microbatches(stacked)
    assert calibration.finalize(merged) == {"kl": pytest.approx(3.0)}


def test_where_hides_whatever_an_entry_holds():
    total, count = calibration.pair(
        jnp.array([1.0, jnp.nan]), where=jnp.array([True, False])
    )
    assert (float(total), float(count)) == (1.0, 1.0)


def test_nothing_counted_is_zero_not_nan():
    none = calibration.pair(jnp.ones(3), where=jnp.zeros(3, bool))
    assert calibration.finalize({"kl": none}) == {"kl": 0.0}


def test_merge_takes_names_that_one_side_lacks():
    merged = calibration.merge({"a": calibration.pair(jnp.ones(2))}, {"b": (3.0, 2.0)})
    assert calibration.finalize(merged) == {"a": 1.0, "b": 1.5}


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
    whole = calibration.ece(confidence_N, correct_N, num_bins)
    halves = calibration.add(
        calibration.ece(confidence_N[:77], correct_N[:77], num_bins),
        calibration.ece(confidence_N[77:], correct_N[77:], num_bins),
    )
    expected = _oracle_ece(confidence_N.astype(np.float64), correct_N, num_bins)
    assert calibration.finalize_ece(whole) == pytest.approx(expected, abs=1e-5)
    assert calibration.finalize_ece(halves) == pytest.approx(expected, abs=1e-5)


def test_ece_at_the_ends_of_the_scale_and_with_a_mask():
    confidence_N = jnp.array([0.0, 1.0, jnp.nan])
    bins = calibration.ece(
        confidence_N,
        jnp.array([False, True, True]),
        4,
        where=jnp.array([True, True, False]),
    )
    np.testing.assert_array_equal(bins.counts_B, [1, 0, 0, 1])
    assert calibration.finalize_ece(bins) == 0.0
    assert calibration.finalize_ece(jax.tree.map(jnp.zeros_like, bins)) == 0.0
