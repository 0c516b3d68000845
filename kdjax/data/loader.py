"""Batches as a pure function of (segments, seed, step), made ahead by threads.

Which segments make up step s is computed, never remembered: the packing plan of an
epoch follows from the lengths and (seed, epoch). Resuming needs one integer and works
on another number of hosts.

Students that only decode read prompt and target in one row. Those with an encoder read
the prompt there: a segment then lies in two rows of the same number, side by side. What
a segment has before its target (a wrong rationale, say) is read in the target's row.

Shapes: M microbatches, R rows of a microbatch (those of one host), T row length,
S length of the encoder's row, K stored pairs, t target tokens of a segment.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Int, Int32, Int64

from kdjax.data import order
from kdjax.data.batch import Batch, BatchSpec
from kdjax.data.mixture import MixtureSegments
from kdjax.data.segments import Segments, as_segments
from kdjax.data.teacher_records import RecordWriter
from kdjax.data.views import Segment

_DROPOUT = 1  # tells these draws from those of the order


class BatchPlan:
    """Assignment of segments to the rows of every step.

    Epoch e packs the segments in an order drawn from (seed, e); its rows, in order,
    are cut into batches. The last batch of an epoch is filled up with empty rows.
    Segments of one example and view are alternatives: an epoch takes one of them, each
    with the same chance (without shuffling it takes all).
    An epoch is packed when its first step is read, or, where there are many segments,
    window by window (`order.WindowedRows`). Safe to use from several threads.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        *,
        batch_size: int,
        row_length: int,
        num_microbatches: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        window: int = 0,
        encoder_length: int = 0,
        start_id: int = 0,
        end_id: int = 0,
    ) -> None:
        """See the class.

        Args:
          segments: at least one, none longer than a row.
          batch_size: packed rows per step over all hosts and microbatches.
          row_length: input positions per row; with an encoder, of the decoder.
          num_microbatches: divides `batch_size`.
          seed: of the order.
          shuffle: False packs once, the longest first (evaluation, labelling).
          window: segments that are shuffled and packed together; 0 = all, or
            `order.WINDOW` where there are more than `order.WHOLE_LIMIT`.
          encoder_length: positions per row of the encoder; 0 = there is none.
          start_id: with an encoder, what the decoder reads first.
          end_id: with an encoder, what ends each prompt.

        Raises:
          ValueError: nothing to plan, a segment too long, or sizes that do not divide.
        """
        if not len(segments):
            raise ValueError("segments is empty: there is nothing to make batches of")
        if batch_size < 1 or num_microbatches < 1 or batch_size % num_microbatches:
            raise ValueError(
                f"batch_size={batch_size} does not divide into num_microbatches="
                f"{num_microbatches}: use a multiple of it"
            )
        self.segments = table = as_segments(segments)
        self.batch_size = batch_size
        self.row_length = row_length
        self.num_microbatches = num_microbatches
        self.seed = seed
        self.shuffle = shuffle
        self.encoder_length = encoder_length
        self._start_1 = np.asarray([start_id], np.int32)
        self._end_id = end_id
        self.views, self.loss_lengths = table.views, table.loss_lengths
        # Every token but the last one is read.
        self.lengths = table.prefix_lengths + table.target_lengths - 1
        self.lengths += 1 if encoder_length else table.prompt_lengths
        limits = {"row_length": (self.lengths, row_length)}
        if encoder_length:
            ends = table.prompt_ends != end_id
            limits["encoder_length"] = (table.prompt_lengths + ends, encoder_length)
        for name, (lengths, limit) in limits.items():
            longest = int(lengths.argmax())
            if lengths[longest] > limit:
                raise ValueError(
                    f"example {table[longest].example_id!r} takes "
                    f"{lengths[longest]} positions, {name}={limit}: use "
                    f"{name} >= {lengths[longest]}, or a smaller max_prompt or "
                    "max_target with on_long='truncate' or 'drop'"
                )
        self._lock = threading.Lock()
        self._ends: list[int] = []  # steps up to the end of each epoch
        self._order = _make_order(
            [lengths for lengths, _ in limits.values()],
            [limit for _, limit in limits.values()],
            table,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            window=window,
        )

    def before_target(self, segment: Segment) -> Int32[np.ndarray, " p"]:
        """Return the tokens before the target in its row."""
        start = self._start_1 if self.encoder_length else segment.prompt_ids
        return np.concatenate([start, segment.prefix_ids])

    def encoder_ids(self, segment: Segment) -> Int32[np.ndarray, " p"]:
        """Return the row of the encoder: the prompt and the end token."""
        ids = with_end(segment.prompt_ids.tolist(), self._end_id)
        return np.asarray(ids, np.int32)

    def steps_per_epoch(self, epoch: int) -> int:
        """Count the batches of an epoch; it may differ by one or so between epochs."""
        with self._lock:
            return self._steps(epoch)

    def packing_efficiency(self) -> float:
        """Return the share of positions that segments take, in the first epoch.

        Of the first `order.WINDOW` rows of a large data set.
        """
        with self._lock:
            num_rows = min(self._order.num_rows(0), order.WINDOW)
            rows = self._order.rows(0, 0, num_rows)
        items = np.concatenate(rows)
        return float(self.lengths[items].sum() / (num_rows * self.row_length))

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, and the batch's index in it."""
        with self._lock:
            return self._locate(step)

    def batch(self, step: int) -> list[np.ndarray]:
        """Return the indices of the segments in each row of a step."""
        with self._lock:
            epoch, index = self._locate(step)
            start = index * self.batch_size
            rows = self._order.rows(epoch, start, start + self.batch_size)
        empty = np.zeros(0, np.int64)
        return rows + [empty] * (self.batch_size - len(rows))

    def epochs(self, step: int) -> list[int]:
        """Return the epoch of each row of a step: of a mixture that of its source."""
        with self._lock:
            epoch, index = self._locate(step)
            start = index * self.batch_size
            return self._order.epochs(epoch, start, start + self.batch_size)

    def _locate(self, step: int) -> tuple[int, int]:
        if step < 0:
            raise ValueError(f"step={step}: steps count from 0")
        if self._order.same_rows:
            return divmod(step, self._steps(0))
        while not self._ends or self._ends[-1] <= step:
            done = self._ends[-1] if self._ends else 0
            self._ends.append(done + self._steps(len(self._ends)))
        epoch = int(np.searchsorted(self._ends, step, side="right"))
        return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    def _steps(self, epoch: int) -> int:
        return -(-self._order.num_rows(epoch) // self.batch_size)


def _make_order(
    lengths: Sequence[Int[np.ndarray, " N"]],
    limits: Sequence[int],
    segments: Segments,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    window: int,
) -> order.Order:
    """Choose between one packing, epochs of all, windows, and those of each source."""
    if not shuffle:
        return order.FixedRows(lengths, limits)
    if isinstance(segments, MixtureSegments):
        orders = []
        for number, part in enumerate(segments.parts):
            own = slice(segments.bounds[number], segments.bounds[number + 1])
            orders.append(
                order.WindowedRows(
                    [of_kind[own] for of_kind in lengths],
                    limits,
                    part.alternatives,
                    seed=(seed, number),
                    window=window or order.WINDOW,
                )
            )
        return order.MixedRows(
            orders, segments.pattern, segments.bounds, batch_size=batch_size
        )
    if window or len(segments) > order.WHOLE_LIMIT:
        return order.WindowedRows(
            lengths,
            limits,
            segments.alternatives,
            seed=(seed,),
            window=window or order.WINDOW,
        )
    return order.ShuffledRows(lengths, limits, segments.alternatives, seed=seed)


def with_end(prompt_ids: Sequence[int], end_id: int) -> list[int]:
    """Return a prompt for an encoder: with its end token, once."""
    ends = len(prompt_ids) and prompt_ids[-1] == end_id
    return [*prompt_ids] if ends else [*prompt_ids, end_id]


class SegmentSpan(NamedTuple):
    """The positions of a segment in its row."""

    item: int  # index into the plan's segments
    segment: Segment
    inputs: slice  # its input positions
    target: slice  # those that predict its target tokens, from the prompt's last on
    # those of them whose token is in the loss; all of `target` without a mask
    loss: slice | Int64[np.ndarray, " l"]
    prompt: slice  # its positions in the encoder's row; empty without one


def segment_spans(plan: BatchPlan, items: Iterable[int]) -> Iterator[SegmentSpan]:
    """Yield the spans of a row of `BatchPlan.batch`: segments follow one another."""
    start = prompt_start = 0
    for item in items:
        segment = plan.segments[item]
        stop = start + int(plan.lengths[item])
        first = stop - len(segment.target_ids)
        prompt_stop = prompt_start
        if plan.encoder_length:
            prompt_stop += len(plan.encoder_ids(segment))
        mask = segment.loss_mask
        yield SegmentSpan(
            int(item),
            segment,
            slice(start, stop),
            slice(first, stop),
            slice(first, stop) if mask is None else first + np.flatnonzero(mask),
            slice(prompt_start, prompt_stop),
        )
        start, prompt_start = stop, prompt_stop


def make_batch(
    plan: BatchPlan,
    step: int,
    *,
    terms: Sequence[Any],
    cache: Any = None,
    temperature: float = 1.0,
    rows: slice = slice(None),
    online: bool = False,
    dropout: bool = False,
) -> Batch:
    """Make the arrays of one step.

    A token's weight is the sum over the terms of its view and kind of
    `term.weight / count`, count being the view's tokens in the loss in the whole
    global batch: known from the lengths, so that the loss is one plain sum however the
    batch is cut. It is multiplied by its segment's weight, which the count leaves out:
    0.5 halves what a segment adds to the loss, whatever it shares the batch with.

    Args:
      plan: the batches.
      step: index of the step, from 0.
      terms: with fields view, kind ("hard", "soft" or others) and weight.
      cache: the teacher's records, for the views with a soft term.
      temperature: of the soft terms; one that the cache declares.
      rows: the rows of each microbatch to make (this host's).
      online: the teacher runs beside the student: soft terms need no cache.
      dropout: the model has dropout, and is trained.

    Returns:
      The batch, in NumPy. Keys for dropout follow from (seed, step, row).

    Raises:
      ValueError: a soft term without a cache, an undeclared temperature, a missing
        record, or one that does not fit its segment.
    """
    contents = plan.batch(step)
    weights = _weights(plan, contents, terms)
    soft_views = _soft_views(terms)
    if soft_views and cache is None and not online:
        raise ValueError(
            "soft terms need a teacher cache: label the data first, or use "
            "method.soft_weight=0, or teacher.online=True"
        )
    shape = (plan.num_microbatches, plan.batch_size // plan.num_microbatches)
    local = np.arange(plan.batch_size).reshape(shape)[:, rows]
    batch = BatchSpec(
        num_microbatches=local.shape[0],
        num_rows=local.shape[1],
        row_length=plan.row_length,
        encoder_length=plan.encoder_length,
        weight_kinds=tuple(weights),
        dropout=dropout,
        teacher_kind=None if cache is None else cache.kind,
        num_pairs=0 if cache is None else cache.k,
    ).empty()
    flat = jax.tree.map(lambda x: x.reshape(local.size, *x.shape[2:]), batch)  # views
    if dropout:
        keys = np.random.default_rng([plan.seed, step, _DROPOUT])
        drawn = keys.integers(2**32, size=(plan.batch_size, 2), dtype=np.uint32)
        flat.dropout_keys[:] = drawn[local.ravel()]
    epochs = plan.epochs(step)
    records = {
        epoch: RecordWriter(cache, temperature, epoch)
        for epoch in ({} if cache is None else dict.fromkeys(epochs))
    }
    for row, index in enumerate(local.ravel()):
        for number, span in enumerate(segment_spans(plan, contents[index]), 1):
            _write(flat, row, number, span, weights, plan)
            if cache is not None and span.segment.view in soft_views:
                records[epochs[index]].write(flat.teacher, row, span.loss, span.segment)
    return batch


def _soft_views(terms: Sequence[Any]) -> set[int]:
    return {term.view for term in terms if term.kind == "soft" and term.weight}


def _weights(
    plan: BatchPlan, contents: list[np.ndarray], terms: Sequence[Any]
) -> dict[str, dict[int, float]]:
    """Return the weight of one target token, by kind, then view."""
    items = np.concatenate(contents)
    kinds = dict.fromkeys(["hard", "soft", *(term.kind for term in terms)])
    weights: dict[str, dict[int, float]] = {kind: {} for kind in kinds}
    for term in terms:
        count = int(plan.loss_lengths[items[plan.views[items] == term.view]].sum())
        if count:
            of_view = weights[term.kind]
            of_view[term.view] = of_view.get(term.view, 0.0) + term.weight / count
    return weights


def _write(
    batch: Batch,
    row: int,
    number: int,
    span: SegmentSpan,
    weights: dict[str, dict[int, float]],
    plan: BatchPlan,
) -> None:
    """Write a segment into one row of a batch with leading axes [rows, T]."""
    segment, inputs = span.segment, span.inputs
    ids = np.concatenate([plan.before_target(segment), segment.target_ids])
    batch.tokens[row, inputs] = ids[:-1]
    batch.targets[row, inputs] = ids[1:]
    batch.positions[row, inputs] = np.arange(len(ids) - 1)
    batch.segments[row, inputs] = number
    if batch.encoder is not None:
        prompt_p = plan.encoder_ids(segment)
        batch.encoder.tokens[row, span.prompt] = prompt_p
        batch.encoder.positions[row, span.prompt] = np.arange(len(prompt_p))
        batch.encoder.segments[row, span.prompt] = number
    batch.view[row, span.loss] = segment.view
    for kind, of_view in weights.items():
        weight = of_view.get(segment.view, 0.0) * segment.weight
        batch.weights[kind][row, span.loss] = weight


def iterate(
    make: Callable[[int], Batch],
    start: int,
    stop: int,
    *,
    num_threads: int = 2,
    prefetch: int = 8,
) -> Iterator[tuple[int, Batch]]:
    """Yield (step, make(step)) for start <= step < stop, made ahead by threads.

    Args:
      make: a pure function of the step, safe to call from several threads.
      start: first step; the step to resume at.
      stop: one past the last step.
      num_threads: how many make batches; the order does not depend on it.
      prefetch: batches made ahead of the one in use.
    """
    if start >= stop:
        return
    steps = grain.MapDataset.range(start, stop).map(lambda s: (int(s), make(int(s))))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    yield from steps.to_iter_dataset(options)
