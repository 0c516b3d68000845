"""File formats of other tools, read and written as checked sequences.

`FORMATS` has the formats by name of the tool, and the fields that each of them lacks.

Shape suffixes: L tokens of a sequence, M pairs of a row as stored, K pairs of a row.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Int32, Shaped

from kdjax.runtime import limits
from kdjax.teacher.importers import formats
from kdjax.teacher.importers.files import Path, refuse
from kdjax.teacher.importers.formats import RawSequence

_LEAST = -1e38  # nats: what float32 holds, with room
_SLACK = 1e-3  # nats above 0 that are taken for rounding
_GROUP = 256  # sequences of a parquet row group


class ImportedSequence(NamedTuple):
    """One sequence of L tokens; row i is the teacher's distribution for token i.

    A row that the origin does not give is empty: all its ids are -1. The first one is,
    unless the sequence begins within a text.
    """

    token_ids: Int32[np.ndarray, "L"] | None  # None: the origin does not store them
    ids: Int32[np.ndarray, "L K"]  # by descending log-probability, -1 in unused slots
    log_probs: Float32[np.ndarray, "L K"]  # nats, -inf in unused slots
    target_log_probs: Float32[np.ndarray, "L"]  # of the tokens; NaN where unknown


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A tool's file format for teacher outputs."""

    read_raw: Callable[[Path], Iterator[RawSequence]]
    # Fields that are unknown for some token: "tail_mass" (the stored probabilities are
    # normalised over the stored ids alone), "entropy", "target_log_probs".
    missing: tuple[str, ...]
    write: Callable[[Path, Iterable[ImportedSequence]], None] | None = None

    def read(
        self, path: Path, *, k: int, vocab_size: int, num_rows: int = 0
    ) -> Iterator[ImportedSequence]:
        """Yield the checked sequences of a file, or of a folder's files by name.

        Args:
          path: the file or folder.
          k: most probable pairs per row; where there are fewer, slots stay unused.
          vocab_size: ids from here on have no token: their mass is left out.
          num_rows: every id is below it; 0 = vocab_size.

        Raises:
          ValueError: file, line or row, the value found and the one needed; raised
            when the sequence is reached.
        """
        if k < 1:
            raise ValueError(f"k={k} pairs of each row: use 1 or more")
        for raw in self.read_raw(path):
            yield _checked(raw, k, vocab_size, max(num_rows, vocab_size))


def _checked(
    raw: RawSequence, k: int, vocab_size: int, num_rows: int
) -> ImportedSequence:
    """Check and sort the rows of a sequence and cut them to k pairs."""
    where, ids_LM, log_probs_LM, token_ids, targets = raw
    if ids_LM.size > limits.MAX_SEQUENCE_PAIRS:
        needed = f"at most {limits.MAX_SEQUENCE_PAIRS} pairs"
        refuse(where, f"{ids_LM.size} pairs", needed)
    if targets is None:
        targets = np.full(len(ids_LM), math.nan)
    too_high = f"a log-probability of at most {_SLACK}"
    beyond_LM = (log_probs_LM < _LEAST) & (log_probs_LM > -math.inf)
    wrong_LM = np.isnan(log_probs_LM) | (log_probs_LM > _SLACK) | beyond_LM
    _refuse_first(where, wrong_LM, log_probs_LM, too_high)
    wrong = (targets > _SLACK) | ((targets < _LEAST) & (targets > -math.inf))
    _refuse_first(where, wrong[:, None], targets[:, None], too_high)
    used_LM = log_probs_LM > -math.inf
    in_vocabulary = f"an id from 0 to {num_rows - 1}"
    wrong_LM = used_LM & ((ids_LM < 0) | (ids_LM >= num_rows))
    _refuse_first(where, wrong_LM, ids_LM, in_vocabulary)
    if token_ids is not None:
        wrong = (token_ids < 0) | (token_ids >= num_rows)
        _refuse_first(where, wrong[:, None], token_ids[:, None], in_vocabulary)
    # Unused slots get numbers of their own, or they would be taken for repetitions.
    sorted_LM = np.sort(np.where(used_LM, ids_LM, -1 - np.arange(ids_LM.shape[1])))
    again = sorted_LM[:, 1:] == sorted_LM[:, :-1]
    _refuse_first(where, again, sorted_LM[:, 1:], "each id once in a row")

    padding_LM = used_LM & (ids_LM >= vocab_size)
    if padding_LM.any():
        # What rows without a token have is spread over the others.
        mass_L = np.exp(np.where(padding_LM, log_probs_LM, -math.inf)).sum(1)
        rest_L = np.log1p(-np.minimum(mass_L, 1 - 1e-6))
        used_LM &= ~padding_LM
        log_probs_LM = np.where(used_LM, log_probs_LM - rest_L[:, None], -math.inf)
        targets = targets - rest_L

    order_LK = np.argsort(-log_probs_LM, axis=1, kind="stable")[:, :k]
    log_probs_LK = np.take_along_axis(log_probs_LM, order_LK, 1)
    ids_LK = np.take_along_axis(np.where(used_LM, ids_LM, -1), order_LK, 1)
    unused = ((0, 0), (0, k - order_LK.shape[1]))
    return ImportedSequence(
        token_ids=None if token_ids is None else token_ids.astype(np.int32),
        ids=np.pad(ids_LK, unused, constant_values=-1).astype(np.int32),
        log_probs=np.pad(
            np.minimum(log_probs_LK, 0), unused, constant_values=-math.inf
        ).astype(np.float32),
        target_log_probs=np.minimum(targets, 0).astype(np.float32),
    )


def _refuse_first(
    where: str,
    wrong_LM: Bool[np.ndarray, "L M"],
    values_LM: Shaped[np.ndarray, "L M"],
    needed: str,
) -> None:
    rows, columns = np.nonzero(wrong_LM)
    if len(rows):
        row = rows[0]
        refuse(f"{where}, token {row}", str(values_LM[row, columns[0]]), needed)


def write_vllm(path: Path, sequences: Iterable[ImportedSequence]) -> None:
    """Write dumps of vLLM's offline outputs, one JSON object per line.

    The rank of a token that is not among the stored ones is unknown: the lowest one
    that leaves a gap is written.

    Raises:
      ValueError: a sequence lacks something that every such dump has.
    """
    with open(path, "w", encoding="utf-8") as file:
        for number, rows in enumerate(sequences):
            where = f"sequence {number}"
            token_ids = _known_tokens(where, rows)
            answers: list[dict[str, Any] | None] = [None]
            for row in range(1, len(token_ids)):
                used = rows.ids[row] >= 0
                ids = rows.ids[row][used].tolist()
                log_probs = rows.log_probs[row][used].tolist()
                ranks = list(range(1, len(ids) + 1))
                target = float(rows.target_log_probs[row])
                if not ids or (token_ids[row] not in ids and math.isnan(target)):
                    needed = "a row, and the log-probability of its token"
                    refuse(f"{where}, token {row}", f"{len(ids)} pairs", needed)
                if token_ids[row] not in ids:
                    ids.append(token_ids[row])
                    log_probs.append(target)
                    ranks.append(len(ids) + 1)
                answers.append(
                    {
                        str(i): {"logprob": p, "rank": rank, "decoded_token": None}
                        for i, p, rank in zip(ids, log_probs, ranks, strict=True)
                    }
                )
            answer = {"prompt_token_ids": token_ids, "prompt_logprobs": answers}
            file.write(json.dumps(answer) + "\n")


def write_distillkit(path: Path, sequences: Iterable[ImportedSequence]) -> None:
    """Write a parquet file of DistillKit's raw rows.

    An unused slot becomes id 0 at -inf. Log-probabilities of tokens that are not among
    the stored pairs are lost: the format has no field for them.

    Raises:
      ValueError: a sequence without token ids, or with a row for its first token.
    """
    names = {
        "input_ids": pa.list_(pa.uint64()),
        "token_ids": pa.list_(pa.list_(pa.int64())),
        "top_values": pa.list_(pa.list_(pa.float32())),
    }
    schema = pa.schema(list(names.items()))
    numbered = iter(enumerate(sequences))
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(itertools.islice(numbered, _GROUP)):
            samples = [
                {
                    "input_ids": _known_tokens(f"sequence {number}", rows),
                    "token_ids": np.maximum(rows.ids[1:], 0).tolist(),
                    "top_values": rows.log_probs[1:].tolist(),
                }
                for number, rows in group
            ]
            writer.write_table(pa.Table.from_pylist(samples, schema))


def _known_tokens(where: str, rows: ImportedSequence) -> list[int]:
    if rows.token_ids is None or (rows.ids[0] >= 0).any():
        needed = "token ids, and no row for the first of them"
        refuse(where, "a sequence from within a text", needed)
    return rows.token_ids.tolist()


# Entropy needs every probability, and no format has more than the largest.
FORMATS: dict[str, Format] = {
    # Without token ids in the file the tokens outside the top k are known all the same.
    "vllm": Format(read_raw=formats.read_vllm, missing=("entropy",), write=write_vllm),
    "sglang": Format(read_raw=formats.read_sglang, missing=("entropy",)),
    # A token that is not among the stored pairs has no log-probability anywhere.
    "distillkit": Format(
        read_raw=formats.read_distillkit,
        missing=("entropy", "target_log_probs"),
        write=write_distillkit,
    ),
    # The file says neither what its numbers are normalised over nor what came.
    "axolotl": Format(
        read_raw=formats.read_axolotl,
        missing=("tail_mass", "entropy", "target_log_probs"),
    ),
    # Logits without their sum over the vocabulary: only ratios are known.
    "maxtext": Format(
        read_raw=formats.read_maxtext,
        missing=("tail_mass", "entropy", "target_log_probs"),
    ),
}
