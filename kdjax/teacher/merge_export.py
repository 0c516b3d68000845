"""Merging and exporting teacher caches, and importing other tools' outputs.

Shapes: L tokens of a sequence, T target tokens, K stored pairs, S temperatures.
"""

import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from kdjax.config import Config
from kdjax.data.tokenizer import fingerprint
from kdjax.data.views import Segment
from kdjax.models import hf
from kdjax.teacher import cache as cache_lib
from kdjax.teacher import shards
from kdjax.teacher.codec import Record
from kdjax.teacher.importers.convert import FORMATS, ImportedSequence
from kdjax.teacher.manifest import MANIFEST, Manifest


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
    seen: dict[bytes, str] = {}
    for cache in caches:
        for name, expected in first.identity().items():
            actual = cache.manifest.identity()[name]
            if name not in ("content", "shard_size") and actual != expected:
                raise ValueError(
                    f"{name}={actual!r} of {cache.folder!s} differs from {expected!r} "
                    f"of {caches[0].folder!s}: only caches labelled alike can be merged"
                )
        for key in cache:
            if key in seen:
                raise ValueError(
                    f"key={key.hex()} is in {seen[key]} and in {cache.folder!s}: merge "
                    "caches of disjoint examples"
                )
            seen[key] = str(cache.folder)
    make_folder(out)
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
    for index, (path, num_records) in enumerate(sources):
        shards.copy_shard(path, out, index, len(sources), manifest)
        advance(num_records)
    return cache_lib.finish(out, manifest, num_shards=len(sources))


def make_folder(folder: str | os.PathLike) -> None:
    """Make a new folder.

    Raises:
      ValueError: there is something in it.
    """
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise ValueError(f"out={folder!s} is not empty: name a new folder")


def export(cache: cache_lib.TeacherCache, out: str | os.PathLike) -> int:
    """Write a Parquet file, one row per record, and return the number of rows.

    Columns: key (hex), target_ids [T], target_log_probs [T], log_z and entropy [T][S],
    and by kind ids and log_probs [T][K] without unused slots, log_probs [T][V], or ids
    and counts [T][S][R][n] without unused slots.

    Raises:
      ValueError: the file exists.
    """
    import datasets  # seconds, which no other action needs

    path = pathlib.Path(out)
    if path.exists() or not path.parent.is_dir():
        raise ValueError(f"out={out!s} exists, or its folder does not: name a new file")

    def rows() -> Iterator[dict[str, Any]]:
        for key in cache:
            yield {"key": key.hex()} | _columns(cache.read(key))

    scratch = tempfile.mkdtemp(prefix="kdjax-export-")
    try:
        try:
            dataset = datasets.Dataset.from_generator(
                rows, features=_features(cache.kind), cache_dir=scratch
            )
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, ValueError):  # a damaged record
                raise error.__cause__ from None
            raise
        dataset.to_parquet(os.fspath(out))
        return len(dataset)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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


def import_sequences(
    sequences: Iterable[ImportedSequence],
    segments: Sequence[Segment],
    out: str | os.PathLike,
    manifest: Manifest,
    *,
    shard_size: int,
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
      advance: called with the target tokens of every segment matched.

    Raises:
      ValueError: a segment without a sequence, or without a row for a target token;
        sequences that do not fit.
    """
    make_folder(out)
    by_tokens: dict[bytes, list[int]] = {}
    for index, segment in enumerate(segments):
        by_tokens.setdefault(segment.ids.tobytes(), []).append(index)
    records: dict[int, Record] = {}
    num_in_order = 0
    for number, rows in enumerate(sequences):
        if rows.token_ids is None:
            num_in_order += 1
            matches = [number] if number < len(segments) else []
        else:
            # A tool may have appended an end of sequence to the tokens it was given.
            tokens = rows.token_ids.astype(np.int32)
            matches = by_tokens.get(tokens.tobytes(), [])
            matches = matches or by_tokens.get(tokens[:-1].tobytes(), [])
        for index in matches:
            records[index] = _record(rows, segments[index], manifest)
            advance(records[index].num_tokens)
    if num_in_order not in (0, len(segments)):
        raise ValueError(
            f"{num_in_order} sequences without token ids for {len(segments)} examples: "
            "they are matched by their place, so there must be one for each, in order"
        )
    absent = [s for i, s in enumerate(segments) if i not in records]
    if absent:
        raise ValueError(
            f"example {absent[0].example_id!r}: no sequence has its tokens "
            f"({len(absent)} such of {len(segments)}): run the teacher on these very "
            "prompts and targets, with this tokenizer"
        )
    unique = {segments[i].key: record for i, record in sorted(records.items())}
    pairs = list(unique.items())
    parts = [pairs[i : i + shard_size] for i in range(0, len(pairs), shard_size)]
    for index, part in enumerate(parts):
        cache_lib.write_shard(out, index, len(parts), part, manifest)
    return cache_lib.finish(out, manifest, num_shards=len(parts))


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
      ValueError: as `import_sequences` and `cache.verify`; then there is no manifest.
    """
    vocab_size = len(tokenizer)
    # Ids of a padded vocabulary may be among the stored ones.
    if config.teacher.path:
        folder = hf.resolve(config.teacher.path)
        if (folder / "config.json").is_file():
            vocab_size = hf.read_config(folder).vocab_size
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
    import_sequences(
        FORMATS[tool].read(path, k=k, vocab_size=vocab_size),
        segments,
        out,
        manifest,
        shard_size=config.cache.shard_size,
        advance=advance,
    )
    try:
        return cache_lib.verify(cache_lib.load_cache(out))
    except ValueError:  # a cache that was refused must not be trained on
        (pathlib.Path(out) / MANIFEST).unlink()
        raise


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
