"""What a teacher says of each token of a chunk, as the cache stores it. Pure.

Shapes: C tokens of the chunk, V vocabulary, K stored pairs, S temperatures, P points.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses.part import Part


def chunk_label(
    logits_CV: Float[Array, "C V"],
    targets_C: Int[Array, "C"],
    *,
    k: int | None,
    temperatures: tuple[float, ...],
    points_CSP: Float[Array, "C S P"] | None = None,
) -> dict[str, jax.Array]:
    """Return what the teacher cache stores for one chunk; see `head.label`."""
    part = Part(size=logits_CV.shape[-1])
    log_p_CV = logits_CV - _log_mass(part, logits_CV, 1.0)[:, None]
    log_z, entropy, drawn = [], [], []
    for column, t in enumerate(temperatures):
        # log Z is 0 by definition at temperature 1, also when rounding says 1e-7.
        log_z_C = (
            jnp.zeros_like(log_p_CV[:, 0]) if t == 1.0 else _log_mass(part, log_p_CV, t)
        )
        log_pt_CV = log_p_CV / t - log_z_C[:, None]
        terms_CV = jnp.where(log_p_CV > -jnp.inf, jnp.exp(log_pt_CV) * log_pt_CV, 0.0)
        log_z.append(log_z_C)
        entropy.append(-terms_CV.sum(-1))
        if points_CSP is not None:
            drawn.append(_look_up(jnp.exp(log_pt_CV), points_CSP[:, column]))
    out = {
        "target_log_probs_N": part.pick(log_p_CV, targets_C),
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


def _log_mass(part: Part, values_CV: jax.Array, t: float) -> jax.Array:
    return part.logsumexp(values_CV, part.peak(values_CV), t)
