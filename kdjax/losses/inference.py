"""Passes of the head without gradient: scores of a model, labels of a teacher.

Shapes: N tokens, C tokens of a chunk, V vocabulary, D width, K stored pairs,
S temperatures, P draws.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdjax.losses.chunk_label import chunk_label
from kdjax.losses.chunk_loss import Teacher, Tokens, chunk_loss
from kdjax.losses.fused_head import check_teacher, stored_teacher
from kdjax.losses.head import (
    Head,
    Heads,
    check_shapes,
    head_logits,
    num_valid,
    vocab_shard,
    with_num_valid,
)
from kdjax.losses.options import LabelOptions, LossOptions
from kdjax.losses.token_scan import Placement, scan_tokens


def score(
    hidden_ND: Float[Array, "N D"],
    weight_VD: Float[Array, "V D"],
    targets_N: Int[Array, "N"],
    teacher: Teacher | None,
    options: LossOptions,
    *,
    bias_V: Float[Array, "V"] | None = None,
    active_N: Bool[Array, "N"] | None = None,
    placement: Placement | None = None,
) -> dict[str, jax.Array]:
    """Return per-token measures of a model on held-out tokens, without gradient.

    Args:
      hidden_ND: as in `fused_loss`, like all that is not named here.
      weight_VD: output head.
      targets_N: int32 ids in [0, V).
      teacher: stored outputs; None = none.
      options: as in `fused_loss`.
      bias_V: added to the products.
      active_N: tokens to score; the result is 0 for the others. None = all.
      placement: split the tokens over a mesh; the vocabulary is never split.

    Returns:
      {"nll": float32 [N], nats, "kl": float32 [N], nats at T, unscaled, 0 without a
      teacher, "top1_ids": int32 [N], the most probable id}.

    Raises:
      ValueError: as `fused_loss`.
    """
    options = with_num_valid(options, weight_VD)
    placement = placement and placement.without_vocab_axis()
    hard_N = jnp.ones(targets_N.shape, jnp.float32)
    soft_N = jnp.zeros_like(hard_N) if teacher is None else hard_N
    stored, _ = stored_teacher(teacher, targets_N)
    tokens = Tokens(targets_N, hard_N, soft_N, stored)
    student = Head(weight_VD, bias_V)
    check_shapes(options, hidden_ND, student, tokens)
    check_teacher(options, weight_VD, stored, None)

    def step(
        carry: None, heads: Heads, hidden_CD: jax.Array, tokens: Tokens
    ) -> tuple[None, tuple[dict[str, jax.Array], None]]:
        shard = vocab_shard(options, placement, heads[0])
        logits_CV = head_logits(hidden_CD, heads[0], options.logit_transform, shard)
        top1_ids = jnp.argmax(logits_CV, axis=-1).astype(jnp.int32)
        loss = chunk_loss(logits_CV, tokens, options, shard)
        out = {"nll": loss.nll_C, "kl": loss.kl_C, "top1_ids": top1_ids}
        return carry, (out, None)

    _, out, _ = scan_tokens(
        step,
        hidden_ND,
        (student, None),
        tokens,
        chunk_size=options.chunk_size,
        placement=placement,
        active_N=active_N,
    )
    return out


def label(
    hidden_ND: Float[Array, "N D"],
    weight_VD: Float[Array, "V D"],
    targets_N: Int[Array, "N"],
    options: LabelOptions,
    *,
    bias_V: Float[Array, "V"] | None = None,
    uniforms_NSP: Float[Array, "N S P"] | None = None,
    active_N: Bool[Array, "N"] | None = None,
    placement: Placement | None = None,
) -> dict[str, jax.Array]:
    """Return what a teacher cache stores for each target token.

    Args:
      hidden_ND: hidden states after the final norm.
      weight_VD: output head.
      targets_N: int32 ids in [0, V).
      options: pairs per token, temperatures, chunk size and the rest.
      bias_V: added to the products; None = none.
      uniforms_NSP: P numbers in [0, 1) for each temperature: ids are drawn by inverse
        CDF, one per number, instead of storing the top k.
      active_N: tokens to label; the result is 0 for the others. None = all.
      placement: split the tokens over a mesh; the vocabulary is never split.

    Returns:
      {"log_probs_NK": log-probabilities at temperature 1 from the full softmax, sorted
      from the largest (k None: [N, num_valid] in id order), "ids_NK": int32 (absent if
      k is None), "target_log_probs_N", "log_z_NS": log sum_v p_v^(1/T), "entropy_NS":
      of the teacher at each T}; float32, nats. With uniforms, "drawn_ids_NSP" in place
      of log-probabilities and ids.

    Raises:
      ValueError: arrays whose shapes do not belong together, or options that do not
        fit them.
    """
    options = with_num_valid(options, weight_VD)
    placement = placement and placement.without_vocab_axis()
    temperatures = options.temperatures
    tokens, teacher = (targets_N, uniforms_NSP), Head(weight_VD, bias_V)
    if uniforms_NSP is not None and uniforms_NSP.shape[1] != len(temperatures):
        raise ValueError(
            f"uniforms_NSP of shape {uniforms_NSP.shape} must be [N, "
            f"{len(temperatures)}, P], one row per temperature of {temperatures}"
        )
    check_shapes(options, hidden_ND, teacher, tokens)
    if options.k is not None and not 1 <= options.k <= num_valid(options):
        raise ValueError(
            f"k={options.k} must lie in 1..{options.num_valid}, the vocabulary: lower "
            "k, or None for dense"
        )

    def step(
        carry: None,
        heads: Heads,
        hidden_CD: jax.Array,
        tokens: tuple[jax.Array, jax.Array | None],
    ) -> tuple[None, tuple[dict[str, jax.Array], None]]:
        shard = vocab_shard(options, placement, heads[0])
        logits_CV = head_logits(hidden_CD, heads[0], options.logit_transform, shard)
        targets_C, uniforms_CSP = tokens
        out = chunk_label(
            logits_CV,
            targets_C,
            k=options.k,
            temperatures=temperatures,
            uniforms_CSP=uniforms_CSP,
            with_entropy=options.with_entropy,
        )
        if options.k is None and uniforms_CSP is None:
            out["log_probs_NK"] = out["log_probs_NK"][:, : num_valid(options)]
        return carry, (out, None)

    _, out, _ = scan_tokens(
        step,
        hidden_ND,
        (teacher, None),
        tokens,
        chunk_size=options.chunk_size,
        placement=placement,
        active_N=active_N,
    )
    return out
