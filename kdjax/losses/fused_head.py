"""The fused head: from hidden states to losses and gradients, chunk by chunk.

The logits of a chunk of tokens live only while the chunk is worked on, and gradients
are made in the same pass, so nothing of size [tokens, vocabulary] outlives a chunk and
each of the three matmuls (logits, d_hidden, d_weight) runs once.

On a mesh each device gathers the head once, scans over its own tokens without
communication, and the gradient of the head is reduced once at the end. (Left to
automatic partitioning, the loop holds an all-reduce of logits.) With a vocabulary axis
each device keeps its shard of the vocabulary for the tokens of its group, which
exchanges a few numbers per token in the loop, and the hidden states' gradient at its
end.

Shapes: N tokens, C tokens of a chunk, V vocabulary, D width, E width of an online
teacher, K stored pairs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses.chunk_loss import ChunkLoss, Teacher, Tokens, chunk_loss
from kdjax.losses.head import (
    Head,
    Heads,
    add_products,
    check_shapes,
    head_logits,
    matmul,
    vocab_shard,
    with_num_valid,
)
from kdjax.losses.options import LossOptions
from kdjax.losses.token_scan import Placement, Step, Tree, scan_tokens


class OnlineTeacherLogits(NamedTuple):
    """Logits of a teacher that runs beside the student, made chunk by chunk."""

    hidden_NE: Float[Array, "N E"]
    """Hidden states after its final norm, in the dtype of the student's."""
    weight_VE: Float[Array, "V E"]
    """Its head; as many rows as the student's (padding is masked by `num_valid`)."""
    bias_V: Float[Array, "V"] | None = None


def fused_loss(
    hidden_ND: Float[Array, "N D"],
    weight_VD: Float[Array, "V D"],
    targets_N: Int[Array, "N"],
    hard_weights_N: Float[Array, "N"],
    soft_weights_N: Float[Array, "N"],
    teacher: Teacher | OnlineTeacherLogits | None,
    options: LossOptions,
    *,
    bias_V: Float[Array, "V"] | None = None,
    placement: Placement | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "N"]]]:
    """Return the weighted sum of cross-entropy and distillation loss over tokens.

      loss   = sum_n hard_n * h_n + soft_n * kl_n * (T^2 if scale_by_t2 else 1)
      h_n    = (1 - e) nll_n + e * mean_v -log q_nv,  e the label smoothing
      nll_n  = -log q_n[target_n],  q_n = softmax(z_n)
      z_n    = logit_transform(hidden_n W^T + b)
      kl_n   = divergence(softmax(z_n / T), teacher_n at T), the forward KL unless
               another is given; `sparse` has the tails

    Differentiable once, in `hidden_ND`, `weight_VD` and `bias_V`; everything else is
    constant. Gradients are made in the forward pass, and only when asked for.

    Args:
      hidden_ND: hidden states after the final norm, float32 or bfloat16.
      weight_VD: output head (or tied embedding). Used in the dtype of `hidden_ND`.
      targets_N: int32 ids in [0, V).
      hard_weights_N: float32 weight of each token's nll.
      soft_weights_N: float32 weight of each token's kl. Tokens with both weights 0
        (padding) add exactly 0 to the loss and to every gradient.
      teacher: stored outputs, those of an online teacher, or None for cross-entropy
        alone.
      options: temperature, divergence, tail, chunk size and the rest.
      bias_V: added to the products, float32; None = none.
      placement: split tokens, and with a vocabulary axis the vocabulary, over a mesh;
        N need not divide by its devices. None = leave the arrays where they are.

    Returns:
      The loss (float32) and {"nll", "kl"}: float32 [N] in nats, neither weighted nor
      scaled by T^2, without gradient; kl is 0 where the soft weight is 0, both are 0
      where both weights are 0.

    Raises:
      ValueError: arrays whose shapes do not belong together, or options that do not
        fit them.

    Source: gradient in the forward pass: Hsu et al., 2024, Liger Kernel, arXiv
    2410.10989, section 3.2; T^2: Hinton et al., 2015, arXiv 1503.02531, section 2;
    label smoothing: Szegedy et al., 2015, arXiv 1512.00567, section 7.
    """
    options = with_num_valid(options, weight_VD)
    if teacher is None:
        soft_weights_N = jnp.zeros_like(soft_weights_N)
    stored, teacher_head = stored_teacher(teacher, targets_N)
    tokens = Tokens(targets_N, hard_weights_N, soft_weights_N, stored)
    student = Head(weight_VD, bias_V)
    check_shapes(options, hidden_ND, student, tokens)
    check_teacher(options, weight_VD, stored, teacher_head)
    return _weighted_loss(options, placement, hidden_ND, student, teacher_head, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_loss(
    options: LossOptions,
    placement: Placement | None,
    hidden_ND: Float[Array, "N D"],
    student: Head,
    teacher_head: Head | None,
    tokens: Tokens,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "N"]]]:
    """Return the result of `fused_loss`; differentiable in hidden and student."""

    def step(
        carry: None, heads: Heads, hidden_CD: jax.Array, tokens: Tokens
    ) -> tuple[None, tuple[dict[str, jax.Array], None]]:
        loss = _chunk_loss(options, placement, heads, hidden_CD, tokens)
        return carry, (_per_token(loss), None)

    heads = (student, teacher_head)
    _, per_token, _ = _scan_weighted(
        step, options, placement, hidden_ND, heads, tokens, accumulate=False
    )
    return _total(options, per_token, tokens)


def _weighted_loss_forward(
    options: LossOptions,
    placement: Placement | None,
    hidden_ND: Float[Array, "N D"],
    student: Head,
    teacher_head: Head | None,
    tokens: Tokens,
) -> tuple[
    tuple[Float[Array, ""], dict[str, Float[Array, "N"]]],
    tuple[Float[Array, "N D"], Head],
]:
    """Return the loss, and as residuals its gradients for a cotangent of 1."""

    def step(
        sums: Head, heads: Heads, hidden_CD: jax.Array, tokens: Tokens
    ) -> tuple[Head, tuple[dict[str, jax.Array], jax.Array]]:
        loss = _chunk_loss(options, placement, heads, hidden_CD, tokens)
        # A bias's gradient is summed before anything is rounded.
        dtype = hidden_CD.dtype if sums.bias_V is None else jnp.float32
        d_products_CV = loss.d_products(options.logit_transform, dtype)
        if sums.bias_V is not None:
            sums = sums._replace(bias_V=sums.bias_V + d_products_CV.sum(0))
        d_products_CV = d_products_CV.astype(hidden_CD.dtype)
        d_hidden_CD = matmul("cv,vd->cd", d_products_CV, heads[0].weight_VD)
        d_weight_VD = add_products(sums.weight_VD, d_products_CV, hidden_CD, placement)
        # A shard of the vocabulary has a summand of the gradient: added in float32.
        if vocab_shard(options, placement, heads[0]).axis is None:
            d_hidden_CD = d_hidden_CD.astype(hidden_CD.dtype)
        sums = sums._replace(weight_VD=d_weight_VD)
        return sums, (_per_token(loss), d_hidden_CD)

    heads = (student, teacher_head)
    sums, per_token, d_hidden_ND = _scan_weighted(
        step, options, placement, hidden_ND, heads, tokens, accumulate=True
    )
    d_student = jax.tree.map(
        lambda g, x: g[: x.shape[0]].astype(x.dtype), sums, student
    )
    d_hidden_ND = d_hidden_ND.astype(hidden_ND.dtype)
    return _total(options, per_token, tokens), (d_hidden_ND, d_student)


def _weighted_loss_backward(
    options: LossOptions,
    placement: Placement | None,
    gradients: tuple[Float[Array, "N D"], Head],
    cotangents: tuple[Float[Array, ""], dict[str, Float[Array, "N"]]],
) -> tuple[Float[Array, "N D"], Head, None, None]:
    """Return the gradients, scaled by the loss's cotangent."""
    del options, placement
    scale, _ = cotangents  # the per-token outputs carry no gradient
    d_hidden_ND, d_student = jax.tree.map(
        lambda g: (scale * g.astype(jnp.float32)).astype(g.dtype), gradients
    )
    return d_hidden_ND, d_student, None, None


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


def _scan_weighted(
    step: Step,
    options: LossOptions,
    placement: Placement | None,
    hidden_ND: Float[Array, "N D"],
    heads: Heads,
    tokens: Tokens,
    *,
    accumulate: bool,
) -> tuple[Tree, Tree, Tree]:
    """Return `scan_tokens` over the tokens that have a weight.

    Heads and dense rows of a teacher get rows and columns of padding until the
    vocabulary divides over its axis.
    """
    token_specs = None
    if placement is not None:
        heads = jax.tree.map(lambda x: _pad_to_multiple(x, placement.num_shards), heads)
        token_specs = jax.tree.map(lambda _: placement.token_spec, tokens)
        rows_NV = tokens.teacher.log_probs_NK
        if tokens.teacher.ids_NK is None and rows_NV is not None:
            missing = -rows_NV.shape[1] % placement.num_shards
            padding = [(0, 0), (0, missing)]
            rows_NV = jnp.pad(rows_NV, padding, constant_values=-jnp.inf)
            tokens = tokens._replace(
                teacher=tokens.teacher._replace(log_probs_NK=rows_NV)
            )
            token_specs = token_specs._replace(
                teacher=token_specs.teacher._replace(log_probs_NK=placement.row_spec)
            )
    return scan_tokens(
        step,
        hidden_ND,
        heads,
        tokens,
        chunk_size=options.chunk_size,
        placement=placement,
        token_specs=token_specs,
        active_N=(tokens.hard_weights_N != 0) | (tokens.soft_weights_N != 0),
        accumulate=accumulate,
    )


def _chunk_loss(
    options: LossOptions,
    placement: Placement | None,
    heads: Heads,
    hidden_CD: Float[Array, "C D"],
    tokens: Tokens,
) -> ChunkLoss:
    """Return the losses of one chunk."""
    student, teacher_head = heads
    shard = vocab_shard(options, placement, student)
    hidden_CE = tokens.teacher.hidden_NE
    if teacher_head is not None and hidden_CE is not None:
        transform = options.teacher_logit_transform
        rows_CV = head_logits(hidden_CE, teacher_head, transform, shard)
        peak_C, t = shard.peak(rows_CV), options.temperature
        log_z_C = shard.logsumexp(rows_CV, peak_C, t)
        tokens = tokens._replace(teacher=Teacher(None, rows_CV, log_z_C))
    logits_CV = head_logits(hidden_CD, student, options.logit_transform, shard)
    return chunk_loss(logits_CV, tokens, options, shard)


def _per_token(loss: ChunkLoss) -> dict[str, jax.Array]:
    return {"nll": loss.nll_C, "kl": loss.kl_C, "hard": loss.hard_C}


def _total(
    options: LossOptions, per_token: dict[str, Float[Array, "N"]], tokens: Tokens
) -> tuple[Float[Array, ""], dict[str, Float[Array, "N"]]]:
    """Return the loss, and nll and kl of each token.

    A token without weight counts 0 whatever its loss is.
    """
    hard, soft = tokens.hard_weights_N, tokens.soft_weights_N * options.soft_scale
    hard_N = jnp.where(hard != 0, hard * per_token["hard"], 0.0)
    soft_N = jnp.where(soft != 0, soft * per_token["kl"], 0.0)
    return (hard_N + soft_N).sum(), {k: per_token[k] for k in ("nll", "kl")}


def stored_teacher(
    teacher: Teacher | OnlineTeacherLogits | None, targets_N: Int[Array, "N"]
) -> tuple[Teacher, Head | None]:
    """Return the teacher's arrays per token, and the head of an online teacher.

    Without a teacher each token has one slot, which is unused.
    """
    if isinstance(teacher, OnlineTeacherLogits):
        head = Head(teacher.weight_VE, teacher.bias_V)
        return Teacher(None, None, None, hidden_NE=teacher.hidden_NE), head
    if teacher is not None:
        return teacher, None
    zeros_N = jnp.zeros(targets_N.shape, jnp.float32)
    ids_N1 = jnp.full_like(targets_N, -1)[:, None]
    return Teacher(ids_N1, zeros_N[:, None], zeros_N), None


def _pad_to_multiple(x: jax.Array, divisor: int) -> jax.Array:
    """Append zeros along axis 0 until its length divides."""
    return jnp.pad(x, [(0, -x.shape[0] % divisor)] + [(0, 0)] * (x.ndim - 1))


def check_teacher(
    options: LossOptions,
    weight_VD: jax.Array,
    teacher: Teacher,
    teacher_head: Head | None,
) -> None:
    """Raise ValueError for a teacher that does not fit the options or the head."""
    vocab_size = weight_VD.shape[0]
    if teacher.entropy_N is not None and options.divergence.name != "forward_kl":
        raise ValueError(
            f"divergence={options.divergence.name!r} with draws of the teacher: they "
            "estimate 'forward_kl' alone; use it, or label with cache.kind='top_k'"
        )
    if teacher.ids_NK is None and teacher.log_probs_NK is not None:
        num_columns = teacher.log_probs_NK.shape[1]
        if num_columns != vocab_size:
            raise ValueError(
                f"a dense teacher of {num_columns} columns does not fit {vocab_size} "
                "rows of weight_VD: pad its log-probabilities with -inf"
            )
    if teacher_head is not None and teacher_head.weight_VD.shape[0] != vocab_size:
        raise ValueError(
            f"an online teacher's head of {teacher_head.weight_VD.shape[0]} rows does "
            f"not fit {vocab_size} rows of weight_VD: pad it, and set num_valid"
        )
