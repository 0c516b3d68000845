"""Loss and gradient of one chunk of tokens, given its logits. Pure.

Shapes: C tokens of the chunk, V vocabulary rows of this device, K stored pairs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdjax.losses.options import LogitTransform, LossOptions
from kdjax.losses.sparse import (
    TAILS_WITH_BUCKET,
    sampled_forward_kl,
    stored_events,
    teacher_at_temperature,
    teacher_events,
)
from kdjax.losses.vocab_shard import VocabShard


class Teacher(NamedTuple):
    """The teacher's distribution of each target token.

    `ids_NK` None means dense: K == V and column v is id v. Stored ids of a token are
    distinct; an unused slot has id -1 and log-probability -inf.
    """

    ids_NK: Int[Array, "N K"] | None
    """Stored ids, int32."""
    log_probs_NK: Float[Array, "N K"] | None
    """Their log-probabilities at temperature 1, float32, never renormalised."""
    log_z_N: Float[Array, "N"] | None
    """log sum_v p_v^(1/T) over the whole vocabulary at the temperature used, nats."""
    entropy_N: Float[Array, "N"] | None = None
    """Given for draws alone: the teacher's entropy at the temperature used, nats. Then
    `log_probs_NK` are logs of the shares of the draws at that temperature."""
    hidden_NE: Float[Array, "N E"] | None = None
    """Hidden states, given for an online teacher alone, in place of all above."""


class Tokens(NamedTuple):
    """Target, weights and teacher of each token, all that the student does not make."""

    targets_N: Int[Array, "N"]
    hard_weights_N: Float[Array, "N"]
    soft_weights_N: Float[Array, "N"]
    teacher: Teacher


class ChunkLoss(NamedTuple):
    """Per-token losses of a chunk, and the gradient of their weighted sum."""

    nll_C: Float[Array, "C"]
    """-log q(target) at temperature 1, nats."""
    hard_C: Float[Array, "C"]
    """The hard loss: (1 - e) nll + e * the mean of -log q, e the label smoothing."""
    kl_C: Float[Array, "C"]
    """The divergence at the temperature, nats, not scaled; 0 without soft weight."""
    d_products: Callable[[LogitTransform, Any], Float[Array, "C V"]]
    """(transform, dtype) -> the gradient of sum(hard * hard_C + soft * soft_scale * kl)
    in the products of which the transform has made the logits, rounded to the dtype."""


class _LogQ(NamedTuple):
    """The student's log-probabilities at the temperature, nats."""

    stored_CK: Float[Array, "C K"]
    """Of the stored ids; -inf in unused slots and for ids of another device."""
    rest_C: Float[Array, "C"]
    """Of all other ids together."""
    stored_sum_C: Float[Array, "C"]
    """Of the stored ids together."""


class _SoftLoss(NamedTuple):
    """The divergence of a chunk from stored pairs, as a function of log q."""

    kl_C: Float[Array, "C"]
    d_log_q: Callable[[], tuple[jax.Array, jax.Array, jax.Array]]
    """Returns d kl / d log q of the stored ids [C, K] and of the rest [C], and the sum
    of all of them [C]."""


def chunk_loss(
    logits_CV: Float[Array, "C V"],
    tokens: Tokens,
    options: LossOptions,
    shard: VocabShard,
) -> ChunkLoss:
    """Return the losses of one chunk from the float32 logits of this device."""
    loss_fn = _dense_loss if tokens.teacher.ids_NK is None else _sparse_loss
    loss = loss_fn(logits_CV, tokens, options, shard)
    return loss._replace(kl_C=jnp.where(tokens.soft_weights_N != 0, loss.kl_C, 0.0))


def _sparse_loss(
    logits_CV: Float[Array, "C V"],
    tokens: Tokens,
    options: LossOptions,
    shard: VocabShard,
) -> ChunkLoss:
    """Return losses against stored pairs: the events are the K stored ids and the rest.

    With z = logits / T, g = d kl / d (log q_stored, log q_rest) and G = sum(g):
      stored i: d kl / d z_i = g_i - G q_i
      other j:  d kl / d z_j = r_j (g_rest - G q_rest),  r = softmax over the rest alone
    r_j q_rest instead of q_j keeps the rest's gradient exact when its mass is tiny.

    The gradient is written once, in the dtype that the matmuls read: first as if all
    ids were of the rest, then the entries of the stored ids and of the target are set.
    """
    targets_C, hard_C, soft_C, teacher = tokens
    assert teacher.ids_NK is not None
    t = options.temperature
    valid_CK = (teacher.ids_NK >= 0) & (soft_C != 0)[:, None]
    rows_C1 = jnp.arange(logits_CV.shape[0])[:, None]
    slots_CK = jnp.where(valid_CK, shard.local(teacher.ids_NK), shard.size)
    target_C1 = shard.local(targets_C)[:, None]
    ids_CX = jnp.concatenate([slots_CK, target_C1], axis=1)
    logits_CX = logits_CV.at[rows_C1, ids_CX].get(mode="fill", fill_value=-jnp.inf)
    stored_CK, target_logits_C = logits_CX[:, :-1], shard.max(logits_CX[:, -1])
    # -inf by way of what was read: so the reading comes first, and the logits are
    # overwritten where they lie instead of being copied.
    masked_CK = jnp.minimum(stored_CK, -jnp.inf)
    rest_CV = logits_CV.at[rows_C1, slots_CK].set(masked_CK, mode="drop")
    rest_peak_C, stored_peak_C = shard.peak(rest_CV), shard.peak(stored_CK)
    rest = _masses(rest_CV, rest_peak_C, t, shard)
    stored_1_C = shard.logsumexp(stored_CK, stored_peak_C, 1.0)
    stored_t_C = shard.logsumexp(stored_CK, stored_peak_C, t)
    total_1_C = jnp.logaddexp(rest.log_1_C, stored_1_C)
    total_t_C = jnp.logaddexp(rest.log_t_C, stored_t_C)
    log_q = _LogQ(
        stored_CK / t - total_t_C[:, None],
        rest.log_t_C - total_t_C,
        stored_t_C - total_t_C,
    )
    if teacher.entropy_N is not None:
        soft_loss = _sampled_loss(log_q, slots_CK, teacher, shard)
    else:
        soft_loss = _stored_loss(log_q, valid_CK, slots_CK, teacher, options, shard)
    nll_C = total_1_C - target_logits_C
    hard_loss_C, add_d_uniform = _smoothed(
        logits_CV, nll_C, total_1_C, hard_C, options, shard
    )

    def d_products(transform: LogitTransform, dtype: Any) -> Float[Array, "C V"]:
        g_CK, g_rest_C, g_sum_C = soft_loss.d_log_q()
        scale_C = soft_C * (options.soft_scale / t)
        d_stored_CK = hard_C[:, None] * jnp.exp(
            stored_CK - total_1_C[:, None]
        ) + scale_C[:, None] * (g_CK - g_sum_C[:, None] * jnp.exp(log_q.stored_CK))
        d_rest_1_C = hard_C * jnp.exp(rest.log_1_C - total_1_C)
        d_rest_t_C = scale_C * (g_rest_C - g_sum_C * jnp.exp(log_q.rest_C))
        d_CV = add_d_uniform(rest.vjp(d_rest_1_C, d_rest_t_C, None), rest_CV)
        d_CV = transform.vjp(d_CV, rest_CV).astype(dtype)

        d_target_C1 = -(1 - options.label_smoothing) * hard_C[:, None]
        is_target_CK = slots_CK == target_C1
        d_stored_CK = add_d_uniform(jnp.zeros_like(stored_CK), stored_CK) + d_stored_CK
        d_stored_CK += jnp.where(is_target_CK, d_target_C1, 0.0)
        logits_C1 = logits_CX[:, -1:]
        d_C1 = add_d_uniform(rest.vjp(d_rest_1_C, d_rest_t_C, logits_C1), logits_C1)
        d_CX = jnp.concatenate([d_stored_CK, d_C1 + d_target_C1], axis=1)
        d_CX = transform.vjp(d_CX, logits_CX).astype(dtype)
        # Entries that are set once, and beyond the end those that are not.
        others_C1 = is_target_CK.any(1, keepdims=True)
        last_C1 = jnp.where(others_C1, shard.size, target_C1)
        places_CX = jnp.concatenate([slots_CK, last_C1], axis=1)
        beyond_X = shard.size + jnp.arange(places_CX.shape[1], dtype=places_CX.dtype)
        places_CX = jnp.where(places_CX < shard.size, places_CX, beyond_X[None])
        return d_CV.at[rows_C1, places_CX].set(d_CX, mode="drop", unique_indices=True)

    return ChunkLoss(nll_C, hard_loss_C, soft_loss.kl_C, d_products)


def _sampled_loss(
    log_q: _LogQ, slots_CK: Int[Array, "C K"], teacher: Teacher, shard: VocabShard
) -> _SoftLoss:
    """Return the forward KL from draws, each counted by the device that has its id."""
    assert teacher.log_probs_NK is not None and teacher.entropy_N is not None
    ones_C = jnp.ones_like(log_q.rest_C)
    log_shares_CK = jnp.where(slots_CK < shard.size, teacher.log_probs_NK, -jnp.inf)
    local_kl_C, vjp = jax.vjp(
        lambda log_q_CK: sampled_forward_kl(log_q_CK, log_shares_CK, 0.0),
        log_q.stored_CK,
    )

    def d_log_q() -> tuple[jax.Array, jax.Array, jax.Array]:
        (g_CK,) = vjp(ones_C)
        return g_CK, jnp.zeros_like(ones_C), shard.sum(g_CK.sum(-1))

    return _SoftLoss(shard.sum(local_kl_C) - teacher.entropy_N, d_log_q)


def _stored_loss(
    log_q: _LogQ,
    valid_CK: Bool[Array, "C K"],
    slots_CK: Int[Array, "C K"],
    teacher: Teacher,
    options: LossOptions,
    shard: VocabShard,
) -> _SoftLoss:
    """Return the divergence from pairs, each counted by the device that has its id."""
    assert teacher.log_probs_NK is not None and teacher.log_z_N is not None
    tail, divergence = options.tail, options.divergence
    ones_C = jnp.ones_like(log_q.rest_C)
    log_p_CK = teacher_at_temperature(
        teacher.log_probs_NK, teacher.log_z_N, options.temperature
    )
    log_p_CK, log_p_rest_C = teacher_events(
        jnp.where(valid_CK, log_p_CK, -jnp.inf), log_q.rest_C > -jnp.inf, tail=tail
    )
    log_p_CK = jnp.where(slots_CK < shard.size, log_p_CK, -jnp.inf)
    log_q_CK = log_q.stored_CK
    conditional = tail == "renormalize_both"
    if conditional:  # a row without stored ids stays so
        has_mass_C = log_q.stored_sum_C > -jnp.inf
        log_q_CK = log_q_CK - jnp.where(has_mass_C, log_q.stored_sum_C, 0.0)[:, None]
    local_kl_C, vjp = jax.vjp(
        lambda log_q: stored_events(log_q, log_p_CK, divergence=divergence, tail=tail),
        log_q_CK,
    )
    kl_C = shard.sum(local_kl_C)
    if tail in TAILS_WITH_BUCKET:
        rest_kl_C, vjp_rest = jax.vjp(
            lambda log_q: divergence(log_q[:, None], log_p_rest_C[:, None]),
            log_q.rest_C,
        )
        kl_C += rest_kl_C

    def d_log_q() -> tuple[jax.Array, jax.Array, jax.Array]:
        (g_CK,) = vjp(ones_C)
        g_sum_C = shard.sum(g_CK.sum(-1))
        zeros_C = jnp.zeros_like(ones_C)
        if conditional:
            return g_CK - jnp.exp(log_q_CK) * g_sum_C[:, None], zeros_C, zeros_C
        g_rest_C = vjp_rest(ones_C)[0] if tail in TAILS_WITH_BUCKET else zeros_C
        return g_CK, g_rest_C, g_sum_C + g_rest_C

    return _SoftLoss(kl_C, d_log_q)


def _dense_loss(
    logits_CV: Float[Array, "C V"],
    tokens: Tokens,
    options: LossOptions,
    shard: VocabShard,
) -> ChunkLoss:
    """Return losses against dense rows of the teacher; there is no tail."""
    targets_C, hard_C, soft_C, teacher = tokens
    assert teacher.log_probs_NK is not None and teacher.log_z_N is not None
    t = options.temperature
    masses = _masses(logits_CV, shard.peak(logits_CV), t, shard)
    total_1_C, total_t_C = masses.log_1_C, masses.log_t_C
    log_q_CV = logits_CV / t - total_t_C[:, None]
    log_p_CV = teacher_at_temperature(teacher.log_probs_NK, teacher.log_z_N, t)
    # A token without soft weight may come without a teacher row.
    log_p_CV = jnp.where((soft_C != 0)[:, None], log_p_CV, log_q_CV)
    local_kl_C, vjp = jax.vjp(
        lambda log_q: options.divergence(log_q, log_p_CV), log_q_CV
    )
    nll_C = total_1_C - shard.take(logits_CV, targets_C)
    hard_loss_C, add_d_uniform = _smoothed(
        logits_CV, nll_C, total_1_C, hard_C, options, shard
    )

    def d_products(transform: LogitTransform, dtype: Any) -> Float[Array, "C V"]:
        (g_CV,) = vjp(jnp.ones_like(soft_C))
        g_sum_C = shard.sum(g_CV.sum(-1))
        scale_C = soft_C * (options.soft_scale / t)
        d_CV = masses.vjp(hard_C, -scale_C * g_sum_C, None) + scale_C[:, None] * g_CV
        d_CV = add_d_uniform(d_CV, logits_CV)
        d_target_C = -(1 - options.label_smoothing) * hard_C
        rows_C = jnp.arange(targets_C.shape[0])
        d_CV = d_CV.at[rows_C, shard.local(targets_C)].add(d_target_C, mode="drop")
        return transform.vjp(d_CV, logits_CV).astype(dtype)

    return ChunkLoss(nll_C, hard_loss_C, shard.sum(local_kl_C), d_products)


def _smoothed(
    logits_CV: Float[Array, "C V"],
    nll_C: Float[Array, "C"],
    total_C: Float[Array, "C"],
    hard_C: Float[Array, "C"],
    options: LossOptions,
    shard: VocabShard,
) -> tuple[Float[Array, "C"], Callable[[jax.Array, jax.Array], jax.Array]]:
    """Return the hard loss with label smoothing, and what adds its gradient.

    That is (gradient, logits of the same ids) -> gradient, without the target's part.

    hard = (1 - e) nll - e / V sum_v log q_v over the V ids that are not padding.

    Source: Szegedy et al., 2015, arXiv 1512.00567, section 7.
    """
    share = options.label_smoothing
    if not share:
        return nll_C, lambda d_CX, logits_CX: d_CX
    valid_CV = logits_CV > -jnp.inf
    sum_C = shard.sum(jnp.where(valid_CV, logits_CV, 0.0).sum(-1))
    loss_C = (1 - share) * nll_C + share * (total_C - sum_C / shard.num_valid)
    d_each_C = hard_C * (share / shard.num_valid)
    return loss_C, lambda d_CX, logits_CX: jnp.where(
        logits_CX > -jnp.inf, d_CX - d_each_C[:, None], d_CX
    )


class _Masses(NamedTuple):
    """Sums of exponentials of rows, at temperature 1 and at another."""

    log_1_C: Float[Array, "C"]
    log_t_C: Float[Array, "C"]
    vjp: Callable[[jax.Array, jax.Array, jax.Array | None], Float[Array, "C X"]]
    """(d_1_C, d_t_C, some_CX) -> d_1 softmax(values) + d_t softmax(values / t), at some
    of the values, or at all of them for None; a row without mass gets 0."""


def _masses(
    values_CV: Float[Array, "C V"],
    peak_C: Float[Array, "C"],
    t: float,
    shard: VocabShard,
) -> _Masses:
    """Return the masses of logits whose largest are `peak_C`.

    One exponential serves both temperatures where t is an integer (up to 8): those at 1
    are its powers, and `vjp` reads them in place of the logits.
    """
    multiple = int(t) if t == round(t) and t <= 8 else None

    def exponentials(x_CX: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_CX = x_CX - peak_C[:, None]
        exp_t_CX = jnp.exp(x_CX / t)
        return (
            jnp.exp(x_CX) if multiple is None else _power(exp_t_CX, multiple),
            exp_t_CX,
        )

    exp_1_CV, exp_t_CV = exponentials(values_CV)
    log_1_C = jnp.log(shard.sum(exp_1_CV.sum(-1))) + peak_C
    log_t_C = jnp.log(shard.sum(exp_t_CV.sum(-1))) + peak_C / t

    def factor(
        cotangent_C: jax.Array, log_mass_C: jax.Array, log_unit_C: jax.Array
    ) -> jax.Array:
        log_mass_C = jnp.where(log_mass_C > -jnp.inf, log_mass_C, jnp.inf)
        return (cotangent_C * jnp.exp(log_unit_C - log_mass_C))[:, None]

    def vjp(
        d_1_C: jax.Array, d_t_C: jax.Array, some_CX: jax.Array | None
    ) -> Float[Array, "C X"]:
        at_1_C1 = factor(d_1_C, log_1_C, peak_C)
        at_t_C1 = factor(d_t_C, log_t_C, peak_C / t)
        exp_1, exp_t = (
            (exp_1_CV, exp_t_CV) if some_CX is None else exponentials(some_CX)
        )
        if multiple is None:
            return at_1_C1 * exp_1 + at_t_C1 * exp_t
        return exp_t * (at_t_C1 + at_1_C1 * exp_t ** (multiple - 1))

    return _Masses(log_1_C, log_t_C, vjp)


def _power(exp_CV: Float[Array, "C V"], exponent: int) -> Float[Array, "C V"]:
    """Return exponentials to a power >= 1, multiplied: cheaper than exponentials anew.

    The maximum changes nothing; without it XLA takes exp(a) exp(a) for exp(2 a).
    """
    if exponent == 1:
        return exp_CV
    tiny = jnp.finfo(exp_CV.dtype).tiny
    return exp_CV ** (exponent - 1) * jnp.maximum(exp_CV, tiny)
