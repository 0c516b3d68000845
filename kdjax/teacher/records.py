"""The teacher cache: what the teacher said about every target token, on disk.

A cache is a folder: `manifest.json` and ArrayRecord shards. A record belongs to one
(example, view) and is keyed by its content (16 bytes), so shuffling, packing, batch
size and mesh may change after labelling. Row i of a record is the teacher's
distribution for target token i.

Labelling calls `write_shard` for every index not in `complete_shards`, then `finish`
once; training calls `open_cache` and `Cache.read`.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from kdjax.teacher import codec
from kdjax.teacher.codec import Record
from kdjax.teacher.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    read_manifest,
    refuse_other_identity,
    write_manifest,
)
from kdjax.teacher.shards import (
    KEY_BYTES,
    DamagedShardError,
    check_record,
    check_shard,
    complete_shards,
    damage,
    open_reader,
    read_index,
    read_payload,
    shard_name,
    write_shard,
)

__all__ = [
    "KEY_BYTES",
    "MANIFEST",
    "Cache",
    "DamagedShardError",
    "Manifest",
    "Record",
    "Shard",
    "complete_shards",
    "finish",
    "open_cache",
    "read_manifest",
    "shard_name",
    "verify",
    "write_shard",
]


def finish(
    folder: str | os.PathLike, manifest: Manifest, *, num_shards: int
) -> Manifest:
    """Write `manifest.json`, last and atomically, and return what it says.

    Args:
        folder: the cache, with all its shards.
        manifest: its `shards` and `versions` are filled here.
        num_shards: of the whole cache.

    Raises:
        ValueError: a shard is missing, damaged or labelled with something else.
    """
    folder = pathlib.Path(folder)
    shards = []
    for index in range(num_shards):
        path = folder / shard_name(index, num_shards)
        entry = read_index(path)
        refuse_other_identity(path, entry.identity, manifest)
        shards.append(
            Shard(
                name=path.name,
                num_records=len(entry.keys),
                num_tokens=entry.num_tokens,
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


def open_cache(
    folder: str | os.PathLike,
    *,
    tokenizer_fingerprint: str | None = None,
    vocab_size: int | None = None,
    kind: str | None = None,
    k: int | None = None,
    temperatures: Iterable[float] = (),
) -> "Cache":
    """Open a finished cache; what is given must be what the cache holds.

    Args:
        folder: the cache.
        tokenizer_fingerprint: None is not checked, here and below.
        vocab_size: of the teacher.
        kind: "top_k" or "dense".
        k: pairs per token; not checked in a dense cache.
        temperatures: each must have been declared when labelling.

    Raises:
        ValueError: naming the field, what was found, what was wanted, the remedy.
    """
    manifest = read_manifest(folder)
    wanted = {
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "vocab_size": vocab_size,
        "kind": kind,
        "k": None if manifest.kind == "dense" else k,
    }
    for name, value in wanted.items():
        found = getattr(manifest, name)
        if value is not None and value != found:
            raise ValueError(
                f"{name}={value!r} is wanted, the cache {folder!s} has {found!r}: "
                f"ask for {found!r}, or label again into another folder"
            )
    for temperature in temperatures:
        if temperature not in manifest.temperatures:
            raise ValueError(
                f"temperature={temperature} was not declared when {folder!s} was "
                f"labelled: use one of {manifest.temperatures}, or label again with "
                "it among cache.temperatures"
            )
    return Cache(pathlib.Path(folder), manifest)


class Cache:
    """A finished cache, open for reading: random access, safe under threads.

    Shards are opened, and their indices read, when they are first needed.
    """

    def __init__(self, folder: pathlib.Path, manifest: Manifest) -> None:
        """Use `open_cache`, which checks the manifest."""
        self.folder = folder
        self.manifest = manifest
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    @property
    def kind(self) -> str:
        """One of "top_k" and "dense"."""
        return self.manifest.kind

    @property
    def k(self) -> int:
        """Pairs stored per target token; the vocabulary in a dense cache."""
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
        """Whether there is a record for this 16-byte content key."""
        return key in self._locations

    def read(self, key: bytes) -> Record:
        """Return the record of a key.

        Raises:
            ValueError: no such record, or it is damaged (naming file and record).
        """
        if key not in self._locations:
            raise ValueError(
                f"key={key.hex()} is not in the cache {self.folder!s}: these tokens "
                "were not labelled; label again with this data and tokenizer"
            )
        shard, row = self._locations[key]
        path = self.folder / self.manifest.shards[shard].name
        payload = read_payload(self._reader(shard), path, row)
        try:
            return codec.decode(
                payload,
                vocab_size=self.vocab_size,
                dense=self.kind == "dense",
            )
        except codec.DECODE_ERRORS as error:
            raise DamagedShardError(damage(path, row)) from error

    def keys(self) -> Iterator[bytes]:
        """All keys, shard by shard."""
        return iter(self._locations)

    @functools.cached_property
    def _locations(self) -> dict[bytes, tuple[int, int]]:
        """Key -> (shard, row); a key that two shards hold is read from the first."""
        locations: dict[bytes, tuple[int, int]] = {}
        for number, shard in enumerate(self.manifest.shards):
            path = self.folder / shard.name
            entry = read_index(path, self._reader(number))
            refuse_other_identity(path, entry.identity, self.manifest)
            if len(entry.keys) != shard.num_records:
                raise DamagedShardError(damage(path, None))
            for row, key in enumerate(entry.keys):
                locations.setdefault(key, (number, row))
        return locations

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                path = self.folder / self.manifest.shards[shard].name
                self._readers[shard] = open_reader(path)
            return self._readers[shard]


def verify(cache: Cache) -> dict[str, int]:
    """Read everything: checksums, shapes and sums of every record.

    Returns:
        The number of shards, records and tokens read.

    Raises:
        ValueError: naming the file, and the record where one is at fault.
    """
    for shard in cache.manifest.shards:
        path = cache.folder / shard.name
        entry = check_shard(path)
        num_tokens = 0
        for row, key in enumerate(entry.keys):
            record = cache.read(key)
            num_tokens += len(record.log_probs)
            check_record(key, record, cache.manifest, known={})
            # The token that came cannot be likelier than the likeliest one.
            peak_T = record.log_probs.max(axis=1)
            mass_T = np.exp(record.log_probs).sum(axis=1, dtype=np.float64)
            if (record.target_log_probs > peak_T + 0.1).any() or (mass_T > 1.001).any():
                raise ValueError(
                    f"record {row} of {path} is no distribution: label again"
                )
        if num_tokens != shard.num_tokens or _checksum(path) != shard.checksum:
            raise DamagedShardError(damage(path, None))
    return {
        "shards": len(cache.manifest.shards),
        "records": cache.num_records,
        "tokens": cache.num_tokens,
    }


def _checksum(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
