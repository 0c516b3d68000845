"""Divergences from a teacher of which few ids per token are stored.

For the top k the events are the k stored ids and, with some tails, all other ids
together: `teacher_events` has the teacher's side, `stored_events` the summand of the
stored ids, and the divergence of the rest is added to it. `sampled_forward_kl` is for
draws.

Shapes: N tokens, K stored pairs. An unused slot has log-probability -inf on both sides.

What stands for the ids outside the top k is the tail policy:
  bucket               one event more, with the mass that is left on each side: a
                       divergence, never above that over the whole vocabulary
  renormalize_teacher  the teacher's stored probabilities divided by their sum, against
                       the student's whole softmax
  renormalize_both     both conditioned on the stored ids; ids outside get no gradient
  drop                 the stored terms of the forward KL only: not a divergence, can be
                       negative (>= P log P for a stored mass P)

Source: bucket: Anshumann et al., 2025, Sparse Logit Sampling, arXiv 2503.16870, section
3 ("ghost token").
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kdjax.losses.divergence import Divergence

TAILS = ("bucket", "renormalize_teacher", "renormalize_both", "drop")
TAILS_WITH_BUCKET = (
    "bucket",
    "renormalize_teacher",
)  # those with an event for the other ids
FORWARD_KL = Divergence()
_LEAST_TAIL = 2.0**-24  # half the distance of 1 to the next smaller float32


def teacher_at_temperature(
    log_probs_NK: Float[Array, "N K"], log_z_N: Float[Array, "N"], temperature: float
) -> Float[Array, "N K"]:
    """Return the teacher's stored log-probabilities at `temperature`.

    log p_T = log p / T - log Z_T, exact for any k since log Z_T = log sum_v p_v^(1/T)
    was taken over the whole vocabulary.

    Args:
      log_probs_NK: log p at temperature 1; -inf in unused slots.
      log_z_N: log Z at this very temperature, nats; 0 at temperature 1.
      temperature: T > 0.

    Returns:
      log p_T, float32, same shape, nats.
    """
    return log_probs_NK.astype(jnp.float32) / temperature - log_z_N[:, None]


def teacher_events(
    stored_logp_NK: Float[Array, "N K"], has_rest_N: Bool[Array, "N"], *, tail: str
) -> tuple[Float[Array, "N K"], Float[Array, "N"]]:
    """Return log p of the stored ids and of the rest, as the tail policy has them.

    The mass of a bucket is max(2^-24, 1 - sum of the stored probabilities), and 0 where
    the student has no id left (k = V), so that k = V is the dense divergence. No
    gradient flows to the teacher.

    Args:
      stored_logp_NK: log p of the stored ids, temperature applied.
      has_rest_N: whether the student has ids outside them.
      tail: one of TAILS; only those of TAILS_WITH_BUCKET have an event for the rest.
    """
    teacher = jax.lax.stop_gradient(stored_logp_NK.astype(jnp.float32))
    if tail != "bucket":
        if tail != "drop":
            teacher = _renormalize(teacher)
        return teacher, jnp.full_like(teacher[:, 0], -jnp.inf)
    # Below the rounding of 1 - sum nothing is known of the tail but that it is
    # there: 0 would make divergences infinite that are not.
    mass_N = jnp.maximum(_LEAST_TAIL, 1.0 - jnp.exp(teacher).sum(-1))
    return teacher, jnp.where(has_rest_N, jnp.log(mass_N), -jnp.inf)


def stored_events(
    student_NK: Float[Array, "N K"],
    teacher_NK: Float[Array, "N K"],
    *,
    divergence: Divergence,
    tail: str,
) -> Float[Array, "N"]:
    """Return the summand of a divergence that comes from these stored ids.

    Divergences are sums over events: those of several disjoint sets of ids add.
    """
    if tail == "drop":
        p = jnp.exp(teacher_NK)
        return (p * jnp.where(p > 0, teacher_NK - student_NK, 0.0)).sum(-1)
    return divergence(student_NK, teacher_NK)


def sampled_forward_kl(
    student_logp_NK: Float[Array, "N K"],
    log_shares_NK: Float[Array, "N K"],
    entropy_N: Float[Array, "N"] | float,
) -> Float[Array, "N"]:
    """Return the forward KL estimated from draws of the teacher's distribution.

    kl = -H - sum_v w_v log q_v, w_v the share of the draws that gave v: E[w] = p, so
    that value and gradient are those of the whole vocabulary in expectation. The value
    of a token may be negative; a truncated teacher's would be too small on average.

    Args:
      student_logp_NK: log q of the drawn ids under the student's whole softmax, at the
        temperature of the draws.
      log_shares_NK: log w; -inf in unused slots. The shares of a token sum to 1.
      entropy_N: the teacher's exact entropy at that temperature, nats.

    Returns:
      Nats per token, float32.

    Source: Anshumann et al., 2025, Sparse Logit Sampling, arXiv 2503.16870, section 3.
    """
    shares = jax.lax.stop_gradient(jnp.exp(log_shares_NK.astype(jnp.float32)))
    student = jnp.where(shares > 0, student_logp_NK.astype(jnp.float32), 0.0)
    return -(shares * student).sum(-1) - entropy_N


def check_tail(tail: str, divergence: Divergence = FORWARD_KL) -> None:
    """Raise ValueError unless `tail` is a policy that `divergence` can have."""
    if tail not in TAILS:
        raise ValueError(f"tail={tail!r} is not a tail policy: use one of {TAILS}")
    if tail == "drop" and divergence.name != "forward_kl":
        raise ValueError(
            f"tail='drop' with divergence={divergence.name!r}: it is made for "
            "'forward_kl' alone; use 'bucket'"
        )
    if tail == "renormalize_teacher" and divergence.is_reverse:
        raise ValueError(
            f"tail='renormalize_teacher' with divergence={divergence.name!r} is "
            "infinite, the teacher having no probability outside its stored ids: use "
            "'bucket' or 'renormalize_both'"
        )


def _renormalize(logp_NK: jax.Array) -> jax.Array:
    """Return rows divided by their sum; a row without mass stays so (and NaN-free)."""
    empty = jnp.all(logp_NK == -jnp.inf, axis=-1, keepdims=True)
    total = jax.nn.logsumexp(jnp.where(empty, 0.0, logp_NK), axis=-1, keepdims=True)
    return logp_NK - total
