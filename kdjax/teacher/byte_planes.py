"""Arrays as compressed byte planes, and vocabulary ids in few bits.

The pieces a record is built of (`codec` says in which order); all integers little
endian. Every function that packs has its counterpart that unpacks.

A frame is a uint32 length and a Zstandard frame of that many bytes. A plane is one
byte of each element of an array, in the array's order: numbers are cut into planes
because their bytes have different statistics.

An id is coded by its rank in `order`, the ids of the shard from the most frequent;
an id that is not there has rank len(order) + id. A rank is a symbol, one byte, and some
low bits:

  symbols 0..31     rank = symbol
  symbols 32..63    4 bits:  rank = 32 + 16 (symbol - 32) + bits
  symbols 64..159   8 bits:  rank = 544 + 256 (symbol - 64) + bits
  symbols 160..255  16 bits: rank = 25,120 + 65,536 (symbol - 160) + bits

Symbols are a plane. The low bits are a frame: first all of 4 bits, two to a byte, the
earlier one low; then all of 8, then all of 16 bits.
"""

import functools
import struct
import threading

import numpy as np
import zstandard
from jaxtyping import Float32, Int32, Integer, UInt8, UInt16

_LENGTH = struct.Struct("<I")
_LEVEL = 6  # of Zstandard: beyond it a record is not smaller
_threads = threading.local()  # Zstandard contexts must not be shared by threads


class FrameReader:
    """Sequential reader of the frames of a bytes object."""

    def __init__(self, data: bytes, offset: int) -> None:
        """Start reading at `offset`."""
        self._data, self._offset = data, offset

    def next_frame(self, size: int) -> bytes:
        """Return the contents of the next frame, exactly `size` bytes."""
        if self._offset + _LENGTH.size > len(self._data):
            raise ValueError("a frame is missing")
        (length,) = _LENGTH.unpack_from(self._data, self._offset)
        start = self._offset + _LENGTH.size
        self._offset = start + length
        if self._offset > len(self._data):
            raise ValueError(f"a frame of {length} bytes leaves the record")
        return decompress(self._data[start : self._offset], size)

    def next_plane(self, size: int) -> UInt8[np.ndarray, "size"]:
        """Return a plane of exactly `size` bytes."""
        return np.frombuffer(self.next_frame(size), np.uint8)

    def check_end(self) -> None:
        """Raise ValueError unless all bytes were read."""
        if self._offset != len(self._data):
            raise ValueError(
                f"{len(self._data)} bytes, {self._offset} of them are frames"
            )


def decompress(data: bytes, size: int) -> bytes:
    """Decompress a Zstandard frame of exactly `size` bytes; no more is ever made.

    Raises:
      ValueError: it declares or holds another number, is damaged, or something follows.
    """
    if not hasattr(_threads, "decompressor"):
        _threads.decompressor = zstandard.ZstdDecompressor()
    try:
        declared = zstandard.frame_content_size(data)
        if declared not in (size, -1):  # -1: it does not say
            raise ValueError(f"a frame of {declared} bytes, {size} are wanted")
        content = _threads.decompressor.decompress(
            data, max_output_size=max(size, 1), allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ValueError(f"a damaged frame: {error}") from None
    if len(content) != size:
        raise ValueError(f"a frame of {len(content)} bytes, {size} are wanted")
    return content


def pack_frame(data: bytes) -> bytes:
    """Compress into one frame; equal data gives equal bytes."""
    if not hasattr(_threads, "compressor"):
        _threads.compressor = zstandard.ZstdCompressor(
            level=_LEVEL, write_content_size=True, write_checksum=False
        )
    packed = _threads.compressor.compress(data)
    return _LENGTH.pack(len(packed)) + packed


def pack_integers(values: Integer[np.ndarray, "N"], *, num_bytes: int) -> bytes:
    """Pack unsigned integers into `num_bytes` planes, lowest first, a frame each."""
    rows = np.ascontiguousarray(values, "<u4").view(np.uint8).reshape(-1, 4)
    return b"".join(pack_frame(rows[:, i].tobytes()) for i in range(num_bytes))


def unpack_integers(
    reader: FrameReader, num: int, *, num_bytes: int
) -> Integer[np.ndarray, "N"]:
    """Unpack integers of `pack_integers`: uint16 of two planes, uint32 otherwise."""
    dtype = np.dtype("<u2" if num_bytes == 2 else "<u4")
    rows = np.zeros((num, dtype.itemsize), np.uint8)
    for i in range(num_bytes):
        rows[:, i] = reader.next_plane(num)
    return rows.view(dtype)[:, 0]


def pack_floats(values: Float32[np.ndarray, "N"], *, num_bytes: int) -> bytes:
    """Pack float32 into planes; 3 of them round to a relative error of 2^-16."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    if num_bytes == 3:  # to the nearest, ties to even; infinities and NaN stay so
        rounded = (bits + np.uint32(0x7F) + ((bits >> 8) & 1)) >> 8
        bits = np.where(np.isfinite(values), rounded, bits >> 8)
    return pack_integers(bits, num_bytes=num_bytes)


def unpack_floats(
    reader: FrameReader, num: int, *, num_bytes: int
) -> Float32[np.ndarray, "N"]:
    """Unpack floats of `pack_floats`."""
    bits = unpack_integers(reader, num, num_bytes=num_bytes)
    return (bits << np.uint32(8 * (4 - num_bytes))).view("<f4")


class IdCoder:
    """Codec of vocabulary ids with fewer bits for the frequent ones."""

    def __init__(self, order: Int32[np.ndarray, "L"], vocab_size: int) -> None:
        """Build the rank tables.

        Args:
          order: ids by descending frequency; other ids may be packed too.
          vocab_size: every id is below it.

        Raises:
          ValueError: more ids than symbols can name.
        """
        if len(order) + vocab_size > _LIMIT:
            raise ValueError(
                f"vocab_size={vocab_size} with {len(order)} ids in order exceeds "
                f"{_LIMIT}: no teacher of that vocabulary can be stored"
            )
        if len(order) and not 0 <= order.min() <= order.max() < vocab_size:
            raise ValueError(f"ids in order leave the vocabulary of {vocab_size}")
        self.order, self.vocab_size = order.astype(np.int32), vocab_size

    @classmethod
    def from_ids(cls, ids: Integer[np.ndarray, "..."], vocab_size: int) -> "IdCoder":
        """Return the coder for this sample of ids; negative ones are ignored."""
        counts = np.bincount(ids[ids >= 0].ravel(), minlength=vocab_size)
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        return cls(order, vocab_size)

    def pack(self, ids: Integer[np.ndarray, "N"]) -> bytes:
        """Pack ids into the frame of symbols and the frame of low bits."""
        symbols_V, low_V = self._codes
        symbols, low = symbols_V.take(ids), low_V.take(ids)
        widths = _WIDTHS.take(symbols)
        nibbles = low[widths == 4]
        nibbles = np.append(nibbles, [0] * (len(nibbles) % 2)).reshape(-1, 2)
        groups = (
            (nibbles[:, 0] + 16 * nibbles[:, 1]).astype(np.uint8),
            low[widths == 8].astype(np.uint8),
            low[widths == 16].astype("<u2"),
        )
        return pack_frame(symbols.tobytes()) + pack_frame(
            b"".join(group.tobytes() for group in groups)
        )

    @functools.cached_property
    def _codes(self) -> tuple[UInt8[np.ndarray, "V"], UInt16[np.ndarray, "V"]]:
        """The symbol and the low bits of every id."""
        ranks_V = len(self.order) + np.arange(self.vocab_size)
        ranks_V[self.order] = np.arange(len(self.order))
        symbols_V = np.searchsorted(_BASES, ranks_V, side="right") - 1
        low_V = ranks_V - _BASES[symbols_V]
        return symbols_V.astype(np.uint8), low_V.astype(np.uint16)

    def unpack(self, reader: FrameReader, num: int) -> Int32[np.ndarray, "N"]:
        """Unpack ids of `pack`."""
        symbols = reader.next_plane(num)
        ranks, widths = _BASES[symbols], _WIDTHS[symbols]
        rows4, rows8, rows16 = (np.flatnonzero(widths == w) for w in (4, 8, 16))
        ends = np.cumsum([(len(rows4) + 1) // 2, len(rows8), 2 * len(rows16)])
        groups = reader.next_plane(int(ends[-1]))
        packed = groups[: ends[0]]
        nibbles = np.stack([packed & 15, packed >> 4], axis=1).ravel()
        ranks[rows4] += nibbles[: len(rows4)]
        ranks[rows8] += groups[ends[0] : ends[1]]
        ranks[rows16] += groups[ends[1] :].view("<u2")
        num_known = len(self.order)
        ids = ranks - num_known
        if num_known:
            known = self.order.take(ranks, mode="clip")
            ids = np.where(ids < 0, known, ids)
        if num and not ids.max() < self.vocab_size:
            raise ValueError(f"id {ids.max()} leaves the vocabulary")
        return ids


# Symbol -> the lowest rank that has it, and how many low bits come with it.
_WIDTHS = np.repeat(np.array([0, 4, 8, 16], np.uint8), [32, 32, 96, 96])
_STARTS = np.cumsum(np.r_[0, 1 << _WIDTHS.astype(np.int32)]).astype(np.int32)
_BASES, _LIMIT = _STARTS[:-1], int(_STARTS[-1])
