"""The index of a cache: sorted keys with the place of each record, memory-mapped.

An index file is an addition to a cache: it follows from the shards, names the manifest
it belongs to by checksum, and is made again where it does not fit. Little endian:

  magic (8 bytes), uint32 version, uint32 number of shards, uint64 number of records,
  16 bytes checksum of the manifest; the size of each shard's file (uint64); then of all
  records by ascending key the key's first 8 bytes as a number (big endian within the
  key, uint64), its last 8 bytes (uint64), the shard (uint32), the row (uint32), each a
  whole column; 16 bytes blake2b of everything before.
"""

import hashlib
import io
import mmap
import os
import pathlib
import struct
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8, UInt32, UInt64

from kdjax.runtime import files, untrusted

KEY_BYTES = 16
_MAGIC, _VERSION = b"KDJAXKEY", 1
_HEADER = struct.Struct("<8sIIQ16s")
_DIGEST_BYTES = 16
_PIECE = 1 << 20  # bytes read at a time
_COLUMNS = (("high", "<u8"), ("low", "<u8"), ("shard", "<u4"), ("row", "<u4"))
_RECORD_BYTES = sum(np.dtype(dtype).itemsize for _, dtype in _COLUMNS)


class KeyIndex:
    """Places of records by key: N keys in ascending order, in memory or mapped.

    A key that comes twice has the place that was given first.
    """

    def __init__(
        self,
        high: UInt64[np.ndarray, " N"],
        low: UInt64[np.ndarray, " N"],
        shard: UInt32[np.ndarray, " N"],
        row: UInt32[np.ndarray, " N"],
    ) -> None:
        """Use `from_keys` or `read`."""
        self._high, self._low, self._shard, self._row = high, low, shard, row

    @classmethod
    def from_keys(cls, keys: Sequence[UInt8[np.ndarray, "n 16"]]) -> "KeyIndex":
        """Build the index of shards from the keys of each, in the order of its rows."""
        counts = [len(of_shard) for of_shard in keys]
        high, low = _halves(np.concatenate([np.zeros((0, KEY_BYTES), np.uint8), *keys]))
        order = np.lexsort((low, high))  # stable: of equal keys the first stays first
        shard = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
        rows = [np.arange(n, dtype=np.uint32) for n in counts]
        row = np.concatenate([np.zeros(0, np.uint32), *rows])
        return cls(*(column[order] for column in (high, low, shard, row)))

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._high)

    def keys(self) -> UInt8[np.ndarray, "N 16"]:
        """Return all keys, in ascending order."""
        halves = np.stack([self._high, self._low], axis=1).astype(">u8")
        return halves.view(np.uint8)

    def locate(self, key: bytes) -> tuple[int, int] | None:
        """Return shard and row of the record of a key; None if there is none."""
        if len(key) != KEY_BYTES:
            return None
        high, low = struct.unpack(">QQ", key)
        at = int(self._high.searchsorted(np.uint64(high)))
        if at == len(self._high) or int(self._high[at]) != high:
            return None
        if int(self._low[at]) != low:  # keys of equal first halves
            end = int(self._high.searchsorted(np.uint64(high), side="right"))
            at += int(self._low[at:end].searchsorted(np.uint64(low)))
            if at == end or int(self._low[at]) != low:
                return None
        return int(self._shard[at]), int(self._row[at])

    def contains(self, keys: UInt8[np.ndarray, "n 16"]) -> Bool[np.ndarray, " n"]:
        """Return for each key if there is a record of it."""
        if not len(self):
            return np.zeros(len(keys), bool)
        high, low = _halves(keys)
        at = np.minimum(self._high.searchsorted(high), len(self) - 1)
        equal = self._high[at] == high
        matches = equal & (self._low[at] == low)
        for item in np.flatnonzero(equal & ~matches):  # keys of equal first halves
            matches[item] = self.locate(keys[item].tobytes()) is not None
        return matches


def _halves(keys: UInt8[np.ndarray, "n 16"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and last 8 bytes of keys as numbers that sort as they do."""
    halves = np.ascontiguousarray(keys, np.uint8).reshape(-1, KEY_BYTES).view(">u8")
    return halves[:, 0].astype(np.uint64), halves[:, 1].astype(np.uint64)


def write(
    path: str | os.PathLike,
    index: KeyIndex,
    *,
    checksum: str,
    shard_bytes: Sequence[int],
) -> None:
    """Write an index file atomically.

    Args:
      path: of the file.
      index: of the cache.
      checksum: of its manifest, 32 hex digits.
      shard_bytes: size of each shard's file.
    """
    header = _HEADER.pack(
        _MAGIC, _VERSION, len(shard_bytes), len(index), bytes.fromhex(checksum)
    )
    columns = [index._high, index._low, index._shard, index._row]
    data = b"".join(
        [
            header,
            np.asarray(shard_bytes, "<u8").tobytes(),
            *(
                np.asarray(column, dtype).tobytes()
                for column, (_, dtype) in zip(columns, _COLUMNS, strict=True)
            ),
        ]
    )
    digest = hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
    files.write_atomically(path, data + digest)


def read(
    path: str | os.PathLike, *, checksum: str, num_shards: int, num_records: int
) -> tuple[KeyIndex, UInt64[np.ndarray, " shards"]] | None:
    """Map an index file into memory.

    Args:
      path: of the file.
      checksum: of the cache's manifest, 32 hex digits.
      num_shards: of the cache.
      num_records: of the cache.

    Returns:
      The index, and the size of each shard's file; None where there is no file, or it
      is damaged, or of another manifest.
    """
    expected = _HEADER.pack(
        _MAGIC, _VERSION, num_shards, num_records, bytes.fromhex(checksum)
    )
    start = _HEADER.size + 8 * num_shards
    size = start + _RECORD_BYTES * num_records + _DIGEST_BYTES
    try:
        file = untrusted.open_plain(pathlib.Path(path))
    except (OSError, ValueError):
        return None
    with file:
        if os.fstat(file.fileno()).st_size != size:
            return None
        if file.read(_HEADER.size) != expected:
            return None
        if not _is_sound(file, expected, size):
            return None
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    shard_bytes = np.frombuffer(mapped, "<u8", num_shards, _HEADER.size)
    columns = []
    for _, dtype in _COLUMNS:
        columns.append(np.frombuffer(mapped, dtype, num_records, start))
        start += columns[-1].nbytes
    return KeyIndex(*columns), shard_bytes


def _is_sound(file: io.FileIO, header: bytes, size: int) -> bool:
    """Compare the digest at the end of a file, whose header was read."""
    digest = hashlib.blake2b(header, digest_size=_DIGEST_BYTES)
    left = size - len(header) - _DIGEST_BYTES
    while left:
        piece = file.read(min(left, _PIECE))
        if not piece:
            return False
        digest.update(piece)
        left -= len(piece)
    return file.read(_DIGEST_BYTES) == digest.digest()
