"""Divergences between two distributions over the last axis, in nats, per position.

Shapes: `...` any leading axes, E events (the vocabulary, or k stored ids and a tail).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def forward_kl(
    student_logp: Float[Array, "... E"], teacher_logp: Float[Array, "... E"]
) -> Float[Array, "..."]:
    """Return KL(teacher || student) = sum_e p_e (log p_e - log q_e), in float32.

    Summed as p (expm1(d) - d) with d = log q - log p, which adds sum(q) - sum(p) = 0.
    Every term is then >= 0: the sum of p * (-d) alone loses a small divergence to
    rounding and can come out negative.

    Args:
      student_logp: normalised log-probabilities log q; -inf allowed.
      teacher_logp: normalised log-probabilities log p; -inf allowed (p = 0).

    Returns:
      Nats per position, >= 0; inf where q = 0 and p > 0.

    Source: Kullback and Leibler, 1951, On Information and Sufficiency, eq. 2.4.
    """
    student_logp = jnp.asarray(student_logp, jnp.float32)
    teacher_logp = jnp.asarray(teacher_logp, jnp.float32)
    p = jnp.exp(teacher_logp)
    # Below the smallest normal number p * expm1(d) could be 0 * inf.
    possible = p >= jnp.finfo(jnp.float32).tiny
    d = jnp.where(possible, student_logp - teacher_logp, 0.0)
    terms = jnp.where(possible, p * (jnp.expm1(d) - d), jnp.exp(student_logp))
    return terms.sum(-1)


def reverse_kl(
    student_logp: Float[Array, "... E"], teacher_logp: Float[Array, "... E"]
) -> Float[Array, "..."]:
    """Return KL(student || teacher) = sum_e q_e (log q_e - log p_e), in float32.

    Args and Returns as `forward_kl`; inf where p = 0 and q > 0.

    Source: Gu et al., 2023, MiniLLM, arXiv 2306.08543, eq. 1.
    """
    return forward_kl(teacher_logp, student_logp)


def tvd(
    student_logp: Float[Array, "... E"], teacher_logp: Float[Array, "... E"]
) -> Float[Array, "..."]:
    """Return the total variation distance 0.5 * sum_e |p_e - q_e|, in float32.

    Args as `forward_kl`. Returns a number in [0, 1] per position.

    Source: Wen et al., 2023, f-divergence minimization, arXiv 2307.15190, section 3.
    """
    q = jnp.exp(jnp.asarray(student_logp, jnp.float32))
    p = jnp.exp(jnp.asarray(teacher_logp, jnp.float32))
    return 0.5 * jnp.abs(p - q).sum(-1)


DIVERGENCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "tvd": tvd,
}
