"""Decoders of packed log-probabilities (DistillKit) and tf.Example messages.

Compressed log-probabilities (DistillKit) are, for each row of k in descending order:
the first exact_k as floats; coefficients of a curve through the others; and for each
residual bin a scale and the quantised distances of its values from that curve. With
delta encoding the numbers are differences from the one before. All little endian; ids
and quantised values are bit strings, the most significant bit first, filled up to
whole bytes at the end of each bin or row.

Shape suffixes: T rows, B bytes of a row, K pairs of a row.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import yaml
from jaxtyping import Float32, Int64, Shaped, UInt8

from kdjax.runtime import files, limits, untrusted
from kdjax.teacher import varints

_DTYPES: dict[str, np.dtype] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
}
_TERMS = {"sqrt": np.sqrt, "exp": np.exp}
_MAX_POWER = 100  # of a term
_MAX_BITS = 63  # of a bit string: they are unpacked into int64
_MAX_VOCABULARY, _MAX_PAIRS = 2**31, 2**20  # of compressed rows
_FIXED = {1: 8, 5: 4}  # protobuf wire type -> bytes
_FEATURE = {1: "bytes", 2: "float", 3: "int64"}  # field of tf.train.Feature


class ResidualBin(NamedTuple):
    """Quantised residuals of consecutive log-probabilities."""

    scale_dtype: np.dtype
    element_bits: int
    num_elements: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Compression:
    """Contents of `compression_config.yaml`; the names are the file's."""

    d: int  # vocabulary
    k: int  # pairs per row
    exact_k: int  # of them stored as floats
    exact_dtype: np.dtype = _DTYPES["float32"]
    polynomial_terms: tuple[int | str, ...] = ()  # powers of t, "sqrt", "exp"
    term_dtype: np.dtype = _DTYPES["float32"]
    residual_bins: tuple[ResidualBin, ...] = ()
    delta_encoding: bool = True
    normalize_t: bool = False  # t from 0 to 1, not 0, 1, 2, ...

    @property
    def id_bits(self) -> int:
        """Bits of an id; in float32 as the writer computes it."""
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def id_bytes(self) -> int:
        """Bytes of a row of ids."""
        return math.ceil(self.k * self.id_bits / 8)

    @property
    def log_prob_bytes(self) -> int:
        """Bytes of a row of log-probabilities."""
        return (
            self.exact_k * self.exact_dtype.itemsize
            + len(self.polynomial_terms) * self.term_dtype.itemsize
            + sum(
                scale.itemsize + math.ceil(bits * count / 8)
                for scale, bits, count in self.residual_bins
            )
        )


def read_compression(path: str | os.PathLike) -> Compression:
    """Read a `compression_config.yaml`.

    Raises:
      ValueError: naming the file, the value found and the one needed.
    """
    path = pathlib.Path(path)
    if not files.exists(path):
        raise ValueError(f"{path} is missing: compressed rows cannot be read without")
    text = untrusted.read_bytes(path, max_bytes=limits.MAX_SETTINGS_BYTES)
    if b"&" in text or b"*" in text:  # of such, a short text makes endless values
        raise ValueError(f"{path}: found an anchor or alias, needed plain YAML")
    try:
        values = yaml.safe_load(text.decode())
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {untrusted.quote(str(error))}") from None
    try:
        return _compression(values)
    except KeyError as error:
        name = untrusted.quote(str(error.args[0]))
        raise ValueError(f"{path}: {name} is missing or unknown") from None
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {untrusted.quote(str(error))}") from None


def _compression(values: Any) -> Compression:
    if not isinstance(values, dict):
        raise TypeError(f"found {type(values).__name__}, needed names and values")
    # How the residuals were rounded (error_diffusion) changes nothing for a reader.
    known = [field.name for field in dataclasses.fields(Compression)]
    if unknown := sorted(map(str, set(values) - {*known, "error_diffusion"})):
        raise ValueError(f"found {', '.join(unknown)}, needed {', '.join(known)} only")
    bins = tuple(
        ResidualBin(
            scale_dtype=_DTYPES[entry["scale_dtype"]],
            element_bits=int(entry["element_bits"]),
            num_elements=int(entry["num_elements"]),
        )
        for entry in values["residual_bins"] or ()
    )
    result = Compression(
        d=int(values["d"]),
        k=int(values["k"]),
        exact_k=int(values["exact_k"]),
        exact_dtype=_DTYPES[values.get("exact_dtype", "float32")],
        polynomial_terms=tuple(values.get("polynomial_terms") or ()),
        term_dtype=_DTYPES[values.get("term_dtype", "float32")],
        residual_bins=bins,
        delta_encoding=bool(values.get("delta_encoding", True)),
        normalize_t=bool(values.get("normalize_t", False)),
    )
    for term in result.polynomial_terms:
        if not (isinstance(term, str) and term in _TERMS) and not (
            type(term) is int and 0 <= term <= _MAX_POWER
        ):
            raise ValueError(f"polynomial_terms has {term!r}, needed >= 0, sqrt or exp")
    if not (
        1 < result.d <= _MAX_VOCABULARY
        and 0 < result.k <= _MAX_PAIRS
        and 0 <= result.exact_k <= result.k
    ):
        raise ValueError(
            f"found d={result.d}, k={result.k}, exact_k={result.exact_k}, "
            "needed d > 1, k > 0 and exact_k from 0 to k"
        )
    if sum(count for _, _, count in bins) > result.k - result.exact_k:
        raise ValueError(f"residual_bins hold more than k - exact_k of k={result.k}")
    if any(not 0 < bits <= _MAX_BITS or count < 1 for _, bits, count in bins):
        raise ValueError(f"residual_bins need 1 to {_MAX_BITS} bits, 1 element or more")
    return result


def unpack_bits(
    data_TB: UInt8[np.ndarray, "T B"], num_bits: int, count: int
) -> Int64[np.ndarray, "T {count}"]:
    """Unpack `count` integers of `num_bits` from each row, highest bits first."""
    bits = np.unpackbits(data_TB, axis=1, count=count * num_bits)
    bits_TKb = bits.reshape(len(data_TB), count, num_bits)
    values_TK = np.zeros((len(data_TB), count), np.int64)
    for bit in range(num_bits):
        values_TK = values_TK << 1 | bits_TKb[:, :, bit]
    return values_TK


def decode_log_probs(
    data_TB: UInt8[np.ndarray, "T B"], compression: Compression
) -> Float32[np.ndarray, "T K"]:
    """Decode the log-probabilities of compressed rows, in nats.

    Summed in float32. A curve of 16-bit coefficients is rounded as the writer rounds
    it, because the residuals are distances from the rounded one.

    Args:
      data_TB: rows of `compression.log_prob_bytes` bytes.
      compression: of the file.
    """
    at, num_rows = 0, len(data_TB)

    def take(num_bytes: int) -> UInt8[np.ndarray, "T B"]:
        nonlocal at
        at += num_bytes
        return np.ascontiguousarray(data_TB[:, at - num_bytes : at])

    def take_floats(count: int, dtype: np.dtype) -> Shaped[np.ndarray, "T {count}"]:
        flat = np.frombuffer(take(count * dtype.itemsize).tobytes(), dtype)
        return flat.reshape(num_rows, count)

    exact_k, k = compression.exact_k, compression.k
    log_probs_TK = np.zeros((num_rows, k), np.float32)
    log_probs_TK[:, :exact_k] = take_floats(exact_k, compression.exact_dtype)
    curve_TK = log_probs_TK[:, exact_k:]
    if compression.polynomial_terms:
        coefficients = take_floats(
            len(compression.polynomial_terms), compression.term_dtype
        )
        curve_TK[:] = _curve(coefficients, k - exact_k, compression)
    start = 0
    for scale_dtype, num_bits, count in compression.residual_bins:
        scale = take_floats(1, scale_dtype).astype(np.float32)
        values = unpack_bits(take(math.ceil(num_bits * count / 8)), num_bits, count)
        # One bit is a sign; more count up from the lowest of their signed range.
        steps = values * 2 - 1 if num_bits == 1 else values - (1 << (num_bits - 1))
        curve_TK[:, start : start + count] += steps.astype(np.float32) * scale
        start += count
    if compression.delta_encoding:
        return np.cumsum(log_probs_TK, axis=1, dtype=np.float32)
    return log_probs_TK


def _curve(
    coefficients: Shaped[np.ndarray, "T terms"], count: int, compression: Compression
) -> Float32[np.ndarray, "T {count}"]:
    """Return sum of coefficient times term(t) at `count` points t."""
    dtype = compression.term_dtype
    wide = np.float64 if dtype.itemsize == 8 else np.float32
    t = (
        np.linspace(0, 1, count, dtype=wide)
        if compression.normalize_t
        else np.arange(count, dtype=wide)
    )
    total = np.zeros((len(coefficients), count), wide)
    with np.errstate(over="ignore", invalid="ignore"):  # NaN is refused by the reader
        for column, term in enumerate(compression.polynomial_terms):
            point = _TERMS[term](t) if isinstance(term, str) else t**term
            product = point.astype(dtype) * coefficients[:, column, None]
            total += product.astype(wide)
        return total.astype(dtype).astype(np.float32)


def parse_example(data: bytes) -> dict[str, np.ndarray | list[bytes]]:
    """Parse the features of a serialised tf.Example: float32, int64 or bytes lists.

    Raises:
      ValueError: the bytes are no tf.Example, or beyond the limits.
    """
    if len(data) > limits.MAX_EXAMPLE_BYTES:
        raise ValueError(
            f"{len(data)} bytes of a tf.Example, {limits.MAX_EXAMPLE_BYTES} are read"
        )
    fields = _FieldReader().fields
    features = [value for number, _, value in fields(memoryview(data)) if number == 1]
    result: dict[str, np.ndarray | list[bytes]] = {}
    for message in features:
        for number, _, entry in fields(_message(message)):
            if number != 1:
                continue
            pair = {key: value for key, _, value in fields(_message(entry))}
            name = bytes(_message(pair.get(1))).decode(errors="replace")
            if name in result:
                raise ValueError(f"feature {untrusted.quote(name)} comes twice")
            result[name] = _feature(_message(pair.get(2, memoryview(b""))), fields)
    if not result:
        raise ValueError("no features")
    return result


Fields = Callable[[memoryview], Iterator[tuple[int, int, int | memoryview]]]


def _feature(data: memoryview, fields: Fields) -> np.ndarray | list[bytes]:
    values: np.ndarray | list[bytes] = np.zeros(0, np.int64)
    for number, _, message in fields(data):
        kind = _FEATURE.get(number)
        items = [(w, v) for n, w, v in fields(_message(message)) if n == 1]
        if kind == "bytes":
            values = [bytes(_message(value)) for _, value in items]
        elif kind == "float":
            parts = [_floats(_message(value)) for _, value in items]
            values = np.concatenate([np.zeros(0, np.float32), *parts])
        elif kind == "int64":
            parts = [
                np.asarray([value], np.uint64).view(np.int64)
                if wire == 0
                else varints.decode_all(_message(value)).view(np.int64)
                for wire, value in items
            ]
            values = np.concatenate([np.zeros(0, np.int64), *parts])
    return values


class _FieldReader:
    """Reader of the fields of protobuf messages, so many of one record."""

    def __init__(self) -> None:
        self._left = limits.MAX_EXAMPLE_FIELDS

    def fields(self, data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
        """Yield (field number, wire type, integer or bytes) of a protobuf message."""
        at = 0
        while at < len(data):
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"more than {limits.MAX_EXAMPLE_FIELDS} fields")
            tag, at = varints.decode_one(data, at)
            wire = tag & 7
            if wire == 0:
                value, at = varints.decode_one(data, at)
                yield tag >> 3, wire, value
                continue
            if wire == 2:
                size, at = varints.decode_one(data, at)
            elif wire in _FIXED:
                size = _FIXED[wire]
            else:
                raise ValueError(f"wire type {wire}")
            if size > len(data) - at:
                raise ValueError("a message cut short")
            yield tag >> 3, wire, data[at : at + size]
            at += size


def _message(value: Any) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError(f"{value!r} for a message")
    return value


def _floats(data: memoryview) -> Float32[np.ndarray, " n"]:
    if len(data) % 4:
        raise ValueError(f"{len(data)} bytes of floats")
    return np.frombuffer(data, "<f4")
