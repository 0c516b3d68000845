"""Divergences between two distributions over the last axis, in nats, per position.

Shapes: `...` any leading axes, E events (the vocabulary, or k stored ids and a tail).
"""

import dataclasses
import math
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


def jsd(
    student_logp: Float[Array, "... E"],
    teacher_logp: Float[Array, "... E"],
    *,
    beta: float = 0.5,
    rescale: bool = True,
) -> Float[Array, "..."]:
    """Return the generalised Jensen-Shannon divergence, in float32.

      M = beta P + (1 - beta) Q          (P teacher, Q student)
      jsd = beta KL(P || M) + (1 - beta) KL(Q || M)

    divided, with `rescale`, by beta (1 - beta). The sum alone goes to 0 at both ends,
    where the source puts the forward (0) and the reverse KL (1): a jump. Divided it
    goes to those very KLs and is continuous; at beta = 0.5 it is 4 times the sum.

    Args:
      student_logp: as in `forward_kl`.
      teacher_logp: as in `forward_kl`.
      beta: in [0, 1]; 0 is the forward and 1 the reverse KL, rescaled or not.
      rescale: divide, so that the weight of the term means the same for every beta.

    Returns:
      Nats per position, >= 0; finite for 0 < beta < 1.

    Source: Agarwal et al., 2023, GKD, arXiv 2306.13649, eq. 1.
    """
    if beta == 0.0:
        return forward_kl(student_logp, teacher_logp)
    if beta == 1.0:
        return reverse_kl(student_logp, teacher_logp)
    mixture = _mixture(student_logp, teacher_logp, beta)
    forward = forward_kl(mixture, teacher_logp)
    reverse = forward_kl(mixture, student_logp)
    if rescale:
        return forward / (1 - beta) + reverse / beta
    return beta * forward + (1 - beta) * reverse


def skew_forward_kl(
    student_logp: Float[Array, "... E"],
    teacher_logp: Float[Array, "... E"],
    *,
    alpha: float = 0.1,
) -> Float[Array, "..."]:
    """Return KL(P || alpha P + (1 - alpha) Q), P teacher, Q student, in float32.

    Its gradient stays bounded where the student has hardly any probability.

    Args:
      student_logp: as in `forward_kl`.
      teacher_logp: as in `forward_kl`.
      alpha: in [0, 1); 0 is the forward KL.

    Source: Ko et al., 2024, DistiLLM, arXiv 2402.03898, section 3.1.
    """
    return forward_kl(_mixture(student_logp, teacher_logp, alpha), teacher_logp)


def skew_reverse_kl(
    student_logp: Float[Array, "... E"],
    teacher_logp: Float[Array, "... E"],
    *,
    alpha: float = 0.1,
) -> Float[Array, "..."]:
    """Return KL(Q || alpha Q + (1 - alpha) P), P teacher, Q student, in float32.

    Args and Source as `skew_forward_kl`; alpha = 0 is the reverse KL.
    """
    return forward_kl(_mixture(teacher_logp, student_logp, alpha), student_logp)


def _mixture(logp: jax.Array, other_logp: jax.Array, share: float) -> jax.Array:
    """Return log((1 - share) p + share p_other); where both are 0 it is -inf."""
    logp = jnp.asarray(logp, jnp.float32)
    other_logp = jnp.asarray(other_logp, jnp.float32)
    if share == 0.0:
        return logp
    # The gradient of logaddexp is NaN where both are -inf.
    neither = jnp.isneginf(logp) & jnp.isneginf(other_logp)
    mixed = jnp.logaddexp(
        jnp.where(neither, 0.0, logp) + math.log1p(-share),
        jnp.where(neither, 0.0, other_logp) + math.log(share),
    )
    return jnp.where(neither, -jnp.inf, mixed)


DIVERGENCES: dict[str, Callable[..., jax.Array]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """One of DIVERGENCES with its parameter, callable like it and hashable.

    Raises:
      ValueError: an unknown name, or a parameter out of range.
    """

    name: str = "forward_kl"
    alpha: float = 0.1  # of the skewed ones, in [0, 1)
    beta: float = 0.5  # of jsd, in [0, 1]

    def __post_init__(self) -> None:
        """Check."""
        if self.name not in DIVERGENCES:
            raise ValueError(
                f"divergence={self.name!r} is unknown: use one of {list(DIVERGENCES)}"
            )
        if not 0 <= self.alpha < 1 or not 0 <= self.beta <= 1:
            raise ValueError(
                f"alpha={self.alpha} must lie in [0, 1) and beta={self.beta} in [0, 1]"
            )

    def __call__(self, student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
        """Return the divergence of each position, nats (tvd: a share)."""
        parameters = {
            "jsd": {"beta": self.beta},
            "skew_forward_kl": {"alpha": self.alpha},
            "skew_reverse_kl": {"alpha": self.alpha},
        }.get(self.name, {})
        return DIVERGENCES[self.name](student_logp, teacher_logp, **parameters)

    @property
    def is_reverse(self) -> bool:
        """True if infinite where the teacher alone has no probability."""
        return (
            self.name == "reverse_kl"
            or (self.name == "jsd" and self.beta == 1.0)
            or (self.name == "skew_reverse_kl" and self.alpha == 0.0)
        )
