"""Sequences of segments with their columns as arrays.

Order, packing and weights need lengths and views of all segments, but the tokens of
those of one batch alone: a prepared store has the former as columns and reads the
latter when they are used.
"""

import abc
from collections.abc import Callable, Iterator, Sequence
from typing import overload

import numpy as np
from jaxtyping import Int, Int32, UInt8

from kdjax.data.views import Segment


class Segments(Sequence[Segment]):
    """A sequence of segments; each property is an array with an item per segment."""

    @property
    @abc.abstractmethod
    def views(self) -> Int[np.ndarray, " N"]:
        """Return the index of the view of each segment."""

    @property
    def prompt_lengths(self) -> Int32[np.ndarray, " N"]:
        """Return the tokens of each prompt."""
        return self._column("prompt_lengths")

    @property
    def prefix_lengths(self) -> Int32[np.ndarray, " N"]:
        """Return the tokens of each prefix."""
        return self._column("prefix_lengths")

    @property
    def target_lengths(self) -> Int32[np.ndarray, " N"]:
        """Return the tokens of each target."""
        return self._column("target_lengths")

    @property
    def loss_lengths(self) -> Int32[np.ndarray, " N"]:
        """Return the tokens of each target that are in the loss."""
        return self._column("loss_lengths")

    @property
    def prompt_ends(self) -> Int32[np.ndarray, " N"]:
        """Return the last token of each prompt; -1 where it is empty."""
        return self._column("prompt_ends")

    @property
    @abc.abstractmethod
    def alternatives(self) -> Int32[np.ndarray, " N"]:
        """Return the number of the (example, view) pair of each segment.

        Pairs count from 0 in the order in which they first come. Segments of one pair
        are alternatives.
        """

    @property
    @abc.abstractmethod
    def keys(self) -> UInt8[np.ndarray, "N 16"]:
        """Return the content keys."""

    @abc.abstractmethod
    def _column(self, name: str) -> np.ndarray:
        """Return a column whose values are those of the segments alone."""

    @abc.abstractmethod
    def read(self, index: int) -> Segment:
        """Return the segment at an index from 0 to len - 1."""

    @overload
    def __getitem__(self, index: int) -> Segment: ...

    @overload
    def __getitem__(self, index: slice) -> list[Segment]: ...

    def __getitem__(self, index: int | slice) -> Segment | list[Segment]:
        """Return one segment, or those of a slice as a list."""
        if isinstance(index, slice):
            return [self.read(i) for i in range(*index.indices(len(self)))]
        number = int(index)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"index={index} of {len(self)} segments")
        return self.read(number)

    def __iter__(self) -> Iterator[Segment]:
        """Iterate over the segments, made one at a time."""
        return map(self.read, range(len(self)))


# Column -> its value of a segment.
_COLUMNS: dict[str, Callable[[Segment], int]] = {
    "prompt_lengths": lambda s: len(s.prompt_ids),
    "prefix_lengths": lambda s: len(s.prefix_ids),
    "target_lengths": lambda s: len(s.target_ids),
    "loss_lengths": lambda s: s.num_loss_tokens,
    "prompt_ends": lambda s: int(s.prompt_ids[-1]) if len(s.prompt_ids) else -1,
}


class SegmentList(Segments):
    """Segments in memory."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        """Wrap a list, which is not copied."""
        self._segments = segments

    def __len__(self) -> int:
        """Count the segments."""
        return len(self._segments)

    def read(self, index: int) -> Segment:
        """Return the segment at an index."""
        return self._segments[index]

    def _column(self, name: str) -> np.ndarray:
        return self._integers(map(_COLUMNS[name], self._segments))

    def _integers(self, values: Iterator[int]) -> np.ndarray:
        return np.fromiter(values, np.int32, len(self))

    @property
    def views(self) -> Int[np.ndarray, " N"]:
        """Return the index of the view of each segment."""
        return self._integers(s.view for s in self._segments)

    @property
    def alternatives(self) -> Int32[np.ndarray, " N"]:
        """Return the number of the (example, view) pair of each segment."""
        numbers: dict[tuple[str, int], int] = {}
        return self._integers(
            numbers.setdefault((s.example_id, s.view), len(numbers))
            for s in self._segments
        )

    @property
    def keys(self) -> UInt8[np.ndarray, "N 16"]:
        """Return the content keys."""
        content = b"".join(s.key for s in self._segments)
        return np.frombuffer(content, np.uint8).reshape(len(self), 16)


def as_segments(segments: Sequence[Segment]) -> Segments:
    """Return segments with columns; a list is wrapped."""
    return segments if isinstance(segments, Segments) else SegmentList(segments)
