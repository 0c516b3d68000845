"""Stratified draws from the teacher's distribution.

The n draws of a token at one temperature are stratified: draw i is the id at
(i + U_i) / n of the cumulative distribution, U_i uniform in [0, 1). The expected count
of an id is n p, as for independent draws, so loss and gradient are unbiased; the
variance of any sum over the draws is that within the strata alone, never larger.

Shapes: T target tokens, S temperatures, R rounds, n draws of a round.
Source: unbiased estimate: Anshumann et al., 2025, Sparse Logit Sampling, arXiv
2503.16870, section 3; strata: Cochran, 1977, Sampling Techniques, chapter 5.
"""

import hashlib

import numpy as np
from jaxtyping import Float32, Int32


def stratified_uniforms(
    key: bytes, num_tokens: int, num_temperatures: int, num_rounds: int, num_draws: int
) -> Float32[np.ndarray, "T S R n"]:
    """Return ascending uniforms in [0, 1) for inverse-CDF sampling of one record.

    A function of the record's content key alone: neither packing, nor the order of
    examples, nor the number of processes changes what is drawn.
    """
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")
    generator = np.random.Generator(np.random.Philox(seed))
    shape = (num_tokens, num_temperatures, num_rounds, num_draws)
    strata = np.arange(num_draws) + generator.random(shape)
    return np.minimum(strata / num_draws, np.float32(1 - 2**-24)).astype(np.float32)


def count_draws(
    ids: Int32[np.ndarray, "T S R n"],
) -> tuple[Int32[np.ndarray, "T S R n"], Int32[np.ndarray, "T S R n"]]:
    """Count draws: distinct ids by descending count (-1 in unused slots), and counts.

    Args:
      ids: the draws, ascending along the last axis.
    """
    num_draws = ids.shape[-1]
    rows = ids.reshape(-1, num_draws)
    starts = np.diff(rows, axis=1, prepend=-1) != 0
    slots = starts.cumsum(axis=1) - 1
    lines = np.arange(len(rows))[:, None]
    counts = np.zeros(rows.shape, np.int32)
    np.add.at(counts, (lines, slots), 1)
    distinct = np.full(rows.shape, -1, np.int32)
    distinct[np.broadcast_to(lines, rows.shape)[starts], slots[starts]] = rows[starts]
    order = np.argsort(-counts, axis=1, kind="stable")
    return (
        np.take_along_axis(distinct, order, axis=1).reshape(ids.shape),
        np.take_along_axis(counts, order, axis=1).reshape(ids.shape),
    )
