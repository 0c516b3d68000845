"""Labelling: the teacher scores the target tokens of segments into a cache.

Shards are lists of consecutive segments, packed into rows of one length, so there is
one compiled shape. Each process labels its own shards on its own devices and writes
them itself; they meet at the end alone.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int64

from kdjax.config import CacheConfig
from kdjax.data import loader
from kdjax.data.segments import as_segments
from kdjax.data.views import Segment
from kdjax.runtime import limits
from kdjax.teacher import cache, codec, sampling
from kdjax.teacher.codec import Record

_FEWEST_RECORDS, _FEWEST_SHARDS = 512, 64
_RECORD_BYTES = 150  # of a record besides its tokens: frames, key, framing

LabelStep = Callable[[loader.Batch, Any], dict[str, jax.Array]]


def missing(folder: pathlib.Path) -> bool:
    """Return True if the cache has no manifest: it is not, or not fully, labelled."""
    return not (folder / cache.MANIFEST).is_file()


def records_per_shard(
    segments: Sequence[Segment], manifest: cache.Manifest, config: CacheConfig
) -> int:
    """Return the records of a shard: cache.shard_size, or what cache.shard_mib gives.

    That is as many records of mean length as fit, by the bytes of a target token that
    are typical of the kind. A cache has at least 64 shards, unless they were smaller
    than 512 records: so hosts share the work, and little is done again after a kill.
    It follows from segments, manifest and config alone: all hosts and restarts agree.
    """
    if config.shard_size:
        return config.shard_size
    lengths = as_segments(segments).target_lengths[_distinct(segments)]
    num_records = max(1, len(lengths))
    num_scalars = 2 + 2 * len(manifest.temperatures)
    pair_bytes = {"top_k": 1.7, "sampled": 0.6, "dense": 4.0}[manifest.kind]
    num_pairs = manifest.k
    if manifest.kind == "sampled":
        num_pairs *= manifest.num_rounds * len(manifest.temperatures)
    token_bytes = pair_bytes * num_pairs + 3 * num_scalars
    record_bytes = _RECORD_BYTES + token_bytes * int(lengths.sum()) / num_records
    fitting = int(config.shard_mib * 2**20 / record_bytes)
    return max(1, min(fitting, max(_FEWEST_RECORDS, num_records // _FEWEST_SHARDS)))


def check(
    segments: Sequence[Segment], manifest: cache.Manifest, config: CacheConfig
) -> None:
    """Check that a cache of these segments would be one that can be read.

    Args:
      segments: to label.
      manifest: of the cache, without shards.
      config: of the shards.

    Raises:
      ValueError: too many shards, or a record that is too large.
    """
    codec.check_size(
        codec.Sizes(
            num_tokens=int(as_segments(segments).loss_lengths.max(initial=0)),
            num_pairs=manifest.k,
            num_temperatures=len(manifest.temperatures),
            num_rounds=manifest.num_rounds,
        ),
        dense=manifest.kind == "dense",
    )
    size = records_per_shard(segments, manifest, config)
    num_shards = -(-len(_distinct(segments)) // size)
    if num_shards > limits.MAX_SHARDS:
        raise ValueError(
            f"{num_shards} shards of {size} records each, a cache has at most "
            f"{limits.MAX_SHARDS}: raise cache.shard_size, or where it is 0 "
            "cache.shard_mib"
        )


def shards(
    segments: Sequence[Segment], shard_size: int
) -> list[Int64[np.ndarray, " n"]]:
    """Split segments into shards: the indices of each one's.

    Equal content (equal keys) is labelled once.
    """
    indices = _distinct(segments)
    return [indices[i : i + shard_size] for i in range(0, len(indices), shard_size)]


def _distinct(segments: Sequence[Segment]) -> Int64[np.ndarray, " n"]:
    """Return the indices of the segments whose key no segment before them has."""
    halves_N2 = as_segments(segments).keys.view("<u8").reshape(len(segments), 2)
    order = np.lexsort((halves_N2[:, 0], halves_N2[:, 1]))
    sorted_N2 = halves_N2[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (sorted_N2[1:] != sorted_N2[:-1]).any(1)
    return np.sort(order[is_first])


def label(
    segments: Sequence[Segment],
    folder: pathlib.Path,
    manifest: cache.Manifest,
    config: CacheConfig,
    label_step: LabelStep,
    *,
    rows: Mapping[str, Any] | None = None,
    advance: Callable[[int], None] = lambda num_tokens: None,
) -> dict[str, float]:
    """Label the shards that are incomplete; killed anywhere, it continues.

    Args:
      segments: to label, in the data's order.
      folder: the cache.
      manifest: its description, without shards.
      config: shard, batch and row sizes.
      label_step: batch [1, B, T] -> arrays of `losses.label`, tokens first.
      rows: row lengths as keywords of `BatchPlan`; None = those of a decoder-only
        teacher.
      advance: called with the target tokens of every finished batch and skipped shard.

    Returns:
      "tokens" (target tokens labelled), "positions" (computed by the teacher, padding
      included) and "seconds", all of this process and without its first batch, which
      compiles.
    """
    all_shards = shards(segments, records_per_shard(segments, manifest, config))
    complete = cache.complete_shards(folder, manifest)
    loss_lengths = as_segments(segments).loss_lengths
    clock = _Clock()
    rows = rows or {"row_length": config.row_length}
    for index, shard in enumerate(all_shards):
        if index % jax.process_count() != jax.process_index():
            continue
        if index in complete:
            advance(int(loss_lengths[shard].sum()))
            continue
        records = _label_shard(
            [segments[item] for item in shard],
            manifest,
            config,
            label_step,
            rows,
            clock,
            advance,
        )
        cache.write_shard(
            folder,
            index,
            len(all_shards),
            records,
            manifest,
            num_threads=config.num_threads,
        )
    return clock.totals()


def _label_shard(
    segments: Sequence[Segment],
    manifest: cache.Manifest,
    config: CacheConfig,
    label_step: LabelStep,
    rows: Mapping[str, Any],
    clock: "_Clock",
    advance: Callable[[int], None],
) -> Iterator[tuple[bytes, Record]]:
    """Yield the records of one shard, in the order in which its rows were packed."""
    plan = loader.BatchPlan(
        segments, batch_size=config.batch_size, shuffle=False, **rows
    )
    clock.start()
    # The next batch is dispatched before the previous one is fetched and encoded.
    pending = None
    for step in range(plan.steps_per_epoch(0)):
        batch = loader.make_batch(plan, step, terms=())
        sampled = manifest.kind == "sampled"
        uniforms = _uniforms(plan, step, manifest) if sampled else None
        computed = label_step(batch, uniforms)
        if pending is not None:
            yield from _unpack(plan, *pending, manifest, clock, advance)
        pending = (step, computed)
    if pending is not None:
        yield from _unpack(plan, *pending, manifest, clock, advance)


def _uniforms(plan: Any, step: int, manifest: cache.Manifest) -> np.ndarray:
    """Return the uniforms of a batch's draws: [1, B, T, S, R * n]; 0 in padding."""
    num_temperatures = len(manifest.temperatures)
    num_uniforms = manifest.num_rounds * manifest.k
    shape = (plan.batch_size, plan.row_length, num_temperatures, num_uniforms)
    uniforms = np.zeros(shape, np.float32)
    for row, items in enumerate(plan.batch(step)):
        for span in loader.segment_spans(plan, items):
            uniforms[row, span.loss] = sampling.stratified_uniforms(
                span.segment.key,
                span.segment.num_loss_tokens,
                num_temperatures,
                manifest.num_rounds,
                manifest.k,
            ).reshape(-1, num_temperatures, num_uniforms)
    return uniforms[None]


def _unpack(
    plan: Any,
    step: int,
    computed: dict[str, jax.Array],
    manifest: cache.Manifest,
    clock: "_Clock",
    advance: Callable[[int], None],
) -> Iterator[tuple[bytes, Record]]:
    lead = (plan.batch_size, plan.row_length)
    arrays = {
        name: np.asarray(value).reshape(*lead, *value.shape[1:])
        for name, value in computed.items()
    }
    num_tokens = 0
    for row, items in enumerate(plan.batch(step)):
        for span in loader.segment_spans(plan, items):
            num_tokens += span.segment.num_loss_tokens
            outputs = {name: array[row, span.loss] for name, array in arrays.items()}
            yield span.segment.key, _record(outputs, span.segment, manifest)
    clock.add(num_tokens, plan.batch_size * plan.row_length)
    advance(num_tokens)


def _record(
    outputs: dict[str, np.ndarray], segment: Segment, manifest: cache.Manifest
) -> Record:
    """Build the record of one segment from its rows of the computed arrays."""
    num_tokens = segment.num_loss_tokens
    record = Record(
        ids=outputs.get("ids_NK", np.zeros((num_tokens, 0), np.int32)),
        log_probs=outputs.get("log_probs_NK", np.zeros((num_tokens, 0), np.float32)),
        target_ids=segment.loss_ids.astype(np.int32),
        target_log_probs=outputs["target_log_probs_N"],
        log_z=outputs["log_z_NS"],
        entropy=outputs["entropy_NS"],
        kind=manifest.kind,
    )
    if manifest.kind != "sampled":
        return record
    drawn = outputs["drawn_ids_NSP"]
    shape = (*drawn.shape[:2], manifest.num_rounds, manifest.k)
    ids, counts = sampling.count_draws(drawn.reshape(shape))
    return record._replace(ids=ids, counts=counts)


@dataclasses.dataclass(slots=True)
class _Clock:
    """Counter of tokens and seconds, without the first batch, which compiles."""

    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    _since: float = 0.0
    _warm: bool = False

    def start(self) -> None:
        self._since = time.perf_counter()

    def add(self, tokens: int, positions: int) -> None:
        now = time.perf_counter()
        if self._warm:
            self.tokens += tokens
            self.positions += positions
            self.seconds += now - self._since
        self._since, self._warm = now, True

    def totals(self) -> dict[str, float]:
        return {
            "tokens": self.tokens,
            "positions": self.positions,
            "seconds": self.seconds,
        }
