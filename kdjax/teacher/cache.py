"""The teacher cache: the teacher's distribution of every target token, on disk.

A cache is a folder: `manifest.json` and ArrayRecord shards. A record belongs to one
(example, view) and is keyed by its content (16 bytes), so shuffling, packing, batch
size and mesh may change after labelling. Row i of a record is the teacher's
distribution for target token i.

Labelling calls `write_shard` for every index not in `complete_shards`, then `finish`
once; training calls `load_cache` and `TeacherCache.read`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import os
import pathlib
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from kdjax.runtime import untrusted
from kdjax.storage import mirror, urls
from kdjax.teacher import codec, key_index, record_checks
from kdjax.teacher import manifest as manifest_lib
from kdjax.teacher.array_record import ArrayRecordReader, Chunks
from kdjax.teacher.byte_planes import IdCoder
from kdjax.teacher.codec import Record
from kdjax.teacher.key_index import KEY_BYTES, KeyIndex
from kdjax.teacher.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    check_identity,
    read_manifest,
    shard_name,
    write_manifest,
)
from kdjax.teacher.record_checks import AlignmentCheck
from kdjax.teacher.shards import (
    DamagedShardError,
    ShardIndex,
    check_record,
    check_shard,
    complete_shards,
    damage_message,
    open_reader,
    read_index,
    read_payload,
    write_shard,
)

__all__ = [
    "INDEX",
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


INDEX = "index.bin"  # an addition: sorted keys, made of the shards
_MAX_OPEN = 256  # shards held open at a time: a process may have 1,024 files
_MAX_LAYOUTS = 32 * 2**20  # bytes of the layouts of shards that are remembered


def finish(
    folder: str | os.PathLike, manifest: Manifest, *, num_shards: int
) -> Manifest:
    """Check all shards, write the index and `manifest.json`, return the manifest.

    Args:
      folder: the cache, with all its shards.
      manifest: of the cache; its `shards` and `versions` are filled here.
      num_shards: of the whole cache.

    Raises:
      ValueError: a shard is missing, damaged or labelled with something else.
    """
    if num_shards < 1:
        raise ValueError(f"num_shards={num_shards}: a cache has at least one record")
    folder = pathlib.Path(folder)
    shards, keys = [], []
    for index in range(num_shards):
        path = folder / shard_name(index, num_shards)
        entry = read_index(path)
        check_identity(path, entry.identity, manifest)
        keys.append(_key_array(entry.keys))
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
    _write_index(folder, manifest, KeyIndex.from_keys(keys))
    write_manifest(folder, manifest)  # the last: it says that all is there
    return manifest


def _key_array(keys: tuple[bytes, ...]) -> UInt8[np.ndarray, "n 16"]:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def _write_index(folder: pathlib.Path, manifest: Manifest, index: KeyIndex) -> None:
    key_index.write(
        folder / INDEX,
        index,
        checksum=manifest_lib.checksum(manifest),
        shard_bytes=[(folder / shard.name).stat().st_size for shard in manifest.shards],
    )


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
      folder: of the cache, or its address in a store.
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
    if urls.is_url(folder):
        folder = mirror.fetch(str(folder), name="folder")
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
            actual = untrusted.quote(repr(actual))
            raise ValueError(
                f"{name}={value!r} is wanted, the cache {folder!s} has {actual}: "
                f"ask for {actual}, or label again into another folder"
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
            f"of {folder!s} ({untrusted.quote(manifest.teacher_fingerprint)}) did not "
            "give: use 'renormalize_teacher' or 'renormalize_both'"
        )
    return TeacherCache(pathlib.Path(folder), manifest)


class _Layout(NamedTuple):
    """Place of a shard's records in its file, and how their ids are coded."""

    chunks: Chunks
    coder: IdCoder

    @property
    def num_bytes(self) -> int:
        """Memory of it."""
        return sum(column.nbytes for column in self.chunks) + self.coder.order.nbytes


class TeacherCache:
    """A finished cache, open for reading: random access, safe under threads.

    When the first key is looked up, the index of all records is mapped into memory (or
    made of the indices of all shards, where it is missing). The checksum of a shard's
    file is compared once, before its first record is read.
    """

    def __init__(self, folder: pathlib.Path, manifest: Manifest) -> None:
        """Use `load_cache`, which checks the manifest."""
        self.folder = folder
        self.manifest = manifest
        self._readers: dict[int, ArrayRecordReader] = {}
        self._layouts: dict[int, _Layout] = {}
        self._layout_bytes = 0
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
        return self._index.locate(key) is not None

    def contains(self, keys: UInt8[np.ndarray, "N 16"]) -> Bool[np.ndarray, " N"]:
        """Return for each content key if there is a record for it."""
        return self._index.contains(keys)

    def keys(self) -> UInt8[np.ndarray, "N 16"]:
        """Return the content keys of all records, in ascending order."""
        return self._index.keys()

    def read(self, key: bytes) -> Record:
        """Return the record of a key.

        Raises:
          ValueError: no such record, or it is damaged (naming file and record).
        """
        place = self._index.locate(key)
        if place is None:
            raise ValueError(
                f"key={key.hex()} is not in the cache {self.folder!s}: these tokens "
                "were not labelled; label again with this data and tokenizer"
            )
        shard, row = place
        if shard >= len(self.manifest.shards):
            raise DamagedShardError(
                f"{self.folder / INDEX} is damaged: delete it, it is made again"
            )
        reader, coder = self._open(shard)
        payload = read_payload(reader, reader.path, row, key=key)
        try:
            self._check_sizes(codec.read_sizes(payload), shard)
            return codec.decode(
                payload, coder, kind=self.kind, temperatures=self.temperatures
            )
        except codec.DECODE_ERRORS as error:
            raise DamagedShardError(damage_message(reader.path, row)) from error

    def _check_sizes(self, sizes: codec.Sizes, shard: int) -> None:
        """Raise ValueError if a record has other numbers than the manifest says."""
        manifest = self.manifest
        expected = (manifest.k, len(manifest.temperatures), manifest.num_rounds)
        if (
            sizes[1:] != expected
            or sizes.num_tokens > manifest.shards[shard].num_tokens
        ):
            raise ValueError(f"a record of {sizes}, the manifest says {expected}")

    def __iter__(self) -> Iterator[bytes]:
        """Iterate over all keys, shard by shard."""
        for number, shard in enumerate(self.manifest.shards):
            reader = open_reader(self.folder / shard.name)
            for row, key in enumerate(self._read_entry(number, reader).keys):
                if self._index.locate(key) == (number, row):
                    yield key

    @functools.cached_property
    def _index(self) -> KeyIndex:
        """The places of all records, mapped into memory or made of the shards.

        A key that two shards hold is read from the first.
        """
        manifest = self.manifest
        for shard in manifest.shards:
            untrusted.check_inside(self.folder / shard.name, self.folder)
        stored = key_index.read(
            self.folder / INDEX,
            checksum=manifest_lib.checksum(manifest),
            num_shards=len(manifest.shards),
            num_records=manifest.num_records,
        )
        if stored is None:
            return self._make_index()
        index, shard_bytes = stored
        for shard, expected in zip(manifest.shards, shard_bytes.tolist(), strict=True):
            path = self.folder / shard.name
            with contextlib.suppress(OSError):
                status = path.stat()
                if stat.S_ISREG(status.st_mode) and status.st_size == expected:
                    continue
            open_reader(path)  # names what is missing
            raise DamagedShardError(damage_message(path, None))
        return index

    def _make_index(self) -> KeyIndex:
        """Make the index of the shards' own, and keep it where that is possible."""
        keys = []
        for number, shard in enumerate(self.manifest.shards):
            path = self.folder / shard.name
            entry = self._read_entry(number, open_reader(path))
            if len(entry.keys) != shard.num_records:
                raise DamagedShardError(damage_message(path, None))
            keys.append(_key_array(entry.keys))
        index = KeyIndex.from_keys(keys)
        # Without the right or the room to write, it is made again next time.
        with contextlib.suppress(OSError):
            _write_index(self.folder, self.manifest, index)
        return index

    def _read_entry(self, shard: int, reader: ArrayRecordReader) -> ShardIndex:
        """Read the index of a shard and check that it is the manifest's."""
        entry = read_index(reader.path, reader)
        check_identity(reader.path, entry.identity, self.manifest)
        if entry.digest != self.manifest.shards[shard].digest:  # another of this cache
            raise DamagedShardError(damage_message(reader.path, None))
        return entry

    def _open(self, shard: int) -> tuple[ArrayRecordReader, IdCoder]:
        """Return the reader and the id coder of a shard, checked the first time."""
        if shard not in self._checked:
            entry = self.manifest.shards[shard]
            _check_file(self.folder / entry.name, entry)
            self._checked.add(shard)
        with self._lock:
            layout = self._layouts.pop(shard, None)
            reader = self._readers.pop(shard, None)
            if reader is None:
                if len(self._readers) >= _MAX_OPEN:
                    del self._readers[next(iter(self._readers))]  # least lately used
                path = self.folder / self.manifest.shards[shard].name
                reader = open_reader(path, layout and layout.chunks)
            if layout is None:
                index = self._read_entry(shard, reader)
                layout = _Layout(reader.chunks, index.coder)
                self._layout_bytes += layout.num_bytes
                while self._layouts and self._layout_bytes > _MAX_LAYOUTS:
                    oldest = self._layouts.pop(next(iter(self._layouts)))
                    self._layout_bytes -= oldest.num_bytes
            self._readers[shard], self._layouts[shard] = reader, layout
            return reader, layout.coder


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
        stored = check_shard(path)
        if len(stored.keys) != shard.num_records:
            raise DamagedShardError(damage_message(path, None))
        for row, key in enumerate(stored.keys):
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
    with untrusted.open_plain(path) as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
