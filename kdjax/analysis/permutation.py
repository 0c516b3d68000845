"""Permutation tests of conditions within participants.

Shapes: N ratings, M outcomes, C conditions.
"""

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

_CHUNK = 2**22  # ratings permuted at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class PermutationTest:
    """Test that conditions make no difference within participants."""

    shares: tuple[float, ...]  # of each outcome's variance within participants
    p_values: tuple[float, ...]
    joint_p: float  # of the sum of the shares
    participants: int  # who rated several conditions: they alone count
    ratings: int  # theirs


def within_participants(
    outcomes_NM: np.ndarray,
    conditions: Sequence[Hashable],
    participants: Sequence[Hashable],
    *,
    num: int = 9999,
    seed: int = 0,
) -> PermutationTest:
    """Exchange the conditions of each participant's ratings.

    Under the hypothesis that conditions make no difference to any rating, every
    exchange is equally likely, however participants differ, whatever the ratings'
    distribution. The statistic is the share of the variance within participants that
    conditions explain in y = participant + condition, which orders exchanges as the F
    of that model does; participants may have different numbers of ratings. All
    outcomes of a rating move together, so the sum of shares tests them jointly.
    p = (1 + exchanges at least as large) / (1 + exchanges).

    Args:
      outcomes_NM: ratings, none missing.
      conditions: of each rating.
      participants: of each rating.
      num: exchanges drawn.
      seed: of the draws.

    Raises:
      ValueError: no participant has ratings of two conditions, or they do not vary.

    Source: Good, 2005, "Permutation, Parametric and Bootstrap Tests of Hypotheses",
    3rd edition, chapter 5 (blocks); Phipson and Smyth, 2010, SAGMB 9(1), for p.
    """
    who_N = np.unique(np.asarray(participants), return_inverse=True)[1].ravel()
    what_N = np.unique(np.asarray(conditions), return_inverse=True)[1].ravel()
    several = {
        person
        for person in range(who_N.max(initial=-1) + 1)
        if len(set(what_N[who_N == person].tolist())) > 1
    }
    inside_N = np.isin(who_N, list(several))
    if not several:
        raise ValueError("no participant rated two conditions")
    who_N, what_N = who_N[inside_N], what_N[inside_N]
    order = np.argsort(who_N, kind="stable")
    who_N, what_N = who_N[order], what_N[order]
    centred_NM = _centre(np.asarray(outcomes_NM, float)[inside_N][order], who_N)
    total_M = (centred_NM**2).sum(0)
    if (total_M <= 1e-12).any():
        raise ValueError("an outcome does not vary within participants")
    present = np.unique(what_N)
    dummies_NC = (what_N[:, None] == present).astype(float)
    inverse_CC = np.linalg.pinv(_centre(dummies_NC, who_N).T @ dummies_NC)

    def shares(codes_BN: np.ndarray) -> np.ndarray:
        sums = [(codes_BN == code) @ centred_NM for code in present]
        sums_BCM = np.stack(sums, 1)
        return np.einsum("bcm,cd,bdm->bm", sums_BCM, inverse_CC, sums_BCM) / total_M

    observed_M = shares(what_N[None])[0]
    rng = np.random.default_rng(seed)
    larger_M, larger_joint, done = np.zeros(len(observed_M)), 0, 0
    while done < num:
        size = min(num - done, max(_CHUNK // len(what_N), 1))
        keys_BN = who_N + rng.random((size, len(who_N)))
        drawn_BM = shares(what_N[np.argsort(keys_BN, 1)])
        larger_M += (drawn_BM >= observed_M - 1e-12).sum(0)
        larger_joint += int((drawn_BM.sum(1) >= observed_M.sum() - 1e-12).sum())
        done += size
    return PermutationTest(
        shares=tuple(observed_M.tolist()),
        p_values=tuple(((1 + larger_M) / (1 + num)).tolist()),
        joint_p=(1 + larger_joint) / (1 + num),
        participants=len(several),
        ratings=len(what_N),
    )


def sign_flip(values_P: np.ndarray, *, num: int = 9999, seed: int = 0) -> float:
    """Test that values are symmetric about zero; return the two-sided p.

    Under the hypothesis every value could as well have the other sign. All signs are
    tried where there are at most `num` + 1 of them, else `num` draws:
    p = (1 + draws at least as far from zero) / (1 + num).

    Args:
      values_P: a sum of each participant's scores.
      num: signs drawn.
      seed: of the draws.
    """
    values_P = values_P[values_P != 0]
    observed = abs(values_P.sum()) - 1e-12
    if 2 ** len(values_P) <= num + 1:
        numbers = np.arange(2 ** len(values_P))[:, None]
        signs = 1.0 - 2.0 * (numbers >> np.arange(len(values_P)) & 1)
        return float((abs(signs @ values_P) >= observed).mean())
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (num, len(values_P)))
    return float((1 + (abs(signs @ values_P) >= observed).sum()) / (1 + num))


def _centre(values_NM: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
    """Subtract the mean of each group."""
    codes_N = np.unique(groups_N, return_inverse=True)[1].ravel()
    sums = np.zeros((codes_N.max() + 1, values_NM.shape[1]))
    np.add.at(sums, codes_N, values_NM)
    return values_NM - (sums / np.bincount(codes_N)[:, None])[codes_N]
