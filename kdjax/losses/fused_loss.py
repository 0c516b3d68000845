"""The weighted loss of the fused head as one differentiable function.

Shapes: N tokens, C tokens of a chunk, V vocabulary, D width, E width of a live teacher.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kdjax.losses.chunk_loss import Teacher, Tokens, chunk_loss
from kdjax.losses.options import LogitRule, Options
from kdjax.losses.token_scan import Placement, scan_tokens
from kdjax.losses.vocab_shard import Part


class Head(NamedTuple):
    """What turns hidden states into logits."""

    weight_VD: Float[Array, "V D"]
    bias_V: Float[Array, "V"] | None = None


class LiveTeacher(NamedTuple):
    """A teacher that runs beside the student: its rows are made chunk by chunk."""

    hidden_NE: Float[Array, "N E"]
    """Hidden states after its final norm, in the dtype of the student's."""
    weight_VE: Float[Array, "V E"]
    """Its head; as many rows as the student's (padding is masked by `num_valid`)."""
    bias_V: Float[Array, "V"] | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_loss(options, hidden_ND, student, live, tokens):
    """Return the result of `fused_loss`; differentiable in hidden and student."""

    def step(carry, heads, hidden_CD, tokens):
        _, loss = _chunk(options, heads, hidden_CD, tokens)
        return carry, (_per_token(loss), None)

    heads = _divisible(options, (student, live))
    rest = {"active_N": _weighted(tokens)}
    _, per_token, _ = scan(step, options, hidden_ND, heads, tokens, **rest)
    return _total(options, per_token, tokens)


def _weighted_loss_forward(options, hidden_ND, student, live, tokens):
    def step(sums, heads, hidden_CD, tokens):
        logits_CV, loss = _chunk(options, heads, hidden_CD, tokens)
        d_products_CV = options.logit_rule.pull(loss.d_logits(), logits_CV)
        if sums.bias_V is not None:
            sums = sums._replace(bias_V=sums.bias_V + d_products_CV.sum(0))
        d_products_CV = d_products_CV.astype(hidden_CD.dtype)
        d_hidden_CD = _matmul("cv,vd->cd", d_products_CV, heads[0].weight_VD)
        d_weight_VD = _add_products(
            sums.weight_VD, d_products_CV, hidden_CD, options.placement
        )
        # A slice of the vocabulary has but a part of the gradient: added in float32.
        if part_of(options, heads[0]).axis is None:
            d_hidden_CD = d_hidden_CD.astype(hidden_CD.dtype)
        sums = sums._replace(weight_VD=d_weight_VD)
        return sums, (_per_token(loss), d_hidden_CD)

    heads = _divisible(options, (student, live))
    sums, per_token, d_hidden_ND = scan(
        step,
        options,
        hidden_ND,
        heads,
        tokens,
        active_N=_weighted(tokens),
        accumulate=True,
    )
    d_student = jax.tree.map(
        lambda g, x: g[: x.shape[0]].astype(x.dtype), sums, student
    )
    d_hidden_ND = d_hidden_ND.astype(hidden_ND.dtype)
    return _total(options, per_token, tokens), (d_hidden_ND, d_student)


def _weighted_loss_backward(options, gradients, cotangents):
    del options
    scale, _ = cotangents  # the per-token outputs carry no gradient
    d_hidden_ND, d_student = jax.tree.map(
        lambda g: (scale * g.astype(jnp.float32)).astype(g.dtype), gradients
    )
    return d_hidden_ND, d_student, None, None


weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


def _weighted(tokens: Tokens) -> jax.Array:
    """Return which tokens count: the head runs for no other."""
    return (tokens.hard_weights_N != 0) | (tokens.soft_weights_N != 0)


def scan(step, options, hidden_ND, heads, tokens, **keywords):
    """Return `scan_tokens` of the arguments, as the options say.

    `step` gets the tokens of the chunk, the teacher's whole rows among them.
    """
    rows_NV = None
    if isinstance(tokens, Tokens) and tokens.teacher.ids_NK is None:
        rows_NV = tokens.teacher.log_probs_NK
        tokens = tokens._replace(teacher=tokens.teacher._replace(log_probs_NK=None))
    if rows_NV is not None:
        missing = -rows_NV.shape[1] % _num_slices(options.placement)
        rows_NV = jnp.pad(rows_NV, [(0, 0), (0, missing)], constant_values=-jnp.inf)

    def whole_step(carry, heads, hidden_CD, tokens):
        tokens, rows_CV = tokens
        if rows_CV is not None:
            teacher = tokens.teacher._replace(log_probs_NK=rows_CV)
            tokens = tokens._replace(teacher=teacher)
        return step(carry, heads, hidden_CD, tokens)

    return scan_tokens(
        whole_step,
        hidden_ND,
        heads,
        tokens,
        chunk_size=options.chunk_size,
        placement=options.placement,
        rows_NV=rows_NV,
        **keywords,
    )


def whole(placement: Placement | None) -> Placement | None:
    """Return the placement without a vocabulary axis."""
    return placement and Placement(placement.mesh, placement.weight_spec)


def _num_slices(placement: Placement | None) -> int:
    """Return into how many slices the vocabulary is split."""
    if placement is None or placement.split is None:
        return 1
    return placement.mesh.shape[placement.split]


def _divisible(options, heads):
    """Return the heads with rows added until they divide over the vocabulary axis."""
    num_slices = _num_slices(options.placement)
    return jax.tree.map(
        lambda x: jnp.pad(x, [(0, -x.shape[0] % num_slices)] + [(0, 0)] * (x.ndim - 1)),
        heads,
    )


def part_of(options: Options, head: Head) -> Part:
    """Return which rows of the vocabulary `head` has on this device."""
    size = head.weight_VD.shape[0]
    axis = options.placement.split if options.placement else None
    return Part(size=size, axis=axis, num_valid=options.num_valid)


def logits_of(hidden_CD, head: Head, rule: LogitRule, part: Part) -> jax.Array:
    """Return float32 logits [C, V] of the vocabulary rows here, padding -inf."""
    products_CV = _matmul("cd,vd->cv", hidden_CD, head.weight_VD)
    if head.bias_V is not None:
        products_CV += head.bias_V.astype(jnp.float32)[None]
    logits_CV = rule(products_CV)
    return part.mask(logits_CV)


def _chunk(options, heads, hidden_CD, tokens):
    """Return the logits and the losses of one chunk."""
    student, live = heads
    part = part_of(options, student)
    if live is not None:
        rows_CV = logits_of(tokens.teacher.hidden_NE, live, options.teacher_rule, part)
        peak_C, t = part.peak(rows_CV), options.temperature
        log_z_C = part.logsumexp(rows_CV, peak_C, t)
        tokens = tokens._replace(teacher=Teacher(None, rows_CV, log_z_C))
    logits_CV = logits_of(hidden_CD, student, options.logit_rule, part)
    return logits_CV, chunk_loss(logits_CV, tokens, options, part)


def _per_token(loss) -> dict[str, jax.Array]:
    return {"nll": loss.nll_C, "kl": loss.kl_C, "hard": loss.hard_C}


def _matmul(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)


def _add_products(d_weight_VD, d_logits_CV, hidden_CD, placement) -> jax.Array:
    """Return d_weight + d_logits^T hidden.

    A CPU multiplies into an array of its own and adds that: done for a slice of the
    vocabulary at a time, the array is about half as large as the logits of the chunk
    (a width below the chunk's tokens makes it no larger than those anyway).
    """
    num_rows, num_slices = d_weight_VD.shape[0], 1
    num_tokens, width = hidden_CD.shape
    if _platform(placement) == "cpu" and width > num_tokens:
        num_slices = 2 * width // num_tokens
    size = num_rows // num_slices

    def add(d_weight_VD, start, size):
        logits = jax.lax.dynamic_slice_in_dim(d_logits_CV, start, size, axis=1)
        sums = jax.lax.dynamic_slice_in_dim(d_weight_VD, start, size)
        sums += _matmul("cv,cd->vd", logits, hidden_CD)
        return jax.lax.dynamic_update_slice_in_dim(d_weight_VD, sums, start, axis=0)

    if num_slices == 1:
        return add(d_weight_VD, 0, num_rows)
    d_weight_VD = jax.lax.fori_loop(
        0, num_slices, lambda i, d: add(d, i * size, size), d_weight_VD
    )
    rest = num_rows - num_slices * size
    return add(d_weight_VD, num_rows - rest, rest) if rest else d_weight_VD


def _platform(placement: Placement | None) -> str:
    if placement is None:
        return jax.default_backend()
    return placement.mesh.devices.flat[0].platform


def _total(options, per_token, tokens) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss and what is reported of each token.

    A token without weight counts 0 whatever its loss is.
    """
    hard, soft = tokens.hard_weights_N, tokens.soft_weights_N * options.soft_scale
    hard_N = jnp.where(hard != 0, hard * per_token["hard"], 0.0)
    soft_N = jnp.where(soft != 0, soft * per_token["kl"], 0.0)
    return (hard_N + soft_N).sum(), {k: per_token[k] for k in ("nll", "kl")}


def stored(
    teacher: Teacher | LiveTeacher | None, targets_N: jax.Array
) -> tuple[Teacher, Head | None]:
    """Return what comes with each token, one unused slot without a teacher, and the
    head of a live one.
    """
    if isinstance(teacher, LiveTeacher):
        live = Head(teacher.weight_VE, teacher.bias_V)
        return Teacher(None, None, None, hidden_NE=teacher.hidden_NE), live
    if teacher is not None:
        return teacher, None
    zeros_N = jnp.zeros(targets_N.shape, jnp.float32)
    ids_N1 = jnp.full_like(targets_N, -1)[:, None]
    return Teacher(ids_N1, zeros_N[:, None], zeros_N), None
