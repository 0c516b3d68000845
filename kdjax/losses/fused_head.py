"""The fused head: from hidden states to losses and gradients, chunk by chunk.

The logits of a chunk of tokens live only while the chunk is worked on, and gradients
are made in the same pass, so nothing of size [tokens, vocabulary] outlives a chunk and
each of the three matmuls (logits, d_hidden, d_weight) runs once.

On a mesh each device gathers the head once, scans over its own tokens without
communication, and the gradient of the head is reduced once at the end. (Left to
automatic partitioning, the loop holds an all-reduce of logits.) With a vocabulary axis
each device keeps its slice of the vocabulary for the tokens of its group, which
exchanges a few numbers a token in the loop, and the hidden states' gradient at its end.

Shapes: N tokens, C tokens of a chunk, V vocabulary, D width, E width of a live teacher,
K stored pairs, S temperatures.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kdjax.losses.chunk_label import chunk_label
from kdjax.losses.chunk_loss import Teacher, Tokens, chunk_loss
from kdjax.losses.divergence import Divergence
from kdjax.losses.fused_loss import (
    Head,
    LiveTeacher,
    logits_of,
    part_of,
    scan,
    stored,
    weighted_loss,
    whole,
)
from kdjax.losses.options import PLAIN, LogitRule, Options, check
from kdjax.losses.sparse import FORWARD_KL
from kdjax.losses.token_scan import Placement

__all__ = [
    "LiveTeacher",
    "LogitRule",
    "Placement",
    "Teacher",
    "chunk_size",
    "fused_loss",
    "label",
    "score",
    "sharded_fused_loss",
    "sharded_label",
    "sharded_score",
]


def chunk_size(memory_mib: float, vocab_size: int) -> int:
    """Return the tokens per chunk whose float32 logits fit in `memory_mib`.

    The largest power of two that fits, at most 1024; 8 where even 8 do not fit. While
    gradients are made, two arrays of this size are alive.
    """
    fitting = memory_mib * 2**20 / (4 * vocab_size)
    return min(1024, max(8, 2 ** math.floor(math.log2(max(fitting, 1)))))


def fused_loss(
    hidden_ND: Float[Array, "N D"],
    weight_VD: Float[Array, "V D"],
    targets_N: Int[Array, "N"],
    hard_weights_N: Float[Array, "N"],
    soft_weights_N: Float[Array, "N"],
    teacher: Teacher | LiveTeacher | None,
    *,
    bias_V: Float[Array, "V"] | None = None,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    divergence: Divergence = FORWARD_KL,
    tail: str = "bucket",
    label_smoothing: float = 0.0,
    logit_rule: LogitRule = PLAIN,
    teacher_rule: LogitRule = PLAIN,
    chunk_size: int,
    num_valid: int | None = None,
    placement: Placement | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "N"]]]:
    """Return the weighted sum of cross-entropy and distillation loss over tokens.

      loss  = sum_n hard_n * nll_n + soft_n * kl_n * (T^2 if scale_by_t2 else 1)
      nll_n = -log softmax(z_n)[target_n],  z_n = logit_rule(hidden_n W^T + b)
      kl_n  = divergence(softmax(z_n / T), teacher_n at T), the forward KL unless
              another is given; `sparse` has the tails

    Differentiable once, in `hidden_ND`, `weight_VD` and `bias_V`; everything else is
    constant.
    Gradients are made in the forward pass, and only when asked for.

    Args:
      hidden_ND: hidden states after the final norm, float32 or bfloat16.
      weight_VD: output head (or tied embedding). Used in the dtype of `hidden_ND`.
      targets_N: int32 ids in [0, V).
      hard_weights_N: float32 weight of each token's nll.
      soft_weights_N: float32 weight of each token's kl. Tokens with both weights 0
        (padding) add exactly 0 to the loss and to every gradient.
      teacher: stored outputs, a live one, or None for cross-entropy alone.
      bias_V: added to the products, float32; None = none.
      temperature: T of the soft term, > 0; `teacher.log_z_N` must be for this T.
      scale_by_t2: keep the size of the soft gradient independent of T.
      divergence: of the soft term; draws have the forward KL alone.
      tail: what stands for ids that are not stored, one of `sparse.TAILS`.
      label_smoothing: e, the share of the hard target spread evenly over the
        vocabulary; the nll that is returned is without it.
      logit_rule: scale and softcap of the student's logits.
      teacher_rule: those of a live teacher.
      chunk_size: most tokens whose logits are alive at once, per device.
      num_valid: rows of `weight_VD` from here on are padding of the vocabulary and
        have probability 0; None = all rows are real.
      placement: split tokens, and with a vocabulary axis the vocabulary, over a mesh;
        None = leave the arrays where they are.

    Returns:
      The loss (float32) and {"nll", "kl"}: float32 [N] in nats, neither weighted nor
      scaled by T^2, without gradient; kl is 0 where the soft weight is 0, both are 0
      where both weights are 0.

    Raises:
      ValueError: an option out of range, or arrays whose shapes do not belong together.

    Source: gradient in the forward pass: Hsu et al., 2024, Liger Kernel, arXiv
    2410.10989, section 3.2; T^2: Hinton et al., 2015, arXiv 1503.02531, section 2.
    """
    options = Options(
        chunk_size=chunk_size,
        temperature=temperature,
        scale_by_t2=scale_by_t2,
        divergence=divergence,
        tail=tail,
        label_smoothing=label_smoothing,
        logit_rule=logit_rule,
        teacher_rule=teacher_rule,
        num_valid=weight_VD.shape[0] if num_valid is None else num_valid,
        placement=placement,
    )
    if teacher is None:
        soft_weights_N = jnp.zeros_like(soft_weights_N)
    rows, live = stored(teacher, targets_N)
    tokens = Tokens(targets_N, hard_weights_N, soft_weights_N, rows)
    student = Head(weight_VD, bias_V)
    check(options, hidden_ND, student, tokens)
    if live is not None and live.weight_VD.shape[0] != weight_VD.shape[0]:
        raise ValueError(
            f"a live teacher's head of {live.weight_VD.shape[0]} rows does not fit "
            f"{weight_VD.shape[0]} rows of weight_VD: pad it, and set num_valid"
        )
    return weighted_loss(options, hidden_ND, student, live, tokens)


def score(
    hidden_ND: Float[Array, "N D"],
    weight_VD: Float[Array, "V D"],
    targets_N: Int[Array, "N"],
    teacher: Teacher | None,
    *,
    bias_V: Float[Array, "V"] | None = None,
    temperature: float = 1.0,
    tail: str = "bucket",
    logit_rule: LogitRule = PLAIN,
    chunk_size: int,
    num_valid: int | None = None,
    active_N: Bool[Array, "N"] | None = None,
    placement: Placement | None = None,
) -> dict[str, jax.Array]:
    """Return per-token measures of a model on held-out tokens, without gradient.

    Args and Raises as `fused_loss`; the result is 0 where `active_N` is False (None =
    nowhere).

    Returns:
      {"nll": float32 [N], nats, "kl": float32 [N], nats at T, unscaled, 0 without a
      teacher, "top1_ids": int32 [N], the most probable id}.
    """
    options = Options(
        chunk_size=chunk_size,
        temperature=temperature,
        tail=tail,
        logit_rule=logit_rule,
        num_valid=weight_VD.shape[0] if num_valid is None else num_valid,
        placement=whole(placement),
    )
    hard_N = jnp.ones(targets_N.shape, jnp.float32)
    soft_N = jnp.zeros_like(hard_N) if teacher is None else hard_N
    tokens = Tokens(targets_N, hard_N, soft_N, stored(teacher, targets_N)[0])
    student = Head(weight_VD, bias_V)
    check(options, hidden_ND, student, tokens)

    def step(carry, heads, hidden_CD, tokens):
        part = part_of(options, heads[0])
        logits_CV = logits_of(hidden_CD, heads[0], options.logit_rule, part)
        top1_ids = jnp.argmax(logits_CV, axis=-1).astype(jnp.int32)
        loss = chunk_loss(logits_CV, tokens, options, part)
        out = {"nll": loss.nll_C, "kl": loss.kl_C, "top1_ids": top1_ids}
        return carry, (out, None)

    return scan(step, options, hidden_ND, (student, None), tokens, active_N=active_N)[1]


def label(
    hidden_ND: Float[Array, "N D"],
    weight_VD: Float[Array, "V D"],
    targets_N: Int[Array, "N"],
    *,
    k: int | None,
    temperatures: tuple[float, ...],
    bias_V: Float[Array, "V"] | None = None,
    logit_rule: LogitRule = PLAIN,
    chunk_size: int,
    num_valid: int | None = None,
    points_NSP: Float[Array, "N S P"] | None = None,
    with_entropy: bool = True,
    active_N: Bool[Array, "N"] | None = None,
    placement: Placement | None = None,
) -> dict[str, jax.Array]:
    """Return what a teacher cache stores for each target token.

    Args:
      hidden_ND: hidden states after the final norm.
      weight_VD: output head.
      targets_N: int32 ids in [0, V).
      active_N: tokens to label; the result is 0 for the others. None = all.
      k: pairs stored per token, at most the valid vocabulary; None = the whole row.
      temperatures: S declared temperatures.
      bias_V: added to the products; None = none.
      logit_rule: scale and softcap of the logits.
      chunk_size: most tokens whose logits are alive at once, per device.
      num_valid: rows of `weight_VD` from here on are padding.
      points_NSP: P numbers in [0, 1) for each temperature: draws ids instead of
        storing the top k.
      with_entropy: the teacher's entropies are wanted.
      placement: split the tokens over a mesh.

    Returns:
      {"log_probs_NK": log-probabilities at temperature 1 from the full softmax, sorted
      from the largest (k None: [N, V] in id order), "ids_NK": int32 (absent if k is
      None), "target_log_probs_N", "log_z_NS": log sum_v p_v^(1/T), "entropy_NS": of
      the teacher at each T}; float32, nats. With points, "drawn_ids_NSP" in place of
      log-probabilities and ids: where each point lies in the cumulative distribution.

    Raises:
      ValueError: an option out of range, or arrays whose shapes do not belong together.
    """
    options = Options(
        chunk_size=chunk_size,
        logit_rule=logit_rule,
        num_valid=weight_VD.shape[0] if num_valid is None else num_valid,
        placement=whole(placement),
    )
    tokens, teacher = (targets_N, points_NSP), Head(weight_VD, bias_V)
    if points_NSP is not None and points_NSP.shape[1:-1] != (len(temperatures),):
        raise ValueError(
            f"points_NSP of shape {points_NSP.shape} must be [N, {len(temperatures)}, "
            f"P], one row a temperature of {temperatures}"
        )
    check(options, hidden_ND, teacher, tokens)
    limit = weight_VD.shape[0] if num_valid is None else num_valid
    if k is not None and not 1 <= k <= limit:
        raise ValueError(
            f"k={k} must lie in 1..{limit}, the vocabulary: lower k, or None for dense"
        )
    if not temperatures or min(temperatures) <= 0:
        raise ValueError(
            f"temperatures={temperatures} must be > 0: declare one or more"
        )

    def step(carry, heads, hidden_CD, tokens):
        part = part_of(options, heads[0])
        logits_CV = logits_of(hidden_CD, heads[0], options.logit_rule, part)
        targets_C, points_CSP = tokens
        out = chunk_label(
            logits_CV,
            targets_C,
            k=k,
            temperatures=temperatures,
            points_CSP=points_CSP,
            with_entropy=with_entropy,
        )
        return carry, (out, None)

    return scan(step, options, hidden_ND, (teacher, None), tokens, active_N=active_N)[1]


def _sharded(function: Callable) -> Callable:
    """Return `function` with leading argument `mesh` and keyword `weight_spec`."""

    def sharded(
        mesh: Mesh,
        *arguments,
        weight_spec: PartitionSpec,
        vocab_axis: str | None = None,
        **keywords,
    ):
        placement = Placement(mesh, weight_spec, vocab_axis)
        return function(*arguments, **keywords, placement=placement)

    name = function.__name__
    sharded.__name__ = sharded.__qualname__ = f"sharded_{name}"
    sharded.__doc__ = (
        f"Return `{name}` of the later arguments, tokens split over the axes of `mesh`."
        "\n\nThe weight, and its gradient, are laid out by `weight_spec`. N need not"
        "\ndivide by the number of devices. Of `vocab_axis` see `token_scan.Placement`;"
        "\nscoring and labelling never split the vocabulary."
    )
    return sharded


sharded_fused_loss = _sharded(fused_loss)
sharded_score = _sharded(score)
sharded_label = _sharded(label)
