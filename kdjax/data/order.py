"""Order of segments in the rows of every epoch, as a pure function of a seed.

Small data sets are shuffled and packed whole, once per epoch (`ShuffledRows`). Large
ones are dealt into windows by a permutation that is computed, not stored
(`WindowedRows`): an epoch visits the windows in a random order and shuffles within
each. The windows' packing uses lengths alone, so a window has the same number of rows
in every epoch, and no epoch has to be known to find a row of a later one. Without
shuffling there is one packing, by lengths alone (`FixedRows`).
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int

from kdjax.data import packing
from kdjax.data.permutation import permute

Rows = list[np.ndarray]  # the items of each row, int64

WHOLE_LIMIT = 2**18  # segments; more are ordered in windows
WINDOW = 65_536  # segments of a window: some 5 MB while it is in use

_WINDOW_TAG = 2  # tells these draws from others of the same seed


class Order(Protocol):
    """Rows of the epochs; not safe under threads."""

    same_rows: bool  # all epochs have the same number of rows

    def epochs(self, epoch: int, start: int, stop: int) -> list[int]:
        """Return the epoch of each of some rows: of a mixture that of its source."""

    def num_rows(self, epoch: int) -> int:
        """Return the number of rows of an epoch."""

    def rows(self, epoch: int, start: int, stop: int) -> Rows:
        """Return the items of some rows of an epoch."""


class FixedRows:
    """Rows of all items, the same in all epochs, as few as can be."""

    def __init__(
        self, lengths: Sequence[Int[np.ndarray, " N"]], limits: Sequence[int]
    ) -> None:
        """See the class.

        Args:
          lengths: of the items, an array for each kind of row that is packed together.
          limits: positions of a row of each kind.
        """
        self.same_rows = True
        self._lengths, self._limits = lengths, limits

    def epochs(self, epoch: int, start: int, stop: int) -> list[int]:
        """Return the epoch of each of some rows."""
        return [epoch] * (stop - start)

    def num_rows(self, epoch: int) -> int:
        """Return the number of rows: the same for all epochs."""
        del epoch
        return len(self._rows)

    def rows(self, epoch: int, start: int, stop: int) -> Rows:
        """Return the items of some rows."""
        del epoch
        return self._rows[start:stop]

    @functools.cached_property
    def _rows(self) -> Rows:
        items = _longest_first(self._lengths, np.arange(len(self._lengths[0])))
        if len(self._lengths) == 1:
            row_of = packing.pack_full(self._lengths[0][items], self._limits[0])
        else:
            row_of = _pack_longest_first(self._lengths, self._limits, items)
        return _by_row(items, row_of)


class ShuffledRows:
    """Rows of items that are shuffled and packed whole, epoch by epoch.

    Of alternatives an epoch takes one, each with the same chance.
    """

    def __init__(
        self,
        lengths: Sequence[Int[np.ndarray, " N"]],
        limits: Sequence[int],
        alternatives: Int[np.ndarray, " N"],
        *,
        seed: int,
    ) -> None:
        """See the class.

        Args:
          lengths: of the items, an array for each kind of row that is packed together.
          limits: positions of a row of each kind.
          alternatives: number of the group that an item belongs to, from 0.
          seed: of the order.
        """
        self._lengths, self._limits = lengths, limits
        self._alternatives, self._seed = alternatives, seed
        self.same_rows = False
        self._rows: dict[int, Rows] = {}  # of the last few epochs used

    def epochs(self, epoch: int, start: int, stop: int) -> list[int]:
        """Return the epoch of each of some rows."""
        return [epoch] * (stop - start)

    def num_rows(self, epoch: int) -> int:
        """Return the number of rows of an epoch, which is packed for it."""
        return len(self._epoch(epoch))

    def rows(self, epoch: int, start: int, stop: int) -> Rows:
        """Return the items of some rows of an epoch."""
        return self._epoch(epoch)[start:stop]

    def _epoch(self, epoch: int) -> Rows:
        if epoch not in self._rows:
            rng = np.random.default_rng([self._seed, epoch])
            places = rng.permutation(int(self._alternatives.max()) + 1)
            # Which of the alternatives says nothing of where it stands: the first
            # of several in a random order would stand early in every epoch.
            drawn = rng.permutation(np.arange(len(self._alternatives)))
            _, first = np.unique(self._alternatives[drawn], return_index=True)
            order = drawn[first][places]
            if len(self._rows) >= 3:
                del self._rows[min(self._rows)]
            self._rows[epoch] = packing.pack(self._lengths, order, self._limits)
        return self._rows[epoch]


class WindowedRows:
    """Rows of items that are shuffled and packed in windows.

    The seed deals the groups of alternatives into windows of equal size. In epoch e the
    windows come in an order drawn from (seed, e), and window w is packed from draws of
    (seed, e, w): which alternative of a group is taken, which of the items of one
    length goes where, and the order of the rows. All epochs have the same number of
    rows. A group takes the room of its longest alternative.

    Memory: 4 bytes per group, and the arrays of the last few windows.
    """

    def __init__(
        self,
        lengths: Sequence[Int[np.ndarray, " N"]],
        limits: Sequence[int],
        alternatives: Int[np.ndarray, " N"] | None,
        *,
        seed: Sequence[int],
        window: int = WINDOW,
    ) -> None:
        """See the class.

        Args:
          lengths: of the items, an array for each kind of row that is packed together.
          limits: positions of a row of each kind.
          alternatives: number of the group that an item belongs to, from 0; groups are
            runs of items. None = every item is its own group.
          seed: of the order.
          window: groups of a window, at most.

        Raises:
          ValueError: a group whose items do not follow one another.
        """
        self.same_rows = True
        self._seed = tuple(seed)
        self._limits = limits
        self._starts: np.ndarray | None = None  # of the groups; None = they are items
        self._lengths = lengths
        num_items = len(lengths[0])
        if alternatives is not None and int(alternatives.max()) + 1 < num_items:
            steps = np.diff(alternatives)
            if steps.min() < 0 or steps.max() > 1:
                raise ValueError(
                    "alternatives of one example and view are not side by side: order "
                    "the segments by example, then view"
                )
            self._starts = np.flatnonzero(np.r_[True, steps > 0])
            self._lengths = [np.maximum.reduceat(x, self._starts) for x in lengths]
            self._num_alternatives = np.diff(np.r_[self._starts, num_items])
        self._num_groups = len(self._lengths[0])
        num_windows = -(-self._num_groups // window)
        bounds = np.arange(num_windows + 1, dtype=np.int64) * self._num_groups
        self._bounds = bounds // num_windows
        self._row_of: list[np.ndarray] = []  # of each window's groups, longest first
        for number in range(num_windows):
            groups = _longest_first(self._lengths, self._groups(number))
            self._row_of.append(_pack_longest_first(self._lengths, limits, groups))
        self._window_rows = np.asarray([int(r.max()) + 1 for r in self._row_of])
        self._packed: dict[tuple[int, int], Rows] = {}  # the last few windows used

    def epochs(self, epoch: int, start: int, stop: int) -> list[int]:
        """Return the epoch of each of some rows."""
        return [epoch] * (stop - start)

    def num_rows(self, epoch: int) -> int:
        """Return the number of rows of an epoch: the same for all."""
        del epoch
        return int(self._window_rows.sum())

    def rows(self, epoch: int, start: int, stop: int) -> Rows:
        """Return the items of some rows of an epoch."""
        rng = np.random.default_rng([*self._seed, epoch])
        order = rng.permutation(len(self._window_rows))
        ends = np.cumsum(self._window_rows[order])
        rows: Rows = []
        place = int(np.searchsorted(ends, start, side="right"))
        while start < stop and place < len(order):
            begin = int(ends[place - 1]) if place else 0
            window_rows = self._window(epoch, int(order[place]))
            rows += window_rows[start - begin : stop - begin]
            start, place = int(ends[place]), place + 1
        return rows

    def _groups(self, window: int) -> np.ndarray:
        """Return the groups of a window, in the order of the seed."""
        places = np.arange(self._bounds[window], self._bounds[window + 1])
        return permute(places, self._num_groups, (*self._seed, _WINDOW_TAG))

    def _window(self, epoch: int, window: int) -> Rows:
        """Return the rows of a window in an epoch."""
        if (epoch, window) not in self._packed:
            rng = np.random.default_rng([*self._seed, epoch, window, _WINDOW_TAG])
            groups = rng.permutation(self._groups(window))
            groups = _longest_first(self._lengths, groups)
            items = groups
            if self._starts is not None:
                nums = self._num_alternatives[groups]
                drawn = (rng.random(len(groups)) * nums).astype(np.int64)
                items = self._starts[groups] + drawn
            rows = _by_row(items, self._row_of[window])
            shuffled = [rows[i] for i in rng.permutation(len(rows)).tolist()]
            if len(self._packed) >= 3:
                del self._packed[next(iter(self._packed))]
            self._packed[epoch, window] = shuffled
        return self._packed[epoch, window]


class MixedRows:
    """Rows of several sources, in a fixed pattern; each source has epochs of its own.

    The rows of a run are one sequence. Row r belongs to source `pattern[r % P]`, P rows
    being a period, and is the next row of that source's own endless order: so the
    shares are exact in every P rows, whatever the sizes of the sources. An epoch of
    the mixture is as long as the rows until each source was seen once, rounded up to
    whole batches: nothing begins anew there.
    """

    def __init__(
        self,
        orders: Sequence[WindowedRows],
        pattern: Int[np.ndarray, " P"],
        bounds: Sequence[int],
        *,
        batch_size: int,
    ) -> None:
        """See the class.

        Args:
          orders: of the sources.
          pattern: source of each row of a period.
          bounds: first item of each source.
          batch_size: rows of a batch.
        """
        self.same_rows = True
        self._orders, self._pattern, self._bounds = orders, pattern, bounds
        self._source_rows = [order.num_rows(0) for order in orders]
        self._counts = np.bincount(pattern, minlength=len(orders))
        self._before = [
            np.cumsum(pattern == s) - (pattern == s) for s in range(len(orders))
        ]
        periods = max(
            -(-rows // int(count))
            for rows, count in zip(self._source_rows, self._counts, strict=True)
        )
        self._num_rows = -(-periods * len(pattern) // batch_size) * batch_size

    def num_rows(self, epoch: int) -> int:
        """Return the number of rows of an epoch: the same for all."""
        del epoch
        return self._num_rows

    def _places(
        self, epoch: int, start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each row, and its number among those of its source."""
        rows = np.arange(start, stop, dtype=np.int64) + epoch * self._num_rows
        periods, places = np.divmod(rows, len(self._pattern))
        sources = self._pattern[places]
        before = np.stack(self._before)[sources, places]
        return sources, periods * self._counts[sources] + before

    def epochs(self, epoch: int, start: int, stop: int) -> list[int]:
        """Return the epoch of its source that each of some rows belongs to."""
        sources, numbers = self._places(epoch, start, stop)
        return (numbers // np.asarray(self._source_rows)[sources]).tolist()

    def rows(self, epoch: int, start: int, stop: int) -> Rows:
        """Return the items of some rows of an epoch."""
        sources, numbers = self._places(epoch, start, min(stop, self._num_rows))
        rows: Rows = [np.zeros(0, np.int64)] * len(sources)
        for source, order in enumerate(self._orders):
            places = np.flatnonzero(sources == source)
            done = 0
            while done < len(places):  # they follow one another in the source's order
                own, first = divmod(
                    int(numbers[places[done]]), self._source_rows[source]
                )
                last = min(first + len(places) - done, self._source_rows[source])
                for row in order.rows(own, first, last):
                    rows[places[done]] = row + self._bounds[source]
                    done += 1
        return rows


def _longest_first(
    lengths: Sequence[Int[np.ndarray, " N"]], items: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """Sort items by their lengths, descending; equal ones stay in their order."""
    keys = [-of_kind[items].astype(np.int64) for of_kind in lengths]
    return items[np.lexsort(keys[::-1])]


def _pack_longest_first(
    lengths: Sequence[Int[np.ndarray, " N"]],
    limits: Sequence[int],
    items: Int[np.ndarray, " n"],
) -> Int[np.ndarray, " n"]:
    """Return the row of each of some items, which are sorted by their lengths."""
    if len(lengths) == 1:
        return packing.pack_by_length(lengths[0][items], limits[0])
    lengths_Cn = [of_kind[items] for of_kind in lengths]
    row_of = np.zeros(len(items), np.int32)
    for row, packed in enumerate(
        packing.pack(lengths_Cn, np.arange(len(items)), limits)
    ):
        row_of[packed] = row
    return row_of


def _by_row(items: Int[np.ndarray, " n"], row_of: Int[np.ndarray, " n"]) -> Rows:
    """Group items by their row; those of one row stay in their order."""
    sorted_items = items[np.argsort(row_of, kind="stable")].astype(np.int64)
    bounds = [0, *np.cumsum(np.bincount(row_of)).tolist()]
    return [sorted_items[a:b] for a, b in itertools.pairwise(bounds)]
