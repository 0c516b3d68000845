"""Records of the teacher cache, laid out beside the tokens of a batch.

Shapes: T row length, K stored pairs (sampled: draws per round), t target tokens.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from kdjax.data.batch import TeacherRecords
from kdjax.data.segments import as_segments
from kdjax.data.views import Segment


class RecordWriter:
    """Writer of the records of one cache, at one temperature, into batches."""

    def __init__(self, cache: Any, temperature: float, epoch: int) -> None:
        """Select the column of `temperature` and, of a sampled cache, a round of draws.

        Epoch e uses round e modulo the number of rounds.

        Raises:
          ValueError: a temperature that was not declared when labelling.
        """
        if temperature not in cache.temperatures:
            raise ValueError(
                f"temperature={temperature} was not declared when labelling: the cache "
                f"has {tuple(cache.temperatures)}; use one of them or label again"
            )
        self._cache = cache
        self._column = tuple(cache.temperatures).index(temperature)
        self._epoch = epoch

    def write(
        self,
        rows: TeacherRecords,
        row: int,
        target: slice | Int64[np.ndarray, " l"],
        segment: Segment,
    ) -> None:
        """Write row i of a record to the position that predicts the i-th loss token.

        Args:
          rows: arrays [rows, T, ...] that are written to.
          row: which row.
          target: positions that predict the segment's tokens in the loss.
          segment: whose record is read.

        Raises:
          ValueError: no record, or one of other tokens.
        """
        if not self._cache.has(segment.key):
            raise missing(segment, 1)
        record = self._cache.read(segment.key)
        if not np.array_equal(record.target_ids, segment.loss_ids):
            raise ValueError(
                f"example {segment.example_id!r}: its record is of {record.num_tokens} "
                f"target tokens, not these {segment.num_loss_tokens}: verify the cache"
            )
        rows.log_z[row, target] = record.log_z[:, self._column]
        ids, log_probs = record.ids, record.log_probs
        if rows.entropy is not None:
            drawn = (slice(None), self._column, self._epoch % record.ids.shape[2])
            ids = record.ids[drawn]
            with np.errstate(divide="ignore"):
                log_probs = np.log(record.counts[drawn] / np.float32(self._cache.k))
            rows.entropy[row, target] = record.entropy[:, self._column]
        stored = slice(0, log_probs.shape[-1])
        rows.log_probs[row, target, stored] = log_probs
        if rows.ids is not None:
            rows.ids[row, target, stored] = ids


def check_cache(
    segments: Sequence[Segment], cache: Any, views: Collection[int]
) -> None:
    """Check that the cache has a record for every segment of the given views.

    Raises:
      ValueError: naming the first example without one.
    """
    table = as_segments(segments)
    is_absent = np.isin(table.views, list(views)) & ~cache.contains(table.keys)
    if is_absent.any():
        raise missing(table[int(is_absent.argmax())], int(is_absent.sum()))


def missing(segment: Segment, count: int) -> ValueError:
    """Return the error for examples without a record."""
    return ValueError(
        f"example {segment.example_id!r}, view {segment.view}: the teacher cache has "
        f"no record of it ({count} such in all): label the same data with the same "
        "tokenizer and length limits, or name the cache that belongs to them"
    )
