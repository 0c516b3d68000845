"""The teacher cache: the teacher's distribution of every target token, on disk.

A cache is a folder: `manifest.json` and ArrayRecord shards. A record belongs to one
(example, view) and is keyed by its content (16 bytes), so shuffling, packing, batch
size and mesh may change after labelling. Row i of a record is the teacher's
distribution for target token i.

Labelling calls `write_shard` for every index not in `complete_shards`, then `finish`
once; training calls `load_cache` and `TeacherCache.read`.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from kdjax.teacher import codec, record_checks
from kdjax.teacher.byte_planes import IdCoder
from kdjax.teacher.codec import Record
from kdjax.teacher.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    check_identity,
    read_manifest,
    write_manifest,
)
from kdjax.teacher.record_checks import AlignmentCheck
from kdjax.teacher.shards import (
    KEY_BYTES,
    DamagedShardError,
    check_record,
    check_shard,
    complete_shards,
    damage_message,
    open_reader,
    read_index,
    read_payload,
    shard_name,
    write_shard,
)

__all__ = [
    "KEY_BYTES",
    "MANIFEST",
    "DamagedShardError",
    "Manifest",
    "Record",
    "Shard",
    "TeacherCache",
    "complete_shards",
    "finish",
    "load_cache",
    "read_manifest",
    "shard_name",
    "verify",
    "write_shard",
]


_MAX_OPEN = 256  # shards held open at a time: a process may have 1,024 files


def finish(
    folder: str | os.PathLike, manifest: Manifest, *, num_shards: int
) -> Manifest:
    """Check all shards, write `manifest.json` atomically and return the manifest.

    Args:
      folder: the cache, with all its shards.
      manifest: of the cache; its `shards` and `versions` are filled here.
      num_shards: of the whole cache.

    Raises:
      ValueError: a shard is missing, damaged or labelled with something else.
    """
    folder = pathlib.Path(folder)
    shards = []
    for index in range(num_shards):
        path = folder / shard_name(index, num_shards)
        entry = read_index(path)
        check_identity(path, entry.identity, manifest)
        shards.append(
            Shard(
                name=path.name,
                num_records=len(entry.keys),
                num_tokens=entry.num_tokens,
                digest=entry.digest,
                checksum=_checksum(path),
            )
        )
    libraries = ("jax", "numpy", "zstandard", "array_record")
    manifest = dataclasses.replace(
        manifest,
        shards=tuple(shards),
        versions={name: importlib.metadata.version(name) for name in libraries},
    )
    for leftover in folder.glob("*.tmp*"):  # of processes that were killed
        leftover.unlink()
    write_manifest(folder, manifest)
    return manifest


def load_cache(
    folder: str | os.PathLike,
    *,
    tokenizer_fingerprint: str | None = None,
    vocab_size: int | None = None,
    kind: str | None = None,
    k: int | None = None,
    num_rounds: int | None = None,
    temperatures: Iterable[float] = (),
    tail: str | None = None,
) -> "TeacherCache":
    """Open a finished cache, checking the properties that are given.

    Args:
      folder: of the cache.
      tokenizer_fingerprint: expected one; None is not checked, here and below.
      vocab_size: of the teacher.
      kind: "top_k", "sampled" or "dense".
      k: pairs per token, or draws per round; not checked in a dense cache.
      num_rounds: of a sampled cache.
      temperatures: each must have been declared when labelling.
      tail: policy for what is not stored; some need the tail's mass.

    Raises:
      ValueError: the cache is unfinished, or differs; names field, values, remedy.
    """
    manifest = read_manifest(folder)
    expected = {
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "vocab_size": vocab_size,
        "kind": kind,
        "k": None if manifest.kind == "dense" else k,
        "num_rounds": num_rounds if manifest.kind == "sampled" else None,
    }
    for name, value in expected.items():
        actual = getattr(manifest, name)
        if value is not None and value != actual:
            raise ValueError(
                f"{name}={value!r} is wanted, the cache {folder!s} has {actual!r}: "
                f"ask for {actual!r}, or label again into another folder"
            )
    for temperature in temperatures:
        if temperature not in manifest.temperatures:
            raise ValueError(
                f"temperature={temperature} was not declared when {folder!s} was "
                f"labelled: use one of {manifest.temperatures}, or label again with "
                "it among cache.temperatures"
            )
    if "tail_mass" in manifest.missing and tail in ("bucket", "drop"):
        raise ValueError(
            f"tail={tail!r} needs the mass outside the stored pairs, which the origin "
            f"of {folder!s} ({manifest.teacher_fingerprint}) did not give: use "
            "'renormalize_teacher' or 'renormalize_both'"
        )
    return TeacherCache(pathlib.Path(folder), manifest)


class TeacherCache:
    """A finished cache, open for reading: random access, safe under threads.

    The indices of all shards are read when the first key is looked up. The checksum of
    a shard's file is compared once, before its first record is read.
    """

    def __init__(self, folder: pathlib.Path, manifest: Manifest) -> None:
        """Use `load_cache`, which checks the manifest."""
        self.folder = folder
        self.manifest = manifest
        self._readers: dict[int, Any] = {}
        self._checked: set[int] = set()
        self._lock = threading.Lock()

    @property
    def kind(self) -> str:
        """One of "top_k", "sampled" and "dense"."""
        return self.manifest.kind

    @property
    def k(self) -> int:
        """Pairs per target token; dense: vocab_size; sampled: draws per round."""
        return self.manifest.k

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the teacher."""
        return self.manifest.vocab_size

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures with exact log_z and entropy, in the order of their columns."""
        return self.manifest.temperatures

    @property
    def num_records(self) -> int:
        """Number of (example, view) pairs."""
        return self.manifest.num_records

    @property
    def num_tokens(self) -> int:
        """Number of target tokens."""
        return self.manifest.num_tokens

    def has(self, key: bytes) -> bool:
        """Return True if there is a record for this 16-byte content key."""
        return key in self._index[0]

    def read(self, key: bytes) -> Record:
        """Return the record of a key.

        Raises:
          ValueError: no such record, or it is damaged (naming file and record).
        """
        locations, coders = self._index
        if key not in locations:
            raise ValueError(
                f"key={key.hex()} is not in the cache {self.folder!s}: these tokens "
                "were not labelled; label again with this data and tokenizer"
            )
        shard, row = locations[key]
        path = self.folder / self.manifest.shards[shard].name
        payload = read_payload(self._checked_reader(shard), path, row, key=key)
        try:
            return codec.decode(
                payload,
                coders[shard],
                kind=self.kind,
                temperatures=self.temperatures,
            )
        except codec.DECODE_ERRORS as error:
            raise DamagedShardError(damage_message(path, row)) from error

    def __iter__(self) -> Iterator[bytes]:
        """Iterate over all keys, shard by shard."""
        return iter(self._index[0])

    @functools.cached_property
    def _index(self) -> tuple[dict[bytes, tuple[int, int]], list[IdCoder]]:
        """Key -> (shard, row), and the id coder of each shard.

        A key that two shards hold is read from the first.
        """
        locations: dict[bytes, tuple[int, int]] = {}
        coders = []
        for number, shard in enumerate(self.manifest.shards):
            path = self.folder / shard.name
            entry = read_index(path)
            check_identity(path, entry.identity, self.manifest)
            if entry.digest != shard.digest:  # another shard of the same cache
                raise DamagedShardError(damage_message(path, None))
            coders.append(entry.coder)
            for row, key in enumerate(entry.keys):
                locations.setdefault(key, (number, row))
        return locations, coders

    def _checked_reader(self, shard: int) -> Any:
        """Return the reader of a shard, whose file is checked the first time."""
        if shard not in self._checked:
            entry = self.manifest.shards[shard]
            _check_file(self.folder / entry.name, entry)
            self._checked.add(shard)
        return self._reader(shard)

    def _reader(self, shard: int) -> Any:
        with self._lock:
            reader = self._readers.pop(shard, None)
            if reader is None:
                if len(self._readers) >= _MAX_OPEN:
                    del self._readers[next(iter(self._readers))]  # least lately used
                path = self.folder / self.manifest.shards[shard].name
                reader = open_reader(path)
            self._readers[shard] = reader
            return reader


def verify(
    cache: TeacherCache, *, advance: Callable[[int], None] = lambda num_tokens: None
) -> dict[str, float]:
    """Read and check everything: checksums, shapes, probability sums, alignment.

    A row is the distribution for its own token: the stored log-probability of the token
    that came must be the row's. Where the origin did not give it, rows must on average
    fit their own tokens better than their neighbours. So rows that were shifted by one
    position fail.

    Args:
      cache: an open cache.
      advance: called with the target tokens of every record read.

    Returns:
      "shards", "records" and "tokens" that were read, and "teacher_nll", nats per
      target token (NaN where the origin did not give it).

    Raises:
      ValueError: naming the file, and the record where one is at fault.
    """
    num_tokens, total, alignment = 0, 0.0, AlignmentCheck()
    known = "target_log_probs" not in cache.manifest.missing
    for shard in cache.manifest.shards:
        path = cache.folder / shard.name
        _check_file(path, shard)
        num_in_shard = 0
        for row, key in enumerate(check_shard(path).keys):
            record = cache.read(key)
            num_in_shard += record.num_tokens
            check_record(key, record, cache.manifest, seen={})
            if error := record_checks.find_error(record, cache.manifest):
                raise ValueError(f"record {row} of {path}: {error}")
            total -= float(record.target_log_probs.sum(dtype=np.float64))
            if not known:
                alignment.add(record)
            advance(record.num_tokens)
        if num_in_shard != shard.num_tokens:
            raise DamagedShardError(damage_message(path, None))
        num_tokens += num_in_shard
    if error := alignment.find_error():
        raise ValueError(f"cache {cache.folder!s}: {error}")
    return {
        "shards": len(cache.manifest.shards),
        "records": cache.num_records,
        "tokens": num_tokens,
        "teacher_nll": total / max(1, num_tokens) if known else math.nan,
    }


def _check_file(path: pathlib.Path, entry: Shard) -> None:
    """Raise DamagedShardError, naming the record if one can be named, on a mismatch."""
    if _checksum(path) != entry.checksum:
        check_shard(path)
        raise DamagedShardError(damage_message(path, None))


def _checksum(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
