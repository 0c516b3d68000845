"""Readers of other tools' teacher outputs, one function per format.

Some tools store at a token the distribution for that token, some the one for the next
token. Here row i is the distribution for token i. Numbers are passed on as stored;
`convert` checks them, sorts them and cuts them to size.

Shape suffixes: L tokens of a sequence, T rows as stored, M pairs of a row as stored, B
bytes.
"""

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int64, Shaped, UInt8

from kdjax.runtime import limits
from kdjax.teacher.importers import encodings, files
from kdjax.teacher.importers.files import Path, refuse

Pairs = Sequence[tuple[int, float]]  # (id, log-probability)

_LARGEST = 2**31 - 1  # id
_VLLM_MINUS_INFINITY = -9999.0  # what its server writes for -inf, which JSON lacks
_AXOLOTL = ("logprobs", "target_token_ids")
_MAXTEXT: dict[str, type[np.generic]] = {
    "inputs": np.int64,
    "top_k_indices": np.int64,
    "top_k_logits": np.float32,
}
_INTS, _INT_ROWS = pa.list_(pa.int64()), pa.list_(pa.list_(pa.int64()))
_FLOAT_ROWS, _BYTE_ROWS = (pa.list_(pa.list_(t)) for t in (pa.float64(), pa.uint8()))
_RAW = {"input_ids": _INTS, "token_ids": _INT_ROWS, "top_values": _FLOAT_ROWS}
_COMPRESSED = {
    "input_ids": _INTS,
    "bytepacked_indices": _BYTE_ROWS,
    "compressed_logprobs": _BYTE_ROWS,
}


class RawSequence(NamedTuple):
    """One sequence with the numbers as stored."""

    where: str  # file and line, row or record, for errors
    ids: Int64[np.ndarray, "L M"]
    log_probs: Float64[np.ndarray, "L M"]  # nats; -inf: an unused slot
    token_ids: Int64[np.ndarray, "L"] | None = None
    target_log_probs: Float64[np.ndarray, "L"] | None = None  # NaN where unknown


def read_vllm(path: Path) -> Iterator[RawSequence]:
    """Read outputs of vLLM with `prompt_logprobs`, one JSON object per line.

    An object is a dumped `RequestOutput` or an answer of the HTTP server, which has a
    sequence in each choice (completions) or in itself (chat). Entry i is for token i,
    over the whole vocabulary.
    """
    for file in files.files(path, ".jsonl"):
        for where, answer in files.json_objects(file):
            alone = answer.get("prompt_logprobs") is not None
            parts = [answer] if alone else answer.get("choices")
            if not isinstance(parts, list) or not parts:
                needed = "prompt_logprobs, or choices that have it"
                refuse(where, sorted(answer), needed)
            for number, part in enumerate(parts):
                yield _vllm(
                    where if alone else f"{where} choice {number}", part, answer
                )


def _vllm(where: str, part: Any, answer: dict[str, Any]) -> RawSequence:
    rows = _list(where, part, "prompt_logprobs")
    values = part.get("prompt_token_ids") or answer.get("prompt_token_ids")
    token_ids = None if values is None else _integers(where, values, len(rows))
    _first_is_null(where, rows[0])
    best: list[Pairs] = [()]
    targets = [math.nan]
    for row in range(1, len(rows)):
        place = f"{where}, token {row}"
        if not isinstance(rows[row], dict) or not rows[row]:
            refuse(place, rows[row], "entries by token id")
        entries = [_vllm_entry(place, *item) for item in rows[row].items()]
        entries.sort(key=operator.itemgetter(2))
        # The realised token is there even if it is not among the best; then its rank
        # leaves a gap. Otherwise only its id says which entry it is.
        outside = [e for number, e in enumerate(entries, 1) if e[2] > number]
        if len(outside) > 1:
            refuse(place, [e[2] for e in entries], "ranks 1, 2, ... with one gap only")
        best.append([e[:2] for e in entries if e not in outside])
        targeted = outside
        if token_ids is not None:
            targeted = [e for e in entries if e[0] == token_ids[row]]
            if not targeted:
                refuse(place, [e[0] for e in entries], f"token {token_ids[row]} too")
        targets.append(targeted[0][1] if targeted else math.nan)
    return RawSequence(where, *_padded(where, best), token_ids, np.asarray(targets))


def _vllm_entry(where: str, key: str, value: Any) -> tuple[int, float, int]:
    """Return (id, log-probability, rank)."""
    try:
        log_prob, rank = value["logprob"], value["rank"]
        # Of every pair of a dump: without calls of `_number` and the like.
        if type(log_prob) is not float:
            log_prob = _number(log_prob)
        if type(rank) is not int:
            raise TypeError(rank)
        i = int(key) if key.isdecimal() and key.isascii() else _parse_id(key)
        return i, -math.inf if log_prob == _VLLM_MINUS_INFINITY else log_prob, rank
    except (KeyError, OverflowError, TypeError, ValueError):
        refuse(where, {key: value}, "an id with numbers logprob and rank")


def read_sglang(path: Path) -> Iterator[RawSequence]:
    """Read answers of SGLang's `/generate`, an object or a list of them per line.

    Requested with `return_logprob`, `top_logprobs_num` and `logprob_start_len=0`; a
    later start gives the later tokens only. Entry i is for token i, over the whole
    vocabulary.
    """
    for file in files.files(path, ".jsonl"):
        for where, answer in files.json_objects(file):
            meta = answer.get("meta_info")
            own = _list(where, meta, "input_token_logprobs")
            top = _list(where, meta, "input_top_logprobs")
            if len(top) != len(own):
                refuse(where, f"{len(top)} input_top_logprobs", f"{len(own)}: tokens")
            _first_is_null(where, top[0])
            tokens = []
            pairs: list[Pairs] = [()]
            for row, (token, entries) in enumerate(zip(own, top, strict=True)):
                place = f"{where}, token {row}"
                tokens.append(_sglang_pair(place, token, first=row == 0))
                if row and not (isinstance(entries, list) and entries):
                    refuse(place, entries, "a list of [logprob, id, text]")
                if row:
                    pairs.append([_sglang_pair(place, entry) for entry in entries])
            token_ids = _integers(where, [token[0] for token in tokens], len(own))
            targets = np.asarray([token[1] for token in tokens], np.float64)
            yield RawSequence(where, *_padded(where, pairs), token_ids, targets)


def _sglang_pair(where: str, entry: Any, *, first: bool = False) -> tuple[int, float]:
    """Return (id, log-probability); the first token has none."""
    try:
        log_prob = math.nan if first and entry[0] is None else _number(entry[0])
        return _integer(entry[1]), log_prob
    except (IndexError, KeyError, OverflowError, TypeError, ValueError):
        refuse(where, entry, "[logprob, id, text]")


def read_axolotl(path: Path) -> Iterator[RawSequence]:
    """Read data sets of axolotl's KD plugin, both versions, jsonl or parquet.

    Tokens are not stored: row i stands for the i-th of the last L tokens of the text,
    and null or an empty list for a row that was not captured. The plugin normalises the
    numbers over the stored ids and changes temperature whenever it reads them; the file
    does not say what they are normalised over.
    """
    for file in files.files(path, ".jsonl", ".parquet"):
        for where, sample in _axolotl_samples(file):
            rows = _list(where, sample, "logprobs")
            pairs: list[Pairs]
            for i, row in enumerate(rows):
                if row is not None and not isinstance(row, list):
                    refuse(f"{where}, token {i}", row, "a list, or null")
            if sample.get("target_token_ids") is None:
                pairs = [
                    [_axolotl_pair(f"{where}, token {i}", e) for e in row or ()]
                    for i, row in enumerate(rows)
                ]
            else:
                ids = _list(where, sample, "target_token_ids")
                if len(ids) != len(rows):
                    refuse(where, f"{len(ids)} target_token_ids", f"{len(rows)}: rows")
                pairs = [
                    _axolotl_row(f"{where}, token {i}", *lists)
                    for i, lists in enumerate(zip(ids, rows, strict=True))
                ]
            yield RawSequence(where, *_padded(where, pairs))


def _axolotl_samples(file: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.suffix != ".parquet":
        yield from files.json_objects(file)
        return
    names = files.column_names(file)
    if "logprobs" not in names:
        refuse(str(file), f"columns {', '.join(sorted(names))}", "logprobs")
    columns = {name: None for name in _AXOLOTL if name in names}
    for where, row in files.parquet_rows(file, columns):
        yield where, {name: value.as_py() for name, value in row.items()}


def _axolotl_pair(where: str, entry: Any) -> tuple[int, float]:
    try:
        name, _, number = entry["token"].partition(":")
        if name != "token_id":
            raise ValueError(name)
        return _parse_id(number), _number(entry["logprob"])
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        needed = '{"token": "token_id:<id>", "logprob": number}, or target_token_ids'
        refuse(where, entry, needed)


def _axolotl_row(where: str, ids: Any, log_probs: Any) -> Pairs:
    try:
        pairs = zip(ids or (), log_probs or (), strict=True)
        return [(_integer(i), _number(p)) for i, p in pairs]
    except (OverflowError, TypeError, ValueError):
        refuse(where, (ids, log_probs), "as many ids as log-probabilities")


def read_distillkit(path: Path) -> Iterator[RawSequence]:
    """Read parquet files of DistillKit, compressed or raw.

    Row t is for token t + 1, over the whole vocabulary; a last row that stands for a
    token behind the sequence is left out. Compression loses a little: probabilities
    may add up to a little more than 1.
    """
    for file in files.files(path, ".parquet"):
        names = files.column_names(file)
        columns = _RAW if names >= set(_RAW) else _COMPRESSED
        if not names >= set(columns):
            needed = f"{', '.join(_COMPRESSED)}; or {', '.join(_RAW)}"
            refuse(str(file), f"columns {', '.join(sorted(names))}", needed)
        compression = None
        if columns is _COMPRESSED:
            settings = file.with_name("compression_config.yaml")
            compression = encodings.read_compression(settings)
        for where, row in files.parquet_rows(file, columns):
            token_ids, ids, log_probs = (scalar.values for scalar in row.values())
            if token_ids is None or token_ids.null_count or not len(token_ids):
                refuse(where, "null or no input_ids", "token ids")
            tokens_L = token_ids.to_numpy()
            ids_TM, log_probs_TM = _matrix(where, ids), _matrix(where, log_probs)
            if compression is not None:
                ids_TM, log_probs_TM = _decompressed(
                    where, ids_TM, log_probs_TM, compression
                )
            if ids_TM.shape != log_probs_TM.shape:
                refuse(where, f"{log_probs_TM.shape} values", f"{ids_TM.shape}, as ids")
            if len(ids_TM) not in (len(tokens_L) - 1, len(tokens_L)):
                needed = f"{len(tokens_L) - 1}: one for each token but the first"
                refuse(where, f"{len(ids_TM)} rows", needed)
            raw = _next_token(where, tokens_L, ids_TM, log_probs_TM)
            is_target_LM = (raw.ids == tokens_L[:, None]) & ~np.isneginf(raw.log_probs)
            targets = np.where(is_target_LM, raw.log_probs, 0).sum(1)
            targets[~is_target_LM.any(1)] = math.nan
            yield raw._replace(target_log_probs=targets)


def _matrix(where: str, rows: pa.ListArray | None) -> Shaped[np.ndarray, "T M"]:
    if rows is None or rows.null_count or rows.flatten().null_count:
        refuse(where, "null", "rows of numbers")
    widths = sorted(set(rows.value_lengths().to_pylist())) or [0]
    if len(widths) > 1:
        refuse(where, f"rows of {widths} values", "as many in each")
    return rows.flatten().to_numpy().reshape(len(rows), widths[0])


def _decompressed(
    where: str,
    ids_TB: UInt8[np.ndarray, "T B"],
    log_probs_TB: UInt8[np.ndarray, "T B"],
    compression: encodings.Compression,
) -> tuple[np.ndarray, np.ndarray]:
    widths = (ids_TB.shape[1], log_probs_TB.shape[1])
    needed = (compression.id_bytes, compression.log_prob_bytes)
    if len(ids_TB) and widths != needed:
        refuse(
            where, f"rows of {widths} bytes", f"{needed}, as compression_config.yaml"
        )
    return (
        encodings.unpack_bits(ids_TB, compression.id_bits, compression.k),
        encodings.decode_log_probs(log_probs_TB, compression).astype(np.float64),
    )


def read_maxtext(path: Path) -> Iterator[RawSequence]:
    """Read ArrayRecord files of tf.Example that MaxText saves for a teacher.

    Row t holds logits for token t + 1, which are normalised here over the stored ids:
    their sum over the vocabulary is not stored. Examples packed into one record
    (`inputs_segmentation`, 0 is padding) come one after another; the last row of each
    stands for a token that is not among the inputs, and is left out.
    """
    for file in files.files(path, ".array_record"):
        for where, record in files.records(file):
            inputs, ids_TM, logits_TM, segments = _maxtext_arrays(where, record)
            with np.errstate(invalid="ignore"):  # NaN is refused later
                top_T1 = logits_TM.max(1, keepdims=True)
                sums_T1 = np.exp(logits_TM - top_T1).sum(1, keepdims=True)
                log_probs_TM = logits_TM - top_T1 - np.log(sums_T1)
            edges = np.flatnonzero(np.diff(segments)) + 1
            for part in np.split(np.arange(len(inputs)), edges):
                if segments[part[0]] != 0:
                    yield _next_token(
                        where, inputs[part], ids_TM[part], log_probs_TM[part]
                    )


def _maxtext_arrays(where: str, record: bytes) -> tuple[np.ndarray, ...]:
    """Return inputs [T], ids [T, M], logits [T, M] and segments [T]."""
    try:
        example = encodings.parse_example(record)
    except ValueError as error:
        refuse(where, str(error), "a tf.Example; pickles and safetensors are not read")
    for name, kind in _MAXTEXT.items():
        if getattr(example.get(name), "dtype", None) != kind:
            refuse(where, sorted(example), f"{name}, a list of {kind.__name__}")
    inputs, ids, logits = (np.asarray(example[name]) for name in _MAXTEXT)
    length = len(inputs)
    if (
        not length
        or not len(ids)
        or len(ids) != len(logits)
        or len(ids) % max(length, 1)
    ):
        actual = f"{len(ids)} top_k_indices, {len(logits)} top_k_logits"
        refuse(where, actual, f"the same number of both for each of {length} inputs")
    segments = example.get("inputs_segmentation", np.ones(length, np.int64))
    if not isinstance(segments, np.ndarray) or segments.shape != inputs.shape:
        refuse(where, f"{len(segments)} inputs_segmentation", f"{length}, as inputs")
    shape = (length, -1)
    return inputs, ids.reshape(shape), logits.reshape(shape).astype(float), segments


def _next_token(
    where: str, token_ids: np.ndarray, ids_TM: np.ndarray, log_probs_TM: np.ndarray
) -> RawSequence:
    """Move rows to the next token, which they predict; the first token gets none."""
    width, rows = ids_TM.shape[1], len(token_ids) - 1
    return RawSequence(
        where,
        np.concatenate([np.full((1, width), -1), ids_TM[:rows]]),
        np.concatenate([np.full((1, width), -math.inf), log_probs_TM[:rows]]),
        token_ids,
    )


def _padded(where: str, rows: Sequence[Pairs]) -> tuple[np.ndarray, np.ndarray]:
    """Return ids [L, M] and log-probabilities [L, M] of rows of unequal lengths."""
    shape = len(rows), max(map(len, rows))
    if shape[0] * shape[1] > limits.MAX_SEQUENCE_PAIRS:
        needed = f"at most {limits.MAX_SEQUENCE_PAIRS} pairs"
        refuse(where, f"{shape[0]} rows of {shape[1]}", needed)
    ids_LM, log_probs_LM = np.full(shape, -1, np.int64), np.full(shape, -math.inf)
    for row, pairs in enumerate(rows):
        if pairs:
            ids, log_probs = zip(*pairs, strict=True)
            if max(map(abs, ids)) > _LARGEST:
                refuse(f"{where}, token {row}", repr(ids), "ids of 32 bits")
            ids_LM[row, : len(pairs)] = ids
            log_probs_LM[row, : len(pairs)] = log_probs
    return ids_LM, log_probs_LM


def _number(value: Any) -> float:
    """Return a JSON number as a float.

    Raises:
      TypeError: it is something else, a text or a truth value say.
    """
    if type(value) not in (int, float):
        raise TypeError(value)
    return float(value)


def _integer(value: Any) -> int:
    """Return a JSON integer; raises as `_number`."""
    if type(value) is not int:
        raise TypeError(value)
    return value


def _parse_id(text: str) -> int:
    """Return the integer that a text is; Python's own reads "1_0" and more as one."""
    if not (text.isascii() and text.removeprefix("-").isdigit()):
        raise ValueError(text)
    return int(text)


def _first_is_null(where: str, row: Any) -> None:
    if row:
        refuse(f"{where}, token 0", row, "null: nothing comes before the first token")


def _list(where: str, values: Any, name: str) -> list[Any]:
    items = values.get(name) if isinstance(values, dict) else None
    if not isinstance(items, list) or not items:
        names = sorted(values) if isinstance(values, dict) else values
        refuse(where, names if items is None else items, f"a list {name}, not empty")
    return items


def _integers(where: str, values: Any, length: int) -> Int64[np.ndarray, " L"]:
    try:
        integers = np.asarray([_integer(value) for value in values], np.int64)
    except (OverflowError, TypeError):
        refuse(where, values, "token ids")
    if len(integers) != length:
        refuse(where, f"{length} rows", f"{len(integers)}: one for each token")
    return integers
