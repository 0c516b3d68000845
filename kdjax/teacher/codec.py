"""Encoding of one teacher record as bytes: `encode` and `decode`, two pure functions.

A record is a header (uint32 T, uint32 K, uint16 S, uint16 R) and the frames below, in
this order; `planes` says how arrays and ids become frames. Arrays of tokens are stored
column by column (token index fastest). docs/cache.md has the whole format.

  top_k    K T codes as 2 planes; K T ids; the log of the mass stored at temperature 1;
           scalars with the log of that at each temperature (0 at 1) instead of log Z
  sampled  S R T numbers of distinct ids as 2 planes; of those the counts, 2 planes, and
           the ids, both by (S, R, T) and descending count; scalars
  dense    K T log-probabilities as 4 planes; scalars
  scalars  T target ids; then log Z for each temperature, log p of the target, entropy
           for each temperature, as planes of 3 bytes

Codes are differences, modulo 2^16, along K of round(C log(1 + x)), x = -log p in nats
and C = 96: neighbouring codes are (1 + x) / C nats apart, fine where the mass is and
coarse in the tail, and sixteen bits reach every float32. A decoded row is shifted so
that it has its exact mass at temperature 1, and log Z_T is what gives it its exact mass
at T: at every declared temperature the tail mass 1 - sum p is that of the teacher, not
of the rounding. The rounding costs about E[(1 + x)^2] / (24 C^2) nats of KL at
temperature 1, measured 3e-5 on text.

Shapes: T target tokens, K pairs (sampled: distinct ids at most), S temperatures, R
rounds of draws, V vocabulary, X scalars of a token.
"""

import struct
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt16

from kdjax.runtime import limits
from kdjax.teacher import byte_planes
from kdjax.teacher.byte_planes import IdCoder

_GRID = 96.0  # C, codes per unit of log(1 + x)
_EMPTY = 0xFFFF  # code of an unused slot (log-probability -inf)
_HEADER = struct.Struct("<IIHH")  # T, K, S, R
_MAGNITUDES = np.minimum(  # code -> x
    np.expm1(np.arange(_EMPTY + 1) / _GRID), np.finfo(np.float32).max
).astype(np.float32)
_MAGNITUDES[_EMPTY] = np.inf

# What `decode` raises on bytes that `encode` did not write.
DECODE_ERRORS = (struct.error, ValueError)


class Record(NamedTuple):
    """The teacher's distribution for each of T target tokens (nats).

    Attributes:
      ids: vocabulary ids, -1 in unused slots. top_k: [T, K] by descending
        probability; sampled: [T, S, R, K], the distinct ids of each round by
        descending count; dense: empty, column v is id v.
      log_probs: log-probabilities at temperature 1 under the full softmax, never
        renormalised; -inf in unused slots. sampled: empty.
      target_ids: the realised tokens.
      target_log_probs: their log-probability at temperature 1.
      log_z: log sum_v p_v^(1/T) for each declared temperature T.
      entropy: entropy of the teacher at each declared temperature.
      counts: how often each id was drawn; empty unless sampled.
      kind: "top_k", "sampled" or "dense".
    """

    ids: Int32[np.ndarray, "T ..."]
    log_probs: Float32[np.ndarray, "T K"]
    target_ids: Int32[np.ndarray, "T"]
    target_log_probs: Float32[np.ndarray, "T"]
    log_z: Float32[np.ndarray, "T S"]
    entropy: Float32[np.ndarray, "T S"]
    counts: Int32[np.ndarray, "T S R K"] = np.zeros((0, 0, 0, 0), np.int32)
    kind: str = "top_k"

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.target_ids)


def encode(record: Record, coder: IdCoder, *, temperatures: tuple[float, ...]) -> bytes:
    """Encode a record; equal records give equal bytes.

    Args:
      record: its `log_z` has a column for each of `temperatures`.
      coder: of the shard.
      temperatures: those declared when labelling.

    Raises:
      ValueError: a NaN, a row without any stored pair, an id outside the
        vocabulary, or fields whose shapes do not agree.
    """
    validate(record, vocab_size=coder.vocab_size)
    sizes = Sizes(
        record.num_tokens,
        record.ids.shape[-1] if record.kind == "sampled" else record.log_probs.shape[1],
        record.log_z.shape[1],
        record.ids.shape[2] if record.kind == "sampled" else 0,
    )
    check_size(sizes, dense=record.kind == "dense")
    log_z_TS = record.log_z
    if record.kind == "sampled":
        parts = _pack_draws(record, coder)
    elif record.kind == "dense":
        parts = [byte_planes.pack_floats(record.log_probs.T.ravel(), num_bytes=4)]
    else:
        codes_TK = _quantize(record.log_probs)
        deltas_TK = np.diff(codes_TK, axis=1, prepend=np.uint16(0))  # modulo 2^16
        # An unused slot is marked by its code; the id written there is the cheapest.
        free = coder.order[0] if len(coder.order) else 0
        ids_TK = np.where(codes_TK == _EMPTY, free, record.ids)
        parts = [
            byte_planes.pack_integers(deltas_TK.T.ravel(), num_bytes=2),
            coder.pack(ids_TK.T.ravel()),
        ]
        log_z_TS = _log_masses(record.log_probs, temperatures)
        log_z_TS[:, 1:] -= record.log_z
    scalars_TX = np.concatenate(
        [log_z_TS, record.target_log_probs[:, None], record.entropy], axis=1
    )
    parts += [
        coder.pack(record.target_ids),
        byte_planes.pack_floats(scalars_TX.T.ravel(), num_bytes=3),
    ]
    return _HEADER.pack(*sizes) + b"".join(parts)


class Sizes(NamedTuple):
    """Header of an encoded record."""

    num_tokens: int
    num_pairs: int
    num_temperatures: int
    num_rounds: int


def read_sizes(data: bytes) -> Sizes:
    """Read the header of an encoded record.

    Raises:
      ValueError: there is none, or its record is beyond the limits.
    """
    if len(data) < _HEADER.size:
        raise ValueError(f"{len(data)} bytes are no record")
    sizes = Sizes(*_HEADER.unpack_from(data))
    check_size(sizes)
    return sizes


def check_size(sizes: Sizes, *, dense: bool = True) -> None:
    """Check that a record of these sizes is one that is stored.

    Raises:
      ValueError: it is too large.
    """
    num_tokens, num_pairs, num_temperatures, num_rounds = sizes
    num_values = num_tokens * max(num_pairs, 2 * num_temperatures + 2)
    limit = limits.MAX_DENSE if dense else limits.MAX_PAIRS
    if num_rounds:
        num_values *= num_temperatures * num_rounds
        limit = limits.MAX_PAIRS
    if num_values > limit:
        raise ValueError(
            f"a record of {num_tokens} target tokens with {num_values} numbers, at "
            f"most {limit} are stored of one: lower data.max_target, cache.k or "
            "cache.num_draws, or use cache.kind='top_k'"
        )


def decode(
    data: bytes, coder: IdCoder, *, kind: str, temperatures: tuple[float, ...]
) -> Record:
    """Decode a record of `encode`, exact to the rounding described above.

    Raises:
      ValueError: the bytes are no such record, or beyond the limits.
    """
    sizes = read_sizes(data)
    check_size(sizes, dense=kind == "dense")
    num_tokens, num_pairs, num_temperatures, num_rounds = sizes
    if (kind == "sampled") != (num_rounds > 0):
        raise ValueError(f"{num_rounds} rounds of draws in a record of kind {kind!r}")
    if num_temperatures != len(temperatures):
        raise ValueError(f"{num_temperatures} temperatures, {temperatures} are wanted")
    reader = byte_planes.FrameReader(data, _HEADER.size)
    num_stored = num_tokens * num_pairs
    num_scalars = 1 + 2 * num_temperatures + (kind == "top_k")
    log_probs_TK = np.zeros((num_tokens, 0), np.float32)
    ids = np.zeros((num_tokens, 0), np.int32)
    counts = np.zeros((0, 0, 0, 0), np.int32)
    if kind == "sampled":
        shape = (num_temperatures, num_rounds, num_tokens, num_pairs)
        ids, counts = _unpack_draws(reader, coder, shape)
    elif kind == "dense":
        values = byte_planes.unpack_floats(reader, num_stored, num_bytes=4)
        log_probs_TK = _rows(values, num_tokens, num_pairs)
    else:
        deltas = byte_planes.unpack_integers(reader, num_stored, num_bytes=2)
        deltas_KT = deltas.reshape(num_pairs, num_tokens)
        codes_TK = np.cumsum(deltas_KT, axis=0, dtype=np.uint16).T
        log_probs_TK = -_MAGNITUDES[codes_TK]
        ids = _rows(coder.unpack(reader, num_stored), num_tokens, num_pairs)
        ids[codes_TK == _EMPTY] = -1
    target_ids = coder.unpack(reader, num_tokens)
    scalars = byte_planes.unpack_floats(reader, num_tokens * num_scalars, num_bytes=3)
    reader.check_end()
    scalars_TX = _rows(scalars, num_tokens, num_scalars)
    num_sums = num_temperatures + (kind == "top_k")
    is_target_X = np.arange(num_scalars) == num_sums
    if not (np.isfinite(scalars_TX) | (np.isneginf(scalars_TX) & is_target_X)).all():
        raise ValueError("numbers that are not finite")
    if kind == "dense" and not (log_probs_TK < np.inf).all():
        raise ValueError("log-probabilities that are not finite")
    log_z_TS = scalars_TX[:, :num_sums]
    if kind == "top_k":
        if not np.isfinite(log_probs_TK[:, :1]).all():
            raise ValueError("a target token without a pair")
        log_probs_TK += log_z_TS[:, :1] - _log_masses(log_probs_TK, ())
        log_z_TS = _log_masses(log_probs_TK, temperatures)[:, 1:] - log_z_TS[:, 1:]
        log_z_TS[:, [t == 1.0 for t in temperatures]] = 0.0  # by definition
    return Record(
        ids=ids,
        log_probs=log_probs_TK,
        counts=counts,
        target_ids=target_ids,
        target_log_probs=scalars_TX[:, num_sums],
        log_z=log_z_TS,
        entropy=scalars_TX[:, num_sums + 1 :],
        kind=kind,
    )


def _rows(values: np.ndarray, num_tokens: int, num_columns: int) -> np.ndarray:
    """Return [T, columns] from values that were stored column by column."""
    return np.ascontiguousarray(values.reshape(num_columns, num_tokens).T)


def _pack_draws(record: Record, coder: IdCoder) -> list[bytes]:
    counts_SRTK = record.counts.transpose(1, 2, 0, 3)
    used_SRTK = counts_SRTK > 0
    num_used = used_SRTK.sum(axis=-1)
    return [
        byte_planes.pack_integers(num_used.ravel(), num_bytes=2),
        byte_planes.pack_integers(counts_SRTK[used_SRTK], num_bytes=2),
        coder.pack(record.ids.transpose(1, 2, 0, 3)[used_SRTK]),
    ]


def _unpack_draws(
    reader: byte_planes.FrameReader, coder: IdCoder, shape: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    num_used = byte_planes.unpack_integers(reader, int(np.prod(shape[:3])), num_bytes=2)
    if num_used.max(initial=0) > shape[3]:
        raise ValueError(f"{num_used.max()} ids drawn {shape[3]} times")
    used_SRTK = np.arange(shape[3]) < num_used.reshape(*shape[:3], 1)
    num = int(num_used.sum(dtype=np.int64))
    counts = np.zeros(shape, np.int32)
    counts[used_SRTK] = byte_planes.unpack_integers(reader, num, num_bytes=2)
    ids = np.full(shape, -1, np.int32)
    ids[used_SRTK] = coder.unpack(reader, num)
    order = (2, 0, 1, 3)
    return ids.transpose(order), counts.transpose(order)


def validate(record: Record, *, vocab_size: int) -> None:
    """Raise ValueError unless `record` can be encoded."""
    num_tokens = record.num_tokens
    if not (
        record.target_log_probs.shape == (num_tokens,)
        and record.log_z.shape == record.entropy.shape
        and record.log_z.shape[0] == num_tokens
    ):
        raise ValueError(
            f"target_log_probs {record.target_log_probs.shape}, log_z "
            f"{record.log_z.shape} and entropy {record.entropy.shape} must be [T], "
            f"[T, S] and [T, S] with T={num_tokens}"
        )
    for name in ("target_log_probs", "log_z", "entropy"):
        if np.isnan(getattr(record, name)).any():
            raise ValueError(
                f"{name} of a teacher record holds NaN: the teacher's logits overflowed"
            )
    _check_ids(record.target_ids, "target_ids", vocab_size)
    if record.kind == "sampled":
        _check_draws(record, vocab_size)
    else:
        _check_rows(record, vocab_size)


def _check_rows(record: Record, vocab_size: int) -> None:
    ids_TK, log_probs_TK = record.ids, record.log_probs
    num_tokens, num_pairs = log_probs_TK.shape
    dense = record.kind == "dense"
    if dense and num_pairs != vocab_size:
        raise ValueError(
            f"log_probs of a dense record has {num_pairs} columns, the vocabulary "
            f"{vocab_size} ids: give one column per id"
        )
    if num_tokens != record.num_tokens or not (
        dense or ids_TK.shape == log_probs_TK.shape
    ):
        raise ValueError(
            f"ids {ids_TK.shape} and log_probs {log_probs_TK.shape} differ, or have "
            f"not T={record.num_tokens} rows"
        )
    if np.isnan(log_probs_TK).any():
        raise ValueError(
            "log_probs of a teacher record holds NaN: the teacher's logits overflowed"
        )
    if not np.isfinite(log_probs_TK.max(axis=1, initial=-np.inf)).all():
        raise ValueError("a target token has no finite log-probability: store k >= 1")
    if not dense:
        _check_ids(ids_TK[np.isfinite(log_probs_TK)], "ids", vocab_size)


def _check_draws(record: Record, vocab_size: int) -> None:
    shape = (record.num_tokens, record.log_z.shape[1])
    if record.ids.shape != record.counts.shape or record.ids.shape[:2] != shape:
        raise ValueError(
            f"ids {record.ids.shape} and counts {record.counts.shape} must be "
            f"[T, S, R, K] with (T, S)={shape}"
        )
    if record.ids.shape[-1] > 0xFFFF:
        raise ValueError(f"{record.ids.shape[-1]} slots of draws: draw at most 65535")
    totals = record.counts.sum(axis=-1)
    if (np.diff(record.counts, axis=-1) > 0).any() or len(np.unique(totals)) > 1:
        raise ValueError(
            "counts must descend and have one sum, the number of draws: "
            f"sums from {totals.min()} to {totals.max()}"
        )
    if record.counts.min(initial=0) < 0 or record.counts.max(initial=0) > 0xFFFF:
        raise ValueError("counts must lie in 0..65535: draw less")
    _check_ids(record.ids[record.counts > 0], "ids", vocab_size)


def _check_ids(ids: np.ndarray, name: str, vocab_size: int) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(
            f"{name} from {ids.min()} to {ids.max()} leave the vocabulary of "
            f"{vocab_size}: give the vocabulary the teacher was run with"
        )


def _quantize(log_probs_TK: Float32[np.ndarray, "T K"]) -> UInt16[np.ndarray, "T K"]:
    """Round log-probabilities to codes; one above 0 by float error becomes 0."""
    empty_TK = np.isneginf(log_probs_TK)
    magnitudes_TK = np.maximum(-np.where(empty_TK, 0, log_probs_TK), 0)
    codes_TK = np.rint(_GRID * np.log1p(magnitudes_TK, dtype=np.float64))
    return np.where(empty_TK, _EMPTY, codes_TK).astype(np.uint16)


def _log_masses(
    log_probs_TK: Float32[np.ndarray, "T K"], temperatures: tuple[float, ...]
) -> Float32[np.ndarray, "T 1+S"]:
    """Return log sum_k p_k^(1/t) for t = 1 and each temperature, summed in float64.

    A temperature of 1 among the others has 0, which takes no room.
    """
    peak_T1 = log_probs_TK.max(axis=1, keepdims=True)
    below_TK = log_probs_TK - peak_T1
    sums = [
        np.zeros(len(below_TK))
        if column and t == 1.0
        else peak_T1[:, 0] / t
        + np.log(np.exp(below_TK / np.float32(t)).sum(axis=1, dtype=np.float64))
        for column, t in enumerate((1.0, *temperatures))
    ]
    return np.stack(sums, axis=1).astype(np.float32)
