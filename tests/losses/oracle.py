"""Float64 NumPy reference of the losses, written from the definitions."""

import numpy as np


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
    total = hard @ np.array(nll) + soft @ np.array(kls) * temperature**2
    return total, np.array(nll), np.array(kls), d_logits @ weight, d_logits.T @ hidden
