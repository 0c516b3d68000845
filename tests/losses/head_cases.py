"""Cases for the tests of the fused head, and a float64 reference of its losses."""

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.losses import Divergence, LossOptions, Teacher, fused_loss
from kdjax.losses.sparse import (
    TAILS_WITH_BUCKET,
    check_tail,
    stored_events,
    teacher_events,
)

N, V, D, K = 21, 37, 8, 6


def log_softmax(z):
    """Return log softmax over the last axis; -inf allowed."""
    peak = z.max(-1, keepdims=True)
    return z - peak - np.log(np.exp(z - peak).sum(-1, keepdims=True))


def teacher_pairs(logits_NV, k, temperature):
    """Return the top k (ids, log-probs at T = 1) and log Z_T of each row."""
    logp = log_softmax(np.asarray(logits_NV, np.float64))
    ids = np.argsort(-logp, axis=-1)[:, :k]
    log_z = np.log(np.exp(logp / temperature).sum(-1))
    return ids, np.take_along_axis(logp, ids, -1), log_z


def kl(logits_V, teacher_logits_V, k, temperature, tail):
    """Return (KL of one token, its gradient in the logits), by loops."""
    vocab_size = len(logits_V)
    q = np.exp(log_softmax(logits_V / temperature))
    p = np.exp(log_softmax(teacher_logits_V / temperature))
    stored = np.argsort(-log_softmax(teacher_logits_V))[:k]
    other = np.setdiff1d(np.arange(vocab_size), stored)
    p_stored = p[stored].sum()
    value, grad = 0.0, np.zeros(vocab_size)
    if tail == "renormalize_teacher":
        p = p / p_stored
    if tail == "renormalize_both":
        p = p / p_stored
        inside = np.zeros(vocab_size)
        inside[stored] = q[stored] / q[stored].sum()
        q = inside
    for i in stored:
        if p[i] > 0:
            value += p[i] * (np.log(p[i]) - np.log(q[i]))
        grad[i] = q[i] - p[i]
    if tail == "bucket" and len(other):
        p_tail, q_tail = p[other].sum(), q[other].sum()
        value += p_tail * (np.log(p_tail) - np.log(q_tail))
        grad[other] = q[other] - p_tail * q[other] / q_tail
    if tail == "renormalize_teacher":
        grad[other] = q[other]
    if tail == "drop":
        grad[stored] = p_stored * q[stored] - p[stored]
        grad[other] = p_stored * q[other]
    return value, grad / temperature


def sparse_divergence(
    student_NK, student_rest_N, teacher_NK, *, divergence=None, tail="bucket"
):
    """Return a divergence over k stored ids and the rest, made from `losses.sparse`.

    Arguments are log-probabilities at one temperature, float32; those of the student's
    rest are a log-sum-exp over the other ids.
    """
    divergence = divergence or Divergence()
    check_tail(tail, divergence)
    teacher_NK, teacher_rest_N = teacher_events(
        teacher_NK, student_rest_N > -jnp.inf, tail=tail
    )
    if tail == "renormalize_both":
        empty_N1 = jnp.isneginf(student_NK).all(-1, keepdims=True)
        finite_NK = jnp.where(empty_N1, 0.0, student_NK)
        student_NK = student_NK - jax.nn.logsumexp(finite_NK, axis=-1, keepdims=True)
    value_N = stored_events(student_NK, teacher_NK, divergence=divergence, tail=tail)
    if tail in TAILS_WITH_BUCKET:
        value_N += divergence(student_rest_N[:, None], teacher_rest_N[:, None])
    return value_N


def loss(hidden, weight, targets, hard, soft, teacher_logits, *, k, temperature, tail):
    """Return loss, nll, kl and the gradients in hidden and weight."""
    logits = hidden @ weight.T
    nll, kls, d_logits = [], [], np.zeros_like(logits)
    for n, target in enumerate(targets):
        logq = log_softmax(logits[n])
        nll.append(-logq[target])
        value, grad = kl(logits[n], teacher_logits[n], k, temperature, tail)
        kls.append(value if soft[n] else 0.0)
        d_logits[n] = hard[n] * np.exp(logq) + soft[n] * temperature**2 * grad
        d_logits[n, target] -= hard[n]
    nll = np.where((hard != 0) | (soft != 0), nll, 0.0)
    total = hard @ nll + soft @ np.array(kls) * temperature**2
    return total, nll, np.array(kls), d_logits @ weight, d_logits.T @ hidden


def make(seed=0, *, k=K, temperature=1.0, num_tokens=N, vocab_size=V, sharpness=1.5):
    """Return float64 arrays: hidden, weight, targets, hard, soft, teacher logits."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(num_tokens, D))
    weight = rng.normal(size=(vocab_size, D))
    targets = rng.integers(0, vocab_size, num_tokens)
    targets[:2] = 0, vocab_size - 1
    hard, soft = rng.uniform(0.1, 1.0, (2, num_tokens))
    hard[3], soft[4], hard[5], soft[5] = 0, 0, 0, 0
    teacher_logits = sharpness * rng.normal(size=(num_tokens, vocab_size))
    teacher = teacher_of(teacher_logits, k, temperature)
    arrays = (hidden, weight, targets, hard, soft)
    return arrays, teacher_logits, teacher


def teacher_of(logits, k, temperature):
    """Return the top-k `Teacher` (k None: dense) of float64 logits."""
    if k is None:
        logp, log_z = (
            log_softmax(logits),
            teacher_pairs(logits, 1, temperature)[2],
        )
        return Teacher(None, jnp.float32(logp), jnp.float32(log_z))
    ids, logp, log_z = teacher_pairs(logits, k, temperature)
    return Teacher(jnp.int32(ids), jnp.float32(logp), jnp.float32(log_z))


def as_jax(arrays, dtype=jnp.float32):
    """Return the arrays of `make` in the dtypes of the head."""
    hidden, weight, targets, hard, soft = arrays
    return (
        jnp.asarray(hidden, dtype),
        jnp.asarray(weight, dtype),
        jnp.int32(targets),
        jnp.float32(hard),
        jnp.float32(soft),
    )


def value_and_grads(arrays, teacher, *, loss=fused_loss, **options):
    """Return (loss, per-token, d_hidden, d_weight) under jit."""
    hidden, weight, *rest = arrays
    loss_options = LossOptions(**options)

    @jax.jit
    def run(hidden, weight, rest, teacher):
        def total(hidden, weight):
            return loss(hidden, weight, *rest, teacher, loss_options)

        return jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, weight)

    (value, per_token), (d_hidden, d_weight) = run(hidden, weight, rest, teacher)
    return value, per_token, d_hidden, d_weight


def assert_close(actual, expected, tol=1e-5):
    """Compare trees with a tolerance relative to the largest entry."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=tol * max(1.0, np.abs(e).max()))
