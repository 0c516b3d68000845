"""Merging and exporting teacher caches, and importing other tools' outputs.

Shapes: L tokens of a sequence, T target tokens, K stored pairs, S temperatures.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from kdjax.config import Config
from kdjax.data.tokenizer import fingerprint, vocabulary_size
from kdjax.data.views import Segment
from kdjax.experiment.models import label_vocab_size, student_shape
from kdjax.models import hf
from kdjax.teacher import cache as cache_lib
from kdjax.teacher import shards, staging
from kdjax.teacher.codec import Record
from kdjax.teacher.importers.convert import FORMATS, ImportedSequence
from kdjax.teacher.label import records_per_shard
from kdjax.teacher.manifest import Manifest


def merge(
    caches: Sequence[cache_lib.TeacherCache],
    out: str | os.PathLike,
    *,
    advance: Callable[[int], None] = lambda num_records: None,
) -> Manifest:
    """Write one cache of the records of several, whose bytes are copied.

    Args:
      caches: of the same teacher, tokenizer, kind, k and temperatures, without common
        examples.
      out: a new folder.
      advance: called with the records of every shard written.

    Raises:
      ValueError: caches that differ, or share an example.
    """
    first = caches[0].manifest
    for number, cache in enumerate(caches):
        for name, expected in first.identity().items():
            actual = cache.manifest.identity()[name]
            if name not in ("content", "shard_size") and actual != expected:
                raise ValueError(
                    f"{name}={actual!r} of {cache.folder!s} differs from {expected!r} "
                    f"of {caches[0].folder!s}: only caches labelled alike can be merged"
                )
        keys = cache.keys()
        for other in caches[:number]:
            if (common := other.contains(keys)).any():
                raise ValueError(
                    f"key={keys[common.argmax()].tobytes().hex()} is in "
                    f"{other.folder!s} and in {cache.folder!s}: merge caches of "
                    "disjoint examples"
                )
    manifest = dataclasses.replace(
        first,
        data=" and ".join(cache.manifest.data for cache in caches),
        content=" ".join(cache.manifest.content for cache in caches),
        shard_size=0,
    )
    sources = [
        (cache.folder / shard.name, shard.num_records)
        for cache in caches
        for shard in cache.manifest.shards
    ]
    with staging.new_folder(out) as scratch:
        for index, (path, num_records) in enumerate(sources):
            shards.copy_shard(path, scratch, index, len(sources), manifest)
            advance(num_records)
        return cache_lib.finish(scratch, manifest, num_shards=len(sources))


def export(cache: cache_lib.TeacherCache, out: str | os.PathLike) -> int:
    """Write a Parquet file, one row per record, and return the number of rows.

    Columns: key (hex), target_ids [T], target_log_probs [T], log_z and entropy [T][S],
    and by kind ids and log_probs [T][K] without unused slots, log_probs [T][V], or ids
    and counts [T][S][R][n] without unused slots.

    Raises:
      ValueError: the file exists.
    """
    import datasets  # seconds, which no other action needs

    def rows() -> Iterator[dict[str, Any]]:
        for key in cache:
            yield {"key": key.hex()} | _columns(cache.read(key))

    with (
        staging.new_file(out) as partial,
        tempfile.TemporaryDirectory(prefix="kdjax-export-") as scratch,
    ):
        try:
            dataset = datasets.Dataset.from_generator(
                rows, features=_features(cache.kind), cache_dir=scratch
            )
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, ValueError):  # a damaged record
                raise error.__cause__ from None
            raise
        dataset.to_parquet(os.fspath(partial))
        return len(dataset)


def _columns(record: Record) -> dict[str, Any]:
    columns: dict[str, Any] = {
        name: getattr(record, name)
        for name in ("target_ids", "target_log_probs", "log_z", "entropy")
    }
    if record.kind == "dense":
        return columns | {"log_probs": record.log_probs}
    others = {"counts": record.counts} if record.kind == "sampled" else {}
    others = others or {"log_probs": record.log_probs}
    for name, array in (("ids", record.ids), *others.items()):
        columns[name] = _without_unused(array, record.ids >= 0)
    return columns


def _without_unused(array: np.ndarray, used: np.ndarray) -> list[Any]:
    if array.ndim == 1:
        return array[used].tolist()
    return [_without_unused(*pair) for pair in zip(array, used, strict=True)]


def _features(kind: str) -> Any:
    """Return the columns of a kind of cache, as datasets.Features."""
    import datasets

    def of(dtype: str, depth: int) -> Any:
        feature = datasets.Value(dtype)
        for _ in range(depth):
            feature = datasets.List(feature)
        return feature

    by_kind = {
        "dense": {"log_probs": of("float32", 2)},
        "top_k": {"ids": of("int32", 2), "log_probs": of("float32", 2)},
        "sampled": {"ids": of("int32", 4), "counts": of("int32", 4)},
    }
    return datasets.Features(
        {
            "key": datasets.Value("string"),
            "target_ids": of("int32", 1),
            "target_log_probs": of("float32", 1),
            "log_z": of("float32", 2),
            "entropy": of("float32", 2),
        }
        | by_kind[kind]
    )


def write_ids(
    segments: Iterable[Segment],
    views: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    out: str | os.PathLike,
    *,
    advance: Callable[[int], None] = lambda num_tokens: None,
) -> int:
    """Write what a teacher elsewhere is to read, one JSON object per line.

    `token_ids` is what it is run on: prompt, prefix and target. It must give the
    log-probabilities of these tokens (of those from `num_prompt_tokens` on), and
    generate nothing.

    Args:
      segments: examples as tokens; of equal ones the first is written.
      views: their names.
      tokenizer: of the segments.
      out: a new file.
      advance: called with the target tokens of every segment.

    Returns:
      The number of lines.

    Raises:
      ValueError: the file exists.
    """
    done: set[bytes] = set()
    with staging.new_file(out) as partial, partial.open("w", encoding="utf-8") as file:
        for segment in segments:
            advance(len(segment.target_ids))
            if segment.key in done:
                continue
            done.add(segment.key)
            before = segment.ids[: len(segment.ids) - len(segment.target_ids)]
            row = {
                "id": segment.example_id,
                "view": views[segment.view],
                "key": segment.key.hex(),
                "token_ids": segment.ids.tolist(),
                "num_prompt_tokens": len(before),
                "prompt_ids": before.tolist(),
                "target_ids": segment.target_ids.tolist(),
                "prompt": tokenizer.decode(before),
                "target": tokenizer.decode(segment.target_ids),
            }
            file.write(json.dumps(row) + "\n")
    return len(done)


def import_sequences(
    sequences: Iterable[ImportedSequence],
    segments: Sequence[Segment],
    out: str | os.PathLike,
    manifest: Manifest,
    *,
    shard_size: int,
    num_threads: int = 1,
    advance: Callable[[int], None] = lambda num_tokens: None,
) -> Manifest:
    """Write a cache of another tool's teacher outputs for these segments.

    A sequence belongs to the segment with its token ids (prompt to target); one
    without token ids to the segment at its place in the data.

    Args:
      sequences: read from the other tool's files.
      segments: the examples to be covered, in the data's order.
      out: a new folder.
      manifest: its kind is top_k, its temperatures (1.0,).
      shard_size: records of a shard.
      num_threads: that encode records.
      advance: called with the target tokens of every segment matched.

    Raises:
      ValueError: a segment without a sequence, or without a row for a target token;
        sequences that do not fit.
    """
    # Of equal examples one is enough, and of its tokens their hash.
    unique = {segment.key: index for index, segment in enumerate(segments)}
    by_tokens: dict[bytes, list[int]] = {}
    for index in unique.values():
        by_tokens.setdefault(_digest(segments[index].ids), []).append(index)
    num_shards = -(-len(unique) // shard_size)
    records = _records(sequences, segments, by_tokens, manifest, advance)
    for index in range(num_shards):
        of_shard = itertools.islice(records, shard_size)
        cache_lib.write_shard(
            out, index, num_shards, of_shard, manifest, num_threads=num_threads
        )
    for _ in records:  # sequences that are left over are read and counted
        pass
    return cache_lib.finish(out, manifest, num_shards=num_shards)


def _digest(token_ids: np.ndarray) -> bytes:
    data = np.ascontiguousarray(token_ids, np.int32).tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()


def _records(
    sequences: Iterable[ImportedSequence],
    segments: Sequence[Segment],
    by_tokens: Mapping[bytes, Sequence[int]],
    manifest: Manifest,
    advance: Callable[[int], None],
) -> Iterator[tuple[bytes, Record]]:
    """Yield the record of each example once, in the order of the sequences."""
    done: set[bytes] = set()
    num_in_order = 0
    for number, rows in enumerate(sequences):
        if rows.token_ids is None:
            num_in_order += 1
            matches: Sequence[int] = [number] if number < len(segments) else []
        else:
            # A tool may have appended an end of sequence to the tokens it was given.
            matches = by_tokens.get(_digest(rows.token_ids), [])
            matches = matches or by_tokens.get(_digest(rows.token_ids[:-1]), [])
        for index in matches:
            segment = segments[index]
            if segment.key not in done:
                record = _record(rows, segment, manifest)
                done.add(segment.key)
                advance(record.num_tokens)
                yield segment.key, record
    if num_in_order not in (0, len(segments)):
        raise ValueError(
            f"{num_in_order} sequences without token ids for {len(segments)} examples: "
            "they are matched by their place, so there must be one for each, in order"
        )
    absent = [segment for segment in segments if segment.key not in done]
    if absent:
        raise ValueError(
            f"example {absent[0].example_id!r}: no sequence has its tokens "
            f"({len(absent)} such of {len(segments)}): run the teacher on these very "
            "prompts and targets, with this tokenizer (python -m kdjax.cache ids "
            "writes them)"
        )


def import_file(
    path: str | os.PathLike,
    segments: Sequence[Segment],
    out: str | os.PathLike,
    *,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    tool: str,
    teacher: str | None = None,
    name: str = "",
    advance: Callable[[int], None] = lambda num_tokens: None,
) -> dict[str, float]:
    """Import a file of another tool as a verified cache.

    Args:
      path: file, or folder of files, that the tool wrote.
      segments: the examples to be covered, in the data's order.
      out: a new folder.
      config: of the run that will read the cache.
      tokenizer: of the segments.
      tool: a key of `convert.FORMATS`.
      teacher: name of the model that the tool ran; None = `config.teacher.path`.
      name: of the segments, for the manifest.
      advance: called with the target tokens of every segment matched.

    Returns:
      What `cache.verify` returns.

    Raises:
      ValueError: as `import_sequences` and `cache.verify`; then there is no cache.
    """
    num_rows, vocab_size = _vocabulary(config, tokenizer)
    k = min(config.cache.k, vocab_size)
    teacher = teacher or config.teacher.path or "unknown"
    manifest = Manifest(
        kind="top_k",
        k=k,
        vocab_size=vocab_size,
        temperatures=(1.0,),
        tokenizer_fingerprint=fingerprint(tokenizer),
        teacher_path=teacher,
        teacher_fingerprint=f"{tool}:{teacher}",
        missing=FORMATS[tool].missing,
        data=name,
    )
    shard_size = records_per_shard(segments, manifest, config.cache)
    with staging.new_folder(out) as scratch:
        import_sequences(
            FORMATS[tool].read(path, k=k, vocab_size=vocab_size, num_rows=num_rows),
            segments,
            scratch,
            manifest,
            shard_size=shard_size,
            num_threads=config.cache.num_threads,
            advance=advance,
        )
        try:
            return cache_lib.verify(cache_lib.load_cache(scratch))
        except ValueError as error:  # it names a folder that is gone then
            raise ValueError(str(error).replace(str(scratch), str(out))) from None


def _vocabulary(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return the rows of the teacher's vocabulary, and those of them that are used.

    Of a teacher that is only known by its outputs, rows that have no token are those up
    to the next multiple of 1,024.
    """
    num_tokens = vocabulary_size(tokenizer)
    if config.teacher.path:
        folder = hf.resolve(config.teacher.path)
        if (folder / "config.json").is_file():
            teacher = hf.read_config(folder)
            student = student_shape(config, tokenizer)
            used = label_vocab_size(student, teacher, tokenizer)
            return teacher.vocab_size, used
    return -(-num_tokens // _ROW_MULTIPLE) * _ROW_MULTIPLE, num_tokens


_ROW_MULTIPLE = 1024


def _record(rows: ImportedSequence, segment: Segment, manifest: Manifest) -> Record:
    """Build a record at temperature 1 of the rows of the segment's target tokens."""
    num_tokens = len(segment.target_ids)
    start = len(segment.ids) - num_tokens
    length = len(rows.ids)
    where = f"example {segment.example_id!r}"
    if rows.token_ids is None and length >= num_tokens:
        start = length - num_tokens  # rows of the last tokens of the sequence
    if length < start + num_tokens:
        raise ValueError(
            f"{where}: its sequence has {length} rows for {start} prompt and "
            f"{num_tokens} target tokens: run the teacher on these very tokens"
        )
    targets: slice | np.ndarray = slice(start, start + num_tokens)
    if segment.loss_mask is not None:
        targets = start + np.flatnonzero(segment.loss_mask)
    ids_TK, log_probs_TK = rows.ids[targets], rows.log_probs[targets]
    empty_T = (ids_TK < 0).all(axis=1)
    if empty_T.any():
        raise ValueError(
            f"{where}: there is no row for target token {int(empty_T.argmax())}: the "
            "sequence was cut, or its rows stand for other tokens"
        )
    is_target_TK = ids_TK == segment.loss_ids[:, None]
    stored_T = np.where(is_target_TK, log_probs_TK, -np.inf).max(axis=1)
    target_T = rows.target_log_probs[targets]
    target_T = np.where(np.isnan(target_T), stored_T, target_T)
    unknown_T = np.isneginf(target_T)
    if "target_log_probs" not in manifest.missing and unknown_T.any():
        raise ValueError(
            f"{where}: target token {int(unknown_T.argmax())} has no log-probability "
            "in its row: its rows may stand for other tokens"
        )
    zeros_TS = np.zeros((segment.num_loss_tokens, 1), np.float32)
    return Record(
        ids=ids_TK,
        log_probs=log_probs_TK,
        target_ids=segment.loss_ids.astype(np.int32),
        target_log_probs=np.where(unknown_T, 0, target_T).astype(np.float32),
        log_z=zeros_TS,  # by definition at temperature 1
        entropy=zeros_TS,
    )
