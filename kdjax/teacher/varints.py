"""Base-128 integers, as protobuf and Riegeli write them."""

import numpy as np
from jaxtyping import UInt8, UInt64

MAX_BYTES = 10  # of one integer
_PIECE = 1 << 20  # bytes decoded at a time


def decode_one(data: bytes | memoryview, start: int) -> tuple[int, int]:
    """Decode the unsigned integer that starts at `start`; return it and its end.

    Raises:
      ValueError: the data end before it does, or it takes more than 64 bits.
    """
    value = 0
    for place, byte in enumerate(bytes(data[start : start + MAX_BYTES])):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value & (1 << 64) - 1, start + place + 1
    raise ValueError("an integer without an end")


def decode_all(data: bytes | memoryview) -> UInt64[np.ndarray, " n"]:
    """Decode integers that fill the data; thousands of them, so without a loop.

    Raises:
      ValueError: the last one has no end, or one takes more than 64 bits.
    """
    octets = np.frombuffer(data, np.uint8)
    pieces = [np.zeros(0, np.uint64)]
    while len(octets) > _PIECE:  # some 50 bytes of memory are needed for each
        last = np.flatnonzero(octets[:_PIECE] < 128)
        end = int(last[-1]) + 1 if len(last) else _PIECE
        pieces.append(_decode(octets[:end]))
        octets = octets[end:]
    return np.concatenate([*pieces, _decode(octets)])


def _decode(octets: UInt8[np.ndarray, " n"]) -> UInt64[np.ndarray, " m"]:
    if not len(octets):
        return np.zeros(0, np.uint64)
    ends = np.flatnonzero(octets < 128)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = np.diff(np.append(starts, len(octets)))
    if not len(ends) or ends[-1] != len(octets) - 1 or lengths.max() > MAX_BYTES:
        raise ValueError("an integer without an end")
    place = np.arange(len(octets)) - np.repeat(starts, lengths)
    parts = (octets & 127).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(parts, starts)


def encode(value: int) -> bytes:
    """Encode an unsigned integer."""
    octets = bytearray()
    while value > 127:
        octets.append(value & 127 | 128)
        value >>= 7
    return bytes([*octets, value])
