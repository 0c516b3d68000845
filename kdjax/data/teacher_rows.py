"""The teacher's part of a batch: records of the cache, laid out beside the tokens.

Shapes: T row length, K stored pairs (sampled: draws a round), t target tokens.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from kdjax.data.views import Segment

Batch = dict[str, np.ndarray]


class TeacherRows:
    """Writes records of one cache, at one temperature, into the arrays of a batch."""

    def __init__(self, cache: Any, temperature: float, epoch: int) -> None:
        """Take the column of `temperature`, and of a sampled cache one round of draws.

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

    def empty(self, lead: tuple[int, int]) -> Batch:
        """Arrays without any record; see `loader.make_batch`."""
        cache = self._cache
        teacher: Batch = {
            "teacher_log_probs": np.full((*lead, cache.k), -np.inf, np.float32),
            "teacher_log_z": np.zeros(lead, np.float32),
        }
        if cache.kind != "dense":
            teacher["teacher_ids"] = np.full((*lead, cache.k), -1, np.int32)
        if cache.kind == "sampled":
            teacher["teacher_entropy"] = np.zeros(lead, np.float32)
        return teacher

    def write(self, batch: Batch, row: int, target: slice, segment: Segment) -> None:
        """Row i of the record goes to the position that predicts target token i.

        Raises:
          ValueError: no record, or one of other tokens.
        """
        if not self._cache.has(segment.key):
            raise missing(segment, 1)
        record = self._cache.read(segment.key)
        if not np.array_equal(record.target_ids, segment.target_ids):
            raise ValueError(
                f"example {segment.example_id!r}: its record is of {record.num_tokens} "
                f"target tokens, not these {len(segment.target_ids)}: verify the cache"
            )
        batch["teacher_log_z"][row, target] = record.log_z[:, self._column]
        ids, log_probs = record.ids, record.log_probs
        if record.kind == "sampled":
            chosen = (slice(None), self._column, self._epoch % record.ids.shape[2])
            ids = record.ids[chosen]
            with np.errstate(divide="ignore"):
                log_probs = np.log(record.counts[chosen] / np.float32(self._cache.k))
            batch["teacher_entropy"][row, target] = record.entropy[:, self._column]
        stored = slice(0, log_probs.shape[-1])
        batch["teacher_log_probs"][row, target, stored] = log_probs
        if record.kind != "dense":
            batch["teacher_ids"][row, target, stored] = ids


def check_cache(
    segments: Sequence[Segment], cache: Any, views: Collection[int]
) -> None:
    """Checks that the cache has a record for every segment of the given views.

    Raises:
      ValueError: naming the first example without one.
    """
    absent = [s for s in segments if s.view in views and not cache.has(s.key)]
    if absent:
        raise missing(absent[0], len(absent))


def missing(segment: Segment, count: int) -> ValueError:
    """The error for examples without a record."""
    return ValueError(
        f"example {segment.example_id!r}, view {segment.view}: the teacher cache has "
        f"no record of it ({count} such in all): label the same data with the same "
        "tokenizer and length limits, or name the cache that belongs to them"
    )
