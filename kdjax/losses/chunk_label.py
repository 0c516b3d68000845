"""Teacher labels of one chunk of tokens, as the cache stores them. Pure.

Shapes: C tokens of the chunk, V vocabulary, K stored pairs, S temperatures, P draws,
G groups of M ids.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses.vocab_shard import VocabShard

GROUP = 32  # ids whose largest value stands for them in `top_k`
SLAB = 1024  # ids that a CPU adds up at once: their exponentials stay in its cache


def chunk_label(
    logits_CV: Float[Array, "C V"],
    targets_C: Int[Array, "C"],
    *,
    k: int | None,
    temperatures: tuple[float, ...],
    uniforms_CSP: Float[Array, "C S P"] | None = None,
    with_entropy: bool = True,
) -> dict[str, jax.Array]:
    """Return what the teacher cache stores for one chunk; see `inference.label`.

    With x = logits - peak, z_T = sum exp(x / T) and w_T = sum exp(x / T) x:
      log-sum-exp = log z_1 + peak
      log Z_T = log z_T - log z_1 / T
      entropy at T = log z_T - w_T / (T z_T)
    """
    shard = VocabShard(size=logits_CV.shape[-1], num_valid=logits_CV.shape[-1])
    peak_C = shard.peak(logits_CV)
    sums = jax.lax.platform_dependent(
        logits_CV,
        peak_C,
        cpu=functools.partial(
            _sums_in_slabs, temperatures=(1.0, *temperatures), with_x=with_entropy
        ),
        default=functools.partial(
            _sums, temperatures=(1.0, *temperatures), with_x=with_entropy
        ),
    )
    log_z1_C = jnp.log(sums[0][0])
    mass_C = log_z1_C + peak_C
    log_z, entropy, drawn_ids = [], [], []
    for column, (t, (z_C, *w_C)) in enumerate(zip(temperatures, sums[1:], strict=True)):
        # log Z is 0 by definition at temperature 1, also when rounding says 1e-7.
        log_z_C = jnp.log(z_C) - log_z1_C / t if t != 1.0 else jnp.zeros_like(mass_C)
        log_z.append(log_z_C)
        if with_entropy:
            entropy.append(jnp.log(z_C) - w_C[0] / (t * z_C))
        if uniforms_CSP is not None:
            p_CV = jnp.exp((logits_CV - mass_C[:, None]) / t - log_z_C[:, None])
            drawn_ids.append(_inverse_cdf(p_CV, uniforms_CSP[:, column]))
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


def _terms(
    logits_CX: Float[Array, "C X"],
    peak_C: Float[Array, "C"],
    temperatures: tuple[float, ...],
    with_x: bool,
) -> list[tuple[Float[Array, "C X"], ...]]:
    """Return exp(x / T), and exp(x / T) x, for x = logits - peak and each T."""
    # 0 * -inf is no number: an id without probability has a term of 0.
    x_CX = jnp.maximum(logits_CX - peak_C[:, None], jnp.finfo(jnp.float32).min)
    exps = [jnp.exp(x_CX / t) for t in temperatures]
    return [(exp_CX, exp_CX * x_CX) if with_x else (exp_CX,) for exp_CX in exps]


def _sums(
    logits_CV: jax.Array,
    peak_C: jax.Array,
    *,
    temperatures: tuple[float, ...],
    with_x: bool,
) -> list[tuple[Float[Array, "C"], ...]]:
    """Return the sums of `_terms` over the vocabulary."""
    terms = _terms(logits_CV, peak_C, temperatures, with_x)
    return jax.tree.map(lambda term_CV: term_CV.sum(-1), terms)


def _sums_in_slabs(
    logits_CV: jax.Array,
    peak_C: jax.Array,
    *,
    temperatures: tuple[float, ...],
    with_x: bool,
) -> list[tuple[Float[Array, "C"], ...]]:
    """Return `_sums`, slab by slab: on a CPU in less than half of the time.

    There a sum over rows is a library's, which takes what it sums up into itself and
    computes it without vectors.
    """
    size = logits_CV.shape[-1]
    if size <= SLAB:
        return _sums(logits_CV, peak_C, temperatures=temperatures, with_x=with_x)

    def add_slab(index: jax.Array, sums: Any) -> Any:
        start = jnp.minimum(index * SLAB, size - SLAB)  # the last slab overlaps
        slab = jax.lax.dynamic_slice_in_dim(logits_CV, start, SLAB, 1)
        is_new = start + jnp.arange(SLAB) >= index * SLAB
        slab = jnp.where(is_new[None], slab, -jnp.inf)
        return jax.tree.map(jnp.add, sums, _terms(slab, peak_C, temperatures, with_x))

    zeros = jnp.zeros((logits_CV.shape[0], SLAB), jnp.float32)
    start = [(zeros,) * (1 + with_x) for _ in temperatures]
    sums = jax.lax.fori_loop(0, -(-size // SLAB), add_slab, start)
    return jax.tree.map(lambda sum_CX: sum_CX.sum(-1), sums)


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
