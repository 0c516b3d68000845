"""Calibration: reliability bins and the expected calibration error.

Shapes: N examples, B bins.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Bins(NamedTuple):
    """Per-bin sums of a reliability diagram; bins of equal width on (0, 1]."""

    counts_B: Float[Array, "B"]
    confidences_B: Float[Array, "B"]  # sum of confidences
    corrects_B: Float[Array, "B"]  # number of correct predictions


def reliability_bins(
    confidence_N: Float[Array, "N"],
    correct_N: Bool[Array, "N"],
    num_bins: int,
) -> Bins:
    """Return the bins of a reliability diagram.

    Confidence c falls in bin ceil(c * num_bins) - 1, so bin b covers
    (b / num_bins, (b + 1) / num_bins], and 0 falls in the first one.

    Args:
      confidence_N: probability given to the prediction, in [0, 1].
      correct_N: True where the prediction was right.
      num_bins: number of bins B.

    Source: Guo et al., 2017, arXiv 1706.04599, section 2.
    """
    confidence_N = jnp.asarray(confidence_N, jnp.float32)
    bin_N = jnp.clip(jnp.ceil(confidence_N * num_bins) - 1, 0, num_bins - 1)
    ones_N = jnp.ones_like(confidence_N)
    correct_N = jnp.asarray(correct_N, jnp.float32)
    columns_N3 = jnp.stack([ones_N, confidence_N, correct_N], axis=1)
    sums_B3 = jax.ops.segment_sum(
        columns_N3, bin_N.astype(jnp.int32), num_segments=num_bins
    )
    return Bins(sums_B3[:, 0], sums_B3[:, 1], sums_B3[:, 2])


def expected_calibration_error(bins: Bins) -> float:
    """Return the expected calibration error, in [0, 1]; 0.0 without predictions.

    ECE = sum_b (n_b / n) |accuracy_b - mean confidence_b|
        = sum_b |corrects_b - confidences_b| / n
    """
    counts_B, confidences_B, corrects_B = jax.device_get(bins)
    total = float(counts_B.sum())
    return float(abs(corrects_B - confidences_B).sum()) / total if total else 0.0
