"""Metrics as (sum, count) pairs, so that nothing depends on how a batch was cut.

Pairs add over microbatches, devices, steps and hosts, and are divided once, at the
end: a mean of means would weight a short microbatch like a long one.

Shapes: N tokens or examples, M microbatches, B bins.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Pair = tuple[Float[Array, ""], Float[Array, ""]]
Tree = TypeVar("Tree")  # a pair, a dict of pairs, Bins, or any nesting of them


class Bins(NamedTuple):
    """Per-bin sums of a reliability diagram; bins of equal width on (0, 1].

    Two of them add field by field (`add`).
    """

    counts_B: Float[Array, "B"]
    confidences_B: Float[Array, "B"]  # sum of confidences
    corrects_B: Float[Array, "B"]  # number of correct predictions


def pair(
    values: Float[Array, "..."], *, where: Bool[Array, "..."] | None = None
) -> Pair:
    """Return the float32 sum of `values` and how many there are.

    Args:
        values: any shape, any unit.
        where: same shape; False entries are left out, whatever they hold.
    """
    values = jnp.asarray(values, jnp.float32)
    if where is None:
        return values.sum(), jnp.float32(values.size)
    where = jnp.broadcast_to(where, values.shape)
    return jnp.sum(values, where=where), jnp.sum(where, dtype=jnp.float32)


def add(first: Tree, second: Tree) -> Tree:
    """Add two trees of the same structure, leaf by leaf."""
    return jax.tree.map(lambda a, b: a + b, first, second)


def merge(*dicts: Mapping[str, Pair]) -> dict[str, Pair]:
    """Add dicts of pairs by name; a name may be missing from some of them."""
    merged: dict[str, Pair] = {}
    for pairs in dicts:
        for name, (total, count) in pairs.items():
            total_so_far, count_so_far = merged.get(name, (0.0, 0.0))
            merged[name] = (total_so_far + total, count_so_far + count)
    return merged


def merge_microbatches(stacked: Tree) -> Tree:
    """Sum over the leading axis M of every leaf (the stacked outputs of a scan)."""
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), stacked)


def finalize(pairs: Mapping[str, Pair]) -> dict[str, float]:
    """Return name -> sum / count as Python floats; 0.0 where the count is 0."""
    host = jax.device_get(dict(pairs))
    return {
        name: float(total) / float(count) if count else 0.0
        for name, (total, count) in host.items()
    }


def ece(
    confidence_N: Float[Array, "N"],
    correct_N: Bool[Array, "N"],
    num_bins: int,
    *,
    where: Bool[Array, "N"] | None = None,
) -> Bins:
    """Return the bins of the expected calibration error.

    Confidence c falls in bin ceil(c * num_bins) - 1, so bin b covers
    (b / num_bins, (b + 1) / num_bins], and 0 falls in the first one.

    Args:
        confidence_N: probability given to the prediction, in [0, 1].
        correct_N: whether the prediction was right.
        num_bins: number of bins B.
        where: False entries are left out.

    Source: Guo et al., 2017, arXiv 1706.04599, section 2.
    """
    confidence_N = jnp.asarray(confidence_N, jnp.float32)
    bin_N = jnp.clip(jnp.ceil(confidence_N * num_bins) - 1, 0, num_bins - 1)
    weight_N = jnp.ones_like(confidence_N)
    if where is not None:
        weight_N = jnp.where(where, weight_N, 0.0)
        confidence_N = jnp.where(where, confidence_N, 0.0)
        bin_N = jnp.where(where, bin_N, 0)
    columns_N3 = jnp.stack(
        [weight_N, confidence_N, jnp.asarray(correct_N, jnp.float32) * weight_N], axis=1
    )
    sums_B3 = jax.ops.segment_sum(
        columns_N3, bin_N.astype(jnp.int32), num_segments=num_bins
    )
    return Bins(sums_B3[:, 0], sums_B3[:, 1], sums_B3[:, 2])


def finalize_ece(bins: Bins) -> float:
    """Return the expected calibration error, in [0, 1]; 0.0 without predictions.

    ECE = sum_b (n_b / n) |accuracy_b - mean confidence_b|
        = sum_b |corrects_b - confidences_b| / n
    """
    counts_B, confidences_B, corrects_B = jax.device_get(bins)
    total = float(counts_B.sum())
    return float(abs(corrects_B - confidences_B).sum()) / total if total else 0.0
