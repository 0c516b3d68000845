"""Loss and gradient of one chunk of tokens, given its logits. Pure, not sharded.

Shapes: C tokens of the chunk, V vocabulary, K stored pairs, S temperatures.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses.divergence import Divergence
from kdjax.losses.sparse import (
    FORWARD_KL,
    sampled_forward_kl,
    sparse_divergence,
    teacher_at_temperature,
)


class Teacher(NamedTuple):
    """The teacher's distribution for each target token.

    `ids_NK` None means dense: K == V and column v is id v. Stored ids of a token are
    distinct; an unused slot has id -1 and log-probability -inf.
    """

    ids_NK: Int[Array, "N K"] | None
    """Stored ids, int32."""
    log_probs_NK: Float[Array, "N K"]
    """Their log-probabilities at temperature 1, float32, never renormalised."""
    log_z_N: Float[Array, "N"]
    """log sum_v p_v^(1/T) over the whole vocabulary at the temperature used, nats."""
    entropy_N: Float[Array, "N"] | None = None
    """Given for draws alone: the teacher's entropy at the temperature used, nats. Then
    `log_probs_NK` are logs of the shares of the draws at that temperature."""


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
    kl_C: Float[Array, "C"]
    """The divergence at the temperature, nats, not scaled; 0 without soft weight."""
    d_logits: Callable[[], Float[Array, "C V"]]
    """Returns the gradient of sum(hard * nll + soft * soft_scale * kl)."""


def chunk_loss(
    logits_CV: Float[Array, "C V"],
    tokens: Tokens,
    *,
    temperature: float,
    soft_scale: float,
    tail: str,
    divergence: Divergence = FORWARD_KL,
) -> ChunkLoss:
    """Return the losses of one chunk from its float32 logits."""
    rule = _dense_loss if tokens.teacher.ids_NK is None else _sparse_loss
    loss = rule(logits_CV, tokens, temperature, soft_scale, tail, divergence)
    return loss._replace(kl_C=jnp.where(tokens.soft_weights_N != 0, loss.kl_C, 0.0))


def _sparse_loss(
    logits_CV, tokens, temperature, soft_scale, tail, divergence
) -> ChunkLoss:
    """Losses against stored pairs: the vocabulary is the K stored ids and the rest.

    With z = logits / T, g = d kl / d (log q_stored, log q_rest) and G = sum(g):
      stored i: d kl / d z_i = g_i - G q_i
      other j:  d kl / d z_j = r_j (g_rest - G q_rest),  r = softmax over the rest alone
    r_j q_rest instead of q_j keeps the rest's gradient exact when its mass is tiny.
    """
    targets, hard, soft, teacher = tokens
    vocab_size = logits_CV.shape[-1]
    used_CK = (teacher.ids_NK >= 0) & (soft != 0)[:, None]
    rows = jnp.arange(logits_CV.shape[0])[:, None]
    ids = jnp.where(used_CK, teacher.ids_NK, vocab_size)  # out of range: dropped
    stored_CK = logits_CV.at[rows, ids].get(mode="fill", fill_value=-jnp.inf)
    target_logits = _pick(logits_CV, targets)
    rest_CV = logits_CV.at[rows, ids].set(-jnp.inf, mode="drop")

    def log_masses(t):
        rest = _logsumexp(rest_CV, t)
        return rest, jnp.logaddexp(rest, _logsumexp(stored_CK, t))

    rest_1, total_1 = log_masses(1.0)
    rest_t, total_t = log_masses(temperature)
    log_q_CK = stored_CK / temperature - total_t[:, None]
    log_q_rest = rest_t - total_t
    if teacher.entropy_N is None:
        log_p_CK = teacher_at_temperature(
            teacher.log_probs_NK, teacher.log_z_N, temperature
        )
    else:
        log_p_CK = teacher.log_probs_NK
    log_p_CK = jnp.where(used_CK, log_p_CK, -jnp.inf)

    def soft_loss(log_q_CK, log_q_rest):
        if teacher.entropy_N is not None:
            return sampled_forward_kl(log_q_CK, log_p_CK, teacher.entropy_N)
        return sparse_divergence(
            log_q_CK, log_q_rest, log_p_CK, divergence=divergence, tail=tail
        )

    def d_logits():
        _, pull = jax.vjp(soft_loss, log_q_CK, log_q_rest)
        g_CK, g_rest = pull(jnp.ones_like(log_q_rest))
        g_sum = g_CK.sum(-1) + g_rest
        scale = soft * (soft_scale / temperature)
        d_stored = hard[:, None] * jnp.exp(stored_CK - total_1[:, None]) + scale[
            :, None
        ] * (g_CK - g_sum[:, None] * jnp.exp(log_q_CK))
        d_rest_1 = hard * jnp.exp(rest_1 - total_1)
        d_rest_t = scale * (g_rest - g_sum * jnp.exp(log_q_rest))
        if temperature == 1.0:
            d_CV = _spread(rest_CV, rest_1, d_rest_1 + d_rest_t, 1.0)
        else:
            d_CV = _spread(rest_CV, rest_1, d_rest_1, 1.0) + _spread(
                rest_CV, rest_t, d_rest_t, temperature
            )
        d_CV = d_CV.at[rows, ids].add(d_stored, mode="drop")
        return d_CV.at[rows[:, 0], targets].add(-hard)

    return ChunkLoss(total_1 - target_logits, soft_loss(log_q_CK, log_q_rest), d_logits)


def _dense_loss(
    logits_CV, tokens, temperature, soft_scale, tail, divergence
) -> ChunkLoss:
    """Losses against whole rows of the teacher; there is no tail."""
    del tail
    targets, hard, soft, teacher = tokens
    total_1 = _logsumexp(logits_CV, 1.0)[:, None]
    total_t = _logsumexp(logits_CV, temperature)[:, None]
    log_q_CV = logits_CV / temperature - total_t
    log_p_CV = teacher_at_temperature(
        teacher.log_probs_NK, teacher.log_z_N, temperature
    )
    # A token without soft weight may come without a teacher row.
    log_p_CV = jnp.where((soft != 0)[:, None], log_p_CV, log_q_CV)

    def d_logits():
        _, pull = jax.vjp(lambda log_q: divergence(log_q, log_p_CV), log_q_CV)
        (g_CV,) = pull(jnp.ones_like(soft))
        d_z = g_CV - g_CV.sum(-1, keepdims=True) * jnp.exp(log_q_CV)
        scale = soft * (soft_scale / temperature)
        d_CV = hard[:, None] * jnp.exp(logits_CV - total_1) + scale[:, None] * d_z
        return d_CV.at[jnp.arange(targets.shape[0]), targets].add(-hard)

    return ChunkLoss(
        total_1[:, 0] - _pick(logits_CV, targets),
        divergence(log_q_CV, log_p_CV),
        d_logits,
    )


def chunk_label(
    logits_CV: Float[Array, "C V"],
    targets_C: Int[Array, "C"],
    *,
    k: int | None,
    temperatures: tuple[float, ...],
    points_CSP: Float[Array, "C S P"] | None = None,
) -> dict[str, jax.Array]:
    """Return what the teacher cache stores for one chunk; see `head.label`."""
    log_p_CV = logits_CV - _logsumexp(logits_CV, 1.0)[:, None]
    log_z, entropy, drawn = [], [], []
    for column, t in enumerate(temperatures):
        # log Z is 0 by definition at temperature 1, also when rounding says 1e-7.
        log_z_C = (
            jnp.zeros_like(log_p_CV[:, 0]) if t == 1.0 else _logsumexp(log_p_CV, t)
        )
        log_pt_CV = log_p_CV / t - log_z_C[:, None]
        terms_CV = jnp.where(log_p_CV > -jnp.inf, jnp.exp(log_pt_CV) * log_pt_CV, 0.0)
        log_z.append(log_z_C)
        entropy.append(-terms_CV.sum(-1))
        if points_CSP is not None:
            drawn.append(_look_up(jnp.exp(log_pt_CV), points_CSP[:, column]))
    out = {
        "target_log_probs_N": _pick(log_p_CV, targets_C),
        "log_z_NS": jnp.stack(log_z, axis=-1),
        "entropy_NS": jnp.stack(entropy, axis=-1),
    }
    if points_CSP is not None:
        return out | {"drawn_ids_NSP": jnp.stack(drawn, axis=1)}
    if k is None:
        return out | {"log_probs_NK": log_p_CV}
    log_probs_CK, ids_CK = jax.lax.top_k(log_p_CV, k)
    return out | {"log_probs_NK": log_probs_CK, "ids_NK": ids_CK.astype(jnp.int32)}


def _look_up(p_CV: jax.Array, points_CP: jax.Array) -> Int[Array, "C P"]:
    """Return the ids at `points_CP` of the cumulative distributions, int32."""
    totals_CV = jnp.cumsum(p_CV, axis=-1)
    # An id without probability is never met: its total is that of the one before.
    targets_CP = points_CP * totals_CV[:, -1:]
    found = jax.vmap(lambda a, v: jnp.searchsorted(a, v, side="right"))(
        totals_CV, targets_CP
    )
    last_C = p_CV.shape[-1] - 1 - jnp.argmax(p_CV[:, ::-1] > 0, axis=-1)
    return jnp.minimum(found, last_C[:, None]).astype(jnp.int32)


def _pick(values_CV: jax.Array, ids_C: jax.Array) -> jax.Array:
    return values_CV[jnp.arange(ids_C.shape[0]), ids_C]


def _logsumexp(values: jax.Array, temperature: float) -> jax.Array:
    """Return log sum exp(values / temperature) over the last axis; -inf if empty."""
    peak = values.max(-1, keepdims=True)
    peak = jnp.where(peak > -jnp.inf, peak, 0.0)
    mass = jnp.exp((values - peak) / temperature).sum(-1)
    return jnp.log(mass) + peak[:, 0] / temperature


def _spread(rest_CV, log_mass_C, amount_C, temperature) -> jax.Array:
    """Return amount_C split over the row in proportion to exp(rest / temperature)."""
    log_mass_C = jnp.where(log_mass_C > -jnp.inf, log_mass_C, 0.0)
    return amount_C[:, None] * jnp.exp(rest_CV / temperature - log_mass_C[:, None])
