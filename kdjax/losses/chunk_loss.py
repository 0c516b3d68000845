"""Loss and gradient of one chunk of tokens, given its logits. Pure.

Shapes: C tokens of the chunk, V vocabulary rows of this device, K stored pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses.options import Options
from kdjax.losses.sparse import (
    RESTS,
    sampled_forward_kl,
    stored_events,
    teacher_at_temperature,
    teacher_events,
)
from kdjax.losses.vocab_shard import Part


class Teacher(NamedTuple):
    """The teacher's distribution for each target token.

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
    """Given for a live teacher alone, in place of everything above."""


class Tokens(NamedTuple):
    """What is known of each target token before the student runs."""

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
    d_logits: Callable[[], Float[Array, "C V"]]
    """Returns the gradient of sum(hard * hard_C + soft * soft_scale * kl)."""


class _Soft(NamedTuple):
    """The divergence of a chunk from stored pairs, as a function of log q."""

    kl_C: Float[Array, "C"]
    pull: Callable[[], tuple[jax.Array, jax.Array, jax.Array]]
    """Returns d kl / d log q of the stored ids [C, K] and of the rest [C], and the sum
    of all of them [C]."""


def chunk_loss(
    logits_CV: Float[Array, "C V"], tokens: Tokens, options: Options, part: Part
) -> ChunkLoss:
    """Return the losses of one chunk from the float32 logits of this device."""
    rule = _dense_loss if tokens.teacher.ids_NK is None else _sparse_loss
    loss = rule(logits_CV, tokens, options, part)
    return loss._replace(kl_C=jnp.where(tokens.soft_weights_N != 0, loss.kl_C, 0.0))


def _sparse_loss(logits_CV, tokens, options, part) -> ChunkLoss:
    """Losses against stored pairs: the vocabulary is the K stored ids and the rest.

    With z = logits / T, g = d kl / d (log q_stored, log q_rest) and G = sum(g):
      stored i: d kl / d z_i = g_i - G q_i
      other j:  d kl / d z_j = r_j (g_rest - G q_rest),  r = softmax over the rest alone
    r_j q_rest instead of q_j keeps the rest's gradient exact when its mass is tiny.
    """
    targets, hard, soft, teacher = tokens
    t = options.temperature
    used_CK = (teacher.ids_NK >= 0) & (soft != 0)[:, None]
    rows = jnp.arange(logits_CV.shape[0])[:, None]
    slots_CK = jnp.where(used_CK, part.local(teacher.ids_NK), part.size)
    ids_CX = jnp.concatenate([slots_CK, part.local(targets)[:, None]], axis=1)
    found_CX = logits_CV.at[rows, ids_CX].get(mode="fill", fill_value=-jnp.inf)
    stored_CK, target_logits = found_CX[:, :-1], part.max(found_CX[:, -1])
    # -inf by way of what was read: so the reading comes first, and the logits are
    # overwritten where they lie instead of being copied.
    gone_CK = jnp.minimum(stored_CK, -jnp.inf)
    rest_CV = logits_CV.at[rows, slots_CK].set(gone_CK, mode="drop")
    rest_peak, stored_peak = part.peak(rest_CV), part.peak(stored_CK)
    rest = _masses(rest_CV, rest_peak, t, part)
    stored_1 = part.logsumexp(stored_CK, stored_peak, 1.0)
    stored_t = part.logsumexp(stored_CK, stored_peak, t)
    total_1 = jnp.logaddexp(rest.log_1_C, stored_1)
    total_t = jnp.logaddexp(rest.log_t_C, stored_t)
    log_q_CK = stored_CK / t - total_t[:, None]
    log_q_rest = rest.log_t_C - total_t
    log_q = (log_q_CK, log_q_rest, stored_t - total_t)
    soft_loss = _soft_loss(*log_q, used_CK, slots_CK, teacher, options, part)
    nll_C = total_1 - target_logits
    hard_C, d_uniform = _smoothed(logits_CV, nll_C, total_1, hard, options, part)

    def d_logits():
        g_CK, g_rest, g_sum = soft_loss.pull()
        scale = soft * (options.soft_scale / t)
        d_stored = hard[:, None] * jnp.exp(stored_CK - total_1[:, None]) + scale[
            :, None
        ] * (g_CK - g_sum[:, None] * jnp.exp(log_q_CK))
        d_rest_1 = hard * jnp.exp(rest.log_1_C - total_1)
        d_rest_t = scale * (g_rest - g_sum * jnp.exp(log_q_rest))
        d_CV = rest.spread(d_rest_1, d_rest_t)
        d_CV = d_uniform(d_CV)
        d_target = -(1 - options.label_smoothing) * hard
        d_CX = jnp.concatenate([d_stored, d_target[:, None]], axis=1)
        return d_CV.at[rows, ids_CX].add(d_CX, mode="drop")

    return ChunkLoss(nll_C, hard_C, soft_loss.kl_C, d_logits)


def _soft_loss(
    log_q_CK, log_q_rest, log_q_stored, used_CK, slots_CK, teacher, options, part
) -> _Soft:
    """The divergence from stored pairs, each counted by the device that has its id."""
    here_CK = slots_CK < part.size
    tail, divergence = options.tail, options.divergence
    ones_C = jnp.ones_like(log_q_rest)
    if teacher.entropy_N is not None:
        log_shares_CK = jnp.where(here_CK, teacher.log_probs_NK, -jnp.inf)
        found_C, pull = jax.vjp(
            lambda log_q: sampled_forward_kl(log_q, log_shares_CK, 0.0), log_q_CK
        )

        def pull_draws():
            (g_CK,) = pull(ones_C)
            return g_CK, jnp.zeros_like(ones_C), part.sum(g_CK.sum(-1))

        return _Soft(part.sum(found_C) - teacher.entropy_N, pull_draws)

    log_p_CK = teacher_at_temperature(
        teacher.log_probs_NK, teacher.log_z_N, options.temperature
    )
    log_p_CK, log_p_rest = teacher_events(
        jnp.where(used_CK, log_p_CK, -jnp.inf), log_q_rest > -jnp.inf, tail=tail
    )
    log_p_CK = jnp.where(here_CK, log_p_CK, -jnp.inf)
    conditional = tail == "renormalize_both"
    if conditional:  # a row without stored ids stays so
        known = log_q_stored > -jnp.inf
        log_q_CK = log_q_CK - jnp.where(known, log_q_stored, 0.0)[:, None]
    found_C, pull = jax.vjp(
        lambda log_q: stored_events(log_q, log_p_CK, divergence=divergence, tail=tail),
        log_q_CK,
    )
    kl_C = part.sum(found_C)
    if tail in RESTS:
        rest_C, pull_rest = jax.vjp(
            lambda log_q: divergence(log_q[:, None], log_p_rest[:, None]), log_q_rest
        )
        kl_C += rest_C

    def pull_pairs():
        (g_CK,) = pull(ones_C)
        g_sum = part.sum(g_CK.sum(-1))
        if conditional:
            g_CK -= jnp.exp(log_q_CK) * g_sum[:, None]
            return g_CK, jnp.zeros_like(ones_C), jnp.zeros_like(ones_C)
        g_rest = pull_rest(ones_C)[0] if tail in RESTS else jnp.zeros_like(ones_C)
        return g_CK, g_rest, g_sum + g_rest

    return _Soft(kl_C, pull_pairs)


def _dense_loss(logits_CV, tokens, options, part) -> ChunkLoss:
    """Losses against whole rows of the teacher; there is no tail."""
    targets, hard, soft, teacher = tokens
    t = options.temperature
    row = _masses(logits_CV, part.peak(logits_CV), t, part)
    total_1, total_t = row.log_1_C, row.log_t_C
    log_q_CV = logits_CV / t - total_t[:, None]
    log_p_CV = teacher_at_temperature(teacher.log_probs_NK, teacher.log_z_N, t)
    # A token without soft weight may come without a teacher row.
    log_p_CV = jnp.where((soft != 0)[:, None], log_p_CV, log_q_CV)
    found_C, pull = jax.vjp(lambda log_q: options.divergence(log_q, log_p_CV), log_q_CV)
    nll_C = total_1 - part.pick(logits_CV, targets)
    hard_C, d_uniform = _smoothed(logits_CV, nll_C, total_1, hard, options, part)

    def d_logits():
        (g_CV,) = pull(jnp.ones_like(soft))
        g_sum = part.sum(g_CV.sum(-1))
        scale = soft * (options.soft_scale / t)
        d_CV = row.spread(hard, -scale * g_sum) + scale[:, None] * g_CV
        d_CV = d_uniform(d_CV)
        d_target = -(1 - options.label_smoothing) * hard
        rows = jnp.arange(targets.shape[0])
        return d_CV.at[rows, part.local(targets)].add(d_target, mode="drop")

    return ChunkLoss(nll_C, hard_C, part.sum(found_C), d_logits)


def _smoothed(logits_CV, nll_C, total_C, hard, options, part):
    """The hard loss with label smoothing, and what it adds to the gradient.

    hard = (1 - e) nll - e / V sum_v log q_v over the V ids that are not padding.

    Source: Szegedy et al., 2015, arXiv 1512.00567, section 7.
    """
    share = options.label_smoothing
    if not share:
        return nll_C, lambda d_CV: d_CV
    valid_CV = logits_CV > -jnp.inf
    sum_C = part.sum(jnp.where(valid_CV, logits_CV, 0.0).sum(-1))
    hard_C = (1 - share) * nll_C + share * (total_C - sum_C / part.num_valid)
    d_each = hard * (share / part.num_valid)
    return hard_C, lambda d_CV: jnp.where(valid_CV, d_CV - d_each[:, None], d_CV)


class _Masses(NamedTuple):
    """Sums of exponentials of rows, at temperature 1 and at another."""

    log_1_C: Float[Array, "C"]
    log_t_C: Float[Array, "C"]
    spread: Callable[[jax.Array, jax.Array], Float[Array, "C V"]]
    """(d_1_C, d_t_C) -> d_1 softmax(values) + d_t softmax(values / t); a row without
    mass gets 0."""


def _masses(values_CV, peak_C, t, part) -> _Masses:
    """Return the masses of logits whose largest are `peak_C`.

    One exponential serves both temperatures where t is an integer (up to 8): those at 1
    are its powers, and `spread` reads them in place of the logits.
    """
    x_CV = values_CV - peak_C[:, None]
    exp_t_CV = jnp.exp(x_CV / t)
    multiple = int(t) if t == round(t) and t <= 8 else None
    exp_1_CV = jnp.exp(x_CV) if multiple is None else _power(exp_t_CV, multiple)
    log_1_C = jnp.log(part.sum(exp_1_CV.sum(-1))) + peak_C
    log_t_C = jnp.log(part.sum(exp_t_CV.sum(-1))) + peak_C / t

    def share(amount_C, log_mass_C, log_unit_C):
        log_mass_C = jnp.where(log_mass_C > -jnp.inf, log_mass_C, jnp.inf)
        return (amount_C * jnp.exp(log_unit_C - log_mass_C))[:, None]

    def spread(d_1_C, d_t_C):
        at_1, at_t = share(d_1_C, log_1_C, peak_C), share(d_t_C, log_t_C, peak_C / t)
        if multiple is None:
            return at_1 * exp_1_CV + at_t * exp_t_CV
        return exp_t_CV * (at_t + at_1 * exp_t_CV ** (multiple - 1))

    return _Masses(log_1_C, log_t_C, spread)


def _power(exp_CV: jax.Array, exponent: int) -> jax.Array:
    """Return exponentials to a power >= 1, multiplied: cheaper than exponentials anew.

    The maximum changes nothing; without it XLA takes exp(a) exp(a) for exp(2 a).
    """
    if exponent == 1:
        return exp_CV
    tiny = jnp.finfo(exp_CV.dtype).tiny
    return exp_CV ** (exponent - 1) * jnp.maximum(exp_CV, tiny)
