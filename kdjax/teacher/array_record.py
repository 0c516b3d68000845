"""Reader of ArrayRecord files that believes no size that a file declares.

An ArrayRecord file is a Riegeli/records file: chunks of records, one after another,
interrupted by a block header of 24 bytes at every multiple of 64 KiB. The last block
holds the postscript, a chunk that says where the footer is; the footer is a chunk that
says where the others are. Every number is checked against the size of the file before
memory is taken for it, and nothing is decompressed beyond the limits.

Source: https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md
and https://github.com/google/array_record/blob/main/cpp/layout.proto.
"""

import os
import pathlib
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from kdjax.runtime import limits, untrusted
from kdjax.teacher import byte_planes, varints

_BLOCK, _BLOCK_HEADER = 1 << 16, 24
_USABLE = _BLOCK - _BLOCK_HEADER
# Hash of the header, size and hash of the data, type (low byte) and number of records,
# size of the records. The hashes are not those of a standard library.
_CHUNK = struct.Struct("<QQQQQ")
_SIMPLE = ord("r")
_COMPRESSIONS = {0: "none", ord("z"): "zstd", ord("b"): "brotli", ord("s"): "snappy"}
_MAGIC = 0x71930E704FDAE05E
_TAGS = (8, 16, 24)  # of a footer's message: offset, size, number of records


class Chunks(NamedTuple):
    """Place and size of the chunks of a file, as its footer says."""

    offsets: Int64[np.ndarray, " C"]
    sizes: Int64[np.ndarray, " C"]  # bytes of the records
    num_records: Int64[np.ndarray, " C"]


class ArrayRecordReader:
    """Random access to the records of a file; safe under threads."""

    def __init__(self, path: str | os.PathLike, chunks: Chunks | None = None) -> None:
        """Open a file.

        Args:
          path: of the file.
          chunks: its `chunks`, where they are known; None = read the footer.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is no whole ArrayRecord file.
        """
        self.path = pathlib.Path(path)
        self._file = untrusted.open_plain(path)
        self._size = os.fstat(self._file.fileno()).st_size
        self.chunks = self._read_footer() if chunks is None else chunks

    def __del__(self) -> None:
        """Close the file, when the last reader of it is done."""
        if file := getattr(self, "_file", None):
            file.close()

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._size

    def num_records(self) -> int:
        """Return the number of records of a file with one record per chunk."""
        return len(self.chunks.offsets)

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """Read records of a file with one record per chunk, uncompressed.

        Raises:
          ValueError: there is no such record, or it is not as the footer says.
        """
        return [self._read_one(row) for row in rows]

    def iter_records(self) -> Iterator[bytes]:
        """Read all records in order, compressed or not; as `iter_chunks`."""
        for records in self.iter_chunks():
            yield from records

    def iter_chunks(self) -> Iterator[list[bytes]]:
        """Read the records of all chunks in order, compressed or not.

        Raises:
          ValueError: a chunk that is not as it says.
        """
        for offset, size, num in zip(*map(np.ndarray.tolist, self.chunks), strict=True):
            records = self._read_chunk(offset)
            if len(records) != num or sum(map(len, records)) != size:
                raise ValueError(f"the chunk at {offset} is not as the footer says")
            yield records

    def _read_one(self, row: int) -> bytes:
        if not 0 <= row < len(self.chunks.offsets):
            raise ValueError(f"record {row} of {len(self.chunks.offsets)}")
        size = int(self.chunks.sizes[row])
        encoded = varints.encode(size)
        before = b"\0" + varints.encode(len(encoded)) + encoded
        data = self._read_logical(
            int(self.chunks.offsets[row]), _CHUNK.size + len(before) + size
        )
        _, data_size, _, kind, decoded = _CHUNK.unpack_from(data)
        start = _CHUNK.size + len(before)
        if (data_size, kind, decoded, data[_CHUNK.size : start]) != (
            len(before) + size,
            1 << 8 | _SIMPLE,
            size,
            before,
        ):
            raise ValueError(f"record {row} is not as the footer says")
        return data[start:]

    def _read_footer(self) -> Chunks:
        if self._size % _BLOCK or self._size < 2 * _BLOCK:
            raise ValueError(f"{self._size} bytes")
        places = self._read_chunk(self._size - _BLOCK)
        place = varints.decode_all(places[0]) if places else np.zeros(0)
        if place.tolist()[::2] != [8, 16] or int(place[3]) != _MAGIC:
            raise ValueError("it has no postscript")
        values, num_chunks = self._footer_values(int(place[1]))
        if len(values) != 2 * len(_TAGS) * num_chunks:
            raise ValueError("its footer is damaged")
        fields = values.reshape(num_chunks, len(_TAGS), 2)
        if (fields[:, :, 0] != np.array(_TAGS, np.uint64)).any():
            raise ValueError("its footer is damaged")
        if (fields[:, :, 1] >= np.uint64(1 << 62)).any():
            raise ValueError("its footer names places out of the file")
        offsets, sizes, num_records = fields[:, :, 1].astype(np.int64).T.copy()
        ascending = (np.diff(offsets, append=self._size) > 0).all()
        if not (ascending and (num_records > 0).all()):
            raise ValueError("its footer names places out of the file")
        return Chunks(offsets, sizes, num_records)

    def _footer_values(self, offset: int) -> tuple[np.ndarray, int]:
        """Return the integers of all messages but the first, and their number."""
        data, num, size = self._read_raw(offset)
        if not 0 < num <= limits.MAX_SHARD_RECORDS + 2:  # itself, and an index
            raise ValueError(
                f"{num} chunks, {limits.MAX_SHARD_RECORDS} records of a file are read"
            )
        sizes, values = _decompress(data, num, size)
        # A message holds at most three integers of ten bytes and their tags.
        if (sizes[1:] > np.uint64(33)).any():
            raise ValueError("its footer is damaged")
        return varints.decode_all(values[int(sizes[0]) :]), num - 1

    def _read_chunk(self, offset: int) -> list[bytes]:
        """Read the records of the chunk at `offset`."""
        sizes, values = _decompress(*self._read_raw(offset))
        ends = np.cumsum(sizes, dtype=np.int64).tolist()
        starts = [0, *ends[:-1]]
        return [values[a:b] for a, b in zip(starts, ends, strict=True)]

    def _read_raw(self, offset: int) -> tuple[bytes, int, int]:
        """Return data, number of records and their size of the chunk at `offset`."""
        header = self._read_logical(offset, _CHUNK.size)
        _, data_size, _, kind, decoded = _CHUNK.unpack(header)
        if kind & 0xFF != _SIMPLE:
            raise ValueError(f"a chunk of type {kind & 0xFF} at {offset}")
        if data_size > self._size - offset:
            raise ValueError(f"the chunk at {offset} leaves the file")
        data = self._read_logical(offset, _CHUNK.size + data_size)[_CHUNK.size :]
        return data, kind >> 8, decoded

    def _read_logical(self, offset: int, num_bytes: int) -> bytes:
        """Read `num_bytes` from `offset`, without the block headers among them."""
        if not 0 <= offset < self._size or num_bytes > limits.MAX_ENTRY_BYTES:
            raise ValueError(f"{num_bytes} bytes at {offset} of {self._size}")
        num_headers = (num_bytes + (offset + _USABLE - 1) % _BLOCK) // _USABLE
        end = offset + num_bytes + num_headers * _BLOCK_HEADER
        if end > self._size:
            raise ValueError(f"{num_bytes} bytes at {offset} leave the file")
        stored = os.pread(self._file.fileno(), end - offset, offset)
        if len(stored) != end - offset:
            raise ValueError(f"{num_bytes} bytes at {offset} leave the file")
        if not num_headers:
            return stored
        first = -offset % _BLOCK
        parts = [stored[:first]]
        for start in range(first, len(stored), _BLOCK):
            parts.append(stored[start + _BLOCK_HEADER : start + _BLOCK])
        return b"".join(parts)


def _decompress(data: bytes, num: int, size: int) -> tuple[np.ndarray, bytes]:
    """Return the sizes and the bytes of the records of a simple chunk."""
    name = _COMPRESSIONS.get(data[0] if data else -1, "an unknown method")
    if name not in ("none", "zstd"):
        raise ValueError(
            f"it is compressed with {name}: write it again with zstd, or uncompressed"
        )
    if size > limits.MAX_ENTRY_BYTES or num > limits.MAX_ENTRY_BYTES:
        raise ValueError(f"a chunk of {num} records with {size} bytes")
    length, start = varints.decode_one(data, 1)
    if length > len(data) - start:
        raise ValueError("the sizes of a chunk leave it")
    packed_sizes, values = data[start : start + length], data[start + length :]
    if name == "zstd":
        most = min(varints.MAX_BYTES * num, limits.MAX_ENTRY_BYTES)
        packed_sizes = _unpack(packed_sizes, most)
        values = _unpack(values, size)
    sizes = varints.decode_all(packed_sizes)
    # The largest first: their sum must not overflow.
    if (
        len(sizes) != num
        or (sizes > np.uint64(size)).any()
        or int(sizes.sum(dtype=np.uint64)) != size
        or len(values) != size
    ):
        raise ValueError("a chunk does not hold what its header says")
    return sizes, values


def _unpack(data: bytes, max_bytes: int) -> bytes:
    size, start = varints.decode_one(data, 0)
    if size > max_bytes:
        raise ValueError(f"{size} bytes compressed, {max_bytes} are allowed")
    return byte_planes.decompress(data[start:], size)
