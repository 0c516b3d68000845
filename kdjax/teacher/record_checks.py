"""Plausibility checks of records: probability mass, and alignment with target tokens.

Shapes: T target tokens, K stored pairs, S temperatures, R rounds.
"""

import math

import numpy as np
from jaxtyping import Bool

from kdjax.teacher.codec import Record
from kdjax.teacher.manifest import Manifest

# Codes are (1 + x) / 96 nats apart: half of it, and what the shift of a row to its
# exact mass adds at most, with a margin.
_STEP = 0.02  # times (1 + x), nats
_IMPOSSIBLE = np.log(1e-12)  # chance below which draws refute a probability
_SHIFTED = "rows may be shifted against their tokens; label or import again"


def find_error(record: Record, manifest: Manifest) -> str:
    """Return a description of the first implausible value of `record`, or ""."""
    if record.kind == "sampled":
        return _check_draws(record, manifest)
    return _check_rows(record, manifest)


def _check_rows(record: Record, manifest: Manifest) -> str:
    log_probs_TK = record.log_probs
    with np.errstate(invalid="ignore"):  # unused slots: -inf minus -inf
        ascends = (np.diff(log_probs_TK, axis=1) > 1e-3).any()
    if record.kind == "top_k" and ascends:
        return "log-probabilities do not descend"
    if "target_log_probs" in manifest.missing:
        return _check_mass(record, manifest)
    rows = np.arange(record.num_tokens)
    target_T = record.target_log_probs
    if record.kind == "dense":
        stored_T, is_stored_T = log_probs_TK[rows, record.target_ids], rows >= 0
    else:
        matches_TK = record.ids == record.target_ids[:, None]
        is_stored_T = matches_TK.any(axis=1)
        stored_T = log_probs_TK[rows, matches_TK.argmax(axis=1)]
    slack_T = _STEP * (1 - target_T)
    wrong_T = is_stored_T & (np.abs(stored_T - target_T) > slack_T)
    # A token that is not stored cannot be likelier than the least likely one that is.
    wrong_T |= ~is_stored_T & (target_T > _least_log_probs(log_probs_TK) + slack_T)
    return _token_error(
        wrong_T, "the stored row gives the token that came another"
    ) or _check_mass(record, manifest)


def _check_mass(record: Record, manifest: Manifest) -> str:
    """Return an error if the probabilities of a row sum to more than 1, or ""."""
    # Other tools round log-probabilities, some to bfloat16.
    limit = 1.02 if manifest.missing else 1.001
    for column, temperature in enumerate((1.0, *manifest.temperatures)):
        log_p_TK = record.log_probs / np.float32(temperature)
        if column:
            log_p_TK = log_p_TK - record.log_z[:, [column - 1]]
        mass_T = np.exp(log_p_TK).sum(axis=1, dtype=np.float64)
        if (mass_T > limit).any():
            return (
                f"probabilities at temperature {temperature} sum to "
                f"{mass_T.max():.4f}: no distribution"
            )
    return ""


def _least_log_probs(log_probs_TK: np.ndarray) -> np.ndarray:
    """Return each row's least stored log-probability; 0 (no limit) if not filled."""
    last_T = log_probs_TK[:, -1]
    return np.where(np.isneginf(last_T), 0.0, last_T)


def _check_draws(record: Record, manifest: Manifest) -> str:
    if "target_log_probs" in manifest.missing:
        return ""
    temperatures = np.asarray(manifest.temperatures)
    log_p_TS = record.target_log_probs[:, None] / temperatures - record.log_z
    p_TS = np.minimum(np.exp(log_p_TS), 1 - 1e-7)
    is_target = record.ids == record.target_ids[:, None, None, None]
    counts_TS = np.where(is_target, record.counts, 0).sum(axis=(2, 3))
    num = manifest.k * manifest.num_rounds
    # Log of Chernoff's bound on so few, or so many, draws.
    share_TS = np.clip(counts_TS / num, 1e-9, 1 - 1e-9)
    log_chance_TS = -num * (
        share_TS * (np.log(share_TS) - np.log(p_TS))
        + (1 - share_TS) * (np.log1p(-share_TS) - np.log1p(-p_TS))
    )
    return _token_error(
        (log_chance_TS < _IMPOSSIBLE).any(axis=1), "the draws give the token another"
    )


def _token_error(wrong_T: Bool[np.ndarray, "T"], what: str) -> str:
    if not wrong_T.any():
        return ""
    return f"{what} probability at target token {int(wrong_T.argmax())}: {_SHIFTED}"


class AlignmentCheck:
    """Test for rows that are shifted by one position against their tokens.

    Other tools store the row that predicts a token at the token, or one before: a cache
    whose rows give the next or the previous token more probability is shifted.
    """

    _MIN_TOKENS = 32  # fewer tokens give no verdict
    _MARGIN = 0.3  # nats per token: less may be chance, or a teacher that knows nothing

    def __init__(self) -> None:
        """Start without any token."""
        self._totals = np.zeros(3)  # of rows used one later, as stored, one earlier
        self._num_tokens = 0

    def add(self, record: Record) -> None:
        """Add a record (sampled: its rows at the first temperature)."""
        if record.num_tokens < 3:
            return
        for column, shift in enumerate((-1, 0, 1)):
            rows = slice(1 + shift, record.num_tokens - 1 + shift)
            self._totals[column] += _log_probs(record, rows).sum()
        self._num_tokens += record.num_tokens - 2

    def find_error(self) -> str:
        """Return a description of the shift, "" if there is none or too little data."""
        if self._num_tokens < self._MIN_TOKENS:
            return ""
        nats = (self._totals - self._totals[1]) / self._num_tokens
        best = int(nats.argmax())
        if nats[best] < self._MARGIN:
            return ""
        neighbour = ("previous", "", "next")[best]
        return (
            f"rows give their tokens {nats[best]:.2f} nats less than the rows of the "
            f"{neighbour} token would: the cache is shifted by one; label or import "
            "again"
        )


def _log_probs(record: Record, rows: slice) -> np.ndarray:
    """Return the log-probabilities of all but the end tokens under these rows."""
    targets = record.target_ids[1:-1]
    if record.kind == "dense":
        return np.maximum(record.log_probs[rows][np.arange(len(targets)), targets], -30)
    if record.kind == "sampled":
        ids, counts = record.ids[rows, 0, 0], record.counts[rows, 0, 0]
        hits = np.where(ids == targets[:, None], counts, 0).sum(axis=1)
        return np.log((hits + 0.5) / (counts.sum(axis=1) + 1))
    hits_TK = record.ids[rows] == targets[:, None]
    floor = math.log(1e-4)
    log_probs_T = np.where(hits_TK, record.log_probs[rows], -np.inf).max(axis=1)
    return np.maximum(log_probs_T, floor)
