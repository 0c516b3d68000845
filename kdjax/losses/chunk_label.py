"""Teacher labels of one chunk of tokens, as the cache stores them. Pure.

Shapes: C tokens of the chunk, V vocabulary, K stored pairs, S temperatures, P draws,
G groups of M ids.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses.vocab_shard import VocabShard

GROUP = 32  # ids whose largest value stands for them in `top_k`


def chunk_label(
    logits_CV: Float[Array, "C V"],
    targets_C: Int[Array, "C"],
    *,
    k: int | None,
    temperatures: tuple[float, ...],
    uniforms_CSP: Float[Array, "C S P"] | None = None,
    with_entropy: bool = True,
) -> dict[str, jax.Array]:
    """Return what the teacher cache stores for one chunk; see `inference.label`."""
    shard = VocabShard(size=logits_CV.shape[-1], num_valid=logits_CV.shape[-1])
    peak_C = shard.peak(logits_CV)
    mass_C = shard.logsumexp(logits_CV, peak_C, 1.0)
    log_z, entropy, drawn_ids = [], [], []
    for column, t in enumerate(temperatures):
        # log Z is 0 by definition at temperature 1, also when rounding says 1e-7.
        log_z_C = jnp.zeros_like(mass_C)
        if t != 1.0:
            log_z_C = shard.logsumexp(logits_CV, peak_C, t) - mass_C / t
        log_z.append(log_z_C)
        log_pt_CV = (logits_CV - mass_C[:, None]) / t - log_z_C[:, None]
        if with_entropy:
            terms_CV = jnp.exp(log_pt_CV) * log_pt_CV
            terms_CV = jnp.where(logits_CV > -jnp.inf, terms_CV, 0.0)
            entropy.append(-terms_CV.sum(-1))
        if uniforms_CSP is not None:
            drawn_ids.append(_inverse_cdf(jnp.exp(log_pt_CV), uniforms_CSP[:, column]))
    out = {
        "target_log_probs_N": shard.take(logits_CV, targets_C) - mass_C,
        "log_z_NS": jnp.stack(log_z, axis=-1),
    }
    if with_entropy:
        out["entropy_NS"] = jnp.stack(entropy, axis=-1)
    if uniforms_CSP is not None:
        return out | {"drawn_ids_NSP": jnp.stack(drawn_ids, axis=1)}
    if k is None:
        return out | {"log_probs_NK": logits_CV - mass_C[:, None]}
    largest_CK, ids_CK = top_k(logits_CV, k)
    return out | {"log_probs_NK": largest_CK - mass_C[:, None], "ids_NK": ids_CK}


def top_k(
    values_CV: Float[Array, "C V"], k: int
) -> tuple[Float[Array, "C K"], Int[Array, "C K"]]:
    """Return the k largest values of each row, descending, and their ids.

    Exactly `jax.lax.top_k`, ties included, and up to three times as fast where V is
    large: the k largest values lie in the k groups of ids whose largest values are the
    largest, and of groups that tie the first ones are enough.
    """
    num_rows, size = values_CV.shape
    num_groups = -(-size // GROUP)
    if num_groups < 4 * k:
        largest_CK, ids_CK = jax.lax.top_k(values_CV, k)
        return largest_CK, ids_CK.astype(jnp.int32)
    num_missing = num_groups * GROUP - size
    values_CV = jnp.pad(values_CV, ((0, 0), (0, num_missing)), constant_values=-jnp.inf)
    values_CGM = values_CV.reshape(num_rows, num_groups, GROUP)
    _, groups_CK = jax.lax.top_k(values_CGM.max(-1), k)
    groups_CK = jnp.sort(groups_CK, axis=-1)  # ties go to the lower id
    candidates = jnp.take_along_axis(values_CGM, groups_CK[:, :, None], axis=1)
    largest_CK, positions_CK = jax.lax.top_k(candidates.reshape(num_rows, -1), k)
    first_CK = jnp.take_along_axis(groups_CK, positions_CK // GROUP, axis=1) * GROUP
    return largest_CK, (first_CK + positions_CK % GROUP).astype(jnp.int32)


def _inverse_cdf(p_CV: jax.Array, uniforms_CP: jax.Array) -> Int[Array, "C P"]:
    """Return the int32 ids at which the cumulative distributions pass the uniforms."""
    totals_CV = jnp.cumsum(p_CV, axis=-1)
    # An id without probability is never drawn: its total is that of the one before.
    targets_CP = uniforms_CP * totals_CV[:, -1:]
    ids_CP = jax.vmap(lambda a, v: jnp.searchsorted(a, v, side="right"))(
        totals_CV, targets_CP
    )
    last_C = p_CV.shape[-1] - 1 - jnp.argmax(p_CV[:, ::-1] > 0, axis=-1)
    return jnp.minimum(ids_CP, last_C[:, None]).astype(jnp.int32)
