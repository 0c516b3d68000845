"""Mixtures: the segments of several sources as one sequence."""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int, Int32, UInt8

from kdjax.data.segments import Segments, as_segments
from kdjax.data.views import Segment

MAX_PERIOD = 100_000  # rows after which the shares of the sources are exact


class MixtureSegments(Segments):
    """The segments of several sources, one source after another."""

    def __init__(
        self,
        parts: Sequence[Sequence[Segment]],
        *,
        names: Sequence[str],
        weights: Sequence[float],
        views: Sequence[Sequence[int]],
    ) -> None:
        """See the class.

        Args:
          parts: segments of each source.
          names: of the sources, which stand before their examples' ids.
          weights: of the sources' rows in a batch, relative to each other.
          views: of each source, the number here of each of its views.
        """
        self.parts = [as_segments(part) for part in parts]
        self.pattern = pattern(weights)
        self._names = names
        self._views = [np.asarray(numbers, np.int32) for numbers in views]
        self.bounds = [0, *np.cumsum([len(part) for part in self.parts]).tolist()]

    def __len__(self) -> int:
        """Count the segments."""
        return self.bounds[-1]

    def read(self, index: int) -> Segment:
        """Return the segment at an index."""
        number = bisect.bisect_right(self.bounds, index) - 1
        segment = self.parts[number].read(index - self.bounds[number])
        return dataclasses.replace(
            segment,
            example_id=f"{self._names[number]}/{segment.example_id}",
            view=int(self._views[number][segment.view]),
        )

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in self.parts])

    @property
    def views(self) -> Int[np.ndarray, " N"]:
        """Return the index of the view of each segment."""
        pairs = zip(self._views, self.parts, strict=True)
        return np.concatenate([numbers[part.views] for numbers, part in pairs])

    @property
    def alternatives(self) -> Int32[np.ndarray, " N"]:
        """Return the number of the (example, view) pair of each segment."""
        columns, start = [], 0
        for part in self.parts:
            if len(part):
                columns.append(part.alternatives + start)
                start = int(columns[-1].max()) + 1
        return np.concatenate(columns)

    @property
    def keys(self) -> UInt8[np.ndarray, "N 16"]:
        """Return the content keys."""
        return self._column("keys")


def pattern(weights: Sequence[float]) -> Int[np.ndarray, " P"]:
    """Return the source of each row of a period, in which the shares are exact.

    Each row goes to the source that is furthest behind its share: 5:3:2 has a period of
    ten rows, 0 1 2 0 0 1 0 2 1 0.

    Raises:
      ValueError: the period would be too long, or weights are too large.
    """
    if not math.isfinite(sum(weights)):
        raise ValueError(
            f"mixture.weights={tuple(weights)} are too large to add: use smaller ones"
        )
    fractions = [Fraction(str(weight)) for weight in weights]
    shares = [fraction / sum(fractions) for fraction in fractions]
    period = int(np.lcm.reduce([share.denominator for share in shares]))
    if period > MAX_PERIOD:
        raise ValueError(
            f"mixture.weights={tuple(weights)}: their shares are exact in no less than "
            f"{period} rows, more than {MAX_PERIOD}: use rounder numbers"
        )
    counts = np.asarray([int(share * period) for share in shares])
    credits, rows = np.zeros(len(counts), np.int64), np.zeros(period, np.int64)
    for row in range(period):
        credits += counts
        rows[row] = credits.argmax()
        credits[rows[row]] -= period
    return rows
